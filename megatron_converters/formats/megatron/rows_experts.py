"""Arguments of mixtures of experts.

Names: Megatron-LM core_v0.8.0 to core_v0.19.0, training/arguments.py and core/transformer/moe.
"""

from __future__ import annotations

from typing import Any

from ...basics.errors import ConversionError
from ...model.checks import number
from ...model.layers import SIGMOID, SOFTMAX
from ...model.spec import ModelSpec, PerLayer
from .argument import (
    Args,
    Argument,
    Build,
    Context,
    Group,
    Properties,
    flag,
    for_experts,
    frequency,
    off_switch,
    only,
    switch,
)
from .options import GROUPED, SINGLE, STACKED

#: Load balancing that differs in training only if several experts are chosen: their weights are then the softmax over all experts
#: (core/transformer/moe/router.py).
SINKHORN = "sinkhorn"
#: Load balancing types that choose experts by the router's probabilities.
_PLAIN_BALANCING = ("aux_loss", "seq_aux_loss", "global_aux_loss", "none")
#: `moe_router_dtype` by the dtype of a stored router that is wider than the model.
_ROUTER_DTYPES = {"float32": "fp32", "float64": "fp64"}


def has_experts(args: Args) -> bool:
    """Whether `args` describe a mixture of experts."""
    return bool(args.get("num_experts"))


def is_sinkhorn(args: Args) -> bool:
    """Whether experts are weighted by the softmax over all of them, whatever other arguments say."""
    return args.get("moe_router_load_balancing_type") in (SINKHORN, [SINKHORN])


def _read_experts(args: Args) -> Properties:
    return {"num_experts": args["num_experts"]} if has_experts(args) else {}


def _frequency(context: Context) -> int | list[int]:
    moe = [int(feed == "moe") for feed in context.per_layer("feed")]
    return 1 if all(moe) else moe


def _read_frequency(args: Args) -> Properties:
    """Layers with experts: N means the first of every N layers, a list has 0 or 1 per layer.

    Source: layer specs in core/models/gpt.
    """
    if not has_experts(args):
        return {"feed": "mlp"}
    freq, layers = args.get("moe_layer_freq", 1), args["num_layers"]
    if isinstance(freq, int) and freq > 0:
        moe = [layer % freq == 0 for layer in range(layers)]
    elif isinstance(freq, list) and len(freq) == layers:
        moe = [bool(kind) for kind in freq]
    else:
        raise ConversionError(
            f"the checkpoint's args have moe_layer_freq={freq!r}; it must be a number or a list of {layers} values, one per "
            "layer"
        )
    if len({*moe}) == 1:
        return {"feed": "moe" if moe[0] else "mlp"}
    return {"feed": PerLayer("moe" if each else "mlp" for each in moe)}


def _read_choice(args: Args) -> Properties:
    if not has_experts(args):
        return {}
    softmax = args.get("moe_router_score_function", SOFTMAX) == SOFTMAX
    return {
        "moe_router_topk": args.get("moe_router_topk") or 2,
        "moe_router_pre_softmax": softmax and (bool(args.get("moe_router_pre_softmax", False)) or is_sinkhorn(args)),
    }


def _one_expert_limit(spec: ModelSpec) -> str:
    values = spec.values
    softmax = values.get("moe_router_score_function") == SOFTMAX
    if not (spec.num_experts and softmax and values["moe_router_topk"] == 1 and not values["moe_router_pre_softmax"]):
        return ""
    return (
        "one expert for each token, with weight 1: Megatron-LM takes --moe-router-topk 1 only with "
        "--moe-router-pre-softmax, which weights it by its probability"
    )


def _groups_limit(spec: ModelSpec) -> str:
    groups, chosen = spec.values.get("moe_router_num_groups"), spec.values.get("moe_router_group_topk")
    if not groups or not chosen or spec.values["moe_router_topk"] // chosen == _SUMMED:
        return ""
    return (
        f"{spec.values['moe_router_topk']} experts from {chosen} of {groups} groups, whose scores are sums of the best "
        f"{_SUMMED}: Megatron-LM sums the best {spec.values['moe_router_topk'] // chosen} of a group"
    )


#: Experts whose scores make up that of their group in Hugging Face's models.
_SUMMED = 2


def _with_experts(name: str, field: str, default: Any) -> Any:
    def read(args: Args) -> Properties:
        if not has_experts(args):
            return {}
        value = args.get(name)
        return {field: default if value is None else value}

    return read


def _scaling(context: Context) -> Any:
    """Factor of the experts' outputs; None for 1, which is no factor."""
    factor = context.value("moe_router_topk_scaling_factor", 1.0)
    return None if factor == 1 else factor


