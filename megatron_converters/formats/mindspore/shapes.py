"""What names and shapes of MindSpore's weights tell of a model: all sizes but the number of heads, and all switches."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ...basics.errors import ConversionError
from ...model.layers import EACH_HEAD, GELU_TANH, LAYER_NORM, RMS_NORM, SILU
from ...model.spec import PerLayer

Shape = tuple[int, ...]
_LAYER = re.compile(r"(?:decoder|model)\.layers\.(\d+)\.(.+)")
_MTP = re.compile(r"mtp\.layers\.(\d+)\.(.+)")
_EMBEDDINGS = ("embedding.word_embeddings.weight", "model.tok_embeddings.embedding_weight")
_HEADS = ("output_layer.weight", "lm_head.weight")


@dataclass(frozen=True)
class Shapes:
    """Shapes by name; names are without a prefix, and those of joined latents taken apart."""

    shapes: Mapping[str, Shape]

    @cached_property
    def layers(self) -> tuple[Mapping[str, Shape], ...]:
        """Shapes of each layer's tensors, by name within the layer; raises `ConversionError` where a layer is missing."""
        found: dict[int, dict[str, Shape]] = {}
        for name, shape in self.shapes.items():
            if match := _LAYER.fullmatch(name):
                found.setdefault(int(match[1]), {})[match[2]] = shape
        missing = sorted({*range(max(found, default=0) + 1)} - found.keys())
        if missing:
            raise ConversionError(
                f"there are weights of layer {max(found, default=0)} and none of layer {missing[0]}; copy the weights again"
            )
        return tuple(found[number] for number in sorted(found))

    @property
    def is_legacy(self) -> bool:
        """Whether names are those of the older Llama classes."""
        return _EMBEDDINGS[1] in self.shapes

    @property
    def is_latent(self) -> bool:
        """Whether attention is multi-latent."""
        return self.first("self_attention.linear_kv_down_proj.weight") is not None

    @property
    def is_moe(self) -> bool:
        """Whether any layer has experts."""
        return self.first("mlp.router.weight") is not None

    @property
    def is_layer_norm(self) -> bool:
        """Whether norms have a bias."""
        return any(name.endswith(".gamma") for name in self.shapes)

    def first(self, *names: str) -> Shape | None:
        """Shape of a tensor by one of these names, in the first layer that has one."""
        return next((layer[name] for layer in self.layers for name in names if name in layer), None)

    def has(self, *names: str) -> bool:
        """Whether any layer has a tensor of one of these names."""
        return self.first(*names) is not None

    @property
    def embeddings(self) -> Shape:
        """Shape of the embeddings: rows of the vocabulary, with padding if there is any, and the hidden size."""
        found = next((self.shapes[name] for name in _EMBEDDINGS if name in self.shapes), None)
        if found is None or len(found) != 2:
            raise ConversionError(f"there is no matrix {' or '.join(_EMBEDDINGS)}, without which it is no whole model")
        return found

    def sizes(self) -> dict[str, int]:
        """Sizes by the names of properties."""
        second = self.first("mlp.linear_fc2.weight", "feed_forward.w2.weight")
        experts, router = self.first("mlp.experts.weight2"), self.first("mlp.router.weight")
        shared = self.first("mlp.shared_experts.linear_fc2.weight")
        size = None if experts is None or router is None else experts[-2] // (1 if len(experts) == 3 else router[0])
        found = {
            "num_layers": len(self.layers),
            "hidden_size": self.embeddings[1],
            "ffn_hidden_size": None if second is None else second[1],
            "num_experts": None if router is None else router[0],
            "moe_ffn_hidden_size": size,
            "shared_ffn_hidden_size": None if shared is None else shared[1],
            "mtp_num_layers": len({match[1] for name in self.shapes if (match := _MTP.fullmatch(name))}) or None,
        }
        return {name: value for name, value in found.items() if value is not None}

    def switches(self) -> dict[str, Any]:
        """Switches by the names of properties."""
        second = self.first("mlp.linear_fc2.weight")
        first = self.first("mlp.linear_fc1.weight")
        gated = first is None or second is None or first[0] == 2 * second[1]
        feeds = ["moe" if "mlp.router.weight" in layer else "mlp" for layer in self.layers]
        found = {
            "normalization": LAYER_NORM if self.is_layer_norm else RMS_NORM,
            "gated": gated,
            "activation": SILU if gated else GELU_TANH,
            "tied": not any(name in self.shapes for name in _HEADS),
            "learned_positions": "embedding.position_embeddings.weight" in self.shapes,
            "rope": "embedding.position_embeddings.weight" not in self.shapes,
            "mlp_bias": self.has("mlp.linear_fc2.bias", "feed_forward.w2.bias"),
            "proj_bias": self.has("self_attention.linear_proj.bias", "attention.wo.bias"),
        }
        if not self.is_latent:
            biases = ("self_attention.linear_qkv.bias", "attention.wq.bias", "attention.w_qkv.bias")
            found["qkv_bias"] = self.has(*biases)
            found["qk_norm"] = EACH_HEAD if self._head_norm is not None else ""
        if self.is_moe:
            found["feed"] = feeds[0] if len({*feeds}) == 1 else PerLayer(feeds)
            found["shared_gate"] = self.has("mlp.shared_experts.shared_experts_gate.weight")
            found["moe_router_enable_expert_bias"] = self.has("mlp.router.expert_bias", "mlp.expert_bias")
        return found

    @property
    def _head_norm(self) -> Shape | None:
        return self.first("self_attention.q_layernorm.weight", "self_attention.q_layernorm.gamma")

    @property
    def head_dim(self) -> int | None:
        """Size of a head, where a norm of queries tells."""
        return None if self._head_norm is None else self._head_norm[0]

    @property
    def query_rows(self) -> int | None:
        """Rows of all query heads together."""
        shape = self.first("self_attention.linear_proj.weight", "attention.wo.weight")
        return None if shape is None else shape[-1]

    @property
    def key_rows(self) -> int | None:
        """Rows of all key heads together."""
        alone = self.first("attention.wk.weight")
        if alone is not None:
            return alone[0]
        joined, queries = self.first("self_attention.linear_qkv.weight", "attention.w_qkv.weight"), self.query_rows
        return None if joined is None or queries is None else (joined[0] - queries) // 2
