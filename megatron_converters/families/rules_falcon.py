"""Rule for query groups and norms of Falcons, by their architecture. transformers 5.23, models/falcon."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..basics.errors import ConversionError
from ..model.spec import ModelSpec
from .rules import Config

_NEW, _PARALLEL, _NORMS = "new_decoder_architecture", "parallel_attn", "num_ln_in_parallel_attn"


@dataclass(frozen=True)
class FalconBlocks:
    """Query groups, and norms of parallel blocks, by the architecture: the second has any number of groups, and one norm or two.

    The first has one group (`multi_query`) or as many as heads, and one norm.
    """

    keys: tuple[str, ...] = (_NEW, "multi_query", "num_kv_heads", _PARALLEL, _NORMS)

    def read(self, config: Config) -> dict[str, Any]:
        new, shares, parallel = (
            _switch(config, key, default) for key, default in ((_NEW, False), ("multi_query", True), (_PARALLEL, True))
        )
        norms, heads = config.get(_NORMS), config.get("num_attention_heads")
        norms = (2 if new else 1) if norms is None else norms
        if norms not in ((1, 2) if new else (1,)) or not parallel:
            raise ConversionError(
                f"config.json has {_NEW}={new}, {_PARALLEL}={parallel} and {_NORMS}={norms!r}; of Falcons only those of parallel "
                "blocks are converted, on one norm, or with the first on two"
            )
        groups = config.get("num_kv_heads") if new or not shares else 1
        if not (new or shares) and groups not in (None, heads):
            raise ConversionError(f"config.json has num_kv_heads={groups!r}, but neither {_NEW} nor multi_query")
        return {"num_query_groups": heads if groups is None else groups, "parallel_norms": norms == 2}

    def write(self, spec: ModelSpec) -> dict[str, Any]:
        groups, heads = spec.values.get("num_query_groups"), spec.values.get("num_attention_heads")
        apart = bool(spec.values["parallel_norms"])
        new = apart or groups not in (1, heads)
        written = {_NEW: new, "multi_query": groups == 1 or new, "num_kv_heads": groups, _PARALLEL: True}
        return written | ({_NORMS: 2 if apart else 1} if new else {})


def _switch(config: Config, key: str, default: bool) -> bool:
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise ConversionError(f"config.json has {key}={value!r}; it must be true or false")
    return value
