"""Hugging Face folders: source and target."""
