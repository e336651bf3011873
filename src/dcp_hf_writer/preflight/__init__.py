"""Checks and explanations before bytes move: options, rank facts, ties, dry runs.

Modules here write nothing.
"""
