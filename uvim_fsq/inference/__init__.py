"""Predictions from trained models, for batches, single images and folders."""
