"""Models with multi-latent attention, besides DeepSeek's."""

from __future__ import annotations

from ..hf_kinds import KINDS
from .model import WITH_EXPERTS, Model

_DEEPSEEK = {key: value for key, value in KINDS["deepseek-v3"].items() if key != "first_k_dense_replace"}
MODELS = {
    "glm4-moe-lite": Model(
        _DEEPSEEK
        | dict(model_type="glm4_moe_lite", v_head_dim=20, mlp_layer_types=["dense", "dense", "sparse", "sparse"])
        | dict(routed_scaling_factor=1.7),
        cut=WITH_EXPERTS,
    )
}
