"""args ↔ spec: every field both ways, what Megatron-LM cannot say, and the flags that it needs."""

from __future__ import annotations

import argparse
import enum
import re
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_converters.basics.dtypes import DType, dtype_named
from megatron_converters.basics.errors import ConversionError
from megatron_converters.formats.megatron.argument import Context, Group
from megatron_converters.formats.megatron.arguments import (
    ARGUMENTS,
    RUN_DEFAULTS,
    inexpressible,
    plain_args,
    router_warnings,
    spec_fields,
    training_args,
    written_args,
)
from megatron_converters.formats.megatron.flags import flag_warnings, flags
from megatron_converters.model.layers import (
    AFTER,
    ALL_HEADS,
    AROUND,
    EACH_HEAD,
    GELU,
    GELU_TANH,
    LAYER_NORM,
    QUICK_GELU,
    RELU,
    SIGMOID,
    SQUARED_RELU,
)
from megatron_converters.model.rotary import RopeScaling
from megatron_converters.model.spec import ModelSpec, PerLayer
from megatron_converters.sharding.ranks import parallel_for
from megatron_converters.sharding.stages import PipelineSplit
from tests.tiny import KINDS, tiny_spec

MOE = {"num_experts": 8, "moe_ffn_hidden_size": 6, "moe_router_topk": 3}
#: YaRN outside multi-latent attention, as args and as a spec have it.
YARN: dict[str, Any] = {
    "position_embedding_type": "yarn",
    "rotary_scaling_factor": 4.0,
    "yarn_original_max_position_embeddings": 64,
}
PLAIN_YARN: dict[str, Any] = dict(kind="yarn", factor=4.0, original_max_position_embeddings=64)
LATENT = {
    **{"kv_lora_rank": 6, "q_lora_rank": 4, "qk_head_dim": 4, "qk_pos_emb_head_dim": 2, "v_head_dim": 6},
    **{"mixer": "latent", "kv_channels": 2, "num_query_groups": 4},
}
SPARSE = {
    **LATENT,
    **{"mixer": "sparse latent", "dsa_indexer_n_heads": 3, "dsa_indexer_head_dim": 4, "dsa_indexer_topk": 8},
    **{"dsa_indexer_rope_interleaved": False, "shared_indexer": False},
}
DELTA = {
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_conv_kernel_dim": 3},
    **{"linear_key_head_dim": 6, "linear_value_head_dim": 10},
    "mixer": PerLayer(["gated delta", "attention"]),
    "attention_output_gate": True,
}
#: Args of sparse attention.
DSA: dict[str, Any] = {
    **{"experimental_attention_variant": "dsa", "multi_latent_attention": True, "dsa_indexer_rope_interleaved": False},
    **{"dsa_indexer_n_heads": 2, "dsa_indexer_head_dim": 64, "dsa_indexer_topk": 8},
}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "sizes": {
        "num_layers": 3,
        "hidden_size": 10,
        "ffn_hidden_size": 6,
        "num_attention_heads": 6,
        "num_query_groups": 3,
        "kv_channels": 12,
        "max_position_embeddings": 77,
    },
    "no groups": {"num_query_groups": 4},
    "one group": {"num_query_groups": 1},
    "epsilon": {"norm_epsilon": 1e-6},
    "base": {"rotary_base": 500000.0},
    "llama3 rope": {"rope_scaling": RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)},
    "llama3.2 rope": {"rope_scaling": RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)},
    "linear rope": {"rope_scaling": RopeScaling("linear", 2.0)},
    "tied": {"tied": True},
    "qkv bias": {"qkv_bias": True},
    "all biases": {"qkv_bias": True, "proj_bias": True, "mlp_bias": True},
    "qk norm": {"qk_norm": EACH_HEAD},
    "window": {"sliding_window": 4096},
    "window of one": {"sliding_window": 1},
    "window on one layer": {"sliding_window": PerLayer([None, 8])},
    "layer norms": {"normalization": LAYER_NORM},
    "norms around 1": {"zero_centred": True},
    "learned positions": {"learned_positions": True, "rope": False, "rotary_base": None},
    "no positions": {"rope": False, "rotary_base": None},
    "rotation on one layer": {"rope": PerLayer([True, False])},
    "part of a head rotated": {"rotary_percent": 0.5},
    "neighbours rotated": {"rotary_interleaved": True},
    "squared relu": {"activation": SQUARED_RELU, "gated": False},
    "gelu": {"activation": GELU, "gated": False},
    "gelu's tanh form": {
        **{"activation": GELU_TANH, "gated": False},
        **{"qkv_bias": True, "proj_bias": True, "mlp_bias": True},
    },
    "sinks": {"sinks": True},
    "quick gelu": {"activation": QUICK_GELU, "glu_linear_offset": 1.0, "activation_func_clamp_value": 7.0},
    "experts with biases": {**MOE, **{"qkv_bias": True, "proj_bias": True, "mlp_bias": True}},
    "latents": LATENT,
    "latents of keys and values alone": {**LATENT, "q_lora_rank": None},
    "latents with YaRN": {
        **LATENT,
        "rope_scaling": RopeScaling(
            "yarn", 40.0, original_max_position_embeddings=4096, mscale=0.7, mscale_all_dim=0.5
        ),
    },
    "sparse attention": SPARSE,
    "sparse attention with neighbours rotated": {**SPARSE, "dsa_indexer_rope_interleaved": True},
    "indexers that layers share": {
        **SPARSE,
        **{"num_layers": 9, "shared_indexer": PerLayer(layer in (3, 4, 5, 7, 8) for layer in range(9))},
    },
    "an indexer that all other layers share": {
        **SPARSE,
        **{"num_layers": 5, "shared_indexer": PerLayer(layer > 0 for layer in range(5))},
    },
    "gated DeltaNet": DELTA,
    "gated DeltaNet in an order of its own": {
        **DELTA,
        "num_layers": 5,
        "mixer": PerLayer(f"{'attention' if layer in (0, 3) else 'gated delta'}" for layer in range(5)),
    },
    "multipliers": {"embedding_multiplier": 12.0, "attention_multiplier": 0.25, "logits_multiplier": 0.125},
    "tokens further on": {"mtp_num_layers": 1},
    "experts chosen by sigmoid": {
        **MOE,
        **{"moe_router_score_function": SIGMOID, "moe_router_enable_expert_bias": True},
        **{"moe_router_topk": 4, "moe_router_num_groups": 4, "moe_router_group_topk": 2},
        "moe_router_topk_scaling_factor": 2.5,
    },
    "training": {"initializer_range": 0.006, "attention_dropout": 0.1},
    "experts": MOE,
    "experts chosen before softmax": {**MOE, "moe_router_pre_softmax": False},
    "experts chosen after softmax": {**MOE, "moe_router_pre_softmax": True, "moe_aux_loss_coeff": 0.01},
    "shared expert": {**MOE, "shared_ffn_hidden_size": 10, "shared_gate": False},
    "gated shared expert": {**MOE, "shared_ffn_hidden_size": 10, "shared_gate": True},
    "parallel blocks": {"parallel_block": True},
    "parallel blocks with norms of their own": {"parallel_block": True, "parallel_norms": True},
    "norms over heads": {**MOE, "qk_norm": ALL_HEADS},
    "norms after blocks": {"block_norms": AFTER, "qk_norm": EACH_HEAD},
    "norms after blocks and over heads": {"block_norms": AFTER, "qk_norm": ALL_HEADS},
    "norms before and after blocks": {"block_norms": AROUND},
    "some layers dense": {**MOE, "num_layers": 5, "feed": PerLayer(["mlp", "moe", "moe", "mlp", "moe"])},
}


