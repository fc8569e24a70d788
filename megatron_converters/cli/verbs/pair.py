"""The two folders that `verify` and `diff` compare."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

from ...comparison.tensors import Comparison
from ...conversion.endpoint import Source
from ...formats.detect import FORMATS
from ...formats.reading import open_source, refuse_unheeded
from ..console import say
from ..options.reading import add_reading_arguments, read_options
from ..options.shared import add_shared

#: Tensors that a line about several names.
_NAMED = 3


class Pair(NamedTuple):
    """Both sources with their formats."""

    formats: tuple[str, str]
    sources: tuple[Source, Source]


def add_pair_arguments(parser: argparse.ArgumentParser) -> None:
    """Options for reading two folders."""
    add_reading_arguments(parser)
    parser.add_argument(
        "--from-b", dest="b_format", choices=FORMATS, default=None, help="Format of B; --from is that of A."
    )
    add_shared(parser, "--json", "--quiet")


def open_pair(args: argparse.Namespace) -> Pair:
    """Open A and B. An option of one format is for each side of that format; a folder of ranks may be given by itself."""
    options = read_options(args)
    first = open_source(args.a, options)
    second = open_source(args.b, dataclasses.replace(options, format=args.b_format))
    refuse_unheeded([first.format, second.format], options)
    return Pair((first.format, second.format), (first.source, second.source))


def describe_pair(pair: Pair) -> dict[str, dict[str, str]]:
    """What is compared, for JSON."""
    return {
        name: {"path": source.origin.described, "format": found}
        for name, found, source in zip("ab", pair.formats, pair.sources, strict=True)
    }


def of_whole_tensors(comparison: Comparison, *, each: bool = False) -> Iterator[str]:
    """What was found of whole tensors, such as another dtype: a line for all that have it in common, or for `each`."""
    for text, names in comparison.alike().items():
        if each:
            yield from (f"{name}: {text}" for name in names)
        else:
            more = f" and {len(names) - _NAMED:,} more tensors" if len(names) > _NAMED else ""
            yield f"{', '.join(names[:_NAMED])}{more}: {text}"


def say_pair(args: argparse.Namespace, pair: Pair) -> None:
    """What is compared, for people, with what each source has to say of itself."""
    for name, found, source in zip("AB", pair.formats, pair.sources, strict=True):
        say(args, f"{name}: {source.origin.described} ({found}, {source.spec.family})")
        for note in (*source.origin.notes, *(f"not compared: {ignored}" for ignored in source.origin.ignored)):
            say(args, f"  {note}")
