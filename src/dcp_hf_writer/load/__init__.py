"""Planned reads from either half of a checkpoint into tensors.

Modules here write no file, and trust none that they read.
"""
