"""Tensor files: safetensors, torch's zip and DCP folders. Reading maps them; writing lays them out, then fills them in place."""
