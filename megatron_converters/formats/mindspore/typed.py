"""What a user types of a model whose weights have no configuration: options of the loader `core_mf`, and their defaults there.

Sizes that shapes tell need not be typed; one that is typed and disagrees is an error. Of a switch the names win, which is said.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ...basics.errors import UsageError
from ...model.layers import EACH_HEAD, LAYER_NORM, RMS_NORM


class Typed(NamedTuple):
    """Option: the property that it says, how its value is turned into that of the property, and its default in the original loader.

    `kind` is the type of its value, or the value that a switch stands for.
    """

    option: str
    field: str
    kind: Any
    default: str
    words: str
    is_size: bool = True

    @property
    def attribute(self) -> str:
        """Name of the attribute that argparse stores it in."""
        return self.option.removeprefix("--").replace("-", "_")

    @property
    def in_verbs(self) -> bool:
        """Whether the verbs have it, too: those that no shape tells."""
        return self.field in ("num_attention_heads", "num_query_groups", "kv_channels", *ASSUMED)


#: Options in the order of the documentation of MindSpore Transformers; the last ones are what that lacks.
TYPED = (
    Typed("--num-layers", "num_layers", int, "512", "Layers"),
    Typed("--hidden-size", "hidden_size", int, "512", "Hidden size"),
    Typed("--ffn-hidden-size", "ffn_hidden_size", int, "128", "Size of the MLP"),
    Typed("--num-attention-heads", "num_attention_heads", int, "64", "Query heads, which shapes do not tell"),
    Typed("--num-query-groups", "num_query_groups", int, "None", "Query groups"),
    Typed("--kv-channels", "kv_channels", int, "hidden size by heads", "Size of a head"),
    Typed("--max-position-embeddings", "max_position_embeddings", int, "2048", "Positions"),
    Typed("--rotary-base", "rotary_base", float, "10000", "Base of rotary embeddings"),
    Typed("--norm-epsilon", "norm_epsilon", float, "1e-05", "Epsilon of norms"),
    Typed("--normalization", "normalization", (RMS_NORM, LAYER_NORM), "RMSNorm", "Kind of norms", False),
    Typed("--add-bias-linear", "mlp_bias", True, "False", "Linears have biases", False),
    Typed("--add-qkv-bias", "qkv_bias", True, "False", "Queries, keys and values have biases", False),
    Typed("--qk-layernorm", "qk_norm", EACH_HEAD, "False", "Queries and keys are normed", False),
    Typed("--swiglu", "gated", True, "False", "The MLP has a gate", False),
    Typed("--untie-embeddings-and-output-weights", "tied", False, "False", "There is an output layer", False),
)
#: Properties that are not in the weights, and what is assumed where nothing says them: Megatron-LM's defaults.
ASSUMED: Mapping[str, Any] = {"rotary_base": 10000.0, "norm_epsilon": 1e-5, "max_position_embeddings": 2048}


def check_sizes(typed: Mapping[str, Any], known: Mapping[str, Any], where: str) -> None:
    """Raise `UsageError` for typed sizes that what is known contradicts, naming both."""
    wrong = [
        f"{row.option} {typed[row.field]} contradicts {known[row.field]} of {where}"
        for row in _given(typed)
        if row.is_size and known.get(row.field) is not None and known[row.field] != typed[row.field]
    ]
    if wrong:
        raise UsageError(f"{'; '.join(wrong)}; leave {'it' if len(wrong) == 1 else 'them'} out, or correct it")


def switch_notes(typed: Mapping[str, Any], known: Mapping[str, Any]) -> list[str]:
    """Warnings about typed switches that the names of the weights contradict."""
    return [
        f"warning: {row.option} contradicts the names of the weights, which win"
        for row in _given(typed)
        if not row.is_size and row.field in known and known[row.field] != typed[row.field]
    ]


def _given(typed: Mapping[str, Any]) -> Iterator[Typed]:
    return (row for row in TYPED if typed.get(row.field) is not None)
