"""Megatron-LM arguments from which a model of megatron-core is built, by the table of arguments."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ..basics.errors import ConversionError, raise_all
from ..formats.megatron.argument import Build, Group, is_latent
from ..formats.megatron.arguments import ARGUMENTS
from ..formats.megatron.rows_activation import OWN_ACTIVATIONS
from ..formats.megatron.rows_positions import YARN
from ..formats.megatron.rows_yarn import has_yarn

#: Field that later releases lack; they behave as if it were False.
_ONLY_IN_0_16 = "moe_use_legacy_grouped_gemm"
#: Fields of the config of multi-latent attention that other models have no field for, and those that no flag sets in any release.
_LATENT_TOO = ("multi_latent_attention", "rotary_base", "rotary_percent")
_FLAGLESS = ("beta_fast", "beta_slow", "original_max_position_embeddings")
#: When arguments are written that only the config of multi-latent attention has fields for.
_OF_LATENT = (is_latent, has_yarn)
#: Attributes from which other attention takes YaRN, by the argument (0.19, `_apply_yarn_config_from_args`).
_YARN_FIELDS = {
    **{name: f"yarn_{name}" for name in ("rotary_scaling_factor", "mscale", "mscale_all_dim")},
    **{f"yarn_{name}": f"yarn_{name}" for name in ("original_max_position_embeddings", "beta_fast", "beta_slow")},
    "yarn_correction_range_round_to_int": "yarn_correction_range_round_to_int",
}
_EXPERTS = (Group.EXPERTS, Group.EXPERT_LAYOUT, Group.ROUTER)
_ROWS = {row.attribute: row for row in ARGUMENTS}
_PASSED = (Build.CONFIG, Build.OPTIONAL, Build.ENGINE)


def _names(builds: Collection[Build], *, experts: bool, latent: bool) -> list[str]:
    """Arguments that are built in one of these ways in a model with or without experts and multi-latent attention."""
    return [
        row.attribute
        for row in ARGUMENTS
        if row.build in builds and (experts or row.group not in _EXPERTS) and (latent or row.written not in _OF_LATENT)
    ]


def required(args: Mapping[str, Any]) -> list[str]:
    """Arguments that the args must have: their defaults would build another model, or fail."""
    experts, latent = bool(args.get("num_experts")), bool(args.get("multi_latent_attention"))
    names = _names((Build.CONFIG, Build.MODEL), experts=experts, latent=latent)
    named = args.get("squared_relu", False) or args.get("mlp_activation")
    return names if named or _is_gated(args) else [*names, "bias_gelu_fusion"]


def _is_gated(args: Mapping[str, Any]) -> bool:
    own = OWN_ACTIVATIONS.get(args.get("mlp_activation", ""))
    return bool(args.get("swiglu", True) or args.get("quick_geglu") or (own is not None and own[1]))


def config_fields(args: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of TransformerConfig, or of MLATransformerConfig, as far as the args have them."""
    experts, latent = bool(args.get("num_experts")), bool(args.get("multi_latent_attention"))
    names = _names(_PASSED, experts=experts, latent=latent)
    names = [name for name in names if latent or name not in _LATENT_TOO]
    fields = {_ROWS[name].config or name: args[name] for name in names if name in args}
    return fields | ({name: args[name] for name in (*_LATENT_TOO, *_FLAGLESS) if name in args} if latent else {})


def provider_fields(args: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a provider, as far as they are plain values: all but its activation.

    Config as built by Megatron-LM's `core_transformer_config_from_args` (0.16).
    """
    fields = config_fields(args)
    if not fields.get(_ONLY_IN_0_16):
        fields.pop(_ONLY_IN_0_16, None)
    if fields.get("rope_type", "") is None:  # Megatron-LM leaves it to the class, whose default is YaRN
        del fields["rope_type"]
    if args.get("num_experts"):
        fields |= {"num_moe_experts": args["num_experts"]}
    if args["position_embedding_type"] == YARN:
        fields |= {field: args[name] for name, field in _YARN_FIELDS.items() if args.get(name) is not None}
    return fields | dict(
        gated_linear_unit=_is_gated(args),
        num_query_groups=args["num_query_groups"] if args["group_query_attention"] else None,
        seq_length=args["max_position_embeddings"],
        share_embeddings_and_output_weights=not args["untie_embeddings_and_output_weights"],
        position_embedding_type=args["position_embedding_type"],
        rotary_percent=args["rotary_percent"],
        rotary_base=args["rotary_base"],
        rope_scaling=args["use_rope_scaling"],
        rope_scaling_factor=args["rope_scaling_factor"],
        seq_len_interpolation_factor=args["rotary_seq_len_interpolation_factor"],
        hidden_dropout=0.0,
        attention_dropout=args.get("attention_dropout", 0.0),
    )


def activation(args: Mapping[str, Any]) -> str:
    """Name of the activation of the MLPs, one of `model.layers.ACTIVATIONS`."""
    if args.get("quick_geglu"):
        return "quick_gelu"
    if args["swiglu"]:
        return "silu"
    if args.get("squared_relu", False):
        return "squared_relu"
    if args.get("mlp_activation"):
        return OWN_ACTIVATIONS[args["mlp_activation"]][0]
    return "gelu_tanh" if args["bias_gelu_fusion"] else "gelu"


def check(args: Mapping[str, Any], what: str) -> None:
    """Raise `ConversionError` for arguments that would be ignored: the model that is built would silently be another one.

    So are those for which megatron-core has only layers of Transformer Engine, which does not run on a CPU.
    """
    engine = needing_engine(args)
    if engine:
        raise ConversionError(
            f"{what}: megatron-core builds a model with {', '.join(engine)} from Transformer Engine's layers alone, which need "
            "a GPU; its logits cannot be computed here"
        )
    raise_all(f"{what}: megatron-core's model cannot be built here with", unheeded(args))


def unheeded(args: Mapping[str, Any]) -> list[str]:
    """Arguments, as `name=value`, with which no model is built here."""
    return [f"{name}={value!r}" for name, value in args.items() if not _is_heeded(name, value)]


def _is_heeded(name: str, value: Any) -> bool:
    row = _ROWS.get(name)
    return row is not None and (row.build is not Build.REFUSED or row.is_usual(value))


def needing_engine(args: Mapping[str, Any]) -> list[str]:
    """Arguments, as `name=value`, with which megatron-core's local layers cannot be the model."""
    return [
        f"{row.attribute}={args[row.attribute]!r}"
        for row in ARGUMENTS
        if row.build is Build.ENGINE and row.attribute in args and not row.is_usual(args[row.attribute])
    ]
