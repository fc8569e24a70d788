"""Arguments of the activation of MLPs and experts.

Names: Megatron-LM core_v0.8.0 to core_v0.19.0, training/arguments.py and core/transformer/transformer_config.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...model.layers import GELU, GELU_TANH, QUICK_GELU, RELU, SILU, SQUARED_RELU, Mlp
from ...model.spec import ModelSpec
from .argument import Args, Argument, Build, Context, Properties, flag, off_switch, switch
from .options import GROUPED

#: Activations of a gated MLP that a flag sets.
_GATED = (SILU, QUICK_GELU)
#: What remains of a model that no flag says, where this project builds it.
LIVE_ONLY = "the model works live only, through AutoBridge"


def _read_activation(args: Args) -> Properties:
    if args.get("quick_geglu"):
        return {"activation": QUICK_GELU, "gated": True}
    if args.get("swiglu", True):
        return {"activation": SILU, "gated": True}
    if args.get("squared_relu"):
        return {"activation": SQUARED_RELU, "gated": False}
    # The fused kernel of bias and GELU is the tanh form; Megatron-LM uses it unless --no-bias-gelu-fusion (core/fusions).
    fused = args.get("bias_gelu_fusion", True) and args.get("add_bias_linear", True)
    return {"activation": GELU_TANH if fused else GELU, "gated": False}


def _gates(activation: str) -> Callable[[Context], bool]:
    """Whether MLPs are gated by an activation."""
    return lambda context: bool(context.value("gated", True)) and context.value("activation", SILU) == activation


def _fuses_gelu(context: Context) -> bool | None:
    """Whether bias and activation are one kernel; None where Megatron-LM's default does not matter.

    Its kernel of a quick GELU applies the limit before it adds the bias, which grouped experts alone have added by then, and MLPs
    have no such kernel (core/fusions/fused_bias_geglu.py, core/transformer/mlp.py, 0.15 to 0.19).
    """
    if context.value("gated", True):
        fused = context.expert_layout == GROUPED and not any(isinstance(kind.feed, Mlp) for kind in context.spec.used)
        return False if context.value("activation", SILU) == QUICK_GELU and not fused else None
    return bool(context.value("activation") == GELU_TANH)


def _activation_limit(spec: ModelSpec) -> str:
    activation, gated = spec.values.get("activation", SILU), spec.values.get("gated", True)
    if gated and activation not in (*_GATED, GELU_TANH):
        return (
            f"a gated MLP with {activation}: Megatron-LM's only flags of a gated MLP, --swiglu and --quick-geglu, have silu and "
            "quick_gelu"
        )
    if not gated and activation in _GATED:
        return f"an MLP of {activation} without a gate: Megatron-LM has no flag for it"
    if activation == GELU_TANH and not gated and not spec.values.get("mlp_bias"):
        return "the tanh form of GELU in an MLP without biases: Megatron-LM computes it in a kernel that needs biases"
    return ""


#: Activations of an MLP that no switch says, and whether it is gated, in the words of `config_fields.py`, which name a function;
#: the first of several is written. Megatron-core's `fast_gelu` is the tanh form.
OWN_ACTIVATIONS = {
    "relu, not gated": (RELU, False),
    "gelu_tanh, gated": (GELU_TANH, True),
    "fast_gelu, gated": (GELU_TANH, True),
}
#: What these are for people, and how a model provider says them.
_NO_SWITCH = {
    "relu, not gated": ("an MLP of ReLU", "activation_func"),
    "gelu_tanh, gated": (
        "a gated MLP with the tanh form of GELU (--swiglu has silu, --quick-geglu another function)",
        "gated_linear_unit and activation_func=fast_gelu",
    ),
}


def _own_activation(spec: ModelSpec) -> str | None:
    """MLP that no switch says, in the words of `config_fields.py`."""
    held = spec.values.get("activation"), spec.values.get("gated", True)
    return next((words for words, own in OWN_ACTIVATIONS.items() if own == held), None)


def _read_own_activation(args: Args) -> Properties:
    own = OWN_ACTIVATIONS.get(args.get("mlp_activation", ""))
    return {} if own is None else dict(zip(("activation", "gated"), own, strict=True))


def _own_activation_limit(spec: ModelSpec) -> str:
    own = _own_activation(spec)
    if own is None:
        return ""
    what, how = _NO_SWITCH[own]
    return (
        f"{what}: Megatron-LM has no flag for it; AutoBridge's live models compute it, and a model provider with {how}"
    )


def _of_quick_gelu(name: str, usual: Any, what: str) -> Argument:
    """What Megatron-LM has with a quick GELU alone: its kernel of silu computes without it, or refuses it."""

    def read(args: Args) -> Properties:
        return {name: usual if args.get(name) is None else args[name]}

    def limit(spec: ModelSpec) -> str:
        value = spec.values.get(name, usual)
        if value == usual or spec.values.get("activation") == QUICK_GELU:
            return ""
        return f"{what} of {value} in MLPs of {spec.values.get('activation', SILU)}: Megatron-LM has it with --quick-geglu alone"

    shown = flag("--" + name.replace("_", "-"), lost=True, default=usual, since="0.15")
    return Argument(
        name,
        lambda context: context.value(name, usual),
        read,
        absent=usual,
        limit=limit,
        flag=shown,
        build=Build.OPTIONAL,
    )


ACTIVATION = (
    Argument(
        "swiglu",
        _gates(SILU),
        _read_activation,
        absent=True,
        limit=_activation_limit,
        flag=flag("--swiglu", switch),
        build=Build.MODEL,
    ),
    Argument(
        "squared_relu",
        lambda context: context.value("activation") == SQUARED_RELU,
        absent=False,
        flag=flag("--squared-relu", switch, lost=True),  # before 0.10 the checkpoint does not restore it
        build=Build.USED,
    ),
    Argument(
        "bias_gelu_fusion",
        _fuses_gelu,
        optional=True,
        flag=flag("--no-bias-gelu-fusion", off_switch, lost=True),
        build=Build.USED,
    ),
    # This project's own, for a function in the configuration of a model that no switch says (`config_fields.py`).
    Argument(
        "mlp_activation",
        lambda context: _own_activation(context.spec),
        _read_own_activation,
        optional=True,
        neutral=tuple(OWN_ACTIVATIONS),
        meaning="an activation that no supported model has",
        limit=_own_activation_limit,
        build=Build.OWN,
    ),
    Argument(
        "quick_geglu",
        _gates(QUICK_GELU),
        absent=False,
        flag=flag("--quick-geglu", switch, lost=True, since="0.15"),
        build=Build.USED,
    ),
    _of_quick_gelu("glu_linear_offset", 0.0, "an offset"),
    _of_quick_gelu("activation_func_clamp_value", None, "a limit"),
    Argument("openai_gelu", lambda _: False),
)
