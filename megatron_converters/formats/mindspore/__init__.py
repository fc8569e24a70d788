"""Weights of MindSpore Transformers (mindformers)."""
