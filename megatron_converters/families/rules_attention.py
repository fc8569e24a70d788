"""Rules for rotary embeddings, sliding windows and the mixers of layers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import NoneType
from typing import Any

from ..basics.errors import ConversionError
from ..model.checks import check_size, is_whole, number, whole
from ..model.rotary import RopeScaling
from ..model.spec import ModelSpec
from .rules import Config, check_kinds, layer_count, list_of_names, per_layer

LINEAR, LLAMA3, YARN, LONGROPE, DYNAMIC = "linear", "llama3", "yarn", "longrope", "dynamic"
_ORIGINAL, ATTN_FACTOR = "original_max_position_embeddings", "attn_factor"
#: Older names of kinds of scaling.
_RENAMED = {"su": LONGROPE}


def scaling_table(config: Config) -> tuple[str, Any]:
    """Key and value of what config.json says of scaling; the order is that of transformers."""
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    return name, config.get(name) or {}


def _kind(table: dict[str, Any]) -> str:
    kind = str(table.get("rope_type") or table.get("type") or "default")
    return _RENAMED.get(kind, kind)


def _stated(name: str, keys: tuple[str, ...], table: dict[str, Any], config: Config) -> Any:
    """Value of a field of the scaling, which may stand outside of it under other names; None where nothing says it.

    What stands in the scaling takes precedence, as in transformers. Names outside that differ are refused, since which one counts
    depends on the program.
    """
    if table.get(name) is not None:
        return table[name]
    given = {key: config[key] for key in keys if config.get(key) is not None}
    values = [*given.values()]
    if any(value != values[0] for value in values):
        listed = " and ".join(f"{key}={value!r}" for key, value in given.items())
        raise ConversionError(f"config.json has {listed}, which mean the same; remove the one that is wrong")
    return values[0] if values else None


@dataclass(frozen=True)
class Rope:
    """Rotary base and scaling, in transformers 4's spelling (rope_theta, rope_scaling) or 5's (rope_parameters).

    Written in the older spelling, which both read. `partial` is the default of `partial_rotary_factor`, None where the
    architecture rotates whole heads. `scalings` are the kinds of scaling that the architecture's class computes, besides none;
    which of them Megatron-LM can express is another question. `original` is the default of
    `original_max_position_embeddings`, where the class has this key outside of the scaling, and then heeds no other. `kind_keys`
    name the kind of scaling. `absent` is the table that the class takes where config.json has none, as pairs. `theta_key` and
    `partial_keys` are the names of base and part outside of the scaling; of the latter the first is written. `beside` are keys of
    the table that decide nothing.
    """

    default_theta: float = 10000.0
    partial: float | None = None
    scalings: tuple[str, ...] = (LINEAR, LLAMA3, YARN, LONGROPE, DYNAMIC)
    original: int | None = None
    kind_keys: tuple[str, ...] = ("rope_type", "type")
    absent: tuple[tuple[str, Any], ...] = ()
    theta_key: str = "rope_theta"
    partial_keys: tuple[str, ...] = ("partial_rotary_factor",)
    beside: tuple[str, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        own = () if self.original is None else (_ORIGINAL,)
        return (self.theta_key, "rope_scaling", "rope_parameters", *self.partial_keys, *own)

    def read(self, config: Config) -> dict[str, Any]:
        table = self._given(config)
        if not isinstance(table, dict):
            raise ConversionError(f"config.json has {table!r} for its rotary embeddings; it must be an object or null")
        if any(isinstance(value, dict) for value in table.values()):
            raise ConversionError("config.json has rotary embeddings that differ by layer type; that is not supported")
        theta = _stated("rope_theta", (self.theta_key,), table, config) or self.default_theta
        scaling = self._scaling(_kind(table), table, config)
        found = {"rotary_base": number(theta, "rope_theta"), "rope_scaling": scaling}
        return {**found, **self._percent(table, config)}

    def _given(self, config: Config) -> Any:
        """Table of config.json, or the class's."""
        return scaling_table(config)[1] or dict(self.absent)

    def unread(self, config: Config) -> list[str]:
        """Fields of the scaling that its kind does not know; none where `read` refuses the whole."""
        name, table = scaling_table(config)
        if not isinstance(table, dict) or any(isinstance(value, dict) for value in table.values()):
            return []
        kind = _kind(table)
        if kind not in ("default", *self.scalings):
            return []
        known = {
            *_BESIDE,
            *self.beside,
            *_OTHER_KEYS.get(kind, ()),
            *(key for keys in _SCALING_KEYS.get(kind, ()) for key in keys),
        }
        return [f"{name}.{key}" for key, value in table.items() if key not in known and value is not None]

    def _percent(self, table: dict[str, Any], config: Config) -> dict[str, Any]:
        if self.partial is None:
            given = [where.get("partial_rotary_factor") for where in (table, config)]
            if any(value not in (None, 1.0) for value in given):
                raise ConversionError(
                    "config.json rotates only a part of each head (partial_rotary_factor); that is not supported"
                )
            return {}
        value = _stated("partial_rotary_factor", self.partial_keys, table, config)
        if value is None and config.keys().isdisjoint(self.partial_keys):  # null is no default: it crashes some classes
            value = self.partial
        return {"rotary_percent": number(value, "partial_rotary_factor")}

    def _scaling(self, kind: str, table: dict[str, Any], config: Config) -> RopeScaling | None:
        if kind == "default":
            return None
        if kind not in self.scalings:
            supported = " and ".join(filter(None, (", ".join(("default", *self.scalings[:-1])), self.scalings[-1])))
            raise ConversionError(f"config.json has RoPE scaling of type {kind!r}; supported are {supported}")
        if kind == DYNAMIC and table.get("alpha") is not None:
            raise ConversionError(
                "config.json has dynamic RoPE scaling with alpha, another rotary base; that is not supported"
            )
        if self.original is not None:
            table = {**table, _ORIGINAL: config.get(_ORIGINAL, self.original)}
        return _scaling_of(kind, table, config)

    def write(self, spec: ModelSpec) -> dict[str, Any]:
        base = whole(number(spec.values.get("rotary_base"), "rotary_base"))
        scaling = written_scaling(spec.values["rope_scaling"], self.kind_keys)
        if scaling is None and self.absent:  # the class would take its own table
            scaling = {"rope_type": "default"}
        written: dict[str, Any] = {self.theta_key: base, "rope_scaling": scaling}
        if self.original is not None and scaling is not None and _ORIGINAL in scaling:
            written[_ORIGINAL] = scaling[_ORIGINAL]
        return written if self.partial is None else {**written, self.partial_keys[0]: spec.values["rotary_percent"]}


