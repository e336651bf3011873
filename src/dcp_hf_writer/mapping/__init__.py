"""What the user declares of a model, and how its tensors become those of a HuggingFace model."""
