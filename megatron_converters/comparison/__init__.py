"""Comparison of two models, or of an output with the manifest of its conversion."""
