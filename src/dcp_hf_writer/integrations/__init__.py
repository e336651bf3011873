"""Derive specs and export options from libraries that define or train models.

A function that needs a library imports it when it is called.
"""