def all_args(
    spec: ModelSpec, impl: str = "local", tp: int = 1, pp: int = 1, router: DType | None = None, **split: Any
) -> dict[str, Any]:
    parallel = parallel_for(spec, tp, pp, PipelineSplit(**split))
    return {**RUN_DEFAULTS, **written_args(Context(spec, parallel, "sequential", 128, 128, impl, router=router))}


def layout_args(spec: ModelSpec, pp: int, split: PipelineSplit, tp: int = 1) -> dict[str, Any]:
    """Attributes of how a checkpoint is cut."""
    context = Context(spec, parallel_for(spec, tp, pp, split), "sequential", 256, 64, "local")
    return written_args(context, (Group.LAYOUT,))


def back(args: dict[str, Any], spec: ModelSpec) -> ModelSpec:
    return ModelSpec.of(
        **spec_fields(argparse.Namespace(**args)), family="llama", dtype=spec.dtype, vocab_size=spec.vocab_size
    )


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
def test_a_spec_survives_args(fields: dict[str, Any]) -> None:
    spec = tiny_spec(**fields)
    assert inexpressible(spec) == []
    assert back(all_args(spec), spec) == spec


def test_the_cases_change_every_property() -> None:
    usual = tiny_spec().values
    changed = {
        name
        for fields in CASES.values()
        for name, value in tiny_spec(**fields).values.items()
        if value != usual.get(name)
    }
    decided_elsewhere = {"family", "dtype", "vocab_size"}
    folded_into_weights = {"residual_multiplier"}
    inexpressible_ones = {"causal", "block_experts", "block_expert_size", "router_norm", "head_bias"}
    inexpressible_ones |= {"attn_logit_softcapping", "final_logit_softcapping", "absent_biases", "num_labels"}
    every = {name for spec in KINDS.values() for name in spec.values}
    assert changed == every - decided_elsewhere - folded_into_weights - inexpressible_ones


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("head_bias", {"head_bias": True}),
        ("mlp_activation", {"activation": RELU, "gated": False}),
    ],
)
def test_what_is_built_by_own_classes_survives_args(name: str, fields: dict[str, Any]) -> None:
    spec = tiny_spec(**fields)
    assert (len(inexpressible(spec)), inexpressible(spec, with_own=True)) == (1, [])
    assert back(all_args(spec), spec) == spec
    assert name not in all_args(tiny_spec())


@pytest.mark.parametrize(("labels", "reasons"), [(0, 0), (1, 1), (3, 1)])
def test_heads_survive_args(labels: int, reasons: int) -> None:
    """Without a head, a model is tied to Megatron-LM; a classifier's own head has the place of the output layer."""
    spec = tiny_spec(num_labels=labels, tied=not labels)
    assert len(inexpressible(spec)) == reasons
    assert back(all_args(spec), spec) == spec
    assert "num_labels" not in all_args(tiny_spec())


