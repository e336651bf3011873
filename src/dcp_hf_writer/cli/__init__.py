"""The command `dcp-hf`: list, inspect, compare, verify, convert and clean up checkpoints.

The modules here show what the folders above compute; they decide nothing about a checkpoint.
"""
