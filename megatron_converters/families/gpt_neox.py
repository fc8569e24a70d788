"""GPT-NeoX (transformers GPTNeoXForCausalLM) and Persimmon (PersimmonForCausalLM), which has its names of linears.

The query, key and value of a head lie together, as in Megatron-LM, from which both come. GPT-NeoX computes attention and MLP in
parallel, each on a norm of its own, unless config.json says otherwise (RedPajama-INCITE); Persimmon has norms of queries and keys.
Names and defaults: transformers 5.23, models/gpt_neox and models/persimmon.
"""

from __future__ import annotations

from ..model.layers import EACH_HEAD, LAYER_NORM
from .defaults import Quotient, SameAs
from .entries import implied, linear, tensor
from .llama import ATTENTION, MLP, SIZES
from .rules import Biases, Named, Passed, Repeated, Row, overridden
from .rules_attention import Rope
from .table import Family, Proof
from .ungated import ENDS, GELUS, LAYER_NORM_EPSILON, NORMS, RELU2

_NEOX = "gpt_neox.layers.{layer}."
_RULES = (
    *overridden(SIZES, (LAYER_NORM_EPSILON,)),
    *implied(
        num_query_groups=SameAs("num_attention_heads"), kv_channels=Quotient("hidden_size", "num_attention_heads")
    ),
    *implied(normalization=LAYER_NORM, gated=False, mlp_bias=True),
    Passed(
        ("hidden_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob")
    ),  # the latter two in GPT-NeoX-20B's file
)

GPT_NEOX = Family(
    name="gpt_neox",
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    since="0.8",
    proof=Proof.LOGITS,
    models="RedPajama-INCITE, Pythia, GPT-NeoX-20B, Dolly",
    covers="attention and MLP in parallel (all but RedPajama), in a layer of `megatron_layers`",
    tensors={
        **tensor("word_embeddings", "gpt_neox.embed_in.weight"),
        **linear("input_norm", _NEOX + "input_layernorm"),
        **linear("qkv", _NEOX + "attention.query_key_value"),
        **linear("proj", _NEOX + "attention.dense"),
        **linear("mlp_norm", _NEOX + "post_attention_layernorm"),
        **linear("fc1", _NEOX + "mlp.dense_h_to_4h"),
        **linear("fc2", _NEOX + "mlp.dense_4h_to_h"),
        **linear("final_norm", "gpt_neox.final_layer_norm"),
        **tensor("output_layer", "embed_out.weight"),
    },
    rules=overridden(
        _RULES,
        (
            Named("activation", "hidden_act", GELUS, "gelu"),
            Rope(partial=0.25, theta_key="rotary_emb_base", partial_keys=("rotary_pct",)),
            Repeated("rope_theta", "rotary_emb_base", 10000),  # as transformers 4.4x has saved it
            Repeated("partial_rotary_factor", "rotary_pct", 0.25),
            Row("max_position_embeddings", "max_position_embeddings", 2048),
            Biases(attention=True, mlp=True, mlp_key=""),
            *(Row(name, "use_parallel_residual", True) for name in ("parallel_block", "parallel_norms")),
        ),
    ),
    ignored_suffixes=(".attention.bias", ".attention.masked_bias", "rotary_emb.inv_freq"),
    renamed={"lm_head.weight": "embed_out.weight"},
)

PERSIMMON = Family(
    name="persimmon",
    model_type="persimmon",
    architecture="PersimmonForCausalLM",
    since="0.10",
    proof=Proof.LOGITS,
    models="Persimmon-8B",
    covers="LayerNorms of queries and keys, squared ReLU",
    tensors={
        **ENDS,
        **NORMS,
        **linear("qkv", ATTENTION + "query_key_value"),
        **linear("q_norm", ATTENTION + "q_layernorm"),
        **linear("k_norm", ATTENTION + "k_layernorm"),
        **linear("proj", ATTENTION + "dense"),
        **linear("fc1", MLP + "dense_h_to_4h"),
        **linear("fc2", MLP + "dense_4h_to_h"),
        **linear("final_norm", "model.final_layernorm"),
    },
    rules=overridden(
        _RULES,
        (
            RELU2,
            Rope(partial=0.5),
            Row("max_position_embeddings", "max_position_embeddings", 16384),
            Named("qk_norm", "qk_layernorm", {True: EACH_HEAD, False: ""}, True),
            *implied(qkv_bias=True, proj_bias=True),
            Repeated("num_key_value_heads", "num_attention_heads", None),  # in Persimmon-8B's file
        ),
    ),
)
