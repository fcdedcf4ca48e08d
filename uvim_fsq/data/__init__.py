"""Joint image/label transforms, collation, loaders and synthetic scenes. Knows nothing of models."""
