"""Translation between Megatron-LM's `args` Namespace and `ModelSpec`.

Attribute names: Megatron-LM core_v0.8.0 to core_v0.19.0, training/arguments.py and `load_args_from_checkpoint` in
training/checkpointing.py. Written `args` hold only plain values and torch dtypes, which `weights_only` loading accepts.
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
#: Attribute by spec field, where they correspond one to one.
_ATTRIBUTES = {
    "num_layers": "num_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "kv_channels": "kv_channels",
    "max_position_embeddings": "max_position_embeddings",
    "qk_norm": "qk_layernorm",
    "qk_norm_over_heads": "qk_layernorm_over_heads",  # this project's own: Megatron-LM has no such norm
    "initializer_range": "init_method_std",
    "attention_dropout": "attention_dropout",
}
#: Attributes whose values differ between the ranks of a training run; a conversion writes rank 0's.
_PER_RANK = {"rank"}
#: Example of a model whose args have every attribute that the args of any model have.
_EXAMPLE_SPEC = ModelSpec(
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
    """`ModelSpec` fields that `args` decide: all but family, dtype and vocab_size. Raises `ConversionError`."""
    values = vars(args)
    refuse_unsupported(values)
    required = ("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "max_position_embeddings")
    missing = [name for name in required if type(values.get(name)) is not int or values[name] < 1]
    if missing:
        raise Unclear(
            f"the checkpoint's args have no valid {', '.join(missing)}; give a reference model with --hf-config DIR"
        )
    fields = {field: values[name] for field, name in _ATTRIBUTES.items() if values.get(name) is not None}
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
    """`ModelSpec` fields of experts; none for a dense model."""
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
    """Auxiliary loss coefficient; of a list with one per load balancing type (core_v0.14 on) the first, as Hugging Face has one."""
    first = coefficient[0] if isinstance(coefficient, list) and coefficient else coefficient
    return number(first, "moe_aux_loss_coeff")


def _dense_layers(freq: Any, layers: int) -> tuple[int, ...]:
    """Layers without experts, by `moe_layer_freq`: N means experts in the first of every N layers, a list has 0 or 1 per layer.

    Source: layer specs in core/models/gpt.
    """
    if isinstance(freq, int) and freq > 0:
        return tuple(layer for layer in range(layers) if layer % freq)
    if isinstance(freq, list) and len(freq) == layers:
        return tuple(layer for layer, kind in enumerate(freq) if not kind)
    raise ConversionError(
        f"the checkpoint's args have moe_layer_freq={freq!r}; it must be a number or a list of {layers} values, one per layer"
    )


def expert_args(spec: ModelSpec, parallel: Parallel, expert_layout: str) -> dict[str, Any]:
    """Attributes of a mixture of experts and of how its checkpoint is cut; for a dense model those that say there is none."""
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


def training_args(spec: ModelSpec, source_args: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes of training that a new checkpoint inherits from its source's args, instead of this project's defaults."""
    names = ["hidden_dropout"]
    if spec.num_experts:
        names += ["moe_token_dispatcher_type"]
        names += ["moe_aux_loss_coeff"] if isinstance(source_args.get("moe_aux_loss_coeff"), list) else []
        # Sinkhorn weights experts by a softmax over all of them, whatever other attributes say.
        names += (
            ["moe_router_load_balancing_type"] if spec.moe_router_pre_softmax or not _is_sinkhorn(source_args) else []
        )
    return {name: source_args[name] for name in names if source_args.get(name) is not None}


#: `moe_router_dtype` by the dtype of a stored router that is wider than the model.
_ROUTER_DTYPES = {"float32": "fp32", "float64": "fp64"}


def router_dtype(spec: ModelSpec, dtype_of: Callable[[Ref], DType]) -> DType | None:
    """Widest dtype of any router; None for a model without routers."""
    dtypes = (dtype_of(ref) for ref in refs(spec) if ref.slot.keeps_precision)
    return max(dtypes, key=lambda dtype: dtype.itemsize, default=None)


def router_args(spec: ModelSpec, router: DType | None) -> dict[str, Any]:
    """Attributes of a router stored in dtype `router`, if that is wider than the model; else none.

    They set the dtype in which the router computes: `moe_router_dtype` in Megatron-LM (0.12 on), `moe_router_fp32` in Habana's.
    """
    if router is None or router.itemsize <= spec.dtype.itemsize:
        return {}
    return {"moe_router_dtype": _ROUTER_DTYPES[router.name], "moe_router_fp32": True}


def router_warnings(spec: ModelSpec, router: DType | None) -> list[str]:
    """Warning that Megatron-LM rounds the weights of a wider router (core/transformer/moe/router.py, `reset_parameters`)."""
    if not router_args(spec, router):
        return []
    return [
        f"warning: the router is stored in {router}, but Megatron-LM holds it in {spec.dtype} like other weights and rounds it "
        "when loading; --moe-router-dtype makes it compute in the wider dtype"
    ]