def test_args_in_megatron_s_words() -> None:
    """Each value as Megatron-LM's `parse_args` and `validate_args` would leave it."""
    args = all_args(
        tiny_spec(rotary_base=500000.0, qkv_bias=True, sliding_window=4096, dtype=dtype_named("bf16")), tp=2, pp=2
    )
    expected = {
        "num_layers": 2,
        "hidden_size": 8,
        "ffn_hidden_size": 4,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "group_query_attention": True,
        "kv_channels": 2,
        "normalization": "RMSNorm",
        "norm_epsilon": 1e-5,
        "layernorm_epsilon": 1e-5,
        "position_embedding_type": "rope",
        "rotary_base": 500000,
        "rotary_percent": 1.0,
        "use_rope_scaling": False,
        "rotary_seq_len_interpolation_factor": None,
        "swiglu": True,
        "untie_embeddings_and_output_weights": True,
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "qk_layernorm": False,
        "window_attn_skip_freq": None,
        "window_size": (4095, 0),  # positions to the left; Hugging Face's window counts the position itself too
        "params_dtype": dtype_named("bf16"),
        "bf16": True,
        "fp16": False,
        "vocab_size": 5,
        "padded_vocab_size": 128,
        "make_vocab_size_divisible_by": 128,
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "world_size": 4,
    }
    assert {name: args[name] for name in expected} == expected
    assert isinstance(args["rotary_base"], int)
    assert "tokenizer_type" not in args  # it would override the user's
    half = all_args(tiny_spec(dtype=dtype_named("fp16")))
    assert (half["bf16"], half["fp16"], half["params_dtype"].name) == (False, True, "float16")


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
def test_args_hold_plain_values_and_dtypes_alone(fields: dict[str, Any]) -> None:
    args = all_args(tiny_spec(**fields))
    assert plain_args(args) == args
    allowed = (bool, int, float, str, type(None), DType)
    others = {name: value for name, value in args.items() if type(value) not in allowed}
    assert others.keys() <= {"window_size", "spec", *PATTERNS}
    assert {*map(type, args.get("spec") or ())} <= {str}
    assert [type(value) for value in args["window_size"] or ()] in ([], [int, int])
    assert all(
        type(value) is list and {*map(type, value)} == {int} for name, value in others.items() if name in PATTERNS
    )


#: Attributes with a value for each layer.
PATTERNS = ("moe_layer_freq", "window_attn_skip_freq", "no_rope_freq", "linear_attention_freq")


class Colour(enum.IntEnum):
    RED = 1


