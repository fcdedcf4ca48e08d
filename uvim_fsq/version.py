"""The version of the package, named by every result."""

__version__ = "0.1.0"
