"""Weight sync: stream a sharded model as HuggingFace tensors, bucket by bucket.

Modules here do not touch storage.
"""
