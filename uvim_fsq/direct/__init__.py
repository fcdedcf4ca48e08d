"""The direct baseline: an image encoder with a label head, without tokens."""
