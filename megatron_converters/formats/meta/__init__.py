"""Llama checkpoints as published by Meta: source."""
