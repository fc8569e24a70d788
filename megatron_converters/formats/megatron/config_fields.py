"""Fields of TransformerConfig and of model providers, turned into the attributes of `args` that mean the same.

`live/buildable_args.py` has the other direction. Names: Megatron-LM core_v0.8.0 to core_v0.19.0, transformer_config.py in
core/transformer, yaml_arguments.py and models/gpt.py in training; Megatron-Bridge 0.4, models/gpt_provider.py; NeMo 2.0 to 2.4,
collections/llm/gpt/model.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from typing import Any

from ...model.layers import GELU, QUICK_GELU, SILU, SQUARED_RELU
from .arguments import ARGUMENTS
from .bridge_providers import fields_of_provider
from .rows_layers import PACKAGE, said

#: Fields that have another name than the attribute of the same value.
_RENAMED = {
    "num_moe_experts": "num_experts",
    "seq_len_interpolation_factor": "rotary_seq_len_interpolation_factor",
    "rope_scaling": "use_rope_scaling",
    "seq_length": "max_position_embeddings",
    **{f"yarn_{name}": name for name in ("rotary_scaling_factor", "mscale", "mscale_all_dim")},
    **{row.config: row.attribute for row in ARGUMENTS if row.config},
}
#: NeMo's names of llama3 RoPE scaling, and MindSpeed-LLM's, whose program has no constants built in either.
_NEMO_SCALING = {
    "scale_factor": "rope_scaling_factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "old_context_len": "original_max_position_embeddings",
}
#: Last part of the name of a function that computes an activation, or the name that `--yaml-cfg` has for it. NeMo's own openai_gelu
#: is the tanh form in every case, which no argument says.
_ACTIVATIONS = {
    "silu": SILU,
    "swish": SILU,
    "swiglu": SILU,
    "gelu": GELU,
    "squared_relu": SQUARED_RELU,
    "squaredrelu": SQUARED_RELU,
    "quick_gelu": QUICK_GELU,
}
#: Layers by the names of Megatron-Bridge's functions that make their specs (models/olmoe, models/exaone).
_LAYER_SPECS = {"olmoe_layer_spec": "norms_over_heads", "exaone4_layer_spec": "post_norms"}
#: A function as `str` shows it, such as `<function silu at 0x7f>` or `<built-in function gelu>`.
_FUNCTION = re.compile(r"<(?:built-in )?function (\w+)")


def args_of_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes of `args` for fields; those that are no field of a model's are kept as they are."""
    fields = fields_of_provider(fields)
    values = {_attribute(name, fields): value for name, value in fields.items()}
    if not isinstance(values.get("use_rope_scaling"), (bool, type(None))):  # a fork's, and no switch
        values["rope_scaling"] = values.pop("use_rope_scaling")
    if "share_embeddings_and_output_weights" in values:
        values["untie_embeddings_and_output_weights"] = not values.pop("share_embeddings_and_output_weights")
    return {**values, **_heads(values), **_activation(values), **_layer(values), **_nemo_scaling(values)}


def _attribute(field: str, fields: Mapping[str, Any]) -> str:
    """Attribute of a field; its own name where the attribute is there, too."""
    attribute = _RENAMED.get(field, field)
    return field if attribute in fields else attribute


def _heads(values: Mapping[str, Any]) -> dict[str, Any]:
    """Query groups, which a config has always and args only where they are fewer than heads."""
    if "num_query_groups" not in values or "group_query_attention" in values:
        return {}
    heads, groups = values.get("num_attention_heads"), values["num_query_groups"]
    return {"group_query_attention": groups is not None and groups != heads, "num_query_groups": groups or heads}


def _activation(values: Mapping[str, Any]) -> dict[str, Any]:
    """Switches of the activation; none where it is not said, and the field itself where no switch says it."""
    if "activation_func" not in values:
        return {}
    value = values["activation_func"]
    named = _name_of(value)
    kind = _ACTIVATIONS.get(named)
    gated = bool(values.get("gated_linear_unit")) or named == "swiglu"
    if kind == SILU and gated:
        return {"swiglu": True}
    if kind == QUICK_GELU and gated:
        return {"swiglu": False, "quick_geglu": True}
    if kind == SQUARED_RELU and not gated:
        return {"swiglu": False, "squared_relu": True}
    if kind == GELU and not gated:
        # The fused kernel computes the tanh form, and only with biases, for which yaml_arguments.py, with bare names, has none.
        fused = bool(values.get("bias_activation_fusion")) and named != value
        return {"swiglu": False, "squared_relu": False, "bias_gelu_fusion": fused}
    return {"swiglu": False, "mlp_activation": f"{named}, {'gated' if gated else 'not gated'}"}


def _layer(values: Mapping[str, Any]) -> dict[str, Any]:
    """Layer that Megatron-LM lacks, by the spec of a provider's layers; none for others."""
    given = values.get("transformer_layer_spec")
    module, _, name = str(given.get("_target_") if isinstance(given, Mapping) else given).rpartition(".")
    if module.partition(".")[0] == PACKAGE:
        return {"spec": [module, name]}
    layer = _LAYER_SPECS.get(_name_of(given))
    return {} if layer is None else {"spec": said(layer)}


def _name_of(value: Any) -> str:
    """Name of a function: of an object in a YAML file, of its text, or the word that stands for it."""
    if isinstance(value, Mapping):
        value = value.get("_target_")
    text = str(value)
    found = _FUNCTION.match(text)
    return found[1] if found else text.rpartition(".")[2]


def _nemo_scaling(values: Mapping[str, Any]) -> dict[str, Any]:
    if "old_context_len" not in values:
        return {}
    scaling = {new: values[old] for old, new in _NEMO_SCALING.items() if old in values}
    return {"rope_scaling_type": "llama3", **scaling, **dict.fromkeys(("scale_factor", "old_context_len"))}


def value_of_text(value: Any) -> Any:
    """Value that a program has written as `str` of it: numbers, lists, None; other text stays."""
    if not isinstance(value, str):
        return value
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return value
