"""Conversion and comparison of stored checkpoints, tensor by tensor, with bounded memory.

The modules here run in one process and start no collective.
"""
