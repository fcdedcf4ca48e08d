"""Backbones of the oracle."""
