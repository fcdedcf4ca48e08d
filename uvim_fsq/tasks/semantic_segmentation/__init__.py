"""Semantic segmentation: your own folders of photos and class PNGs, with a file that names the classes."""
