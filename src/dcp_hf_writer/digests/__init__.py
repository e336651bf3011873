"""Digests of stored bytes: which bytes each digest covers, and how to recompute it from files.

The modules here write nothing.
"""
