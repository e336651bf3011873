"""Index arithmetic on tensors: boxes, strided copies, shards, dtypes.

Pure: no I/O, no processes, no files.
"""
