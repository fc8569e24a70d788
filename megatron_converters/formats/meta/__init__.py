"""Meta's own checkpoints of Llama."""