def test_plain_args_leaves_out_what_weights_only_loading_refuses() -> None:
    plain = {"a": [1, (2.0, None)], "b": {"c": [True]}, 3: "x", "d": dtype_named("bf16"), "e": {}}
    other = {"enum": Colour.RED, "list": [1, Colour.RED], "dict": {"x": object()}, "key": {(1,): 2}, "set": {1}}
    assert plain_args({**plain, **other}) == plain  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (
            {"rope_scaling": RopeScaling("llama3", 8.0, 2.0, 4.0, 8192)},
            "2.0, 4.0 and 8192: Megatron-LM has 1.0, 4.0 and 8192",
        ),
        ({"rope_scaling": RopeScaling("llama3", 8.0, 1.0, 8.0, 8192)}, "1.0, 8.0 and 8192"),
        ({"rope_scaling": RopeScaling("llama3", 8.0, 1.0, 4.0, 4096)}, "1.0, 4.0 and 4096"),
        ({"rope_scaling": RopeScaling("linear", 2.5)}, "linear RoPE scaling by 2.5"),
        ({"sliding_window": PerLayer([8, 16])}, r"sliding windows of \[8, 16\] positions"),
        (
            {"sliding_window": PerLayer([8, None]), "mtp_num_layers": 1},
            r"multi-token prediction, whose layers differ in their sliding window .* --window-attn-skip-freq says one",
        ),
        ({"rope": PerLayer([True, False]), "mtp_num_layers": 1}, "in their rotary embeddings .* --no-rope-freq says"),
        ({"rotary_base": PerLayer([1e4, 1e6])}, "a rotary base of its own for some layers"),
        ({"activation": GELU}, "a gated MLP with gelu"),
        ({"gated": False}, "an MLP of silu without a gate"),
        ({"activation": GELU_TANH, "gated": False}, "the tanh form of GELU in an MLP without biases"),
        ({"causal": False}, "attention to later tokens"),
        ({**LATENT, "causal": False}, "attention to later tokens"),
        ({"rope_scaling": RopeScaling("yarn", 4.0), "rotary_percent": 0.5}, "YaRN in heads that rotate in part: its"),
        ({"rope_scaling": RopeScaling("yarn", 4.0), "rotary_interleaved": True}, "YaRN with interleaved rotary"),
        ({"rope_scaling": RopeScaling("yarn", 4.0), "mtp_num_layers": 1}, "prediction, which --without-mtp leaves out"),
        ({"rope_scaling": RopeScaling("yarn", 1.0, attention_factor=2.0)}, "YaRN by 1 with an attention factor, 2:"),
        ({**LATENT, "rope_scaling": RopeScaling("linear", 2.0)}, "linear RoPE scaling by 2 in multi-latent attention"),
        ({**LATENT, "rope_scaling": RopeScaling("llama3", 8.0)}, "llama3 RoPE scaling by 8 in multi-latent attention"),
        (
            {**LATENT, "rope_scaling": RopeScaling("yarn", 4.0, attention_factor=1.5)},
            "attention factor of its own, 1.5",
        ),
        ({**LATENT, "rope_scaling": RopeScaling("yarn", 4.0, truncate=False)}, "YaRN without truncation"),
        ({**LATENT, "rope_scaling": RopeScaling("yarn", 4.0)}, "YaRN with beta_fast, .* of 32, 1 and 8192"),
        (
            {**MOE, "moe_router_topk": 4, "moe_router_num_groups": 4, "moe_router_group_topk": 4},
            "sums the best 1 of a group",
        ),
        ({"proj_bias": True}, "a bias on only one of"),
        ({"mlp_bias": True}, "a bias on only one of"),
        ({"rotary_base": 10000.5}, "a rotary base of 10000.5"),
        (
            {"parallel_block": True, "qk_norm": ALL_HEADS},
            "on one norm; norms of queries and keys over all heads together: neither Megatron-LM nor .* megatron_layers",
        ),
        (
            {**MOE, "parallel_block": True},
            r"in parallel on one norm, with experts: the layer megatron_layers\.parallel_shared",
        ),
        (
            {**MOE, "qk_norm": ALL_HEADS, "feed": PerLayer(["mlp", "moe"])},
            "over all heads together, with experts in some layers: the layer",
        ),
        ({"block_norms": AFTER, "normalization": LAYER_NORM}, "none before, with LayerNorms: the layer"),
        ({"qk_norm": ALL_HEADS, "zero_centred": True}, "with norms that are stored minus 1: the layer"),
        ({"block_norms": AROUND, "mtp_num_layers": 1}, r"multi-token prediction \(--without-mtp leaves"),
        ({**LATENT, "block_norms": AFTER}, "with attention of another kind in some layers"),
        (
            {"qk_norm": PerLayer([EACH_HEAD, ALL_HEADS])},
            "all heads together, in some layers: a model has layers of one kind",
        ),
        (
            {"num_experts": 4, "moe_ffn_hidden_size": 4, "moe_router_topk": 1},
            "one expert for each token, with weight 1",
        ),
    ],
)
def test_what_megatron_cannot_express(fields: dict[str, Any], reason: str) -> None:
    (found,) = inexpressible(tiny_spec(**fields))
    assert re.search(reason, found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position_embedding_type": "mrope"}, "only 'rope', 'yarn', 'learned_absolute' and 'none' are supported"),
        (
            {"position_embedding_type": "yarn", "multi_latent_attention": True},
            "only 'rope', 'learned_absolute' and 'none' are supported",
        ),
        ({"position_embedding_type": "yarn"}, "position_embedding_type='yarn' without rotary_scaling_factor"),
        ({"position_embedding_type": "relative"}, "position_embedding_type='relative'"),
        ({"normalization": "L2Norm"}, "normalization='L2Norm'; only 'RMSNorm' and 'LayerNorm' are supported"),
        (
            {"use_mup": True, "mup_base_hidden_size": 4},
            "mup_base_hidden_size=4; only the model's own size is supported",
        ),
        ({"use_mup": True, "mup_output_mult": "1"}, "mup_output_mult is '1'; it must be a number"),
        ({"num_experts": 8, "moe_router_score_function": "sqrtsoftplus"}, "only 'softmax' and 'sigmoid' are supported"),
        ({"num_experts": 8, "moe_router_num_groups": 3, "moe_router_group_topk": 1}, "8 experts cannot be grouped so"),
        ({"num_experts": 8, "moe_router_num_groups": 2}, "moe_router_group_topk None; 8 experts cannot be grouped so"),
        ({"moe_mlp_glu_interleave_size": 32}, "gate and up of experts in alternating blocks of rows"),
        ({"moe_apply_probs_on_input": True}, "inputs are scaled"),
        ({"moe_latent_size": 16}, "projected inputs"),
        (
            {"num_experts": 8, "moe_router_load_balancing_type": "quantile_balancing"},
            "does not weight experts by a softmax",
        ),
        (
            {"num_experts": 8, "moe_router_load_balancing_type": "sinkhorn", "moe_router_topk": 1},
            "does not weight experts by a softmax",
        ),
        (
            {"num_experts": 8, "moe_router_load_balancing_type": ["aux_loss", "sinkhorn"]},
            "does not weight experts by a softmax",
        ),
        ({"qk_l2_norm": True}, "queries and keys of length 1"),
        ({"glu_linear_offset": "1"}, "glu_linear_offset is '1'"),
        ({"activation_func_clamp_value": [7.0]}, r"activation_func_clamp_value is \[7.0\]"),
        ({"softmax_scale": 0.1}, "another scale"),
        ({"heterogeneous_layers_config_encoded_json": "{}"}, "layers that differ"),
        ({"experimental_attention_variant": "mamba"}, "only 'gated_delta_net' and 'dsa' are supported"),
        ({"experimental_attention_variant": "dsa"}, "without multi_latent_attention"),
        (
            {"experimental_attention_variant": "dsa", "multi_latent_attention": True},
            "no dsa_indexer_rope_interleaved, as before Megatron-LM 0.19: its indexers read latents before their norm",
        ),
        (
            {**DSA, "dsa_indexer_topk_freq": 0},
            "dsa_indexer_topk_freq=0 and dsa_indexer_skip_topk_offset=0; they must be whole numbers, the first above 0",
        ),
        ({**DSA, "dsa_indexer_n_heads": None}, "dsa_indexer_n_heads is None"),
        ({**DSA, "dsa_indexer_head_dim": 1}, "dsa_indexer_head_dim is 1, fewer than the 64 rows that rotate"),
        ({**DSA, "dsa_indexer_scoring_relu": False}, "indexers whose scores may be negative"),
        ({"experimental_attention_variant": "gated_delta_net"}, "linear_attention_freq=None; it must be a number or"),
        ({"experimental_attention_variant": "gated_delta_net", "linear_attention_freq": [1]}, "a list of 2 values"),
        ({"multi_latent_attention": True, "kv_lora_rank": None}, "kv_lora_rank is None"),
        ({"num_experts": 8, "moe_layer_freq": [1]}, r"moe_layer_freq=\[1\]; it must be a number or a list of 2"),
        ({"num_experts": 8, "moe_layer_freq": 0}, "moe_layer_freq=0"),
        ({"num_experts": 8, "moe_layer_freq": "[1]*2"}, "moe_layer_freq="),
        ({"num_experts": 8, "moe_aux_loss_coeff": "much"}, "moe_aux_loss_coeff is 'much'; it must be a number"),
        ({"no_rope_freq": [1]}, r"no_rope_freq=\[1\]; it must be a number or a list of 2"),
        ({"no_rope_freq": "[0,1]"}, "no_rope_freq="),
        ({"window_attn_skip_freq": [0], "window_size": (7, 0)}, r"window_attn_skip_freq=\[0\]; it must be a number"),
        ({"window_attn_skip_freq": -1, "window_size": (7, 0)}, "window_attn_skip_freq=-1"),
        (
            {"softmax_type": "off-by-one"},
            "only 'vanilla' and 'learnable', attention sinks that are trained, are supported",
        ),
        ({"norm_epsilon": 1e-6}, "norm_epsilon=1e-06 and layernorm_epsilon=1e-05; .*--hf-config"),
        ({"window_size": (7, 7)}, r"window_size=\(7, 7\)"),
        ({"window_size": (-1, 0)}, "window_size"),
        ({"use_rope_scaling": True, "rotary_seq_len_interpolation_factor": 2}, "both llama3 and linear"),
        ({"num_layers": None}, "no valid num_layers; .*--hf-config"),
        ({"max_position_embeddings": None}, "no valid max_position_embeddings"),
    ],
)
def test_args_of_models_that_are_not_supported_are_refused(change: dict[str, Any], message: str) -> None:
    spec = tiny_spec()
    with pytest.raises(ConversionError, match=message):
        back({**all_args(spec), **change}, spec)


