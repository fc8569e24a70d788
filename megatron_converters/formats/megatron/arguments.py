"""Megatron-LM's `args` Namespace ↔ `ModelSpec`.

Attribute names: Megatron-LM core_v0.8.0 to core_v0.19.0, training/arguments.py and `load_args_from_checkpoint` in
training/checkpointing.py. Only plain values and torch dtypes go into `args`, so that `weights_only` loading accepts them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from ...assets.training_args import inheritable
from ...basics.dtypes import BY_NAME, DType
from ...basics.errors import ConversionError, Unclear
from ...model.slots import Ref, refs
from ...model.spec import ModelSpec, RopeScaling, number
from ...sharding.ranks import Parallel
from .limits import FIXED, MEGATRON_LLAMA3, SINKHORN, refuse_unsupported
from .names import STACKED

_DEFAULT_SEQ_LENGTH = 4096
#: spec field ↔ attribute, where they correspond one to one.
_ROWS = {
    "num_layers": "num_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "kv_channels": "kv_channels",
    "max_position_embeddings": "max_position_embeddings",
    "qk_norm": "qk_layernorm",
    "qk_norm_over_heads": "qk_layernorm_over_heads",  # ours: Megatron-LM has no such norm
    "initializer_range": "init_method_std",
    "attention_dropout": "attention_dropout",
}
#: What we write as rank 0's and a training run as each rank's own.
_OF_A_RANK = {"rank"}
#: Some model whose args hold every attribute that any model's do: experts, and a router wider than the rest.
_EVERYTHING = ModelSpec(
    family="mixtral",
    num_layers=1,
    hidden_size=1,
    ffn_hidden_size=1,
    num_attention_heads=1,
    num_query_groups=1,
    kv_channels=1,
    vocab_size=1,
    max_position_embeddings=1,
    norm_epsilon=1e-5,
    rotary_base=1e4,
    dtype=BY_NAME["bfloat16"],
    num_experts=1,
    moe_ffn_hidden_size=1,
    moe_router_topk=1,
)


def spec_fields(args: argparse.Namespace) -> dict[str, Any]:
    """The `ModelSpec` fields that `args` decides: all but family, dtype and vocab_size."""
    values = vars(args)
    refuse_unsupported(values)
    needed = ("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "max_position_embeddings")
    missing = [name for name in needed if type(values.get(name)) is not int or values[name] < 1]
    if missing:
        raise Unclear(
            f"the checkpoint's args have no sound {', '.join(missing)}; give a reference model with --hf-config DIR"
        )
    fields = {field: values[name] for field, name in _ROWS.items() if values.get(name) is not None}
    heads = fields["num_attention_heads"]
    fields.setdefault("kv_channels", fields["hidden_size"] // heads)
    linear_bias = bool(values.get("add_bias_linear", True))
    return {
        **fields,
        **_expert_fields(values, fields),
        "num_query_groups": values.get("num_query_groups") or heads if values.get("group_query_attention") else heads,
        "norm_epsilon": _norm_epsilon(values),
        "rotary_base": number(values.get("rotary_base") or 10000, "rotary_base"),
        "rope_scaling": _rope_scaling(values),
        "tied": not values.get("untie_embeddings_and_output_weights", False),
        "qkv_bias": linear_bias or bool(values.get("add_qkv_bias", False)),
        "proj_bias": linear_bias,
        "mlp_bias": linear_bias,
        "sliding_window": _window(values.get("window_size")),
    }


def _expert_fields(values: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """What args say about experts; nothing for a dense model."""
    experts = values.get("num_experts")
    if not experts:
        return {}
    return {
        "num_experts": experts,
        "moe_ffn_hidden_size": values.get("moe_ffn_hidden_size") or fields["ffn_hidden_size"],
        "moe_router_topk": values.get("moe_router_topk") or 2,
        "moe_router_pre_softmax": bool(values.get("moe_router_pre_softmax", False)) or _is_sinkhorn(values),
        "moe_aux_loss_coeff": _aux_loss(values.get("moe_aux_loss_coeff") or 0.0),
        "shared_ffn_hidden_size": values.get("moe_shared_expert_intermediate_size") or 0,
        "shared_gate": bool(values.get("moe_shared_expert_gate", False)),
        "dense_layers": _dense_layers(values.get("moe_layer_freq", 1), fields["num_layers"]),
    }


def _is_sinkhorn(values: Mapping[str, Any]) -> bool:
    return values.get("moe_router_load_balancing_type") in (SINKHORN, [SINKHORN])


def _aux_loss(coefficient: Any) -> float:
    """The first where there is one for each way of balancing (core_v0.14 on): Hugging Face has one."""
    first = coefficient[0] if isinstance(coefficient, list) and coefficient else coefficient
    return number(first, "moe_aux_loss_coeff")


def _dense_layers(freq: Any, layers: int) -> tuple[int, ...]:
    """Layers without experts: of every N only the first has them, or a list of 0 and 1 says (core/models/gpt, layer specs)."""
    if isinstance(freq, int) and freq > 0:
        return tuple(layer for layer in range(layers) if layer % freq)
    if isinstance(freq, list) and len(freq) == layers:
        return tuple(layer for layer, kind in enumerate(freq) if not kind)
    raise ConversionError(
        f"the checkpoint's args have moe_layer_freq={freq!r}; it must be a number or a list of {layers}"
    )


def expert_args(spec: ModelSpec, parallel: Parallel, expert_layout: str) -> dict[str, Any]:
    """The attributes of a mixture of experts and how its checkpoint is cut; for a dense model, that it is none."""
    if not spec.num_experts:
        return {"num_experts": None, "moe_grouped_gemm": False}
    moe = [int(spec.is_moe(layer)) for layer in range(spec.num_layers)]
    return {
        "num_experts": spec.num_experts,
        "moe_ffn_hidden_size": spec.moe_ffn_hidden_size,
        "moe_router_topk": spec.moe_router_topk,
        "moe_router_pre_softmax": spec.moe_router_pre_softmax,
        "moe_aux_loss_coeff": spec.moe_aux_loss_coeff,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_shared_expert_intermediate_size": spec.shared_ffn_hidden_size or None,
        "moe_shared_expert_gate": spec.shared_gate,
        "moe_layer_freq": 1 if all(moe) else moe,
        "moe_grouped_gemm": expert_layout in ("grouped", STACKED),
        "moe_use_legacy_grouped_gemm": expert_layout == STACKED,
        "moe_dynamic_hpu": expert_layout == "dynamic",
        "moe_token_dispatcher_type": "alltoall",
        # Megatron-LM trains experts with tensor parallelism only together with sequence parallelism.
        "sequence_parallel": parallel.tp > 1,
        "expert_model_parallel_size": parallel.ep,
        "expert_tensor_parallel_size": parallel.etp,
    }


def training_args(spec: ModelSpec, own: Mapping[str, Any]) -> dict[str, Any]:
    """How a checkpoint was trained, by its `own` args: choices that a new one takes over instead of our defaults."""
    names = ["hidden_dropout"]
    if spec.num_experts:
        names += ["moe_token_dispatcher_type"]
        names += ["moe_aux_loss_coeff"] if isinstance(own.get("moe_aux_loss_coeff"), list) else []
        # Sinkhorn's way weights experts as a softmax over all of them does, whatever else the args say.
        names += ["moe_router_load_balancing_type"] if spec.moe_router_pre_softmax or not _is_sinkhorn(own) else []
    return {name: own[name] for name in names if own.get(name) is not None}


#: `moe_router_dtype` of a router that is stored in these, wider than the model.
_ROUTER_DTYPES = {"float32": "fp32", "float64": "fp64"}


def router_dtype(spec: ModelSpec, dtype_of: Callable[[Ref], DType]) -> DType | None:
    """The widest type that a router has; None for a model without one."""
    dtypes = (dtype_of(ref) for ref in refs(spec) if ref.slot.keeps_precision)
    return max(dtypes, key=lambda dtype: dtype.itemsize, default=None)


def router_args(spec: ModelSpec, router: DType | None) -> dict[str, Any]:
    """The attributes of a router stored in `router` where that is wider than the model; nothing for another, or None.

    Both decide in what experts are chosen: `moe_router_dtype` is Megatron-LM's from 0.12 on, `moe_router_fp32` Habana's.
    """
    if router is None or router.itemsize <= spec.dtype.itemsize:
        return {}
    return {"moe_router_dtype": _ROUTER_DTYPES[router.name], "moe_router_fp32": True}


def router_warnings(spec: ModelSpec, router: DType | None) -> list[str]:
    """What Megatron-LM makes of such a router's weights (core/transformer/moe/router.py, `reset_parameters`)."""
    if not router_args(spec, router):
        return []
    return [
        f"warning: the router is stored in {router}, but Megatron-LM holds it in {spec.dtype} like the rest and rounds it as it "
        "loads; --moe-router-dtype makes it compute in the wider type"
    ]


