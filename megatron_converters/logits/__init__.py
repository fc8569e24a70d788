"""Build models on a CPU and compare their logits: the proof that two checkpoints are the same model.

Everything else in this library moves bytes and builds no model; here transformers and megatron-core judge what it moved.
"""

from .compare import LogitsReport, compare_logits, logits_of

__all__ = ["LogitsReport", "compare_logits", "logits_of"]
