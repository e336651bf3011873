"""What the user declares: specs, export options, tied names, specs derived from a function.

Pure: modules here open no file and start no process.
"""
