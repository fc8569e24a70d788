"""Files that hold tensors: safetensors and torch's zip. Reading maps them; writing lays them out first and fills them in place."""
