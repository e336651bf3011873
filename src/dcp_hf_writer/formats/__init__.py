"""Bytes to values and back: headers, archives, DCP metadata, JSON, quantised forms.

Pure: modules here are given bytes, open no file, and trust nothing that they parse.
"""
