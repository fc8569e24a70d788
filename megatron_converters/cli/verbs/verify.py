"""`verify A B`: whether two folders of any formats hold the same model, with `--logits` whether they compute the same;
`verify OUT`: whether an output is as it was written.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ...basics.errors import UsageError
from ...basics.quantities import count, duration, size
from ..console import put_json, say
from ..options.reading import read_options
from ..options.values import natural
from .pair import add_pair_arguments, pair_of

if TYPE_CHECKING:
    from ...assets.origin import Carried
    from ...comparison.manifest_check import Checked
    from ...comparison.tensors import Comparison, Rules

_DEFAULT_LIMIT = 50
#: What decides the tokens of a comparison of logits.
_LOGITS = {
    "seed": (0, "Seed of the random tokens"),
    "batch": (2, "Sequences"),
    "length": (128, "Tokens of each sequence"),
}
#: Options, as attributes, that only a comparison of tensors heeds.
_OF_TENSORS = ("ignore_dtype", "as_cast", "source_format", "b_format", "untie", "source_margs_file")
#: Options of reading that a manifest does not heed.
_OF_SOURCES = ("family_file", "ignore_tensors", "ignore_config_fields")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument("a", metavar="A", help="Folder of any format; alone: an output to check against its manifest.")
    parser.add_argument("b", metavar="B", nargs="?", default=None, help="Folder that should hold the same model.")
    add_pair_arguments(parser)
    parser.add_argument(
        "--tolerance",
        metavar="X",
        type=_tolerance,
        default=None,
        help="Largest difference between values; by default bits are compared. Of logits: as a part of the largest one.",
    )
    parser.add_argument(
        "--ignore-dtype", action="store_true", help="Take tensors of different dtypes for equal if their values are."
    )
    parser.add_argument(
        "--as-cast",
        action="store_true",
        help="Where dtypes differ, round A to B's dtype, as a conversion with --dtype does; bits must then be equal.",
    )
    parser.add_argument(
        "--limit",
        metavar="N",
        type=natural,
        default=_DEFAULT_LIMIT,
        help=f"Differences to print, {_DEFAULT_LIMIT} by default; 0 for all.",
    )
    logits = parser.add_argument_group("logits")
    logits.add_argument(
        "--logits", action="store_true", help="Build both models on this CPU in float32 and compare what they compute."
    )
    for name, (default, words) in _LOGITS.items():
        logits.add_argument(
            f"--{name}", metavar="N", type=natural, default=None, help=f"{words}; {default} by default."
        )


def run(args: argparse.Namespace) -> int:
    """Compare; 0 if nothing differs."""
    if args.b is None:
        _refuse(
            args,
            ("logits", "tolerance", *_LOGITS, *_OF_TENSORS, *_OF_SOURCES),
            "compares two folders; a manifest is compared byte by byte",
        )
        return _verify_output(args)
    if args.logits:
        _refuse(args, _OF_TENSORS, "is for comparing tensors; leave it out with --logits")
        return _verify_logits(args)
    _refuse(args, _LOGITS, "is for comparing logits; give --logits, too")
    return _verify_pair(args)


def _refuse(args: argparse.Namespace, names: Iterable[str], why: str) -> None:
    """Raise if one of these options is given."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value is not False and value != "":
            option = {"source_format": "from", "b_format": "from-b"}.get(name, name.replace("_", "-"))
            raise UsageError(f"--{option} {why}")


def _verify_logits(args: argparse.Namespace) -> int:
    from ...formats.reading import megatron_options
    from ...logits import compare_logits
    from ...logits.compare import TOLERANCE

    read = read_options(args)
    if args.hf_config is not None:
        read = dataclasses.replace(read, hf_config=_folder(args, args.hf_config, config_only=True))
    report = compare_logits(
        _folder(args, args.a),
        _folder(args, args.b),
        **{
            name: default if getattr(args, name) is None else getattr(args, name)
            for name, (default, _) in _LOGITS.items()
        },
        tolerance=TOLERANCE if args.tolerance is None else args.tolerance,
        options=megatron_options(read),
    )
    if args.json:
        put_json({"equal": report.ok, **dataclasses.asdict(report)})
    else:
        say(args, str(report))
    return 0 if report.ok else 1