def stated_heads(args: argparse.Namespace) -> tuple[str, ...]:
    """The `ModelSpec` fields of heads, which no shape tells, that `args` state and do not leave to defaults."""
    values = vars(args)
    stated = {
        "num_attention_heads": values.get("num_attention_heads"),
        "num_query_groups": values.get("group_query_attention"),
        "kv_channels": values.get("kv_channels"),
    }
    return tuple(name for name, value in stated.items() if value)


def stamp(iteration: Any, args: argparse.Namespace | None) -> dict[str, Any]:
    """What a rank's file says that all files of its save say: iteration, model and sizes.

    It has no iteration or no args where the file has none; of args, an attribute that is not there is one that is None.
    """
    found = {} if iteration is None else {"iteration": iteration}
    said = {} if args is None else {name: getattr(args, name, None) for name in _of_all_ranks()}
    # Objects, such as Megatron-LM's of a pipeline layout, are never equal; what they say of themselves is.
    return {**found, **{name: value if _plain(value) else repr(value) for name, value in said.items()}}


@lru_cache(maxsize=1)
def _of_all_ranks() -> tuple[str, ...]:
    """The attributes that every rank of one save records alike: all that say what a model is and how it is cut."""
    parallel = Parallel(1, (_EVERYTHING.num_layers,))
    written = {
        **model_args(_EVERYTHING),
        **layout_args(parallel, 1, 1, ""),
        **expert_args(_EVERYTHING, parallel, STACKED),
        **router_args(_EVERYTHING, BY_NAME["float32"]),
    }
    # The configuration that a conversion recorded says what these cannot.
    return tuple(sorted({*written, "hf_config"} - _OF_A_RANK))


