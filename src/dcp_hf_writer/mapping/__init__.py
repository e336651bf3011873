"""What the user declares: specs, export options, tied names, and specs derived from a function.

Pure: no I/O, no processes.
"""
