"""OPT and Galactica (transformers OPTForCausalLM): learned positions, LayerNorm, biases, and an MLP of ReLU without a gate.

Megatron-LM has no ReLU, so that OPT's weights convert with --allow-inexpressible; Galactica has GELU. The first two rows of the
table of positions are read for no token but padding (`OPTLearnedPositionalEmbedding`, offset). OPT-350M, with norms after its
blocks and projections of its embeddings, has no place there. Names, defaults and the epsilon, which is no key: transformers 5.23,
models/opt.
"""

from __future__ import annotations

from ..model.layers import LAYER_NORM, RELU
from ..model.layouts import AFTER_TWO_ROWS, GROUPED_QKV
from .defaults import Quotient, SameAs
from .entries import implied, linear, tensor
from .llama import SIZES_ALONE
from .rules import Fixed, Named, Passed, Row, overridden
from .table import Family, Proof
from .ungated import GELUS

_LAYER = "model.decoder.layers.{layer}."

OPT = Family(
    name="opt",
    model_type="opt",
    architecture="OPTForCausalLM",
    since="0.8",
    proof=Proof.LOGITS,
    models="OPT, Galactica",
    covers="learned positions, of which two rows are never read; ReLU with `--allow-inexpressible`",
    tensors={
        **tensor("word_embeddings", "model.decoder.embed_tokens.weight"),
        **tensor("position_embeddings", "model.decoder.embed_positions.weight", layout=AFTER_TWO_ROWS),
        **linear("input_norm", _LAYER + "self_attn_layer_norm"),
        **linear("qkv", *(f"{_LAYER}self_attn.{part}_proj" for part in "qkv"), layout=GROUPED_QKV),
        **linear("proj", _LAYER + "self_attn.out_proj"),
        **linear("mlp_norm", _LAYER + "final_layer_norm"),
        **linear("fc1", _LAYER + "fc1"),
        **linear("fc2", _LAYER + "fc2"),
        **linear("final_norm", "model.decoder.final_layer_norm"),
        **tensor("output_layer", "lm_head.weight"),
    },
    rules=overridden(
        SIZES_ALONE,
        (
            Fixed("do_layer_norm_before", True, why="Megatron-LM has no norms after its blocks"),
            Fixed("word_embed_proj_dim", SameAs("hidden_size"), why="Megatron-LM has no projections of embeddings"),
            Fixed("layer_norm_elementwise_affine", True),
            Fixed("_remove_final_layer_norm", False, why="Megatron-LM has a norm before the head"),
            Row("ffn_hidden_size", "ffn_dim", 3072),
            Row("max_position_embeddings", "max_position_embeddings", 2048),
            Row("initializer_range", "init_std", 0.02),
            Row("tied", "tie_word_embeddings", True),
            Named("activation", "activation_function", {"relu": RELU, **GELUS}, "relu"),
            *(Row(name, "enable_bias", True) for name in ("qkv_bias", "proj_bias", "mlp_bias")),
            *implied(
                num_query_groups=SameAs("num_attention_heads"),
                kv_channels=Quotient("hidden_size", "num_attention_heads"),
            ),
            *implied(learned_positions=True, rope=False, normalization=LAYER_NORM, norm_epsilon=1e-5, gated=False),
            Passed(("dropout", "activation_dropout", "layerdrop")),
        ),
    ),
)
