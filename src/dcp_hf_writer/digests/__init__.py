"""Digests of stored bytes: what each one covers, and computing them anew from files.

Modules here write nothing.
"""
