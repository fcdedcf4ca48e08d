"""Figures, panels and HTML reports."""
