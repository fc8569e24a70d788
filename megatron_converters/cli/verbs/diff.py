"""`diff A B`: what differs between two checkpoints of any formats and parallel sizes, the largest differences first."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..console import put_json, say
from ..options.values import natural
from .pair import add_pair_arguments, pair_of

if TYPE_CHECKING:
    from ...comparison.tensors import Compared, Comparison

_DEFAULT_TOP = 20
_HEADINGS = ("relative", "||A-B||", "||A||", "max |A-B|", "differing", "elements", "tensor")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument("a", metavar="A", help="Folder of any format.")
    parser.add_argument("b", metavar="B", help="Folder to compare it with.")
    add_pair_arguments(parser)
    parser.add_argument(
        "--top",
        metavar="N",
        type=natural,
        default=_DEFAULT_TOP,
        help=f"Tensors to list, {_DEFAULT_TOP} by default: those that differ most.",
    )
    parser.add_argument("--all", action="store_true", help="List all tensors, equal ones too.")


def run(args: argparse.Namespace) -> int:
    """Compare; 0 if nothing differs."""
    from ...comparison.report import difference_json
    from ...comparison.settings import settings_differences
    from ...comparison.tensors import Rules, compare
    from ...conversion.progress import make_progress

    pair = pair_of(args)
    settings = settings_differences(*pair.sources)
    comparison = compare(*pair.sources, Rules(norms=True), make_progress(args.quiet, "comparing", "compared"))
    equal = comparison.equal and not any(settings.values())
    if args.json:
        put_json(difference_json(pair, settings, comparison, equal))
    else:
        for line in _report(args, settings, comparison):
            say(args, line)
        say(args, "EQUAL" if equal else "DIFFERENT")
    return 0 if equal else 1


def _report(args: argparse.Namespace, settings: dict[str, list[str]], comparison: Comparison) -> Iterator[str]:
    from ...comparison.report import of_whole_tensors, ranked

    for kind, found in settings.items():
        for difference in found:
            yield f"{kind}: {difference}"
    yield from (f"beside the text part: {difference}" for difference in comparison.beside)
    yield from of_whole_tensors(comparison, each=args.all)
    for tensor in comparison.different:
        for finding in tensor.findings:
            if finding.measure is not None and finding.kind == "copy":
                yield f"{tensor.ref}: {next(finding.lines())}"
    order = ranked(comparison)
    differing = [tensor for tensor in order if tensor.measure is not None and tensor.measure.differing]
    shown = order if args.all else differing[: args.top]
    if shown:
        yield from _table(shown)
    if not args.all and len(differing) > len(shown):
        yield f"… and {len(differing) - len(shown)} more tensors that differ (--top N, --all)"
    yield f"{len(differing)} of {len(order)} compared tensors differ in their elements"


def _table(tensors: list[Compared]) -> Iterator[str]:
    rows = [_HEADINGS, *(_row(tensor) for tensor in tensors)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADINGS))]
    for row in rows:
        numbers = [cell.rjust(width) for cell, width in zip(row[:-1], widths, strict=False)]
        yield "  ".join([*numbers, row[-1]])


def _row(tensor: Compared) -> tuple[str, ...]:
    measure = tensor.measure
    if measure is None:
        return ("",) * (len(_HEADINGS) - 1) + (str(tensor.ref),)
    sizes = (measure.relative, measure.distance or 0.0, measure.norm or 0.0, measure.largest)
    return (*(f"{size:.4g}" for size in sizes), str(measure.differing), str(measure.elements), str(tensor.ref))
