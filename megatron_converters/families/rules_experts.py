"""Rules for mixtures of experts: which layers have one, how many experts, and how they are chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..basics.errors import ConversionError
from ..model.checks import is_whole
from ..model.spec import ModelSpec
from .rules import Config, check_kinds, layer_count, list_of_names, per_layer


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
        dense = [layer in listed or (layer + 1) % step for layer in range(layer_count(config))]
        return {"feed": per_layer(["mlp" if each else "moe" for each in dense])} if dense else {}

    def write(self, spec: ModelSpec) -> dict[str, Any]:
        dense = [layer for layer, feed in enumerate(spec.in_layers("feed")) if feed == "mlp"]
        return {"mlp_only_layers": dense, "decoder_sparse_step": 1}


_SPARSE = {"dense": "mlp", "sparse": "moe"}


@dataclass(frozen=True)
class FirstDense:
    """Layers without experts at the beginning: their number, or as `mlp_layer_types` (transformers 5) lists them.

    Where a class reads the list alone (`listed`), it is written, too.
    """

    default: int
    listed: bool = False
    keys: tuple[str, ...] = ("first_k_dense_replace", "mlp_layer_types", "moe_layer_freq")

    def read(self, config: Config) -> dict[str, Any]:
        first, layers = config.get("first_k_dense_replace"), layer_count(config)
        first = self.default if first is None else first
        if not is_whole(first) or config.get("moe_layer_freq") not in (None, 1):
            raise ConversionError(
                f"config.json has first_k_dense_replace={first!r} and moe_layer_freq={config.get('moe_layer_freq')!r}; the "
                "first must be a number and the second 1"
            )
        types = list_of_names(config, "mlp_layer_types") or [
            "dense" if layer < first else "sparse" for layer in range(layers)
        ]
        check_kinds("mlp_layer_types", types, [*_SPARSE], layers)
        return {"feed": per_layer([_SPARSE[kind] for kind in types])} if types else {}

    def write(self, spec: ModelSpec) -> dict[str, Any]:
        feeds = spec.in_layers("feed")
        written: dict[str, Any] = {"first_k_dense_replace": [*feeds, "moe"].index("moe")}
        kinds = {feed: kind for kind, feed in _SPARSE.items()}
        return written | ({"mlp_layer_types": [kinds.get(feed, feed) for feed in feeds]} if self.listed else {})


@dataclass(frozen=True)
class Experts:
    """Number of experts, under its older and its newer key."""

    default: int
    keys: tuple[str, ...] = ("num_experts", "num_local_experts")
    #: Property that it decides.
    field: ClassVar[str] = "num_experts"

    def read(self, config: Config) -> dict[str, Any]:
        found = [config[key] for key in self.keys if config.get(key) is not None]
        if any(value != found[0] for value in found):
            raise ConversionError(f"config.json has {' and '.join(self.keys)}, but they differ: {found}")
        return {"num_experts": found[0] if found else self.default}

    def write(self, spec: ModelSpec) -> dict[str, Any]:
        return {self.keys[0]: spec.values.get("num_experts")}


@dataclass(frozen=True)
class OptionalExperts:
    """MiniCPM's experts instead of MLPs, where `num_experts` is not 0: of `expert_size` (BlockFFN), else of `intermediate_size`.

    Probabilities of the latter are normed. `dense_layer_ids` lists layers, from 0 on, without block experts.
    """

    topk: int
    keys: tuple[str, ...] = (
        *("num_experts", "num_experts_per_tok"),
        *("expert_size", "norm_after_router", "dense_layer_ids", "ffn_type", "router_act", "norm_scale"),
    )

    def read(self, config: Config) -> dict[str, Any]:
        count = config.get("num_experts") or 0
        if not count:
            return {}
        if config.get("expert_size") is not None:
            return self._block_experts(count, config)
        chosen = config.get("num_experts_per_tok")
        return {
            "num_experts": count,
            "moe_router_topk": self.topk if chosen is None else chosen,
            "moe_ffn_hidden_size": config.get("intermediate_size"),
            "moe_router_pre_softmax": False,
        }

    def _block_experts(self, count: Any, config: Config) -> dict[str, Any]:
        dense = config.get("dense_layer_ids") or []
        layers = layer_count(config)
        if not isinstance(dense, list) or not {*dense} <= {*range(layers)}:
            raise ConversionError(
                f"config.json has dense_layer_ids={dense!r}; it must be a list of layers below {layers}"
            )
        return {
            "feed": per_layer(["mlp" if layer in dense else "block experts" for layer in range(layers)]),
            "block_experts": count,
            "block_expert_size": config["expert_size"],
            "router_norm": config.get("norm_after_router", "rms") == "rms",
        }

    def write(self, spec: ModelSpec) -> dict[str, Any]:
        if spec.num_experts:
            return {"num_experts": spec.num_experts, "num_experts_per_tok": spec.values["moe_router_topk"]}
        if "block_experts" not in spec.values:
            return {}
        dense = [layer for layer, feed in enumerate(spec.in_layers("feed")) if feed == "mlp"]
        return {
            "num_experts": spec.values["block_experts"],
            "expert_size": spec.values["block_expert_size"],
            "norm_after_router": "rms" if spec.values["router_norm"] else "none",
            "dense_layer_ids": dense,
        }


@dataclass(frozen=True)
class NormTopkProb:
    """`norm_topk_prob`: normalizing the probabilities of the chosen experts equals a softmax over only these."""

    default: bool = False
    keys: tuple[str, ...] = ("norm_topk_prob",)

    def read(self, config: Config) -> dict[str, Any]:
        normalized = config.get("norm_topk_prob", self.default) or False
        if not isinstance(normalized, bool):
            raise ConversionError(f"norm_topk_prob is {normalized!r}; it must be true or false")
        return {"moe_router_pre_softmax": not normalized}

    def write(self, spec: ModelSpec) -> dict[str, Any]:
        return {"norm_topk_prob": not spec.values.get("moe_router_pre_softmax")}


@dataclass(frozen=True)
class SharedExperts:
    """Number of shared experts, each of `moe_intermediate_size`, which Megatron-LM and transformers compute as one.

    `size` is the class's default of that; the key has the number.
    """

    default: int
    size: int
    keys: tuple[str, ...] = ("n_shared_experts",)
    #: Property that it decides.
    field: ClassVar[str] = "shared_ffn_hidden_size"

    def read(self, config: Config) -> dict[str, Any]:
        count = config.get(self.keys[0], self.default) or 0
        size = config.get("moe_intermediate_size", self.size)
        if not is_whole(count) or not is_whole(size) or count < 0:
            raise ConversionError(
                f"config.json has {self.keys[0]}={count!r} and moe_intermediate_size={size!r}; they must be whole numbers"
            )
        return {"shared_ffn_hidden_size": count * size}

    def write(self, spec: ModelSpec) -> dict[str, Any]:
        size, shared = spec.values.get("moe_ffn_hidden_size"), spec.values.get("shared_ffn_hidden_size")
        if is_whole(size) and is_whole(shared) and shared % size == 0:
            return {self.keys[0]: shared // size}
        return {self.keys[0]: shared}  # reads back as another size


@dataclass(frozen=True)
class ExpertGroups:
    """Groups of experts, of which some are eligible for a token; one group is no limit."""

    default: tuple[int | None, int | None]
    keys: tuple[str, ...] = ("n_group", "topk_group")

    def read(self, config: Config) -> dict[str, Any]:
        groups, chosen = (config.get(key) or default for key, default in zip(self.keys, self.default, strict=True))
        if groups == chosen:  # all groups are eligible
            groups = chosen = None
        return {"moe_router_num_groups": groups, "moe_router_group_topk": chosen}

    def write(self, spec: ModelSpec) -> dict[str, Any]:
        groups, chosen = spec.values.get("moe_router_num_groups"), spec.values.get("moe_router_group_topk")
        return {"n_group": groups or 1, "topk_group": chosen or 1}
