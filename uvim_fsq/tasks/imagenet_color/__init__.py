"""Colorization: ImageNet and any folder of photos."""