def _score_function(args: Args) -> Properties:
    found = args.get("moe_router_score_function", SOFTMAX)
    if has_experts(args) and found not in (SOFTMAX, SIGMOID):
        raise ConversionError(
            f"the checkpoint's args have moe_router_score_function={found!r}; only {SOFTMAX!r} and {SIGMOID!r} are supported"
        )
    return {"moe_router_score_function": found} if has_experts(args) else {}


def _aux_loss(args: Args) -> Properties:
    """Auxiliary loss coefficient; of a list with one per load balancing type (core_v0.14 on) the first, as Hugging Face has one."""
    value = args.get("moe_aux_loss_coeff") or 0.0
    first = value[0] if isinstance(value, list) and value else value
    return {"moe_aux_loss_coeff": number(first, "moe_aux_loss_coeff")} if has_experts(args) else {}


def check_balancing(args: Args) -> None:
    """Raise `ConversionError` if experts are not weighted as their probabilities say."""
    balancing = args.get("moe_router_load_balancing_type") or "none"
    kinds = balancing if isinstance(balancing, list) else [balancing]
    sinkhorn = kinds == [SINKHORN] and args.get("moe_router_topk") != 1
    if has_experts(args) and not sinkhorn and not all(kind in _PLAIN_BALANCING for kind in kinds):
        raise ConversionError(
            f"the checkpoint's args have moe_router_load_balancing_type={balancing!r} with moe_router_topk="
            f"{args.get('moe_router_topk')!r}, which does not weight experts by a softmax; not supported"
        )


def wide_router(context: Context) -> str | None:
    """`moe_router_dtype` where the stored router is wider than the model; None where it is not."""
    router, dtype = context.router, context.spec.dtype
    return None if router is None or router.itemsize <= dtype.itemsize else _ROUTER_DTYPES[router.name]


def _has_biases(spec: ModelSpec) -> bool:
    return spec.num_experts > 0 and bool(spec.values.get("mlp_bias"))


def _router_dtype(context: Context) -> str | None:
    """Dtype in which the router computes. Hugging Face's models with sigmoid scores compute them in float32."""
    sigmoid = context.value("moe_router_score_function") == SIGMOID
    return wide_router(context) or ("fp32" if sigmoid else None)


def _groups(name: str) -> Argument:
    return Argument(
        name,
        lambda context: context.value(name),
        _with_experts(name, name, None),
        Group.EXPERTS,
        optional=name == "moe_router_group_topk",
        limit=_groups_limit if name == "moe_router_num_groups" else lambda _: "",
        flag=flag("--" + name.replace("_", "-"), lost=True, since="0.12"),
        build=Build.OPTIONAL,
    )


def _of_experts(name: str, write: Any, **more: Any) -> Argument:
    return Argument(name, write, group=Group.EXPERTS, written=for_experts, **more)


def _single(name: str, write: Any, since: str) -> Argument:
    """Switch of experts in one tensor."""
    words = flag("--" + name.replace("_", "-"), switch, lost=True, since=since)
    return _of_experts(name, write, optional=True, absent=False, flag=words)


