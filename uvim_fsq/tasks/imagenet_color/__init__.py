"""Colorization of ImageNet and any folder of photos."""
