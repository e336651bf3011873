"""Index arithmetic on tensors: boxes, strided copies, shards, dtypes.

Pure: modules here open no file and start no process.
"""