def stated_heads(args: argparse.Namespace) -> tuple[str, ...]:
    """`ModelSpec` fields of attention heads, which shapes do not determine, that `args` set explicitly."""
    values = vars(args)
    stated = {
        "num_attention_heads": values.get("num_attention_heads"),
        "num_query_groups": values.get("group_query_attention"),
        "kv_channels": values.get("kv_channels"),
    }
    return tuple(name for name, value in stated.items() if value)


def rank_invariants(iteration: Any, args: argparse.Namespace | None) -> dict[str, Any]:
    """Values that all ranks' files of one save have in common: iteration, model and parallel sizes.

    A file without an iteration or args gives none of these; a missing attribute of args counts as None.
    """
    found = {} if iteration is None else {"iteration": iteration}
    recorded = {} if args is None else {name: getattr(args, name, None) for name in _invariant_attributes()}
    # Objects, such as Megatron-LM's pipeline layout, never compare equal, but their representations do.
    return {**found, **{name: value if _is_plain(value) else repr(value) for name, value in recorded.items()}}


@lru_cache(maxsize=1)
def _invariant_attributes() -> tuple[str, ...]:
    """Attributes of which all ranks of one save record the same value: all that describe the model and how it is cut."""
    parallel = Parallel(1, (_EXAMPLE_SPEC.num_layers,))
    written = {
        **model_args(_EXAMPLE_SPEC),
        **layout_args(parallel, 1, 1, ""),
        **expert_args(_EXAMPLE_SPEC, parallel, STACKED),
        **router_args(_EXAMPLE_SPEC, BY_NAME["float32"]),
    }
    # A conversion also records the Hugging Face configuration, which has what these attributes cannot express.
    return tuple(sorted({*written, "hf_config"} - _PER_RANK))


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
                "the checkpoint's args have both llama3 and linear RoPE scaling; no supported model has both"
            )
        factor = values.get("rope_scaling_factor") or MEGATRON_LLAMA3.factor
        return RopeScaling("llama3", number(factor, "rope_scaling_factor"))
    return RopeScaling("linear", number(linear, "rotary_seq_len_interpolation_factor")) if linear else None


def _window(value: Any) -> int | None:
    """Sliding window as Hugging Face counts it: with the position itself, while Megatron-LM counts only those to its left."""
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
    """Attributes that describe the model, complete for `--use-checkpoint-args` of Megatron-LM 0.8 to 0.19."""
    scaling = spec.rope_scaling
    linear = scaling.factor if scaling is not None and scaling.kind == "linear" else None
    return {
        **{name: getattr(spec, field) for field, name in _ATTRIBUTES.items()},
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
    """Whole numbers as int, since Megatron-LM parses these options with `int`."""
    return int(value) if float(value).is_integer() else value


def seq_length_of(spec: ModelSpec, inherited: Mapping[str, Any]) -> int:
    """Sequence length of the source's training; by default the model's maximum, limited to `_DEFAULT_SEQ_LENGTH`."""
    length: int = inherited.get("seq_length") or min(_DEFAULT_SEQ_LENGTH, spec.max_position_embeddings)
    return length


#: Defaults for attributes of a training run; the source's own values take precedence.
RUN_DEFAULTS: dict[str, Any] = {
    "micro_batch_size": 1,
    "global_batch_size": 1024,
    "consumed_train_samples": 0,
    "consumed_valid_samples": 0,
    "seed": 1234,
}


def uncut_args(spec: ModelSpec, margs: argparse.Namespace | None) -> dict[str, Any]:
    """Attributes of an uncut model with sequential experts, as loaders send them; `margs` are the source's args."""
    return {
        **RUN_DEFAULTS,
        **plain_args(inheritable(margs)),
        **model_args(spec),
        **expert_args(spec, Parallel(1, (spec.num_layers,)), "sequential"),
    }


def layout_args(
    parallel: Parallel, padded_vocab: int, divisor: int, impl: str, ckpt_format: str = "torch"
) -> dict[str, Any]:
    """Attributes that describe how the checkpoint is cut, with expert sizes as for a dense model."""
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
    """Attributes of virtual stages: the layers of each, or their number where first or last stage differ in layers."""
    unset = {"num_layers_per_virtual_pipeline_stage": None, "num_virtual_stages_per_pipeline_rank": None}
    split = parallel.split
    if parallel.vpp == 1 or split.layout is not None:
        return unset
    if split.first is not None or split.last is not None:
        return {**unset, "num_virtual_stages_per_pipeline_rank": parallel.vpp}
    layers = sum(parallel.stages) + split.embedding + split.loss
    return {**unset, "num_layers_per_virtual_pipeline_stage": layers // len(parallel.stages)}


def plain_args(args: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes whose values are plain, torch dtypes or containers of these; others (enums, timers) are left out."""
    return {name: value for name, value in args.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, (str, int)) and _is_plain(item) for key, item in value.items())
    return value is None or type(value) in (bool, int, float, str) or isinstance(value, DType)
