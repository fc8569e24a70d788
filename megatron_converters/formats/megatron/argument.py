"""Row of the table of Megatron-LM's arguments: an attribute of `args`, what it says of a model, its flag, and its releases."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from ...basics.dtypes import DType
from ...model.layers import Latent
from ...model.spec import ModelSpec
from ...sharding.ranks import Parallel
from .options import SEPARATE
from .releases import latest

Args = Mapping[str, Any]
Properties = dict[str, Any]


class Group(Enum):
    """Subject of an argument."""

    MODEL = "model"
    EXPERTS = "experts"
    ROUTER = "dtype of the router"
    RUN = "training run"
    LAYOUT = "layout"
    EXPERT_LAYOUT = "layout of experts"
    TOKENIZER = "tokenizer"
    LOAD = "load"


class Build(Enum):
    """How the builder of `verify --logits` takes an argument."""

    #: Passed to TransformerConfig; a checkpoint must have it.
    CONFIG = "config"
    #: The same, but Megatron-LM's default applies where it is absent.
    OPTIONAL = "optional"
    #: The same; megatron-core builds any value but that of `absent` from Transformer Engine's layers alone.
    ENGINE = "engine"
    #: Used by the builder itself; a checkpoint must have it.
    MODEL = "model"
    #: The same, but Megatron-LM's default applies where it is absent.
    USED = "used"
    #: The same, by classes of this project for what Megatron-LM lacks, so that the argument's limit does not hold there.
    OWN = "own"
    #: Changes nothing of what a model computes in float32, or repeats other arguments.
    NOTHING = "nothing"
    #: Not built: any value but that of `absent` is refused.
    REFUSED = "refused"


@dataclass(frozen=True)
class Context:
    """What arguments are written for: a model and how its checkpoint is cut and named. `router` is the dtype of stored routers."""

    spec: ModelSpec
    parallel: Parallel
    expert_layout: str = "sequential"
    padded_vocab: int = 0
    divisor: int = 1
    impl: str = ""
    ckpt_format: str = "torch"
    router: DType | None = None
    mla_layout: str = SEPARATE

    def value(self, name: str, default: Any = None) -> Any:
        """Property of the model, `default` where it has none."""
        return self.spec.values.get(name, default)

    def per_layer(self, name: str) -> list[Any]:
        """Property in each layer."""
        return self.spec.in_layers(name)


@dataclass(frozen=True)
class Flag:
    """Flag of `pretrain_gpt.py` that sets an argument.

    `words` turns the value into the words after the flag, or None to leave the flag out; it is also left out for the value
    `default`, which Megatron-LM uses anyway, and if none of the attributes `needs` is true. `restored` is whether the flag is
    unnecessary for loading: `--use-checkpoint-args` restores the attribute in every release from 0.8 on (0.10 for experts), or a
    loaded model does not need it; parallel sizes are never restored. `since` and `until` are the first and last release that know
    the flag.
    Releases before `effective_since` parse the flag but ignore it when they build the model; `instead` says what to do there.
    Those before `since` do what the value `implied` says without the flag. `runs_since` is the first release that was seen to run
    such a model (tests/test_releases.py), where the flag is older. `built_as` is the value with which the `pretrain_gpt.py` of
    every known release builds the model, whatever the flag says. `later` are the first releases that heed some values.
    `with_experts` is the first release that takes it beside experts, if that is a later one.
    """

    name: str
    words: Callable[[Any], tuple[str, ...] | None]
    restored: bool = True
    default: Any = None
    needs: tuple[str, ...] = ()
    since: str = ""
    until: str = ""
    effective_since: str = ""
    instead: str = ""
    implied: Any = None
    runs_since: str = ""
    built_as: Any = None
    later: Mapping[Any, str] = field(default_factory=dict)
    with_experts: str = ""

    def since_value(self, value: Any) -> str:
        """First release that heeds the flag with this value."""
        return latest(self.since, self.effective_since, self.later.get(value, "") if self.later else "")

    def matters(self, args: Args) -> bool:
        """Whether args have what the flag is about."""
        return not self.needs or any(args.get(name) for name in self.needs)


def one(value: Any) -> tuple[str, ...] | None:
    """Shell words of a plain value; a list has several. None leaves the flag out."""
    if value is None:
        return None
    return tuple(map(str, value)) if isinstance(value, (list, tuple)) else (str(value),)


def switch(value: Any) -> tuple[str, ...] | None:
    """No words for a true value, else None."""
    return () if value else None


def off_switch(value: Any) -> tuple[str, ...] | None:
    """No words for a false value, else None."""
    return () if value is not None and not value else None


def joined(value: Any) -> tuple[str, ...] | None:
    """One word for a sequence, joined by commas."""
    return None if value is None else (",".join(map(str, value)),)


def frequency(value: Any) -> tuple[str, ...] | None:
    """Words for a number, or for a list in brackets, which Megatron-LM evaluates."""
    return ("[" + ",".join(map(str, value)) + "]",) if isinstance(value, list) else one(value)


def always(_: ModelSpec) -> bool:
    """Whether an argument of every model is written."""
    return True


def for_experts(spec: ModelSpec) -> bool:
    """Whether an argument of mixtures of experts is written."""
    return spec.num_experts > 0


def is_latent(spec: ModelSpec) -> bool:
    """Whether any layer has multi-latent attention."""
    return any(isinstance(kind.mixer, Latent) for kind in spec.used)


def _nothing(_: Args) -> Properties:
    return {}


def _no_limit(_: ModelSpec) -> str:
    return ""


@dataclass(frozen=True)
class Argument:
    """Attribute of `args`: how it is written for a model, and read into properties of one.

    `absent` is the value that args without it have, and `neutral` are other values that do the same. Where `meaning` is given, any
    other value means that, and no model with it is supported. `limit` gives a reason why no value can say what a model is, or no
    text. `flag` sets it.
    """

    attribute: str
    write: Callable[[Context], Any] = lambda _: None
    read: Callable[[Args], Properties] = _nothing
    group: Group = Group.MODEL
    #: Whether it is written for a model, and whether only where its value is not that of `absent`.
    written: Callable[[ModelSpec], bool] = always
    optional: bool = False
    absent: Any = None
    neutral: tuple[Any, ...] = ()
    meaning: str = ""
    limit: Callable[[ModelSpec], str] = _no_limit
    flag: Flag | None = None
    build: Build = Build.NOTHING
    #: Its field in TransformerConfig, where that has another name.
    config: str = ""
    #: Whether it may differ between the files of a checkpoint's ranks.
    per_rank: bool = False

    def is_usual(self, value: Any) -> bool:
        """Whether a value is Megatron-LM's default, or means the same."""
        if not self.absent and isinstance(value, list):
            return not any(value)
        return value == self.absent or value in self.neutral or (not self.absent and not value)

    def shown(self, args: Args) -> str | None:
        """Flag with its value, quoted for a shell; None where `args` do not need it."""
        flag, value = self.flag, args.get(self.attribute)
        if flag is None or not flag.matters(args) or value in self.neutral:
            return None
        if value is not None and value == flag.default:
            return None
        words = flag.words(value)
        return None if words is None else shlex.join((flag.name, *words))


def said(attribute: str, field: str, **more: Any) -> Argument:
    """Argument that is a property of the model."""

    def read(args: Args) -> Properties:
        return {} if args.get(attribute) is None else {field: args[attribute]}

    absent = more.get("absent")
    return Argument(attribute, lambda context: context.value(field, absent), read, **more)


def only(attribute: str, value: Any, meaning: str, **more: Any) -> Argument:
    """Argument of which one value is supported, `value`, which is also Megatron-LM's default or taken for it."""
    build = more.pop("build", Build.REFUSED)
    return Argument(attribute, lambda _: value, absent=value, meaning=meaning, build=build, **more)


def flag(name: str, words: Callable[[Any], tuple[str, ...] | None] = one, **more: Any) -> Flag:
    """Flag of an argument; `lost` is whether loading does not restore the argument."""
    return Flag(name, words, restored=not more.pop("lost", False), **more)