@pytest.mark.parametrize(
    ("change", "field", "value"),
    [
        ({"window_size": "4095,0"}, "sliding_window", 4096),
        ({"window_size": [4095, 0]}, "sliding_window", 4096),
        ({"window_size": (0, 0)}, "sliding_window", 1),
        ({"group_query_attention": False, "num_query_groups": 1}, "num_query_groups", 4),
        ({"group_query_attention": True, "num_query_groups": None}, "num_query_groups", 4),
        ({"kv_channels": None}, "kv_channels", 2),
        ({"norm_epsilon": None, "layernorm_epsilon": 1e-6}, "norm_epsilon", 1e-6),
        ({"norm_epsilon": None, "layernorm_epsilon": None}, "norm_epsilon", 1e-5),
        ({"rotary_base": None}, "rotary_base", 10000.0),
        (
            {"position_embedding_type": "learned_absolute", "use_rotary_position_embeddings": True},
            "rotary_base",
            10000.0,
        ),
        (
            {"use_rope_scaling": True, "rope_scaling_factor": None},
            "rope_scaling",
            RopeScaling("llama3", 8.0, 1.0, 4.0, 8192),
        ),
        ({"mtp_num_layers": 0, "moe_router_num_groups": 0, "squared_relu": None}, "mtp_num_layers", 0),
        ({"mtp_num_layers": 1}, "mtp_num_layers", 1),
        ({"no_rope_freq": [0, 0], "moe_router_topk_scaling_factor": 1.0}, "rope", True),
        ({"no_rope_freq": [1, 0]}, "rope", PerLayer([False, True])),
        ({"no_rope_freq": 3, "num_layers": 5}, "rope", PerLayer([True, True, False, True, True])),
        ({"no_rope_freq": 4}, "rope", True),
        ({"position_embedding_type": "none", "no_rope_freq": [1, 0]}, "rope", False),
        ({"position_embedding_type": "learned_absolute"}, "learned_positions", True),
        ({"position_embedding_type": "learned_absolute"}, "rope", False),
        ({"position_embedding_type": "learned_absolute", "use_rotary_position_embeddings": True}, "rope", True),
        ({"normalization": "LayerNorm"}, "normalization", LAYER_NORM),
        ({"apply_layernorm_1p": True}, "zero_centred", True),
        ({"layernorm_zero_centered_gamma": True}, "zero_centred", True),
        ({"rotary_percent": 0.5}, "rotary_percent", 0.5),
        ({"rotary_interleaved": True}, "rotary_interleaved", True),
        ({"swiglu": False}, "gated", False),
        ({"swiglu": False, "squared_relu": True}, "activation", SQUARED_RELU),
        # The kernel of bias and GELU is the tanh form; without a bias there is none.
        ({"swiglu": False, "add_bias_linear": True}, "activation", GELU_TANH),
        ({"swiglu": False, "add_bias_linear": True, "bias_gelu_fusion": False}, "activation", GELU),
        ({"swiglu": False, "add_bias_linear": False}, "activation", GELU),
        ({"window_attn_skip_freq": 2, "window_size": (7, 0)}, "sliding_window", PerLayer([8, None])),
        ({"window_attn_skip_freq": [0, 1], "window_size": (7, 0)}, "sliding_window", PerLayer([None, 8])),
        ({"window_attn_skip_freq": [1, 1], "window_size": (7, 0)}, "sliding_window", 8),
        ({"window_attn_skip_freq": 2}, "sliding_window", None),
        ({"multi_latent_attention": True}, "kv_lora_rank", 32),
        ({"multi_latent_attention": True, "rotary_scaling_factor": 1.0}, "rope_scaling", None),
        ({"multi_latent_attention": True, "rope_type": "rope", "rotary_scaling_factor": 40}, "rope_scaling", None),
        (
            {"multi_latent_attention": True, "rotary_scaling_factor": 40, "mscale": 0.5},
            "rope_scaling",
            RopeScaling("yarn", 40.0, original_max_position_embeddings=4096, mscale=0.5),
        ),
        ({**YARN, "mscale": 1.0, "mscale_all_dim": 0.0}, "rope_scaling", RopeScaling(**PLAIN_YARN)),
        (
            {**YARN, "yarn_beta_fast": 16, "yarn_beta_slow": 2, "yarn_correction_range_round_to_int": False},
            "rope_scaling",
            RopeScaling(**PLAIN_YARN, beta_fast=16.0, beta_slow=2.0, truncate=False),
        ),
        (
            {**YARN, "mscale": 2.0, "mscale_all_dim": 0.5},
            "rope_scaling",
            RopeScaling(**PLAIN_YARN, mscale=2.0, mscale_all_dim=0.5),
        ),
        # transformers heeds both mscales or neither.
        ({**YARN, "mscale": 0.0}, "rope_scaling", RopeScaling(**PLAIN_YARN, attention_factor=1.0)),
        ({**YARN, "rotary_scaling_factor": 1.0}, "rope_scaling", None),
        (
            {"experimental_attention_variant": "gated_delta_net", "linear_attention_freq": 2, "num_layers": 3},
            "mixer",
            PerLayer(["gated delta", "attention", "gated delta"]),
        ),
        (
            {"experimental_attention_variant": "gated_delta_net", "linear_attention_freq": [0, 1]},
            "mixer",
            PerLayer(["attention", "gated delta"]),
        ),
        ({"attention_output_gate": True}, "attention_output_gate", True),
        # The flag alone scales scores by 1 / size; its two parts by sqrt(base) / size ** power.
        ({"use_mup": True}, "attention_multiplier", 0.5),
        ({"use_mup": True, "mup_base_head_dim": 16.0, "mup_attn_scale_power": 2.0}, "attention_multiplier", 1.0),
        ({"use_mup": True, "mup_embedding_mult": 12, "mup_base_hidden_size": 8}, "embedding_multiplier", 12.0),
        ({"use_mup": True, "mup_output_mult": 0.125}, "logits_multiplier", 0.125),
        ({"num_experts": 8, "moe_router_score_function": "sigmoid"}, "moe_router_score_function", SIGMOID),
        (
            {"num_experts": 8, "moe_router_score_function": "sigmoid", "moe_router_pre_softmax": True},
            "moe_router_pre_softmax",
            False,
        ),
        ({"num_experts": 8, "moe_router_enable_expert_bias": True}, "moe_router_enable_expert_bias", True),
        ({"num_experts": 8, "moe_router_topk_scaling_factor": 2.5}, "moe_router_topk_scaling_factor", 2.5),
        ({"num_experts": 8, "moe_router_topk_scaling_factor": None}, "moe_router_topk_scaling_factor", 1.0),
        ({"num_experts": 8, "moe_router_num_groups": 2, "moe_router_group_topk": 1}, "moe_router_num_groups", 2),
        ({"num_experts": 8, "moe_router_load_balancing_type": "sinkhorn"}, "moe_router_pre_softmax", True),
        ({"num_experts": 8, "moe_router_load_balancing_type": ["seq_aux_loss"]}, "moe_router_pre_softmax", False),
        ({"num_experts": 8, "moe_aux_loss_coeff": [0.5, 0.1]}, "moe_aux_loss_coeff", 0.5),
        ({"num_experts": 8}, "moe_ffn_hidden_size", 4),
        ({"num_experts": 8}, "moe_router_topk", 2),
        ({}, "feed", "mlp"),
        ({"num_experts": 8}, "feed", "moe"),
        ({"num_experts": 8, "moe_layer_freq": [0, 0]}, "feed", "mlp"),
        ({"num_experts": 8, "num_layers": 5, "moe_layer_freq": 2}, "feed", PerLayer(["moe", "mlp"] * 2 + ["moe"])),
        (
            {"num_experts": 8, "num_layers": 5, "moe_layer_freq": 3},
            "feed",
            PerLayer(["moe", "mlp", "mlp", "moe", "mlp"]),
        ),
        ({"num_experts": 8, "moe_layer_freq": [0, 1]}, "feed", PerLayer(["mlp", "moe"])),
        ({"add_bias_linear": True}, "mlp_bias", True),
        ({"add_bias_linear": True, "add_qkv_bias": False}, "qkv_bias", True),  # Megatron's QKV has a bias by either
    ],
)
def test_args_of_other_versions(change: dict[str, Any], field: str, value: Any) -> None:
    args = {**all_args(tiny_spec()), **change}
    assert spec_fields(argparse.Namespace(**args))[field] == value


