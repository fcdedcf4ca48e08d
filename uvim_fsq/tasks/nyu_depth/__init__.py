"""Monocular depth: NYU Depth v2 and your own depth maps."""
