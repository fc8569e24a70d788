"""Move language-model checkpoints between Hugging Face, Megatron-LM and MindSpore, on a CPU, without building a model."""

__version__ = "0.1.0"
