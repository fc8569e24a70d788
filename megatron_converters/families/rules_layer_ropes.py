"""Rules for rotary embeddings that differ between layers (Gemma 3), or that rotate a stated number of rows (MiniMax-M2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..basics.errors import ConversionError
from ..model.checks import is_whole, whole
from ..model.spec import ModelSpec
from .rules import Config, layer_count, per_layer
from .rules_attention import FULL, LINEAR, SLIDING, Rope, layer_types, types_of, widest, windows_of, written_scaling

_BASE, _LOCAL_BASE = "rope_theta", "rope_local_base_freq"
_TABLE, _SCALING = "rope_parameters", "rope_scaling"


@dataclass(frozen=True)
class LayerRopes:
    """Windows on all layers but every `pattern`-th, or as `layer_types` says; a base for them, and one with scaling for the others.

    `rope_parameters` has an object for each type of layer; older files have `rope_local_base_freq`, and `rope_theta` and
    `rope_scaling` of layers without a window. Defaults are those of Gemma 3's class in transformers 5.23.
    """

    window: int = 4096
    pattern: int = 6
    local: float = 10000.0
    full: float = 1000000.0
    keys: tuple[str, ...] = (
        *("sliding_window", "layer_types", "sliding_window_pattern", "_sliding_window_pattern"),
        *(_BASE, _LOCAL_BASE, _SCALING, _TABLE),
    )

    def read(self, config: Config) -> dict[str, Any]:
        window, types = config.get("sliding_window", self.window), self._types(config)
        if window is None and SLIDING in types:
            raise ConversionError(f"config.json has {SLIDING} in layer_types, but its sliding_window is null")
        windows = windows_of(types, window, layer_count(config))
        tables = self._tables(config)
        ropes = {kind: self._rope(kind).read({_TABLE: table}) for kind, table in tables.items()}
        if SLIDING in types and ropes[SLIDING]["rope_scaling"] is not None:
            raise ConversionError(
                f"config.json scales the rotary embeddings of {SLIDING}: {tables[SLIDING]!r:.200}; only those of {FULL} may be"
            )
        each = {name: per_layer([ropes[kind][name] for kind in types]) for name in ("rotary_base", "rope_scaling")}
        return {"sliding_window": per_layer(windows), **each}

    def unread(self, config: Config) -> list[str]:
        """Fields of the objects that their kinds of scaling do not know; none where `read` refuses the whole."""
        try:
            tables = self._tables(config)
        except ConversionError:
            return []
        return [field for kind, table in tables.items() for field in self._rope(kind).unread({_TABLE: table})]

    @property
    def _bases(self) -> tuple[tuple[str, float], tuple[str, float]]:
        """Types of layers, and the default of their base."""
        return (FULL, self.full), (SLIDING, self.local)

    def _rope(self, kind: str) -> Rope:
        """Rule of one type of layers."""
        return Rope(dict(self._bases)[kind], scalings=(LINEAR,))

    def _types(self, config: Config) -> list[str]:
        """Type of each layer."""
        keys = ("sliding_window_pattern", "_sliding_window_pattern")
        given = {config[key] for key in keys if is_whole(config.get(key)) and config[key] > 0}
        others = [key for key in keys if config.get(key) is not None and config[key] not in given]
        if others or len(given) > 1:
            shown = ", ".join(f"{key}={config[key]!r}" for key in keys if key in config)
            raise ConversionError(f"config.json has {shown}; it must be one number above 0")
        interval = given.pop() if given else self.pattern
        return layer_types(config) or [
            SLIDING if (layer + 1) % interval else FULL for layer in range(layer_count(config))
        ]

    def _tables(self, config: Config) -> dict[str, dict[str, Any]]:
        """What config.json says of the rotary embeddings of each type of layer, as transformers merges it."""
        given, scaling = config.get(_TABLE) or {}, config.get(_SCALING) or {}
        tables = {FULL: given.get(FULL), SLIDING: given.get(SLIDING)} if isinstance(given, dict) else {}
        if (
            not tables
            or given.keys() - tables
            or not all(isinstance(each, (dict, type(None))) for each in tables.values())
        ):
            raise ConversionError(
                f"config.json has {_TABLE}={given!r:.200}; it must have an object for each of {FULL} and {SLIDING}"
            )
        if not isinstance(scaling, dict):
            raise ConversionError(f"config.json has {_SCALING}={scaling!r:.200}; it must be an object or null")
        found = {kind: dict(table or {}) for kind, table in tables.items()}
        found[FULL].update(scaling)
        for kind, key in ((FULL, _BASE), (SLIDING, _LOCAL_BASE)):
            if config.get(key) is not None:
                found[kind].setdefault("rope_theta", config[key])
        return found

    def write(self, spec: ModelSpec) -> dict[str, Any]:
        types = types_of(spec)
        bases, scalings = spec.in_layers("rotary_base"), spec.in_layers("rope_scaling")
        of = {kind: number for number, kind in reversed([*enumerate(types)])}
        full, local = (bases[of[kind]] if kind in of else absent for kind, absent in self._bases)
        return {
            "sliding_window": widest(spec),
            "layer_types": types,
            _BASE: whole(full),
            _SCALING: written_scaling(scalings[of[FULL]]) if FULL in of else None,
            _LOCAL_BASE: whole(local),
        }


@dataclass(frozen=True)
class PartByDim(Rope):
    """Rotary embeddings whose part of a head older files say by its rows, `rotary_dim`; `size` is the default of a head's."""

    size: int = 128

    @property
    def keys(self) -> tuple[str, ...]:
        return (*super().keys, "rotary_dim")

    def read(self, config: Config) -> dict[str, Any]:
        rows, size = config.get("rotary_dim"), config.get("head_dim", self.size)
        if rows is not None and not (is_whole(rows) and is_whole(size) and 0 < rows <= size):
            raise ConversionError(f"config.json has rotary_dim={rows!r} of head_dim={size!r}; it must be a part of it")
        said = {} if rows is None else {self.partial_keys[0]: rows / size}
        return super().read({**said, **config})

    def write(self, spec: ModelSpec) -> dict[str, Any]:
        rows = spec.values.get("rotary_percent", 1.0) * (spec.values.get("kv_channels") or self.size)
        return {**super().write(spec), "rotary_dim": round(rows)}
