"""Planned reads from either half of a checkpoint into tensors.

Modules here write no files, and check every file that they read.
"""
