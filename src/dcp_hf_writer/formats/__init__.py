"""Bytes to values and back: headers, archives, DCP metadata, JSON, quantised forms.

Pure: never opens a file, and trusts nothing that it parses.
"""
