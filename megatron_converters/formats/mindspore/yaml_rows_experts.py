"""Keys of MindSpore Transformers' `model_config` of mixtures of experts.

Source: mindformers 1.6.0 to 2.1.0, parallel_core/transformer_config.py and training_graph/transformer/moe.
"""

from __future__ import annotations

from typing import Any

from ...basics.errors import ConversionError, one_line
from ...model.checks import is_whole
from ...model.layers import SIGMOID, SOFTMAX
from ...model.spec import ModelSpec, PerLayer
from .names import Dialect
from .row import Config, Properties, Row

#: Experts whose scores make up that of their group in Hugging Face's models.
_SUMMED = 2


def has_experts(config: Config) -> bool:
    """Whether a configuration describes a mixture of experts."""
    return bool(config["num_moe_experts"])


def _of_experts(key: str, *synonyms: str, field: str = "", absent: Any = None, **more: Any) -> Row:
    """Key of a property that only mixtures of experts have."""
    field = field or key

    def read(config: Config) -> Properties:
        return {field: config[key]} if has_experts(config) else {}

    def write(dialect: Dialect) -> Any:
        return dialect.spec.values.get(field) if dialect.spec.num_experts else None

    return Row((key, *synonyms), write, read, absent, **more)


# -- layers with experts


def _is_moe(spec: ModelSpec) -> list[bool]:
    return [feed == "moe" for feed in spec.in_layers("feed")]


def _first_dense(dialect: Dialect) -> int | None:
    """Number of dense layers that all others follow; None where there are none, or where they are not all at the start."""
    moe = _is_moe(dialect.spec)
    first = moe.index(True) if True in moe else 0
    return first if first and all(moe[first:]) else None


def _frequency(dialect: Dialect) -> int | list[int] | None:
    """1 where all layers have experts, a list of 1 for each that has them, or None where `_first_dense` says it."""
    moe = _is_moe(dialect.spec)
    if not any(moe) or _first_dense(dialect) is not None:
        return None
    return 1 if all(moe) else list(map(int, moe))


def _read_layers(config: Config) -> Properties:
    if not has_experts(config):
        return {"feed": "mlp"}
    layers, first, freq = config["num_layers"], config["first_k_dense_replace"], config["moe_layer_freq"]
    if is_whole(first) and first > 0 and is_whole(layers):
        moe = [layer >= first for layer in range(layers)]
    elif is_whole(freq) and freq > 0 and is_whole(layers):
        moe = [layer % freq == 0 for layer in range(layers)]
    elif isinstance(freq, list) and len(freq) == layers:
        moe = [bool(each) for each in freq]
    else:
        raise ConversionError(
            f"moe_layer_freq is {one_line(freq)}; it must be a number or a list of {one_line(layers)} values, one per layer"
        )
    if len({*moe}) == 1:
        return {"feed": "moe" if moe[0] else "mlp"}
    return {"feed": PerLayer("moe" if each else "mlp" for each in moe)}


# -- the router


def _score(config: Config) -> str:
    """Score function; the older `use_gating_sigmoid` is a switch."""
    value = config["moe_router_score_function"]
    found = value if isinstance(value, str) else SIGMOID if value else SOFTMAX
    if found not in (SOFTMAX, SIGMOID):
        raise ConversionError(
            f"moe_router_score_function is {one_line(found)}; only softmax and sigmoid can be converted"
        )
    return found


def _normalised(dialect: Dialect) -> bool | None:
    """Whether scores of the chosen experts are divided by their sum; those of a softmax are then one over these alone."""
    if not dialect.spec.num_experts:
        return None
    return not dialect.spec.values.get("moe_router_pre_softmax")


def _read_normalised(config: Config) -> Properties:
    if not has_experts(config):
        return {}
    if _score(config) == SIGMOID:
        if not config["norm_topk_prob"]:
            raise ConversionError(
                "norm_topk_prob is false with sigmoid scores; only scores that are divided by their sum can be converted"
            )
        return {"moe_router_pre_softmax": False}
    # The score of a single expert is never divided (training_graph's router.py).
    return {"moe_router_pre_softmax": not config["norm_topk_prob"] or config["moe_router_topk"] == 1}


