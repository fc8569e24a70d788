"""Live models of megatron-core: what builds them from a model description, on a GPU or a CPU."""
