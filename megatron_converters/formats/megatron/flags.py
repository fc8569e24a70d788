"""Command-line flags of `pretrain_gpt.py` that set the attributes of `args`, and notes on the releases that know them.

Source: training/arguments.py of Megatron-LM core_v0.12.0 to core_v0.19.0, whose parsers turn these flags back into the values of
`args`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ...model.layers import LATENT_EPSILON, Attention, Latent
from ...model.spec import ModelSpec
from .argument import Argument, Build, Flag, Group
from .arguments import ARGUMENTS
from .releases import NEWEST, OLDEST, before, latest
from .rows_positions import scaling_of

_BY_FLAG = {row.flag.name: row.flag for row in ARGUMENTS if row.flag is not None}
#: Flags of what megatron-core has only in layers of Transformer Engine.
_NEED_ENGINE = [row.flag.name for row in ARGUMENTS if row.flag is not None and row.build is Build.ENGINE]
#: Attributes that say what a checkpoint lacks besides its model.
_NOT_SAVED = ("no_save_optim", "no_save_rng")
_EXPERT_GROUPS = (Group.EXPERTS, Group.ROUTER, Group.EXPERT_LAYOUT)


def all_flags(args: Mapping[str, Any]) -> list[str]:
    """All flags that set these `args`, each with its value, quoted for a shell."""
    return _shown(ARGUMENTS, args)


def model_flags(args: Mapping[str, Any]) -> list[str]:
    """All flags of a model whose weights `pretrain_gpt.py` cannot load by itself."""
    return all_flags({name: value for name, value in args.items() if name not in _NOT_SAVED})


def flags(args: Mapping[str, Any], release: str = NEWEST) -> list[str]:
    """Flags that this model needs in a release besides `--use-checkpoint-args`, which does not restore them in every release."""
    lost = [row for row in ARGUMENTS if row.flag is not None and not row.flag.restored]
    return [
        "--use-checkpoint-args",
        *("--no-load-optim", "--no-load-rng"),
        *_shown((row for row in lost if not _is_implied(row, args, release)), args),
    ]


def _is_implied(row: Argument, args: Mapping[str, Any], release: str) -> bool:
    """Whether a release without the flag does what it says anyway."""
    flag = row.flag
    return (
        flag is not None
        and flag.implied is not None
        and args.get(row.attribute) == flag.implied
        and before(release, flag.since)
    )


def _shown(chosen: Iterable[Argument], args: Mapping[str, Any]) -> list[str]:
    dense = not args.get("num_experts")
    return [shown for row in chosen if not (dense and row.group in _EXPERT_GROUPS) and (shown := row.shown(args))]


def as_shell(shown: Iterable[str]) -> str:
    """Flags one per line, joined for a shell."""
    return " \\\n  ".join(shown)


def flag_warnings(spec: ModelSpec, shown: Iterable[str], tp: int = 1) -> list[str]:
    """Notes and warnings for the user about the flags that are shown, for a checkpoint cut over `tp`."""
    shown = list(shown)
    known = _known(shown)
    warnings = [*_since_notes(known, experts=spec.num_experts > 0), *_value_notes(shown)]
    warnings += [f"{flag.name} exists up to Megatron-LM {flag.until} only" for flag in known if flag.until]
    warnings += [
        f"warning: {flag.name}: the pretrain_gpt.py of Megatron-LM before {flag.effective_since} accepts it but builds the "
        f"model without it; {flag.instead}"
        for flag in known
        if flag.effective_since
    ]
    warnings += [
        f"warning: {words}: the pretrain_gpt.py of Megatron-LM up to {NEWEST} accepts it but builds the model with "
        f"{_BY_FLAG[name].built_as:g}; {_BY_FLAG[name].instead}"
        for words in shown
        if (name := words.split()[0]) in _BY_FLAG and _BY_FLAG[name].built_as is not None
    ]
    if _gathers_groups(spec, tp):
        (groups,) = {kind.mixer.num_query_groups for kind in spec.used if isinstance(kind.mixer, Attention)}
        warnings.append(f"tensor-parallel {tp} over {groups} query groups needs Megatron-LM {_GATHERS} or later")
    if {"--transformer-impl local", "--sequence-parallel"} <= set(shown):
        warnings.append(
            "warning: Megatron-LM trains experts at a tensor-parallel size above 1 with sequence parallelism only, for which its "
            "local RMS norms cannot be built; use --saver-transformer-impl transformer_engine, tensor-parallel size 1, or a "
            "Megatron-LM with norms of its own, such as Habana's"
        )
    if {"--transformer-impl transformer_engine", "--softmax-type learnable"} <= set(shown):
        warnings.append("--softmax-type learnable needs Transformer Engine 2.8 or later")
    needing = [flag for flag in _NEED_ENGINE if any(words.split()[0] == flag for words in shown)]
    if "--transformer-impl local" in shown and needing:
        warnings.append(
            f"warning: --transformer-impl local: Megatron-LM builds {', '.join(needing)} from Transformer Engine's layers alone; "
            "use --saver-transformer-impl transformer_engine"
        )
    if any(isinstance(kind.mixer, Latent) for kind in spec.used) and spec.norm.norm_epsilon != LATENT_EPSILON:
        warnings.append(
            f"warning: Hugging Face norms the latents of attention with an epsilon of {LATENT_EPSILON:g}, Megatron-LM with that "
            f"of all norms, {spec.norm.norm_epsilon:g}: logits differ by some 1e-5 of the largest"
        )
    if scaling_of(spec, "dynamic") is not None:
        warnings.append(
            "warning: dynamic RoPE scaling: Megatron-LM has none; it computes the same up to the model's "
            f"{spec.max_position_embeddings} positions, and another model beyond"
        )
    yarn = scaling_of(spec, "yarn")
    if yarn is not None and yarn.llama_4_scaling_beta:
        warnings.append(
            f"warning: queries are scaled (llama_4_scaling_beta {yarn.llama_4_scaling_beta:g}): Megatron-LM has no such scale; it "
            f"computes the same up to {yarn.original_max_position_embeddings} positions, and another model beyond"
        )
    return warnings


def _value_notes(shown: Iterable[str]) -> Iterator[str]:
    """Notes on the first release that heeds the values of flags, where it is later than that of the flags."""
    for words in shown:
        name, *value = words.split()
        since = _BY_FLAG[name].later.get(" ".join(value)) if name in _BY_FLAG else None
        if since:
            yield f"{words}: Megatron-LM computes this model from {since} on"


def _since_notes(known: Iterable[Flag], *, experts: bool) -> Iterator[str]:
    """Notes on the first release that knows each flag; many flags of one release share a note."""
    by_release: dict[str, list[str]] = {}
    for flag in known:
        by_release.setdefault(_since(flag, experts=experts), []).append(flag.name)
    for since, names in by_release.items():
        if since and len(names) > _MANY_FLAGS:
            yield f"{' '.join(names)} exist from Megatron-LM {since} on"
        elif since:
            yield from (f"{name} exists from Megatron-LM {since} on" for name in names)


def _since(flag: Flag, *, experts: bool) -> str:
    """First release that takes a flag."""
    return latest(flag.since, flag.with_experts if experts else "")


def _known(shown: Iterable[str]) -> list[Flag]:
    return [_BY_FLAG[name] for name in (flag.split()[0] for flag in shown) if name in _BY_FLAG]


_MANY_FLAGS = 4
#: Release from which attention gathers the query groups that a rank lacks.
_GATHERS = "0.16"


def _gathers_groups(spec: ModelSpec, tp: int) -> bool:
    return any(isinstance(kind.mixer, Attention) and tp > kind.mixer.num_query_groups for kind in spec.used)


def _needed(args: Mapping[str, Any]) -> Iterator[tuple[Flag, str, str]]:
    """Flags that a release must know to build this model, as they are shown, and the first release that heeds each.

    Of how a checkpoint is cut, those that every release works out from others, such as the padded vocabulary, are not needed.
    """
    for row in ARGUMENTS:
        flag, value = row.flag, args.get(row.attribute, row.absent)
        if flag is None or (row.group is Group.LAYOUT and flag.restored) or row.is_usual(value):
            continue
        implied = flag.implied is not None and value == flag.implied
        for shown in _shown([row], args):
            since = latest(flag.since_value(value), _since(flag, experts=bool(args.get("num_experts"))))
            yield flag, shown, "" if implied else since


def least_release(spec: ModelSpec, args: Mapping[str, Any], tp: int, needed: Iterable[str] = ()) -> str:
    """Oldest release that reads a checkpoint with these args as it is meant; `needed` are what else requires one."""
    groups = [_GATHERS] if _gathers_groups(spec, tp) else []
    flags = [release for flag, _, since in _needed(args) for release in (since, flag.runs_since)]
    return latest(OLDEST, *groups, *needed, *flags)


def unknown_flags(args: Mapping[str, Any], release: str) -> list[str]:
    """Flags that these args need and that a release does not know or heed, those of one later release in one reason."""
    reasons, later = [], dict[str, list[str]]()
    for flag, shown, since in _needed(args):
        if before(release, since):
            later.setdefault(since, []).append(shown)
        if flag.until and before(flag.until, release):
            reasons.append(f"{shown}, which exists up to {flag.until} only")
    for since, found in later.items():
        one = len(found) == 1
        words = "which exists and has an effect" if one else "which exist and have an effect"
        reasons.append(f"{', '.join(found)}, {words} from {since} on")
    return reasons