def _norm_epsilon(values: Mapping[str, Any]) -> float:
    names = [name for name in ("norm_epsilon", "layernorm_epsilon") if values.get(name) is not None]
    found = {number(values[name], name) for name in names}
    if len(found) > 1:
        raise Unclear(
            f"the checkpoint's args have norm_epsilon={values['norm_epsilon']} and "
            f"layernorm_epsilon={values['layernorm_epsilon']}; say which is right with --hf-config DIR"
        )
    return found.pop() if found else 1e-5


def _rope_scaling(values: Mapping[str, Any]) -> RopeScaling | None:
    linear = values.get("rotary_seq_len_interpolation_factor")
    if values.get("use_rope_scaling"):
        if linear:
            raise ConversionError(
                "the checkpoint's args have both llama3 and linear RoPE scaling; no supported model has"
            )
        factor = values.get("rope_scaling_factor") or MEGATRON_LLAMA3.factor
        return RopeScaling("llama3", number(factor, "rope_scaling_factor"))
    return RopeScaling("linear", number(linear, "rotary_seq_len_interpolation_factor")) if linear else None


def _window(value: Any) -> int | None:
    """Megatron's window counts the positions to the left, Hugging Face's the position itself too."""
    if value is None:
        return None
    parts = value.split(",") if isinstance(value, str) else value
    sizes = [str(part).strip() for part in parts] if isinstance(parts, (list, tuple)) else []
    if len(sizes) != 2 or not sizes[0].isdecimal() or sizes[1] != "0":
        raise ConversionError(
            f"the checkpoint's args have window_size={value!r}; only a causal window (N, 0) is supported"
        )
    return int(sizes[0]) + 1


def model_args(spec: ModelSpec) -> dict[str, Any]:
    """The attributes that say what the model is, complete for `--use-checkpoint-args` of Megatron-LM 0.8 to 0.19."""
    scaling = spec.rope_scaling
    linear = scaling.factor if scaling is not None and scaling.kind == "linear" else None
    return {
        **{name: getattr(spec, field) for field, name in _ROWS.items()},
        **{name: value for name, (value, _) in FIXED.items()},
        "encoder_num_layers": spec.num_layers,
        "num_query_groups": spec.num_query_groups,
        "group_query_attention": spec.num_query_groups != spec.num_attention_heads,
        "norm_epsilon": spec.norm_epsilon,  # up to 0.15
        "layernorm_epsilon": spec.norm_epsilon,  # from 0.16 on
        "rotary_base": _whole(spec.rotary_base),
        "use_rope_scaling": scaling is not None and scaling.kind == "llama3",
        "rope_scaling_factor": scaling.factor if scaling is not None and scaling.kind == "llama3" else 8.0,
        "rotary_seq_len_interpolation_factor": None if linear is None else _whole(linear),
        "untie_embeddings_and_output_weights": not spec.tied,
        "add_bias_linear": spec.proj_bias and spec.mlp_bias,
        "add_qkv_bias": spec.qkv_bias,
        "window_size": None if spec.sliding_window is None else (spec.sliding_window - 1, 0),
        "vocab_size": spec.vocab_size,
        "params_dtype": spec.dtype,
        "bf16": spec.dtype.name == "bfloat16",
        "fp16": spec.dtype.name == "float16",
        "hidden_dropout": 0.0,
        "add_position_embedding": True,
        "use_rotary_position_embeddings": False,
        "apply_query_key_layer_scaling": False,
        "attention_softmax_in_fp32": False,
        "openai_gelu": False,
        "use_legacy_models": False,
    }