EXPERTS = (
    Argument(
        "num_experts",
        lambda context: context.spec.num_experts or None,
        _read_experts,
        Group.EXPERTS,
        flag=flag("--num-experts", runs_since="0.11"),
    ),
    _of_experts(
        "moe_layer_freq",
        _frequency,
        read=_read_frequency,
        absent=1,
        flag=flag("--moe-layer-freq", frequency, default=1, since="0.10"),
        build=Build.CONFIG,
    ),
    _of_experts(
        "moe_ffn_hidden_size",
        lambda context: context.value("moe_ffn_hidden_size"),
        read=lambda args: (
            {"moe_ffn_hidden_size": args.get("moe_ffn_hidden_size") or args["ffn_hidden_size"]}
            if has_experts(args)
            else {}
        ),
        flag=flag("--moe-ffn-hidden-size", since="0.10"),
        build=Build.CONFIG,
    ),
    _of_experts(
        "moe_router_topk",
        lambda context: context.value("moe_router_topk"),
        read=_read_choice,
        limit=_one_expert_limit,
        flag=flag("--moe-router-topk"),
        build=Build.CONFIG,
    ),
    _of_experts(
        "moe_router_pre_softmax",
        lambda context: context.value("moe_router_pre_softmax"),
        absent=False,
        flag=flag("--moe-router-pre-softmax", switch),
        build=Build.CONFIG,
    ),
    Argument(
        "moe_router_score_function",
        lambda context: context.value("moe_router_score_function", SOFTMAX),
        _score_function,
        Group.EXPERTS,
        absent=SOFTMAX,
        flag=flag("--moe-router-score-function", lost=True, default=SOFTMAX, since="0.12"),
        build=Build.OPTIONAL,
    ),
    Argument(
        "moe_router_enable_expert_bias",
        lambda context: context.value("moe_router_enable_expert_bias", False),
        _with_experts("moe_router_enable_expert_bias", "moe_router_enable_expert_bias", False),
        Group.EXPERTS,
        absent=False,
        flag=flag("--moe-router-enable-expert-bias", switch, lost=True, since="0.12"),
        build=Build.OPTIONAL,
    ),
    Argument(
        "moe_router_topk_scaling_factor",
        _scaling,
        _with_experts("moe_router_topk_scaling_factor", "moe_router_topk_scaling_factor", 1.0),
        Group.EXPERTS,
        flag=flag("--moe-router-topk-scaling-factor", lost=True, since="0.12"),
        build=Build.OPTIONAL,
    ),
    _groups("moe_router_num_groups"),
    _groups("moe_router_group_topk"),
    only("moe_apply_probs_on_input", False, "experts whose inputs are scaled instead of their outputs"),
    only("moe_mlp_glu_interleave_size", None, "gate and up of experts in alternating blocks of rows"),
    only(
        "moe_shared_expert_glu_interleave_size",
        None,
        "gate and up of shared experts in alternating blocks of rows",
        optional=True,
    ),
    # core/transformer/transformer_config.py makes as many groups of it as there are expert-parallel ranks.
    only("moe_router_topk_limited_devices", None, "experts that are chosen from some ranks' alone", optional=True),
    only("moe_latent_size", None, "experts on projected inputs"),
    only("moe_router_force_load_balancing", False, "experts that are chosen at random", optional=True),
    Argument(
        "moe_router_dtype",
        _router_dtype,
        group=Group.ROUTER,
        optional=True,
        flag=flag("--moe-router-dtype", lost=True, since="0.12"),
    ),
    # Habana's name of the same.
    Argument(
        "moe_router_fp32",
        lambda context: wide_router(context) is not None,
        group=Group.ROUTER,
        optional=True,
        absent=False,
    ),
    _of_experts(
        "moe_router_load_balancing_type",
        lambda _: "aux_loss",
        flag=flag("--moe-router-load-balancing-type", lost=True),
        build=Build.OPTIONAL,
    ),
    _of_experts(
        "moe_aux_loss_coeff",
        lambda context: context.value("moe_aux_loss_coeff"),
        read=_aux_loss,
        flag=flag("--moe-aux-loss-coeff", lost=True, default=0.0),
    ),
    _of_experts(
        "moe_shared_expert_intermediate_size",
        lambda context: context.value("shared_ffn_hidden_size") or None,
        read=_with_experts("moe_shared_expert_intermediate_size", "shared_ffn_hidden_size", 0),
        flag=flag("--moe-shared-expert-intermediate-size", since="0.10"),
        build=Build.CONFIG,
    ),
    _of_experts(
        "moe_shared_expert_gate",
        lambda context: context.value("shared_gate"),
        read=_with_experts("moe_shared_expert_gate", "shared_gate", False),
        absent=False,
        flag=flag("--moe-shared-expert-gate", switch, lost=True, since="0.16"),
        build=Build.OPTIONAL,
    ),
    Argument(
        "moe_grouped_gemm",
        lambda context: bool(context.spec.num_experts) and context.expert_layout in (GROUPED, SINGLE, STACKED),
        group=Group.EXPERTS,
        absent=False,
        flag=flag("--moe-grouped-gemm", switch),
        build=Build.CONFIG,
    ),
    _of_experts(
        "moe_use_legacy_grouped_gemm",
        lambda context: context.expert_layout == STACKED,
        absent=False,
        flag=flag("--moe-use-legacy-grouped-gemm", switch, lost=True, since="0.11", until="0.16"),
        build=Build.OPTIONAL,
    ),
    # Transformer Engine's grouped experts refuse the fusion, which is on by default, together with biases (TEGroupedMLP).
    Argument(
        "bias_dropout_fusion",
        lambda context: False if context.expert_layout in (GROUPED, SINGLE) and _has_biases(context.spec) else None,
        group=Group.EXPERTS,
        optional=True,
        flag=flag("--no-bias-dropout-fusion", off_switch, lost=True),
    ),
    # Megatron-LM 0.18 knows it, but takes it with MXFP8 alone.
    _single("moe_single_grouped_weight", lambda context: context.expert_layout == SINGLE, since="0.19"),
    _single(
        "moe_single_grouped_bias",
        lambda context: context.expert_layout == SINGLE and _has_biases(context.spec),
        since="0.19",
    ),
    # Single grouped weights need it; it changes how experts are computed, not what.
    _single("use_transformer_engine_op_fuser", lambda context: context.expert_layout == SINGLE, since="0.18"),
    _of_experts("moe_dynamic_hpu", lambda context: context.expert_layout == "dynamic", absent=False),
    _of_experts("moe_token_dispatcher_type", lambda _: "alltoall", flag=flag("--moe-token-dispatcher-type", lost=True)),
)
