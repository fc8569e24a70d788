"""Comparison of logits: models are built and run on a CPU, which proves that two checkpoints are the same model.

The rest of this library moves bytes and builds no model; here transformers and megatron-core check what it moved.
"""

from .compare import LogitsReport, compare_logits, logits_of

__all__ = ["LogitsReport", "compare_logits", "logits_of"]
