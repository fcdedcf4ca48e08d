"""Import of published UViM checkpoints."""
