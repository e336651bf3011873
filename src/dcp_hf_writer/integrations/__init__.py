"""Derive specs and export options from libraries that define models; save for trainers.

A function that needs a library imports it when it is called; only `trainer` needs its own at once.
"""
