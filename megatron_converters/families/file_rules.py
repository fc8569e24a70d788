"""Rules of a family file: the name of each, what it makes, and what it is given. `RULES` is the one table of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..model.spec import PROPERTIES
from . import rules_attention as attention
from . import rules_experts as experts
from . import rules_layer_kinds as kinds
from .defaults import Product, Quotient, SameAs
from .llama import head_dim, query_groups
from .place import Check, Place, chosen, listed, mapping, number, only, or_null, scalar, switch, text, texts, whole
from .rules import (
    Agreeing,
    Biases,
    Fixed,
    Implied,
    Multiple,
    Named,
    Passed,
    Reciprocal,
    Repeated,
    Restated,
    Row,
    Rule,
    overridden,
)
from .rules_context import InitialContext
from .rules_falcon import FalconBlocks
from .rules_layer_ropes import LayerRopes, PartByDim
from .rules_remote import BaichuanRelease, RopeRatio
from .rules_scaled_queries import ScaledQueries
from .rules_scales import DepthScale, QueryScalar, WidthScale

#: Properties that a rule may decide; the others are decided elsewhere.
_DECIDED = {name: name for name in sorted(PROPERTIES - {"family", "dtype"})}


@dataclass(frozen=True)
class Form:
    """Form of a rule or function in a file: what makes it, and checks of its parameters in the order of a list.

    A `whole` list is the only parameter's value instead of the values of several.
    """

    make: Callable[..., Any]
    required: Mapping[str, Check] = field(default_factory=dict)
    optional: Mapping[str, Check] = field(default_factory=dict)
    whole: bool = False

    def read(self, value: Any, more: Mapping[str, Any], place: Place) -> Any:
        """Make it of a value (a list, a mapping by parameter, null or the first parameter) and keys beside."""
        known = {**self.required, **self.optional}
        given = {**self._by_name(value, tuple(known), place), **more}
        only(given, place, known)
        missing = [name for name in self.required if name not in given]
        if missing:
            takes = ", ".join(known)
            raise place.fault(f"{missing[0]} is missing; give {takes}, in a list in this order or by these keys")
        return self.make(**{name: known[name](value, place.at(name)) for name, value in given.items()})

    def _by_name(self, value: Any, known: Sequence[str], place: Place) -> Mapping[str, Any]:
        if isinstance(value, dict):
            return value
        if value is None and not self.required:
            return {}
        values = value if isinstance(value, list) and not self.whole else [value]
        if len(values) > len(known):
            takes = f"{', '.join(known)} and nothing else" if known else "no value (null)"
            raise place.fault(f"there are {len(values)} values; it takes {takes}")
        return dict(zip(known, values, strict=False))


def _decided(value: Any, place: Place) -> str:
    return chosen(value, place, "property", _DECIDED)


def _decided_ones(value: Any, place: Place) -> tuple[str, ...]:
    return tuple(_decided(each, place.at(number)) for number, each in enumerate(listed(value, place), start=1))


def _spellings(value: Any, place: Place) -> tuple[tuple[str, ...], ...]:
    return tuple(texts(each, place.at(number)) for number, each in enumerate(listed(value, place), start=1))


def _computed(value: Any, place: Place) -> Any:
    """A plain value, or a function of the config."""
    return _one_of(FUNCTIONS, "function", value, place) if isinstance(value, dict) else scalar(value, place)


def _names(value: Any, place: Place) -> dict[Any, Any]:
    return {key: scalar(each, place.at(key)) for key, each in mapping(value, place).items()}


def _scalings(value: Any, place: Place) -> tuple[str, ...]:
    known = {
        name: name
        for name in (attention.LINEAR, attention.LLAMA3, attention.YARN, attention.LONGROPE, attention.DYNAMIC)
    }
    return tuple(chosen(each, place, "scaling", known) for each in texts(value, place))


def _pair(value: Any, place: Place) -> tuple[int, int]:
    numbers = [whole(each, place) for each in listed(value, place)]
    if len(numbers) != 2:
        raise place.fault(f"there are {len(numbers)} numbers; write two")
    return numbers[0], numbers[1]


def _rope(theta: float = 10000.0, partial: float | None = None, **more: Any) -> Rule:
    return attention.Rope(float(theta), partial, **more)


def _window(default: int | None = None) -> Rule:
    return attention.Window(default)


def _shared_experts(default: int, size: int, key: str = "n_shared_experts") -> Rule:
    return experts.SharedExperts(default, size, (key,))


def _query_scalar(default: int, size: int) -> Rule:
    return QueryScalar(default, head_dim(size))


def _part_by_dim(theta: float, size: int) -> Rule:
    return PartByDim(float(theta), 1.0, size=size)


def _listed_window(default: int | None = None, full: int = 0, last: bool = False) -> Rule:
    return kinds.ListedWindow(default, full, last)


FUNCTIONS: Mapping[str, Form] = {
    "key": Form(SameAs, {"key": text}),
    "quotient": Form(Quotient, {"dividend": text, "divisor": text}),
    "product": Form(Product, {"factor": whole, "key": text}),
}
_FIELD_AND_KEY: Mapping[str, Check] = {"field": _decided, "key": text}
RULES: Mapping[str, Form] = {
    "row": Form(Row, _FIELD_AND_KEY, {"default": _computed}),
    "named": Form(Named, {**_FIELD_AND_KEY, "names": _names}, {"default": scalar}),
    "reciprocal": Form(Reciprocal, _FIELD_AND_KEY, {"default": number}),
    "multiple": Form(Multiple, {**_FIELD_AND_KEY, "factor": whole}),
    "fixed": Form(Fixed, {"key": text, "value": scalar}, {"absent": scalar}),
    "restated": Form(Restated, {"key": text, "value": scalar}),
    "repeated": Form(Repeated, {"key": text, "other": text, "default": scalar}),
    "biases": Form(Biases, optional={"attention": switch, "mlp": switch, "attention_key": text, "mlp_key": text}),
    "implied": Form(Implied, {"field": _decided, "value": _computed}),
    "agreeing": Form(Agreeing, {"fields": _decided_ones, "spellings": _spellings}),
    "passed": Form(Passed, {"keys": texts}, whole=True),
    "query_groups": Form(query_groups, optional={"absent": or_null(whole)}),
    "rope": Form(_rope, optional={"theta": number, "partial": or_null(number), "scalings": _scalings}),
    "scaled_queries": Form(ScaledQueries),
    "initial_context": Form(InitialContext, {"default": whole}),
    "multi_query": Form(attention.MultiQuery, {"heads": text}, {"default": switch}),
    "window": Form(_window, optional={"default": or_null(whole)}),
    "switched_window": Form(attention.SwitchedWindow, optional={"switch": switch, "start": whole}),
    "windows_rotate": Form(kinds.WindowsRotate, {"window": whole, "pattern": whole}),
    "no_window": Form(attention.NoWindow),
    "listed_window": Form(_listed_window, optional={"default": or_null(whole), "full": whole, "last": switch}),
    "rotated_layers": Form(kinds.RotatedLayers, {"interval": whole}),
    "linear_attention": Form(attention.LinearAttention, {"interval": whole}),
    "indexers": Form(kinds.Indexers, {"may_share": switch}),
    "dense_layers": Form(experts.DenseLayers),
    "first_dense": Form(experts.FirstDense, {"default": whole}, {"listed": switch}),
    "experts": Form(experts.Experts, {"default": whole}),
    "norm_topk_prob": Form(experts.NormTopkProb, {"default": switch}),
    "shared_experts": Form(_shared_experts, {"default": whole, "size": whole}, {"key": text}),
    "expert_groups": Form(experts.ExpertGroups, {"default": _pair}, whole=True),
    "optional_experts": Form(experts.OptionalExperts, {"topk": whole}),
    "depth_scale": Form(DepthScale, {"default": number}, {"key": text}),
    "query_scalar": Form(_query_scalar, {"default": whole, "size": whole}),
    "width_scale": Form(WidthScale, {"default": number}, {"key": text}),
    "rope_ratio": Form(RopeRatio),
    "falcon_blocks": Form(FalconBlocks),
    "layer_ropes": Form(LayerRopes, optional={"window": whole, "pattern": whole, "local": number, "full": number}),
    "rope_by_type": Form(kinds.RopeByType, {"theta": number}),
    "part_by_dim": Form(_part_by_dim, {"theta": number, "size": whole}),
    "baichuan_release": Form(BaichuanRelease, {"normed_head": switch}),
}


def read_rules(value: Any, place: Place, inherited: Sequence[Rule]) -> tuple[Rule, ...]:
    """Rules of a file, after those of the base whose place none of them takes."""
    own = [_one_of(RULES, "rule", each, place.at(number)) for number, each in enumerate(listed(value, place), start=1)]
    return overridden(inherited, own)


def _one_of(forms: Mapping[str, Form], what: str, value: Any, place: Place) -> Any:
    """What a mapping describes, of which one key names the form."""
    given = mapping(value, place)
    if not given:
        raise place.fault(f"there is no {what}; known are {', '.join(forms)}")
    name = next((key for key in given if key in forms), next(iter(given)))
    form = chosen(name, place, what, forms)
    return form.read(given[name], {key: each for key, each in given.items() if key != name}, place.at(name))
