"""Phi-1, Phi-1.5 and Phi-2 (transformers PhiForCausalLM), and Phi-3, Phi-3.5 and Phi-4 (Phi3ForCausalLM).

Phi computes attention and MLP in parallel on one norm, and has a bias in its head, which Megatron-LM has not. Phi-3 is a Llama with
fused qkv and gate_up. The heads of both rotate in part. Names and defaults: transformers 5.23, models/phi and models/phi3.
LongRoPE, which long-context variants of Phi-3 have, cannot be expressed: Megatron-LM has none.
"""

from __future__ import annotations

from ..model.layers import LAYER_NORM
from ..model.layouts import GATED, GROUPED_QKV, joined
from .entries import implied, linear, tensor
from .llama import ATTENTION, DENSE, DERIVED_HEAD_DIM, LAYER, MLP, SIZES, query_groups
from .rules import Fixed, Named, Passed, Row, overridden
from .rules_attention import LINEAR, LLAMA3, LONGROPE, Rope, Window
from .table import Family, Proof
from .ungated import GELUS, QKV

PHI = Family(
    name="phi",
    model_type="phi",
    architecture="PhiForCausalLM",
    proof=Proof.LOGITS,
    models="Phi-1, 1.5, 2",
    covers=(
        "live, through AutoBridge; files with `--allow-inexpressible`, since the head has a bias, which Megatron-LM's has not"
    ),
    tensors={
        **tensor("word_embeddings", "model.embed_tokens.weight"),
        **linear("input_norm", LAYER + "input_layernorm"),
        **QKV,
        **linear("proj", ATTENTION + "dense"),
        **linear("fc1", MLP + "fc1"),
        **linear("fc2", MLP + "fc2"),
        **linear("final_norm", "model.final_layernorm"),
        **linear("output_layer", "lm_head"),
    },
    rules=(
        *overridden(
            SIZES,
            (
                Row("norm_epsilon", "layer_norm_eps", 1e-5),
                Named("activation", "hidden_act", GELUS, "gelu_new"),
            ),
        ),
        query_groups(),
        DERIVED_HEAD_DIM,
        Rope(partial=0.5),
        Row("max_position_embeddings", "max_position_embeddings", 2048),
        *implied(parallel_block=True, head_bias=True, normalization=LAYER_NORM, gated=False),
        *implied(qkv_bias=True, proj_bias=True, mlp_bias=True),
        Fixed("qk_layernorm", False),
        Passed(("resid_pdrop", "embd_pdrop")),  # dropout outside attention
    ),
)

PHI3 = Family(
    name="phi3",
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    since="0.8",
    proof=Proof.LOGITS,
    models="Phi-3, Phi-4",
    covers="fused `qkv_proj` and `gate_up_proj`, partly rotated heads; LongRoPE is refused",
    tensors={
        **DENSE,
        **tensor("qkv", ATTENTION + "qkv_proj.weight", layout=joined(GROUPED_QKV)),
        **tensor("fc1", MLP + "gate_up_proj.weight", layout=joined(GATED)),
    },
    rules=(
        *SIZES,
        query_groups(),
        DERIVED_HEAD_DIM,
        Rope(partial=1.0, scalings=(LINEAR, LLAMA3, LONGROPE), original=4096),
        Window(default=None),
        Row("norm_epsilon", "rms_norm_eps", 1e-5),
        Row("max_position_embeddings", "max_position_embeddings", 4096),
        Passed(("resid_pdrop", "embd_pdrop")),  # dropout outside attention
    ),
)
