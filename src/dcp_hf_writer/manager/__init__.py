"""The life of a run: when to save, which steps to keep, how to resume, what to do on failure.

Modules here reach the storage of a run through `run_storage` (`remote_run` to list any URL) alone,
and decide in pure functions.
"""
