"""Evaluation of trained models on a data split."""
