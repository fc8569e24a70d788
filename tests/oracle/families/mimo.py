"""Models of MiMo: Qwen2's tensors, and those of a layer of multi-token prediction, which does not change the logits."""

from __future__ import annotations

import torch

from .llama_variants import LLAMA
from .model import Config, Model, Tensors


def _publish(tensors: Tensors, config: Config) -> tuple[Tensors, Config]:
    own, size = "model.layers.0.", config["hidden_size"]
    shapes = {
        **{name.removeprefix(own): tensor.shape for name, tensor in tensors.items() if name.startswith(own)},
        **dict.fromkeys((f"{norm}_layernorm.weight" for norm in ("token", "hidden", "final")), (size,)),
        "input_proj.weight": (size, 2 * size),
    }
    generator = torch.Generator().manual_seed(1)
    layer = {f"model.mtp_layers.0.{name}": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    published = {"architectures": ["MiMoForCausalLM"], "model_type": "mimo", "attention_bias": True}
    return {**tensors, **layer}, {**config, **published, "num_nextn_predict_layers": 1}


_QWEN2 = {name: value for name, value in LLAMA.items() if name != "head_dim"} | dict(model_type="qwen2")
#: Release whose names of the layer megatron-core 0.16.1 has.
_RELEASE = {"megatron_version": "0.16.1"}
MODELS = {
    "mimo": Model(
        _QWEN2,
        _publish,
        whole={"impl": "local", **_RELEASE},
        cut={"tp": 2, "pp": 2, "impl": "transformer_engine", **_RELEASE},
    )
}
