"""Bytes to values and back: headers, archives, DCP metadata, JSON, quantised forms.

Pure: the modules here take bytes from the caller, open no file, and trust nothing that they parse.
"""
