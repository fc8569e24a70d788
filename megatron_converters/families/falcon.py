"""Falcon 7B, 40B, 180B and 11B (transformers FalconForCausalLM).

Queries, keys and values of a group lie together, as in Megatron-LM. Attention and MLP are parallel: on one norm in the first
architecture (7B) and in 11B, each on a norm of its own in the others of the second. Falcon-RW has ALiBi. Names and defaults:
transformers 5.23, models/falcon.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..basics.errors import ConversionError
from ..model.layers import LAYER_NORM
from ..model.spec import ModelSpec
from .defaults import Product, Quotient
from .entries import implied, linear, tensor
from .llama import SIZES_ALONE
from .rules import Config, Fixed, Named, Passed, Restated, Row, overridden
from .rules_attention import Rope
from .table import Family, Proof
from .ungated import GELUS

_BLOCK = "transformer.h.{layer}."
_NEW, _PARALLEL, _NORMS = "new_decoder_architecture", "parallel_attn", "num_ln_in_parallel_attn"


@dataclass(frozen=True)
class FalconBlocks:
    """Query groups, and norms of parallel blocks, by the architecture: the second has any number of groups, and one norm or two.

    The first has one group (`multi_query`) or as many as heads, and one norm.
    """

    keys: tuple[str, ...] = (_NEW, "multi_query", "num_kv_heads", _PARALLEL, _NORMS)

    def read(self, config: Config) -> dict[str, Any]:
        new, shares, parallel = (
            _switch(config, key, default) for key, default in ((_NEW, False), ("multi_query", True), (_PARALLEL, True))
        )
        norms, heads = config.get(_NORMS), config.get("num_attention_heads")
        norms = (2 if new else 1) if norms is None else norms
        if norms not in ((1, 2) if new else (1,)) or not parallel:
            raise ConversionError(
                f"config.json has {_NEW}={new}, {_PARALLEL}={parallel} and {_NORMS}={norms!r}; of Falcons only those of parallel "
                "blocks are converted, on one norm, or with the first on two"
            )
        groups = config.get("num_kv_heads") if new or not shares else 1
        if not (new or shares) and groups not in (None, heads):
            raise ConversionError(f"config.json has num_kv_heads={groups!r}, but neither {_NEW} nor multi_query")
        return {"num_query_groups": heads if groups is None else groups, "parallel_norms": norms == 2}

    def write(self, spec: ModelSpec) -> dict[str, Any]:
        groups, heads = spec.values.get("num_query_groups"), spec.values.get("num_attention_heads")
        apart = bool(spec.values["parallel_norms"])
        new = apart or groups not in (1, heads)
        written = {_NEW: new, "multi_query": groups == 1 or new, "num_kv_heads": groups, _PARALLEL: True}
        return written | ({_NORMS: 2 if apart else 1} if new else {})


def _switch(config: Config, key: str, default: bool) -> bool:
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise ConversionError(f"config.json has {key}={value!r}; it must be true or false")
    return value


FALCON = Family(
    name="falcon",
    model_type="falcon",
    architecture="FalconForCausalLM",
    since="0.12",
    proof=Proof.LOGITS,
    models="Falcon 7B, 11B, 40B, 180B",
    covers="attention and MLP in parallel, on one norm or two; Falcon-RW, which has ALiBi, is refused",
    layer=_BLOCK,
    tensors={
        **tensor("word_embeddings", "transformer.word_embeddings.weight"),
        **linear("input_norm", _BLOCK + "input_layernorm"),
        **linear("qkv", _BLOCK + "self_attention.query_key_value"),
        **linear("proj", _BLOCK + "self_attention.dense"),
        **linear("fc1", _BLOCK + "mlp.dense_h_to_4h"),
        **linear("fc2", _BLOCK + "mlp.dense_4h_to_h"),
        **linear("final_norm", "transformer.ln_f"),
        **tensor("output_layer", "lm_head.weight"),
    },
    variants=(
        ("parallel_norms", True, {**linear("input_norm", _BLOCK + "ln_attn"), **linear("mlp_norm", _BLOCK + "ln_mlp")}),
    ),
    rules=(
        *overridden(
            SIZES_ALONE,
            (
                Row("ffn_hidden_size", "ffn_hidden_size", Product(4, "hidden_size")),
                Row("norm_epsilon", "layer_norm_epsilon", 1e-5),
                Row("tied", "tie_word_embeddings", True),
            ),
        ),
        FalconBlocks(),
        Rope(),
        Row("max_position_embeddings", "max_position_embeddings", 2048),
        Named("activation", "activation", GELUS, "gelu"),
        *(Row(bias, "bias", False) for bias in ("qkv_bias", "proj_bias", "mlp_bias")),
        *implied(
            normalization=LAYER_NORM,
            parallel_block=True,
            gated=False,
            kv_channels=Quotient("hidden_size", "num_attention_heads"),
        ),
        Fixed("alibi", False, why="Megatron-LM has no ALiBi"),
        Restated("apply_residual_connection_post_layernorm", False),
        Restated("ff_factor", 4),
        Passed(("hidden_dropout",)),
    ),
)
