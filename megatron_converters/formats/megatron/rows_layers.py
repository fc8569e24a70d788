"""Layers that Megatron-LM lacks, and the argument with which `pretrain_gpt.py` takes them from this project's `megatron_layers`.

Source: Megatron-LM core_v0.12.0 to core_v0.19.0: `--spec MODULE NAME` of training/arguments.py names a `ModuleSpec`, which
pretrain_gpt.py, or gpt_builders.py from 0.15 on, imports. Up to 0.15 arguments.py refuses it together with experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ...basics.errors import Unclear, one_line
from ...model.layers import AFTER, ALL_HEADS, AROUND, BEFORE, RMS_NORM, Attention, Layer, Mlp
from ...model.spec import ModelSpec
from .argument import Args, Argument, Build, Properties, flag, one

PACKAGE, _SPEC = "megatron_layers", "spec"
#: How a training environment gets the package.
_INSTALL = "pip install --no-deps DIR, where DIR is a clone of megatron-converters"


class LayerKind(NamedTuple):
    """Layer of the package, by the properties in which it is not Megatron-LM's; `words` say what it computes."""

    words: str
    parallel_block: bool = False
    parallel_norms: bool = False
    block_norms: str = BEFORE
    over_heads: bool = False

    @property
    def properties(self) -> Properties:
        """Properties of a model that has it, but for norms of queries and keys of each head, which are an argument of their own."""
        blocks = {name: getattr(self, name) for name in ("parallel_block", "parallel_norms", "block_norms")}
        return blocks | ({"qk_norm": ALL_HEADS} if self.over_heads else {})


_OVER_HEADS = "norms of queries and keys over all heads together"
#: Layers of the package by the names of their modules.
KINDS: Mapping[str, LayerKind] = {
    "parallel": LayerKind(
        "attention and MLP in parallel, each on a norm of its own", parallel_block=True, parallel_norms=True
    ),
    "parallel_shared_norm": LayerKind("attention and MLP in parallel on one norm", parallel_block=True),
    "norms_over_heads": LayerKind(_OVER_HEADS, over_heads=True),
    "post_norms": LayerKind("norms after attention and MLP, and none before", block_norms=AFTER),
    "post_norms_over_heads": LayerKind(
        f"norms after attention and MLP, and none before, and {_OVER_HEADS}", block_norms=AFTER, over_heads=True
    ),
    "sandwich_norms": LayerKind("norms before and after both attention and MLP", block_norms=AROUND),
}
_NAMES = {kind._replace(words=""): name for name, kind in KINDS.items()}
_STOCK_LAYER = LayerKind("")
#: Values that programs have for Megatron-LM's own layers: none, and `--attention-backend local` with its `--spec local`.
_STOCK: tuple[Any, ...] = (None, [], ["local"])


def _own(layer: Layer) -> LayerKind:
    """What of a layer is not Megatron-LM's."""
    return LayerKind("", layer.parallel_block, layer.parallel_norms, layer.block_norms, layer.norms_over_heads)


def said(name: str) -> list[str]:
    """Value of `--spec` for a layer of the package."""
    return [f"{PACKAGE}.{name}", _SPEC]


def _name(spec: ModelSpec) -> str | None:
    """Name in the package of a model's layer; None for Megatron-LM's layers, and for those that nobody has."""
    return _NAMES.get(_own(spec.layer(0)))


def _said(spec: ModelSpec) -> list[str] | None:
    name = _name(spec)
    return None if name is None else said(name)


def name_of_layer(args: Args) -> str:
    """Name in the package of the layer that `args` name; empty for Megatron-LM's own. Raises `Unclear` for other layers."""
    value = args.get("spec")
    if value in _STOCK:
        return ""
    for name in KINDS:
        if value == said(name):
            return name
    raise Unclear(
        f"the checkpoint's args have spec={one_line(value)}, layers of a module that is not known here",
        "give the configuration of the model with --hf-config DIR",
        ("spec",),
    )


def _read(args: Args) -> Properties:
    name = name_of_layer(args)
    return KINDS[name].properties if name else {}


def _limit(spec: ModelSpec) -> str:
    kinds = [*dict.fromkeys(map(_own, spec.used))]
    own = next((kind for kind in kinds if kind != _STOCK_LAYER), _STOCK_LAYER)
    if own == _STOCK_LAYER:
        return ""
    name = _NAMES.get(own)
    if len(kinds) > 1:
        return f"{'; '.join(_words(own))}, in some layers: a model has layers of one kind with --spec"
    if name is None:
        what = "; ".join(_words(own))
        return f"{what}: neither Megatron-LM nor this project's {PACKAGE} has a layer with this together"
    lacking = [*_lacking(spec, KINDS[name])]
    if not lacking:
        return ""
    return f"{KINDS[name].words}, with {'; '.join(lacking)}: the layer {PACKAGE}.{name} has no such"


def _words(own: LayerKind) -> Iterator[str]:
    """What a layer has that Megatron-LM's has not, each in words."""
    norms = LayerKind("", block_norms=own.block_norms), LayerKind("", over_heads=own.over_heads)
    for part in (own._replace(block_norms=BEFORE, over_heads=False), *norms):
        if part in _NAMES:
            yield KINDS[_NAMES[part]].words


def _lacking(spec: ModelSpec, kind: LayerKind) -> Iterator[str]:
    """What of a model the layer lacks."""
    if spec.mtp:
        yield "layers of multi-token prediction (--without-mtp leaves them out)"
    if not all(isinstance(layer.mixer, Attention) for layer in spec.used):
        yield "attention of another kind in some layers"
    dense = [isinstance(layer.feed, Mlp) for layer in spec.used]
    if not all(dense) and (any(dense) or kind != KINDS["norms_over_heads"]):
        yield "experts" if not any(dense) else "experts in some layers"
    if spec.norm.normalization != RMS_NORM and (kind.over_heads or kind.block_norms != BEFORE):
        yield "LayerNorms"
    if spec.norm.zero_centred and kind.over_heads:
        yield "norms that are stored minus 1"


def layer_notes(spec: ModelSpec) -> Iterator[str]:
    """Note on the package that a model's layers come from."""
    name = _name(spec)
    if name is not None:
        yield (
            f"--spec {' '.join(said(name))} names a layer of this project's package {PACKAGE} ({KINDS[name].words}), which "
            f"whatever trains or runs the model must be able to import: {_INSTALL}"
        )


def _formerly(attribute: str, properties: Any) -> Argument:
    """Attribute by which earlier versions of this project recorded a layer, which is read, but not written any more."""
    return Argument(
        attribute,
        read=lambda args: properties if args.get(attribute) and not name_of_layer(args) else {},
        optional=True,
        build=Build.USED,
    )


LAYERS = (
    Argument(
        "spec",
        lambda context: _said(context.spec),
        _read,
        optional=True,
        limit=_limit,
        # Releases restore it, but whoever lacks the package should read here what is missing.
        flag=flag("--spec", one, lost=True, since="0.12", with_experts="0.16"),
        build=Build.USED,
    ),
    _formerly("qk_layernorm_over_heads", {"qk_norm": ALL_HEADS}),
    _formerly("parallel_block", {"parallel_block": True}),
    _formerly("parallel_norms", {"parallel_norms": True}),
)
