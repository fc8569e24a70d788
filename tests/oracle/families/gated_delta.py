"""Models with gated DeltaNet, besides Qwen3-Next."""

from __future__ import annotations

from ..hf_kinds import KINDS
from .model import CUT, ENGINE, WITH_EXPERTS, Model

_MIXTURE = {key: value for key, value in KINDS["qwen3-next"].items() if key != "norm_topk_prob"}
_OF_EXPERTS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size")
_DENSE = {key: value for key, value in _MIXTURE.items() if key not in _OF_EXPERTS}
MODELS = {
    "qwen3.5": Model(_DENSE | dict(model_type="qwen3_5_text", tie_word_embeddings=True), whole=ENGINE, cut=CUT),
    "qwen3.5-moe": Model(_MIXTURE | dict(model_type="qwen3_5_moe_text"), whole=ENGINE, cut=WITH_EXPERTS),
}