def _whole(value: float) -> float:
    """An int where it is one: Megatron-LM parses these options with `int`."""
    return int(value) if float(value).is_integer() else value


def seq_length_of(spec: ModelSpec, inherited: Mapping[str, Any]) -> int:
    """The length of sequences that a source was trained with, or what the model and a small memory allow."""
    length: int = inherited.get("seq_length") or min(_DEFAULT_SEQ_LENGTH, spec.max_position_embeddings)
    return length


#: Attributes of a training run that a conversion starts anew; a source's own values win over these.
RUN_DEFAULTS: dict[str, Any] = {
    "micro_batch_size": 1,
    "global_batch_size": 1024,
    "consumed_train_samples": 0,
    "consumed_valid_samples": 0,
    "seed": 1234,
}


def uncut_args(spec: ModelSpec, margs: argparse.Namespace | None) -> dict[str, Any]:
    """The attributes of a model that is cut nowhere, experts one by one, as loaders send them; `margs` are the source's own."""
    return {
        **RUN_DEFAULTS,
        **plain_args(inheritable(margs)),
        **model_args(spec),
        **expert_args(spec, Parallel(1, (spec.num_layers,)), "sequential"),
    }


def layout_args(
    parallel: Parallel, padded_vocab: int, divisor: int, impl: str, ckpt_format: str = "torch"
) -> dict[str, Any]:
    """The attributes that say how the checkpoint is cut. Expert sizes are those of a dense model."""
    split = parallel.split
    return {
        "tensor_model_parallel_size": parallel.tp,
        "pipeline_model_parallel_size": parallel.pp,
        "transformer_pipeline_model_parallel_size": parallel.pp,
        "virtual_pipeline_model_parallel_size": None if parallel.vpp == 1 else parallel.vpp,
        **_virtual_args(parallel),
        "pipeline_model_parallel_layout": split.layout,
        "context_parallel_size": 1,
        "expert_model_parallel_size": 1,
        "expert_tensor_parallel_size": parallel.tp,
        "data_parallel_size": 1,
        "world_size": parallel.tp * parallel.pp,
        "rank": 0,
        "sequence_parallel": False,
        "decoder_first_pipeline_num_layers": split.first,
        "decoder_last_pipeline_num_layers": split.last,
        "account_for_embedding_in_pipeline_split": split.embedding,
        "account_for_loss_in_pipeline_split": split.loss,
        "padded_vocab_size": padded_vocab,
        "make_vocab_size_divisible_by": divisor,
        "transformer_impl": impl,
        "ckpt_format": ckpt_format,
        "use_dist_ckpt": ckpt_format != "torch",
        "use_distributed_optimizer": False,
        "no_save_optim": True,
        "no_save_rng": True,
    }


def _virtual_args(parallel: Parallel) -> dict[str, Any]:
    """How a user says the number of virtual stages: by their layers, or itself where ranks hold different numbers of layers."""
    said = {"num_layers_per_virtual_pipeline_stage": None, "num_virtual_stages_per_pipeline_rank": None}
    split = parallel.split
    if parallel.vpp == 1 or split.layout is not None:
        return said
    if split.first is not None or split.last is not None:
        return {**said, "num_virtual_stages_per_pipeline_rank": parallel.vpp}
    layers = sum(parallel.stages) + split.embedding + split.loss
    return {**said, "num_layers_per_virtual_pipeline_stage": layers // len(parallel.stages)}


def plain_args(args: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes that are plain values, torch dtypes or containers of them; others (enums, timers) are left out."""
    return {name: value for name, value in args.items() if _plain(value)}


def _plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, (str, int)) and _plain(item) for key, item in value.items())
    return value is None or type(value) in (bool, int, float, str) or isinstance(value, DType)