def test_a_training_run_s_own_choices_are_taken_over() -> None:
    sinkhorn = {"moe_router_load_balancing_type": "sinkhorn"}
    own = {"hidden_dropout": 0.1, "moe_token_dispatcher_type": "flex", "lr": 1.0, **sinkhorn}
    assert training_args(tiny_spec(), own) == {"hidden_dropout": 0.1}
    kept = {"hidden_dropout": 0.1, "moe_token_dispatcher_type": "flex"}
    experts = {"num_experts": 4, "moe_ffn_hidden_size": 4, "moe_router_topk": 2}
    assert training_args(tiny_spec(**experts), own) == kept  # weighted by a softmax over the chosen, as sinkhorn is not
    assert training_args(tiny_spec(**experts, moe_router_pre_softmax=True), own) == {**kept, **sinkhorn}
    lists = {"moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"], "moe_aux_loss_coeff": [0.1, 0.2]}
    assert training_args(tiny_spec(**experts), lists) == lists


def test_sparse_args_mean_megatron_s_defaults() -> None:
    needed = ("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "max_position_embeddings")
    fields = spec_fields(argparse.Namespace(**dict.fromkeys(needed, 8)))
    spec = ModelSpec.of(**fields, family="llama", dtype=dtype_named("bf16"), vocab_size=9)
    names = ("tied", "mlp_bias", "kv_channels", "num_query_groups", "normalization", "gated", "rope", "rotary_percent")
    assert [spec.values[name] for name in names] == [True, True, 1, 8, "RMSNorm", True, True, 1.0]


@pytest.mark.parametrize(
    ("model", "router", "recorded"),
    [
        ("bf16", "fp32", "fp32"),
        ("fp16", "float64", "fp64"),
        ("fp32", "float64", "fp64"),
        ("bf16", "bf16", None),
        ("bf16", "fp16", None),
        ("fp32", "fp32", None),
        ("bf16", None, None),
    ],
)
def test_a_router_wider_than_the_model_is_recorded(model: str, router: str | None, recorded: str | None) -> None:
    spec, stored = tiny_spec(**MOE, dtype=dtype_named(model)), None if router is None else dtype_named(router)
    args = all_args(spec, router=stored)
    said = {name: value for name, value in args.items() if name.startswith(("moe_router_dtype", "moe_router_fp"))}
    assert said == ({} if recorded is None else {"moe_router_dtype": recorded, "moe_router_fp32": True})
    warnings = router_warnings(spec, stored)
    assert len(warnings) == (recorded is not None)
    assert all(f"stored in {stored}, but Megatron-LM holds it in {spec.dtype}" in warning for warning in warnings)
    shown = flags(args)
    assert [flag for flag in shown if "router-dtype" in flag] == (
        [f"--moe-router-dtype {recorded}"] if recorded else []
    )
    notes = [note for note in flag_warnings(spec, shown) if "router-dtype" in note]
    assert notes == (["--moe-router-dtype exists from Megatron-LM 0.12 on"] if recorded else [])


BASE_FLAGS = [
    *("--use-checkpoint-args", "--no-load-optim", "--no-load-rng", "--norm-epsilon 1e-05", "--rotary-base 10000"),
    *(
        "--attention-dropout 0.0",
        "--hidden-dropout 0.0",
        "--transformer-impl local",
        "--make-vocab-size-divisible-by 128",
    ),
    *("--tensor-model-parallel-size 1", "--pipeline-model-parallel-size 1"),
]
MOE_FLAGS = [
    *("--expert-model-parallel-size 1", "--expert-tensor-parallel-size 1"),
    *("--moe-router-load-balancing-type aux_loss", "--moe-token-dispatcher-type alltoall"),
]


@pytest.mark.parametrize(
    ("fields", "more"),
    [
        ({}, []),
        ({"qk_norm": EACH_HEAD}, ["--qk-layernorm"]),
        (
            {"rope_scaling": RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)},
            ["--use-rope-scaling"],
        ),
        (
            {"rope_scaling": RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)},
            ["--use-rope-scaling", "--rope-scaling-factor 32.0"],
        ),
        ({"rope_scaling": RopeScaling("linear", 2.0)}, ["--rotary-seq-len-interpolation-factor 2"]),
        ({"sliding_window": 4096}, ["--window-size 4095,0"]),
        ({"sliding_window": PerLayer([8, None])}, ["--window-size 7,0", "--window-attn-skip-freq '[1,0]'"]),
        ({"rope": PerLayer([True, False])}, ["--no-rope-freq '[0,1]'"]),
        ({"activation": GELU, "gated": False}, ["--no-bias-gelu-fusion"]),
        ({"zero_centred": True}, ["--apply-layernorm-1p"]),
        ({"mtp_num_layers": 1}, ["--mtp-num-layers 1"]),
        ({"dtype": dtype_named("bf16")}, ["--bf16"]),
        ({"dtype": dtype_named("fp16")}, ["--fp16"]),
        (MOE, MOE_FLAGS),
        (
            {**MOE, "shared_ffn_hidden_size": 10, "shared_gate": True, "moe_aux_loss_coeff": 0.01},
            [*MOE_FLAGS, "--moe-shared-expert-gate", "--moe-aux-loss-coeff 0.01"],
        ),
    ],
)
def test_flags(fields: dict[str, Any], more: list[str]) -> None:
    spec = tiny_spec(**fields)
    assert sorted(flags(all_args(spec))) == sorted([*BASE_FLAGS, *more])


