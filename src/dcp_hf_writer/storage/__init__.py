"""Effects on storage: output and input files, one module a backend, and write slots.

Decides nothing about what is written where.
"""
