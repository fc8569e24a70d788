"""Rules of a family's table, which read and write config.json.

A rule claims config keys, reads them into `ModelSpec` fields and writes them back. A key that no rule claims is an error,
since it may change what the model computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ..basics.errors import ConversionError
from ..model.spec import ModelSpec, RopeScaling, is_whole, number

Config = Mapping[str, Any]
REQUIRED = object()


class Rule(Protocol):
    """Some config keys and the spec fields that they decide."""

    @property
    def keys(self) -> tuple[str, ...]: ...
    def read(self, config: Config) -> dict[str, Any]: ...
    def write(self, spec: ModelSpec) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Row:
    """One config key for one spec field. An absent or null key takes `default`, a value or a function of the config."""

    field: str
    key: str
    default: Any = REQUIRED

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key,)

    def read(self, config: Config) -> dict[str, Any]:
        value = config.get(self.key)
        if value is None:
            if self.default is REQUIRED:
                raise ConversionError(f"config.json has no {self.key}; it decides tensor shapes, so add it")
            value = self.default(config) if callable(self.default) else self.default
        return {self.field: value}

    def write(self, spec: ModelSpec) -> dict[str, Any]:
        return {self.key: getattr(spec, self.field)}


@dataclass(frozen=True)
class Fixed:
    """A config key that must have one value, because Megatron's model supports no other."""

    key: str
    value: Any

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key,)

    def read(self, config: Config) -> dict[str, Any]:
        value = config.get(self.key, self.value)
        if value != self.value:
            raise ConversionError(f"config.json has {self.key}={value!r}; only {self.value!r} can be converted")
        return {}

    def write(self, _: ModelSpec) -> dict[str, Any]:
        return {self.key: self.value}


@dataclass(frozen=True)
class Implied:
    """A spec field that the architecture decides without a config key (Qwen2 always has a QKV bias)."""

    field: str
    value: Any
    keys: tuple[str, ...] = ()

    def read(self, _: Config) -> dict[str, Any]:
        return {self.field: self.value}

    def write(self, _: ModelSpec) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class Rope:
    """Rotary base and scaling, in transformers 4's spelling (rope_theta, rope_scaling) or 5's (rope_parameters).

    Written in the older spelling, which both read.
    """

    default_theta: float = 10000.0
    keys: tuple[str, ...] = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")

    def read(self, config: Config) -> dict[str, Any]:
        table = config.get("rope_scaling") or config.get("rope_parameters") or {}  # the same order as in transformers
        if not isinstance(table, dict):
            raise ConversionError(f"config.json has {table!r} for its rotary embeddings; it must be an object or null")
        if any(isinstance(value, dict) for value in table.values()):
            raise ConversionError("config.json has rotary embeddings that differ by layer type; that is not supported")
        kind = str(table.get("rope_type") or table.get("type") or "default")
        theta = table.get("rope_theta", config.get("rope_theta")) or self.default_theta
        if any(where.get("partial_rotary_factor") not in (None, 1.0) for where in (table, config)):
            raise ConversionError(
                "config.json rotates only a part of each head (partial_rotary_factor); that is not supported"
            )
        return {"rotary_base": number(theta, "rope_theta"), "rope_scaling": _read_scaling(kind, table)}

    def write(self, spec: ModelSpec) -> dict[str, Any]:
        base = int(spec.rotary_base) if float(spec.rotary_base).is_integer() else spec.rotary_base
        return {"rope_theta": base, "rope_scaling": _write_scaling(spec.rope_scaling)}


_LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def _read_scaling(kind: str, table: dict[str, Any]) -> RopeScaling | None:
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", _required(table, "factor", kind))
    if kind == "llama3":
        factor, low, high, original = (_required(table, key, kind) for key in _LLAMA3_KEYS)
        return RopeScaling("llama3", factor, low, high, int(original))
    raise ConversionError(f"config.json has RoPE scaling of type {kind!r}; supported are default, linear and llama3")


def _required(table: dict[str, Any], key: str, kind: str) -> float:
    if key not in table:
        raise ConversionError(f"config.json has RoPE scaling of type {kind!r} without {key}")
    return number(table[key], key)


def _write_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    if scaling.kind == "linear":
        return {"rope_type": "linear", "type": "linear", "factor": scaling.factor}
    values = {key: getattr(scaling, key) for key in _LLAMA3_KEYS}
    return {"rope_type": "llama3", **values}


@dataclass(frozen=True)
class Window:
    """A sliding window on every layer (Mistral): null or absent means none, unless the class has a default."""

    default: int | None
    keys: tuple[str, ...] = ("sliding_window",)

    def read(self, config: Config) -> dict[str, Any]:
        return {"sliding_window": config.get("sliding_window", self.default)}

    def write(self, spec: ModelSpec) -> dict[str, Any]:
        return {"sliding_window": spec.sliding_window}


