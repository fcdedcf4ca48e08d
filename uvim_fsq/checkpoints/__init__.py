"""Checkpoints and run directories: reading, writing and loading them."""
