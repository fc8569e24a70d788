"""Megatron-LM checkpoints of the `torch` and the `torch_dist` format: sources and targets."""