def layer_types(config: Config) -> list[str]:
    """Kind of attention of each layer, as transformers 5 lists it; empty if config.json does not."""
    types = config.get("layer_types") or []
    if not isinstance(types, list) or not all(isinstance(kind, str) for kind in types):
        raise ConversionError(f"config.json has layer_types={types!r}; it must be a list of names")
    return types


@dataclass(frozen=True)
class SwitchedWindow:
    """Qwen's window: off unless `use_sliding_window`, and only from layer `max_window_layers` on."""

    keys: tuple[str, ...] = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")

    def read(self, config: Config) -> dict[str, Any]:
        layers = config.get("num_hidden_layers", 0)
        window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
        start = config.get("max_window_layers", 28) if window is not None else 0
        if not is_whole(start) or not is_whole(layers):
            raise ConversionError(
                f"config.json has max_window_layers={start!r} of {layers!r} layers; they must be numbers"
            )
        types = layer_types(config)
        if window is not None and types:
            start = next((i for i, kind in enumerate(types) if kind == "sliding_attention"), layers)
            if types != ["full_attention"] * start + ["sliding_attention"] * (layers - start):
                raise ConversionError(
                    "config.json mixes full and sliding attention in layer_types; that is not supported"
                )
        if window is None or start >= layers:
            return {"sliding_window": None, "sliding_window_from": 0}
        return {"sliding_window": window, "sliding_window_from": start}

    def write(self, spec: ModelSpec) -> dict[str, Any]:
        used = spec.sliding_window is not None
        start = spec.sliding_window_from if used else spec.num_layers
        return {"use_sliding_window": used, "sliding_window": spec.sliding_window, "max_window_layers": start}


@dataclass(frozen=True)
class NoWindow:
    """Qwen's window, which must be off: transformers applies it to other layers in mixtures of experts than in dense models."""

    keys: tuple[str, ...] = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")

    def read(self, config: Config) -> dict[str, Any]:
        if config.get("use_sliding_window") or "sliding_attention" in layer_types(config):
            raise ConversionError(
                "config.json switches on a sliding window; that is not supported for Qwen's mixtures of experts"
            )
        return {"sliding_window": None}

    def write(self, _: ModelSpec) -> dict[str, Any]:
        return {"use_sliding_window": False, "sliding_window": None}


@dataclass(frozen=True)
class DenseLayers:
    """Qwen's layers without experts: those listed, and all except every `decoder_sparse_step`-th."""

    keys: tuple[str, ...] = ("mlp_only_layers", "decoder_sparse_step")

    def read(self, config: Config) -> dict[str, Any]:
        listed, step = config.get("mlp_only_layers") or [], config.get("decoder_sparse_step") or 1
        if not isinstance(listed, list) or not isinstance(step, int) or step < 1:
            raise ConversionError(
                f"config.json has mlp_only_layers={listed!r} and decoder_sparse_step={step!r}; "
                "they must be a list of layers and a whole number above 0"
            )
        count = config.get("num_hidden_layers")
        layers = range(count if isinstance(count, int) else 0)  # ModelSpec refuses anything else
        return {"dense_layers": tuple(layer for layer in layers if layer in listed or (layer + 1) % step)}

    def write(self, spec: ModelSpec) -> dict[str, Any]:
        return {"mlp_only_layers": list(spec.dense_layers), "decoder_sparse_step": 1}


@dataclass(frozen=True)
class Experts:
    """Number of experts, under its older and its newer key."""

    default: int
    keys: tuple[str, ...] = ("num_experts", "num_local_experts")

    def read(self, config: Config) -> dict[str, Any]:
        found = [config[key] for key in self.keys if config.get(key) is not None]
        if any(value != found[0] for value in found):
            raise ConversionError(f"config.json has num_experts and num_local_experts, but they differ: {found}")
        return {"num_experts": found[0] if found else self.default}

    def write(self, spec: ModelSpec) -> dict[str, Any]:
        return {"num_experts": spec.num_experts}


@dataclass(frozen=True)
class NormTopkProb:
    """`norm_topk_prob`: normalizing the probabilities of the chosen experts equals a softmax over only these."""

    keys: tuple[str, ...] = ("norm_topk_prob",)

    def read(self, config: Config) -> dict[str, Any]:
        normalized = config.get("norm_topk_prob") or False
        if not isinstance(normalized, bool):
            raise ConversionError(f"norm_topk_prob is {normalized!r}; it must be true or false")
        return {"moe_router_pre_softmax": not normalized}

    def write(self, spec: ModelSpec) -> dict[str, Any]:
        return {"norm_topk_prob": not spec.moe_router_pre_softmax}