@pytest.mark.parametrize(
    ("split", "more"),
    [
        ({"first": 1}, ["--decoder-first-pipeline-num-layers 1"]),
        ({"last": 2}, ["--decoder-last-pipeline-num-layers 2"]),
        (
            {"embedding": True, "loss": True},
            ["--account-for-embedding-in-pipeline-split", "--account-for-loss-in-pipeline-split"],
        ),
        ({"virtual": 2}, ["--num-layers-per-virtual-pipeline-stage 1"]),
        ({"per_virtual": 1}, ["--num-layers-per-virtual-pipeline-stage 1"]),
        ({"layout": "Et|(t|)*2tL"}, ["--pipeline-model-parallel-layout 'Et|(t|)*2tL'"]),
    ],
)
def test_flags_of_uneven_stages(split: dict[str, Any], more: list[str]) -> None:
    spec = tiny_spec(num_layers=4)
    found = flags(all_args(spec, "transformer_engine", tp=2, pp=2, **split))
    assert set(found) - set(BASE_FLAGS) == {
        *more,
        "--transformer-impl transformer_engine",
        "--tensor-model-parallel-size 2",
        "--pipeline-model-parallel-size 2",
    }


def test_flags_of_virtual_stages_on_uneven_ranks() -> None:
    """Megatron-LM wants their number then, not their layers."""
    spec = tiny_spec(num_layers=8)
    found = flags(all_args(spec, pp=3, first=2, virtual=2, last=2))
    assert "--num-virtual-stages-per-pipeline-rank 2" in found
    assert not any("--num-layers-per-virtual" in flag for flag in found)
    assert "--num-virtual-stages-per-pipeline-rank exists from Megatron-LM 0.11 on" in flag_warnings(spec, found)


def test_virtual_stages_are_recorded_as_megatron_records_them() -> None:
    spec = tiny_spec(num_layers=6)
    for split, vpp, layers, layout in (
        (PipelineSplit(), None, None, None),
        (PipelineSplit(virtual=1), None, None, None),
        (PipelineSplit(virtual=3), 3, 1, None),
        (PipelineSplit(embedding=True, loss=True, virtual=2), 2, 2, None),
        (PipelineSplit(layout="Et|t|tt|ttL"), 2, None, "Et|t|tt|ttL"),
        (PipelineSplit(layout="Ettt|tttL"), None, None, "Ettt|tttL"),
    ):
        said = SimpleNamespace(**layout_args(spec, 2, split))
        assert said.virtual_pipeline_model_parallel_size == vpp
        assert said.num_layers_per_virtual_pipeline_stage == layers
        assert said.pipeline_model_parallel_layout == layout


