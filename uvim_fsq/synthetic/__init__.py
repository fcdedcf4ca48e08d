"""Synthetic rooms with exact depth and segments, written in the formats of the supported data sets."""
