"""`verify`, which checks a stored checkpoint, and `materialize`, which rewrites one.

The modules here run in one process and start no collective.
"""
