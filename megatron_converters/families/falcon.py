"""Falcon 7B, 40B, 180B and 11B (transformers FalconForCausalLM).

Queries, keys and values of a group lie together, as in Megatron-LM. Attention and MLP are parallel: on one norm in the first
architecture (7B) and in 11B, each on a norm of its own in the others of the second. Falcon-RW has ALiBi. Names and defaults:
transformers 5.23, models/falcon.
"""

from __future__ import annotations

from ..model.layers import LAYER_NORM
from .defaults import Product, Quotient
from .entries import implied, linear, tensor
from .llama import SIZES_ALONE
from .rules import Fixed, Named, Passed, Restated, Row, overridden
from .rules_attention import Rope
from .rules_falcon import FalconBlocks
from .table import Family, Proof
from .ungated import GELUS

_BLOCK = "transformer.h.{layer}."
_FFN = Row("ffn_hidden_size", "ffn_hidden_size", Product(4, "hidden_size"))
_TIED = Row("tied", "tie_word_embeddings", True)

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
        **{
            **linear("qkv", _BLOCK + "self_attention.query_key_value"),
            **linear("proj", _BLOCK + "self_attention.dense"),
        },
        **{**linear("fc1", _BLOCK + "mlp.dense_h_to_4h"), **linear("fc2", _BLOCK + "mlp.dense_4h_to_h")},
        **linear("final_norm", "transformer.ln_f"),
        **tensor("output_layer", "lm_head.weight"),
    },
    variants=(
        ("parallel_norms", True, {**linear("input_norm", _BLOCK + "ln_attn"), **linear("mlp_norm", _BLOCK + "ln_mlp")}),
    ),
    rules=(
        *overridden(SIZES_ALONE, (_FFN, Row("norm_epsilon", "layer_norm_epsilon", 1e-5), _TIED)),
        *(FalconBlocks(), Rope()),
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
        *(Restated("apply_residual_connection_post_layernorm", False), Restated("ff_factor", 4)),
        Passed(("hidden_dropout",)),
    ),
)
