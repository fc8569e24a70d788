"""Options of `convert` and `plan`, and the conversion that they ask for."""

from __future__ import annotations

import argparse
import dataclasses
from functools import cache
from typing import TYPE_CHECKING, Any

from ...basics.errors import UsageError
from ...formats.huggingface.options import FUSED, SEPARATE
from ...formats.kinds import FORMATS, HF, MEGATRON, MINDSPORE, TARGETS
from ...formats.megatron.options import EXPERT_LAYOUTS
from ..options.reading import add_reading_arguments, read_options
from ..options.shared import add_shared
from ..options.writing import (
    add_expert_layout_argument,
    add_hf_target_arguments,
    add_megatron_target_arguments,
    add_mindspore_target_arguments,
    hf_options,
    megatron_options,
    mindspore_options,
)

if TYPE_CHECKING:
    from ...formats.reading import ReadOptions
    from ...request import Request


def add_job_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare SRC, DST and the options of every format."""
    parser.add_argument("load_dir", metavar="SRC", help="Folder to read; its format is recognised.")
    parser.add_argument("save_dir", metavar="DST", help="Folder to write to.")
    parser.add_argument(
        "--to",
        choices=list(TARGETS),
        default=None,
        help="Format to write. By default a Megatron-LM checkpoint, but Hugging Face from a checkpoint when no option of "
        "checkpoints is given.",
    )
    add_reading_arguments(parser)
    add_expert_layout_argument(parser, (*EXPERT_LAYOUTS, SEPARATE, FUSED))
    add_shared(parser, "--backfill-from", "--dtype", "--tokenizer-model", "--overwrite")
    for declare in _DECLARING.values():
        declare(parser)
    parser.set_defaults(**{name: None for defaults in _defaults().values() for name in defaults})


def _add_megatron_arguments(parser: Any) -> None:
    add_megatron_target_arguments(parser)
    add_shared(parser, "--make-vocab-size-divisible-by")


_DECLARING = {
    MEGATRON: _add_megatron_arguments,
    HF: add_hf_target_arguments,
    MINDSPORE: add_mindspore_target_arguments,
}
#: Options that reading heeds, too, or that every format does; what does not heed them refuses them by itself.
_OF_ALL = ("expert_layout", "tokenizer_model", "mup")
#: Options that a format heeds when it is read and when it is written.
_OF_BOTH_SIDES = {MEGATRON: ("mup",), MINDSPORE: ("mf_mlp_layout", "mf_qkv_layout")}


@cache
def _defaults() -> dict[str, dict[str, Any]]:
    """Options that not every format has, with their defaults, by format. In the parser itself None means "not given"."""
    found = {}
    for name, declare in _DECLARING.items():
        parser = argparse.ArgumentParser(add_help=False)
        declare(parser)
        declared = vars(parser.parse_args([])).items()
        found[name] = {key: value for key, value in declared if key not in _OF_ALL}
    return found


def request_of(args: argparse.Namespace) -> Request:
    """The conversion that the options ask for."""
    from ...formats.detect import format_of
    from ...formats.hub import located
    from ...request import Request, target_format

    defaults = _defaults()
    given = {name: [key for key in own if getattr(args, key) is not None] for name, own in defaults.items()}
    asks = bool(given[MEGATRON]) or args.expert_layout in EXPERT_LAYOUTS
    place, notes = located(args.load_dir, download=args.download)
    source_format = args.source_format or format_of(place)
    chosen = args.to or target_format(source_format, None, asks)
    heeded = (*defaults[chosen], *_OF_BOTH_SIDES.get(source_format, ()))
    for other, names in given.items():
        unheeded = sorted(name for name in names if name not in heeded)
        if unheeded:
            options = ", ".join(f"--{name.replace('_', '-')}" for name in unheeded)
            raise UsageError(
                f"{options}: only for writing {TARGETS[other]}, but this writes {TARGETS[chosen]}; leave it out, or pass "
                f"--to {other}"
            )
    unset = {key: value for key, value in defaults[chosen].items() if getattr(args, key) is None}
    complete = argparse.Namespace(**{**vars(args), **unset})
    return Request(
        place,
        args.save_dir,
        chosen,
        args.dtype,
        args.overwrite,
        _reading(args, source_format, chosen),
        megatron_options(complete) if chosen == MEGATRON else None,
        hf_options(complete) if chosen == HF else None,
        mindspore_options(complete) if chosen == MINDSPORE else None,
        tuple(notes),
    )


def _reading(args: argparse.Namespace, source_format: str, chosen: str) -> ReadOptions:
    """How to read the source. An option that both sides may heed means the target where the source is of another format."""
    of_target = _OF_BOTH_SIDES.get(chosen, ()) if source_format != chosen else ()
    unset: dict[str, Any] = dict.fromkeys(of_target)
    known = source_format if source_format in FORMATS else None  # a file of weights is of none
    return dataclasses.replace(read_options(args, known), **unset)
