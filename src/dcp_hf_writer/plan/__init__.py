"""Pure planning of a save: layout, regions, global plan, rank reports, manifest.

Modules here do no I/O and take no process group: gather first, then call them.
"""