def _one_expert_limit(spec: ModelSpec) -> str:
    values = spec.values
    softmax = values.get("moe_router_score_function") == SOFTMAX
    if spec.num_experts and softmax and values["moe_router_topk"] == 1 and not values["moe_router_pre_softmax"]:
        return "one expert for each token with weight 1: it is weighted by its probability"
    return ""


def _groups_limit(spec: ModelSpec) -> str:
    values = spec.values
    groups, chosen, topk = (values.get(f"moe_router_{name}") for name in ("num_groups", "group_topk", "topk"))
    if not groups or not chosen or topk // chosen == _SUMMED:
        return ""
    return (
        f"{topk} experts from {chosen} of {groups} groups, whose scores are sums of the best {_SUMMED}: it sums the best "
        f"{topk // chosen} of a group"
    )


def _bias_limit(spec: ModelSpec) -> str:
    biased = spec.values.get("moe_router_enable_expert_bias")
    softmax = spec.values.get("moe_router_score_function") == SOFTMAX
    return "a bias of the choice of experts with softmax scores" if spec.num_experts and biased and softmax else ""


# -- shared experts


def _shared_size(dialect: Dialect) -> int | None:
    return (dialect.spec.values.get("shared_ffn_hidden_size") or None) if dialect.spec.num_experts else None


def _read_shared(config: Config) -> Properties:
    """Size of all shared experts together, by default that of their number of routed ones."""
    if not has_experts(config):
        return {}
    size, number = config["moe_shared_expert_intermediate_size"], config["shared_expert_num"] or 0
    return {"shared_ffn_hidden_size": number * _expert_size(config) if size is None else size}


def _expert_size(config: Config) -> Any:
    """Size of an expert, by default that of a dense MLP."""
    sizes = (config["moe_ffn_hidden_size"], config["ffn_hidden_size"])
    return next((size for size in sizes if size is not None), 4 * (config["hidden_size"] or 0))


EXPERTS = (
    Row(
        ("num_moe_experts", "num_experts", "n_routed_experts", "expert_num"),
        lambda dialect: dialect.spec.num_experts or None,
        lambda config: {"num_experts": config["num_moe_experts"]} if has_experts(config) else {},
    ),
    Row(
        ("moe_ffn_hidden_size", "moe_intermediate_size"),
        lambda dialect: dialect.spec.values.get("moe_ffn_hidden_size") if dialect.spec.num_experts else None,
        lambda config: {"moe_ffn_hidden_size": _expert_size(config)} if has_experts(config) else {},
    ),
    Row(("first_k_dense_replace",), _first_dense),
    Row(("moe_layer_freq",), _frequency, _read_layers, absent=1),
    _of_experts("moe_router_topk", "num_experts_per_tok", "num_experts_chosen", absent=2, limit=_one_expert_limit),
    Row(
        ("moe_router_score_function", "scoring_func", "use_gating_sigmoid"),
        lambda dialect: dialect.spec.values.get("moe_router_score_function") if dialect.spec.num_experts else None,
        lambda config: {"moe_router_score_function": _score(config)} if has_experts(config) else {},
        absent=SOFTMAX,
    ),
    Row(("norm_topk_prob",), _normalised, _read_normalised, absent=True),
    _of_experts("moe_router_enable_expert_bias", "balance_via_topk_bias", absent=False, limit=_bias_limit),
    _of_experts("moe_router_topk_scaling_factor", "routed_scaling_factor", absent=1.0),
    _of_experts("moe_router_num_groups", "n_group", limit=_groups_limit),
    _of_experts("moe_router_group_topk", "topk_group"),
    _of_experts("moe_aux_loss_coeff", absent=0.0),
    Row(("shared_expert_num", "n_shared_experts"), lambda dialect: None if _shared_size(dialect) is None else 1),
    Row(("moe_shared_expert_intermediate_size",), _shared_size, _read_shared),
    _of_experts("use_shared_expert_gating", field="shared_gate", absent=False),
    Row(("moe_grouped_gemm",), lambda dialect: True if dialect.spec.num_experts else None),
)