def _folder(args: argparse.Namespace, name: str, *, config_only: bool = False) -> Path:
    """The folder that a name means; prints notes on it unless JSON is wanted."""
    from ...basics.folders import existing_folder
    from ...formats.hub import located

    folder, notes = located(name, config_only=config_only, download=args.download)
    for note in [] if args.json else notes:
        say(args, note)
    return existing_folder(folder)


def _verify_pair(args: argparse.Namespace) -> int:
    from ...comparison.report import findings, verification_json
    from ...comparison.tensors import Rules, compare
    from ...conversion.progress import make_progress

    rules = Rules(tolerance=args.tolerance or 0.0, ignore_dtype=args.ignore_dtype, as_cast=args.as_cast)
    pair = pair_of(args)
    begun = time.monotonic()
    comparison = compare(*pair.sources, rules, make_progress(args.quiet, "comparing", "compared"))
    if args.json:
        put_json(verification_json(pair, comparison, rules))
    else:
        _say_all(args, list(findings(comparison)), "different: ")
        say(args, _pair_summary(comparison, rules, time.monotonic() - begun, pair.sources[0].origin.carried))
        if comparison.only_casts and not rules.as_cast:
            say(args, "only dtypes differ, as after a cast; --as-cast tells whether B is A rounded to B's dtypes")
    return 0 if comparison.equal else 1


def _verify_output(args: argparse.Namespace) -> int:
    from ...comparison.manifest_check import check_output, find_output
    from ...comparison.report import check_json
    from ...conversion.progress import make_progress
    from ...formats.hub import located

    begun = time.monotonic()
    where = find_output(located(args.a, download=args.download).folder, args.ckpt_dir_name)
    checked = check_output(where, make_progress(args.quiet, "checking", "checked"))
    if args.json:
        put_json(check_json(checked))
    else:
        _say_all(args, [str(fault) for fault in checked.faults], "damaged: ")
        say(args, _output_summary(checked, time.monotonic() - begun))
    return 1 if checked.faults else 0


def _pair_summary(comparison: Comparison, rules: Rules, seconds: float, carried: Carried | None) -> str:
    casts = ", ".join(f"{number} cast from {cast}" for cast, number in comparison.casts.items() if rules.as_cast)
    tensors = f"{count(len(comparison.tensors), 'tensor')}{f' ({casts})' if casts else ''}"
    tensors += f" and {len(carried.tensors)} beside the text part" if carried is not None and comparison.equal else ""
    what = f"{tensors}, {_rate(comparison.nbytes, seconds)}"
    padded = ", ".join(f"{rows} of {name}" for name, rows in zip("AB", comparison.padding, strict=True) if rows)
    beside = f"; rows of vocabulary padding not compared: {padded}" if padded else ""
    if comparison.equal:
        return f"EQUAL: {what}{beside}"
    spec = f"{count(len(comparison.spec), 'setting')} and " if comparison.spec else ""
    spec += f"{count(len(comparison.beside), 'difference')} beside the text part and " if comparison.beside else ""
    return f"DIFFERENT: {spec}{len(comparison.different)} of {what}{beside}"


def _output_summary(checked: Checked, seconds: float) -> str:
    where = f"{count(checked.files, 'file')} of {checked.folder}"
    what = f"{count(checked.tensors, 'tensor')} in {where}, {_rate(checked.nbytes, seconds)}"
    of_hub = f"; written from {checked.hub} of the Hub" if checked.hub is not None else ""
    outcome = f"DAMAGED: {count(len(checked.faults), 'fault')}; checked" if checked.faults else "INTACT:"
    return f"{outcome} {what}{of_hub}"


def _rate(nbytes: int, seconds: float) -> str:
    return f"{size(nbytes)} read in {duration(seconds)} ({size(nbytes / max(seconds, 1e-3))}/s)"


def _say_all(args: argparse.Namespace, found: list[str], prefix: str) -> None:
    shown = found if args.limit <= 0 else found[: args.limit]
    for text in shown:
        say(args, prefix + text)
    if len(found) > len(shown):
        say(args, f"… and {len(found) - len(shown)} more (--limit 0 prints all)")


def _tolerance(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 on")
    return value
