"""The version of the package. Every result records it."""

__version__ = "0.1.0"