def test_flags_with_a_value_parse_as_megatron_parses_them() -> None:
    """The types of these options in Megatron-LM core_v0.16.1, training/arguments.py."""
    types = {"--rotary-seq-len-interpolation-factor": int, "--rope-scaling-factor": float, "--norm-epsilon": float}
    types |= {"--attention-dropout": float, "--make-vocab-size-divisible-by": int, "--tensor-model-parallel-size": int}
    parser = argparse.ArgumentParser()
    for name, kind in types.items():
        parser.add_argument(name, type=kind)
    for scaling in (RopeScaling("linear", 4.0), RopeScaling("llama3", 32.0)):
        spec = tiny_spec(rope_scaling=scaling)
        words = " ".join(flags(all_args(spec))).split()
        parsed, _ = parser.parse_known_args(words)
        assert parsed.rotary_seq_len_interpolation_factor == (4 if scaling.kind == "linear" else None)


#: What `load_args_from_checkpoint` takes from a checkpoint: of a model in core_v0.8.0 to 0.19.0, of experts from 0.10.0 on.
RESTORED = {
    Group.MODEL: """num_layers hidden_size ffn_hidden_size seq_length num_attention_heads num_query_groups group_query_attention
        kv_channels max_position_embeddings position_embedding_type add_bias_linear add_qkv_bias swiglu
        untie_embeddings_and_output_weights normalization rotary_percent rotary_interleaved""".split(),
    Group.EXPERTS: """num_experts moe_layer_freq moe_ffn_hidden_size moe_router_topk moe_router_pre_softmax moe_grouped_gemm
        moe_shared_expert_intermediate_size""".split(),
}
#: Only for weights that are yet to be made.
UNNEEDED = {"init_method_std"}


@pytest.mark.parametrize("group", RESTORED)
def test_what_a_release_does_not_restore_is_a_flag(group: Group) -> None:
    """Else it would compute something else without a word: core_v0.8.0 and 0.9.0 run a Llama 3 with a rotary base of 10000."""
    kept = {row.attribute for row in ARGUMENTS if row.flag is not None and row.flag.restored and row.group is group}
    assert kept - set(RESTORED[group]) - UNNEEDED == set()


def test_a_rope_factor_that_megatron_s_scripts_ignore_is_warned_of() -> None:
    llama3 = tiny_spec(rope_scaling=RopeScaling("llama3", 32.0))
    *_, warning = flag_warnings(llama3, flags(all_args(llama3)))
    assert warning.startswith(
        "warning: --rope-scaling-factor 32.0: the pretrain_gpt.py of Megatron-LM up to 0.19 accepts it but"
    )
    assert "with 8; pass rope_scaling_factor to GPTModel" in warning
    linear = tiny_spec(rope_scaling=RopeScaling("linear", 4.0))
    (warning,) = flag_warnings(linear, flags(all_args(linear)))
    assert warning.startswith("warning: --rotary-seq-len-interpolation-factor:")
    for quiet in (None, RopeScaling("llama3", 8.0), RopeScaling("linear", 1.0)):
        spec = tiny_spec(rope_scaling=quiet)
        assert not [said for said in flag_warnings(spec, flags(all_args(spec))) if said.startswith("warning")]


def test_parallel_sizes_are_flags_for_megatron_takes_none_from_a_checkpoint() -> None:
    """Without `--use-mp-args-from-checkpoint-args` (0.11 on) `load_args_from_checkpoint` leaves all of them alone."""
    spec = tiny_spec(**{**MOE, "num_experts": 4})
    args = all_args(spec, "transformer_engine", tp=2)
    shown = flags({**args, "expert_model_parallel_size": 4, "expert_tensor_parallel_size": 1})
    sizes = ("--tensor-model-parallel-size 2", "--expert-model-parallel-size 4", "--expert-tensor-parallel-size 1")
    assert set(sizes) <= set(shown)
    assert flag_warnings(spec, shown) == ["--expert-tensor-parallel-size exists from Megatron-LM 0.10 on"]


def test_local_experts_under_tensor_parallelism_are_warned_of() -> None:
    spec = tiny_spec(**MOE)
    *_, warning = flag_warnings(spec, flags(all_args(spec, tp=2)))
    assert warning.startswith("warning: Megatron-LM trains experts at a tensor-parallel size above 1")


def test_flags_that_older_releases_lack_are_named() -> None:
    spec = tiny_spec(sliding_window=8)
    (note,) = flag_warnings(spec, flags(all_args(spec)))
    assert note == "--window-size exists from Megatron-LM 0.15 on"


def test_more_ranks_than_query_groups_are_said_to_need_a_release() -> None:
    spec, groups = tiny_spec(num_query_groups=2), 2
    assert flag_warnings(spec, [], groups) == []
    (note,) = flag_warnings(spec, [], 2 * groups)
    assert note.endswith("needs Megatron-LM 0.16 or later")


def test_the_layout_says_how_the_checkpoint_is_cut() -> None:
    spec = tiny_spec(num_layers=3)
    args = layout_args(spec, 2, PipelineSplit(first=1), tp=2)
    said = SimpleNamespace(**args)
    assert (said.tensor_model_parallel_size, said.pipeline_model_parallel_size, said.world_size) == (2, 2, 4)
    assert (said.decoder_first_pipeline_num_layers, said.decoder_last_pipeline_num_layers) == (1, None)
    assert (said.padded_vocab_size, said.make_vocab_size_divisible_by, said.ckpt_format) == (256, 64, "torch")
