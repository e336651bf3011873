"""Specs and options asked of libraries that define or train models.

A library is imported only when it is asked for.
"""
