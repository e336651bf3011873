"""Whether a checkpoint is what it says it is, and `materialize`.

Modules here start no collective: one process looks at storage.
"""