#: Keys of each kind of scaling in config.json: required ones, and those that have a default.
_SCALING_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    LINEAR: (("factor",), ()),
    LLAMA3: (("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL), ()),
    YARN: (
        ("factor", _ORIGINAL),
        ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor"),
    ),
    LONGROPE: (("short_factor", "long_factor", _ORIGINAL), ("factor", "attention_factor")),
    DYNAMIC: (("factor",), ()),
}
#: Further keys of a kind, whose values are no plain numbers, or are refused.
_OTHER_KEYS = {YARN: ("truncate", ATTN_FACTOR), DYNAMIC: ("alpha",)}
_LISTS = ("short_factor", "long_factor")
#: Keys that any kind may have: which one it is, what is read elsewhere, a mark of YaRN's authors (Yarn-Llama-2-7b-128k), and
#: positions that transformers adds where it does not read them.
_BESIDE = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned", _ORIGINAL)
#: Keys where an image has a row of positions for each of its axes; those of a text are equal, which makes the rotations plain ones.
SECTIONS = ("mrope_section", "mrope_interleaved")


def _scaling_of(kind: str, table: dict[str, Any], config: Config) -> RopeScaling:
    """Scaling of a known kind."""
    if kind == YARN:  # as transformers has it; llama3 and LongRoPE mean nothing without theirs
        table = {_ORIGINAL: config.get("max_position_embeddings"), **table}
    required, optional = _SCALING_KEYS[kind]
    values: dict[str, Any] = {key: _required(table, key, kind) for key in required}
    values |= {key: number(table[key], key) for key in optional if table.get(key) is not None}
    if _ORIGINAL in values:
        values[_ORIGINAL] = int(values[_ORIGINAL])
    if kind == LONGROPE and "factor" not in values:
        values["factor"] = _extension(values[_ORIGINAL], config)
    if kind == YARN:
        values |= _yarn(table, values["factor"])
    return RopeScaling(kind, **values)


def _yarn(table: dict[str, Any], factor: float) -> dict[str, Any]:
    """Fields of YaRN that are no plain numbers.

    `attn_factor` (DeepSeek-R1-0528-Qwen3-8B) multiplies the usual attention factor in vLLM, and transformers does not read it: that
    the model is another than without must not be lost.
    """
    truncate, multiplied = table.get("truncate"), table.get(ATTN_FACTOR)
    if not isinstance(truncate, (bool, NoneType)):
        raise ConversionError(
            f"config.json has RoPE scaling of type 'yarn' with truncate={truncate!r}; it must be true or false"
        )
    found: dict[str, Any] = {} if truncate is None else {"truncate": truncate}
    if multiplied is not None and table.get("attention_factor") is None:
        usual = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
        found["attention_factor"] = number(multiplied, ATTN_FACTOR) * usual
    return found


def _required(table: dict[str, Any], key: str, kind: str) -> Any:
    if key not in table:
        raise ConversionError(f"config.json has RoPE scaling of type {kind!r} without {key}")
    return table[key] if key in _LISTS else number(table[key], key)


def _extension(original: int, config: Config) -> float:
    """Factor of LongRoPE that config.json leaves out: how much longer sequences may be than those of the original model."""
    longest = config.get("max_position_embeddings")
    if longest is None:
        raise ConversionError(
            "config.json has RoPE scaling of type 'longrope' without factor or max_position_embeddings"
        )
    return number(longest, "max_position_embeddings") / check_size(original, "original_max_position_embeddings")


def written_scaling(
    scaling: RopeScaling | None, kind_keys: tuple[str, ...] = ("rope_type", "type")
) -> dict[str, Any] | None:
    """Scaling as config.json has it; None for none. `kind_keys` name its kind."""
    if scaling is None:
        return None
    required, optional = _SCALING_KEYS[scaling.kind]
    values = {key: getattr(scaling, key) for key in (*required, *optional)}
    values = {key: list(value) if key in _LISTS else value for key, value in values.items() if value is not None}
    if not scaling.truncate:  # the default is left out, since older programs do not know the key
        values["truncate"] = False
    # transformers 4 knows these two under their older key, too
    named = {key: scaling.kind for key in kind_keys if scaling.kind != LLAMA3 or key != "type"}
    return {**named, **values}


@dataclass(frozen=True)
class MultiQuery:
    """Whether all heads, whose number is under the key `heads`, share one key and value, or each has its own (StarCoder)."""

    heads: str
    default: bool = True
    field: str = "num_query_groups"
    keys: tuple[str, ...] = ("multi_query",)

    def read(self, config: Config) -> dict[str, Any]:
        value = config.get("multi_query", self.default)
        if not isinstance(value, bool):
            raise ConversionError(f"config.json has multi_query={value!r}; it must be true or false")
        return {self.field: 1 if value else config.get(self.heads)}

    def write(self, spec: ModelSpec) -> dict[str, Any]:
        return {"multi_query": spec.values.get(self.field) == 1}


@dataclass(frozen=True)
class Causal:
    """Whether attention sees earlier tokens alone, which transformers 5 lets config.json switch off for every class.

    `use_bidirectional_attention` is its inverse in configurations of embedding models. A null `is_causal` is neither: transformers
    5.23 then hides later tokens with one kernel (sdpa) and not with another (eager).
    """

    keys: tuple[str, ...] = ("is_causal", "use_bidirectional_attention")

    def read(self, config: Config) -> dict[str, Any]:
        if config.get("use_bidirectional_attention"):
            return {"causal": False}
        value = config.get("is_causal", True)
        if not isinstance(value, bool):
            raise ConversionError(
                f"config.json has is_causal={value!r}, which some programs take for true and others for false; write which it is"
            )
        return {"causal": value}

    def write(self, spec: ModelSpec) -> dict[str, Any]:
        return {} if spec.causal else {"is_causal": False}


@dataclass(frozen=True)
class Window:
    """A sliding window on every layer (Mistral): null or absent means none, unless the class has a default."""

    default: int | None
    keys: tuple[str, ...] = ("sliding_window",)

    def read(self, config: Config) -> dict[str, Any]:
        return {"sliding_window": config.get("sliding_window", self.default)}

    def write(self, spec: ModelSpec) -> dict[str, Any]:
        return {"sliding_window": spec.values.get("sliding_window")}


FULL, SLIDING = "full_attention", "sliding_attention"


def layer_types(config: Config) -> list[str]:
    """Kind of attention of each layer, as transformers 5 lists it; empty if config.json does not."""
    return list_of_names(config, "layer_types")


def windows_of(types: list[str], window: Any, layers: int) -> list[Any]:
    """Window of each layer by its type; None for full attention. Raises `ConversionError` for types of other layers."""
    check_kinds("layer_types", types, (FULL, SLIDING), layers)
    return [window if kind == SLIDING else None for kind in types]


def types_of(spec: ModelSpec) -> list[str]:
    """Type of each layer by its window."""
    return [FULL if window is None else SLIDING for window in spec.in_layers("sliding_window")]


def widest(spec: ModelSpec) -> int | None:
    """Window of the layers that have one; None without any."""
    return max(filter(None, spec.in_layers("sliding_window")), default=None)


@dataclass(frozen=True)
class SwitchedWindow:
    """Qwen's window: off unless `use_sliding_window`, and only from layer `max_window_layers` on, or as `layer_types` says.

    `switch` is false for classes that do not read the first key. `start` is the default of the second.
    """

    switch: bool = True
    start: int = 28
    keys: tuple[str, ...] = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")

    def read(self, config: Config) -> dict[str, Any]:
        layers = config.get("num_hidden_layers", 0)
        on = config.get("use_sliding_window") or not self.switch
        window = config.get("sliding_window", 4096) if on else None
        start = config.get("max_window_layers", self.start) if window is not None else 0
        if not is_whole(start) or not is_whole(layers):
            raise ConversionError(
                f"config.json has max_window_layers={start!r} of {layers!r} layers; they must be numbers"
            )
        types = layer_types(config)
        if not is_whole(window):  # none, or what no attention takes
            return {"sliding_window": window}
        layers = layer_count(config)
        types = types or [FULL if layer < start else SLIDING for layer in range(layers)]
        return {"sliding_window": per_layer(windows_of(types, window, layers))}

    def write(self, spec: ModelSpec) -> dict[str, Any]:
        types, window = types_of(spec), widest(spec)
        start = types.index(SLIDING) if SLIDING in types else spec.num_layers
        written = {
            **({"use_sliding_window": window is not None} if self.switch else {}),
            "sliding_window": window,
            "max_window_layers": start,
        }
        return {**written, "layer_types": types} if FULL in types[start:] else written


@dataclass(frozen=True)
class NoWindow:
    """Qwen's window, which must be off: transformers applies it to other layers in mixtures of experts than in dense models."""

    keys: tuple[str, ...] = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")

    def read(self, config: Config) -> dict[str, Any]:
        if config.get("use_sliding_window") or SLIDING in layer_types(config):
            raise ConversionError(
                "config.json switches on a sliding window; that is not supported for Qwen's mixtures of experts"
            )
        return {"sliding_window": None}

    def write(self, _: ModelSpec) -> dict[str, Any]:
        return {"use_sliding_window": False, "sliding_window": None}


LINEAR_ATTENTION = "linear_attention"
_MIXERS = {FULL: "attention", LINEAR_ATTENTION: "gated delta"}


@dataclass(frozen=True)
class LinearAttention:
    """Layers with linear attention: those that `layer_types` lists, else all but every `full_attention_interval`-th."""

    interval: int
    keys: tuple[str, ...] = ("layer_types", "full_attention_interval")

    def read(self, config: Config) -> dict[str, Any]:
        layers, interval = layer_count(config), config.get("full_attention_interval") or self.interval
        if not is_whole(interval) or interval < 1:
            raise ConversionError(f"config.json has full_attention_interval={interval!r}; it must be a number above 0")
        types = layer_types(config) or [LINEAR_ATTENTION if (layer + 1) % interval else FULL for layer in range(layers)]
        check_kinds("layer_types", types, [*_MIXERS], layers)
        if FULL not in types:
            raise ConversionError(
                "config.json describes a model without any layer of full attention; that is not supported"
            )
        return {"mixer": per_layer([_MIXERS[kind] for kind in types])}

    def write(self, spec: ModelSpec) -> dict[str, Any]:
        kinds = {mixer: kind for kind, mixer in _MIXERS.items()}
        return {"layer_types": [kinds.get(mixer, mixer) for mixer in spec.in_layers("mixer")]}
