"""Rules for what layers differ in: which have rotary embeddings, and which a sliding window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..basics.errors import ConversionError
from ..model.checks import is_whole
from ..model.spec import ModelSpec
from .rules import Config, check_kinds, layer_count, list_of_names, per_layer
from .rules_attention import FULL, SLIDING, Rope, layer_types, types_of, widest, windows_of

#: Kind of attention of layers that attend to the positions of an indexer, and the kinds of these, by their letters.
INDEXED = "indexed_attention"
_INDEXERS = {"F": "full", "S": "shared"}


@dataclass(frozen=True)
class ListedWindow:
    """A sliding window on the layers that `layer_types` lists, else on all but one of every `full`: the first, or the last.

    0 is on all. Null means no window; absent, the class's `default`.
    """

    default: int | None
    full: int = 0
    last: bool = False
    keys: tuple[str, ...] = ("sliding_window", "layer_types")

    def read(self, config: Config) -> dict[str, Any]:
        window, types, layers = config.get("sliding_window", self.default), layer_types(config), layer_count(config)
        if self.full:
            types = types or [SLIDING if (layer + self.last) % self.full else FULL for layer in range(layers)]
        if window is None and SLIDING in types:
            raise ConversionError(f"config.json has {SLIDING} in layer_types, but its sliding_window is null")
        if window is None or not types:
            return {"sliding_window": window}
        return {"sliding_window": per_layer(windows_of(types, window, layers))}

    def write(self, spec: ModelSpec) -> dict[str, Any]:
        return {"sliding_window": widest(spec), "layer_types": types_of(spec)}


@dataclass(frozen=True)
class RotatedLayers:
    """Layers with rotary embeddings, those with 1 in `no_rope_layers`, and the window, which the others have by default.

    Without the list every `no_rope_layer_interval`-th layer has none. transformers 5.23, models/smollm3.
    """

    interval: int
    keys: tuple[str, ...] = (
        *("no_rope_layers", "no_rope_layer_interval"),
        *("use_sliding_window", "sliding_window", "layer_types"),
    )

    def read(self, config: Config) -> dict[str, Any]:
        rotated, types = self._rotated(config), layer_types(config)
        window = config.get("sliding_window")
        if not config.get("use_sliding_window") or window is None:
            if SLIDING in types:
                raise ConversionError(
                    f"config.json has {SLIDING} in layer_types, but no sliding_window that use_sliding_window switches on; "
                    "programs differ in what they make of that, so write which it is"
                )
            return {"rope": per_layer(rotated), "sliding_window": None}
        types = types or [FULL if has else SLIDING for has in rotated]
        return {"rope": per_layer(rotated), "sliding_window": per_layer(windows_of(types, window, layer_count(config)))}

    def _rotated(self, config: Config) -> list[bool]:
        layers, listed = layer_count(config), config.get("no_rope_layers")
        interval = config.get("no_rope_layer_interval", self.interval)
        if listed is None and is_whole(interval) and interval > 1:
            return [bool((layer + 1) % interval) for layer in range(layers)]
        if not isinstance(listed, list) or len(listed) < layers or not all(has in (0, 1) for has in listed):
            raise ConversionError(
                f"config.json has no_rope_layers={listed!r} and no_rope_layer_interval={interval!r}; the first must have 1 (with "
                f"rotary embeddings) or 0 for each of {layers} layers, or be absent and the second a number above 1"
            )
        if not any(listed[:layers]):
            raise ConversionError(
                "config.json describes a model without rotary embeddings in any layer; that is not supported"
            )
        return [has == 1 for has in listed[:layers]]

    def write(self, spec: ModelSpec) -> dict[str, Any]:
        window = widest(spec)
        return {
            "no_rope_layers": [int(bool(has)) for has in spec.in_layers("rope")],
            "use_sliding_window": window is not None,
            "sliding_window": window,
            "layer_types": types_of(spec),
        }


@dataclass(frozen=True)
class Indexers:
    """Layers with an indexer of their own, "full", and those that share one, as `indexer_types` lists them, if they `may_share`.

    Without the list `index_topk_pattern` says it ("FSSF"), or a rhythm: beyond the first ones every N-th layer has one.
    transformers 5.23, models/glm_moe_dsa. Its other lists say of all layers that their attention is indexed.
    """

    may_share: bool
    keys: tuple[str, ...] = (
        *("layer_types", "indexer_types", "index_topk_pattern"),
        *("index_topk_freq", "index_skip_topk_offset"),
    )
    #: Property that it decides.
    field: ClassVar[str] = "shared_indexer"

    def read(self, config: Config) -> dict[str, Any]:
        layers, kinds = layer_count(config), layer_types(config)
        if {*kinds} not in (set(), {INDEXED}, {FULL}):
            raise ConversionError(f"config.json has layer_types={kinds!r}; only {INDEXED} can be converted")
        types = self._types(config, layers)
        check_kinds("indexer_types", types, [*_INDEXERS.values()], layers)
        if types[:1] == [_INDEXERS["S"]] or not (self.may_share or {*types} <= {_INDEXERS["F"]}):
            raise ConversionError(
                f"config.json has layers that share an indexer ({types!r:.80}), "
                + ("but the first has none before it" if self.may_share else "which its class does not know")
            )
        return {"shared_indexer": per_layer([kind == _INDEXERS["S"] for kind in types])}

    def _types(self, config: Config, layers: int) -> list[str]:
        listed, pattern = list_of_names(config, "indexer_types"), config.get("index_topk_pattern")
        if isinstance(pattern, str):
            pattern = [_INDEXERS.get(letter, letter) for letter in pattern]
        if listed or pattern:
            return listed or list_of_names({"index_topk_pattern": pattern}, "index_topk_pattern")
        freq, offset = config.get("index_topk_freq", 1), config.get("index_skip_topk_offset", 2)
        if not (is_whole(freq) and is_whole(offset)):
            raise ConversionError(
                f"config.json has index_topk_freq={freq!r} and index_skip_topk_offset={offset!r}; they must be whole numbers"
            )
        return [_INDEXERS["S" if max(layer - offset + 1, 0) % max(freq, 1) else "F"] for layer in range(layers)]

    def write(self, spec: ModelSpec) -> dict[str, Any]:
        if not self.may_share:
            return {}
        return {"indexer_types": [_INDEXERS["S" if each else "F"] for each in spec.in_layers("shared_indexer")]}


@dataclass(frozen=True)
class WindowsRotate:
    """Layers with a sliding window, which alone have rotary embeddings: as `layer_types` says, else all but every N-th.

    Without a window all have. transformers 5.23, models/exaone4 and exaone_moe. `window` and `pattern` are defaults of the last two
    keys.
    """

    window: int
    pattern: int
    keys: tuple[str, ...] = ("layer_types", "sliding_window", "sliding_window_pattern")

    def read(self, config: Config) -> dict[str, Any]:
        window = config.get("sliding_window", self.window)
        interval = config.get("sliding_window_pattern", self.pattern)
        layers, types = layer_count(config), layer_types(config)
        if window is None and SLIDING not in types:
            return {"rope": True, "sliding_window": None}
        if not is_whole(window) or not (types or (is_whole(interval) and interval > 0)):
            raise ConversionError(
                f"config.json has sliding_window={window!r} and sliding_window_pattern={interval!r}; they must be numbers above 0, "
                "the second unless layer_types lists the layers"
            )
        types = types or [SLIDING if (layer + 1) % interval else FULL for layer in range(layers)]
        windows = windows_of(types, window, layers)
        if types and SLIDING not in types:
            raise ConversionError(
                f"config.json has {FULL} in all layers and a sliding_window; programs differ in whether such a model has rotary "
                "embeddings at all, so it cannot be converted"
            )
        return {"rope": per_layer([kind == SLIDING for kind in types]), "sliding_window": per_layer(windows)}

    def write(self, spec: ModelSpec) -> dict[str, Any]:
        return {"layer_types": types_of(spec), "sliding_window": widest(spec)}


@dataclass(frozen=True)
class RopeByType:
    """Rotary embeddings of full attention and of layers with a window, each with a table of their own, which must say the same.

    `rope_parameters` has both. Older files have `rope_theta` and `rope_scaling`, which transformers 5.23 takes for layers of full
    attention alone (models/olmo3). `theta` is the base where nothing says it.
    """

    theta: float
    keys: tuple[str, ...] = ("rope_theta", "rope_scaling", "rope_parameters")

    def read(self, config: Config) -> dict[str, Any]:
        found = {
            kind: Rope(self.theta).read({"rope_parameters": table}) for kind, table in self._tables(config).items()
        }
        used = [found[kind] for kind in dict.fromkeys(layer_types(config) or (FULL, SLIDING)) if kind in found]
        if any(each != used[0] for each in used):
            raise ConversionError(
                "config.json has other rotary embeddings for layers of full attention than for those with a sliding window; "
                "Megatron-LM has one kind for all layers, and no layer can bring another"
            )
        return used[0] if used else found[FULL]

    def _tables(self, config: Config) -> dict[str, dict[str, Any]]:
        nested = config.get("rope_parameters") or {}
        known = {FULL, SLIDING}
        if not isinstance(nested, dict) or not {*nested} <= known:
            raise ConversionError(
                f"config.json has rope_parameters={nested!r}; it must have an object for each of {' and '.join(sorted(known))}"
            )
        tables = {kind: dict(nested.get(kind) or {}) for kind in (FULL, SLIDING)}
        tables[FULL] |= config.get("rope_scaling") or {}
        tables[FULL].setdefault("rope_theta", config.get("rope_theta"))
        return tables

    def write(self, spec: ModelSpec) -> dict[str, Any]:
        written = Rope(self.theta).write(spec)
        table = {"rope_type": "default", **(written["rope_scaling"] or {}), "rope_theta": written["rope_theta"]}
        return {"rope_parameters": {FULL: table, SLIDING: dict(table)}}
