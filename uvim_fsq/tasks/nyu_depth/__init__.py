"""Monocular depth: NYU Depth v2, KITTI and your own depth maps."""
