"""Uploads of trained runs: what is uploaded, its model card, and the upload itself."""
