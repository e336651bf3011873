"""Storage backends: where the bytes of a checkpoint go."""
