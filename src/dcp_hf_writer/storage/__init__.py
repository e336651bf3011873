"""Files: output and input, one module per backend, and the slots that limit writers.

Modules here do not decide what is written where, and start no collective.
"""
