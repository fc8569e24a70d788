"""Common code of the loader and saver plugins: shared options, running, and reporting failures.

A plugin file declares its options and makes one call here; it works with our convert.py and with Megatron-LM's.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

from ..basics.dtypes import DType, dtype_named
from ..basics.errors import ConversionError, Interrupted, UsageError
from ..conversion.endpoint import Source, Target
from ..conversion.progress import make_progress
from ..conversion.run import convert
from ..families.scope import family_of
from ..formats.megatron.arguments import (
    check_expressible,
    inexpressible,
    sent_conventions,
    spec_fields,
    uncut_args,
)
from ..formats.queue.channel import WatchedProgress, check_exit, try_send
from ..formats.queue.messages import EXIT
from ..formats.queue.source import QueueSource
from ..formats.queue.target import QueueTarget, stream
from .console import exit_on_error, fail, prepare_process, report
from .interrupts import watched
from .options.reading import add_hf_source_arguments, open_hf_source
from .options.shared import add_argument, add_shared

#: Seconds that an interrupted loader waits for room in the queue, to tell the saver, which is usually interrupted, too.
_INTERRUPTED_SECONDS = 0.5


def add_common_arguments(parser: Any) -> None:
    """Add the options of loaders and savers that stock convert.py lacks."""
    add_shared(parser, "--quiet", "--overwrite", "--restart", "--family-file", "--download")
    add_argument(
        parser,
        "--megatron-path",
        metavar="DIR",
        default=None,
        help="Accepted for compatibility; not needed, since Megatron-LM is never imported.",
    )


def requested_dtype(args: argparse.Namespace) -> DType | None:
    """Dtype that --bf16, --fp16 or --dtype requests; None keeps that of the source."""
    given = {f"--{name}": name for name in ("bf16", "fp16") if getattr(args, name, False)}
    named = getattr(args, "dtype", None)
    given |= {} if named is None else {f"--dtype {named}": named}
    if len(set(given.values())) > 1:
        raise UsageError(f"{' and '.join(given)} exclude each other; give only one")
    return dtype_named(next(iter(given.values()))) if given else None


def add_hf_loader_arguments(parser: argparse.ArgumentParser, title: str) -> None:
    """Declare the options of a loader of Hugging Face folders, in a group with this title."""
    group = parser.add_argument_group(title=title)
    add_hf_source_arguments(group)
    add_common_arguments(group)


def load_hf_checkpoint(queue: Any, args: argparse.Namespace) -> None:
    """Send the Hugging Face model in --load-dir over the queue."""
    run_loader(queue, args, partial(open_hf_source, args))


def run_loader(queue: Any, args: argparse.Namespace, open_source: Callable[[], Source]) -> None:
    """Send a source over the queue; on failure notify the saver, print the error and exit."""
    prepare_process()
    savers = multiprocessing.active_children()
    try:
        with watched("loader"):  # under Megatron-LM's convert.py; ours does so itself
            _load(queue, args, open_source)
            for saver in savers:  # Megatron-LM's own convert.py exits with 0 even if its saver failed
                check_exit(saver)
    except ConversionError as error:
        _fail(queue, error)
    except KeyboardInterrupt:
        _fail(queue, Interrupted(), _INTERRUPTED_SECONDS)
    except BaseException:
        try_send(queue, EXIT)
        raise


def _fail(queue: Any, error: ConversionError, *seconds: float) -> NoReturn:
    """Print the cause, and exit; only then is the saver told, within `seconds` if given, which prints what follows from it."""
    try:
        fail("loader", error)
    finally:
        try_send(queue, EXIT, *seconds)


def _load(queue: Any, args: argparse.Namespace, open_source: Callable[[], Source]) -> None:
    if args.model_type != "GPT":
        raise UsageError(f"--model-type {args.model_type} cannot be converted; only GPT can")
    with family_of(getattr(args, "family_file", None)):
        source = open_source()
        report(args, f"loading {source.origin.described} ({source.spec.family}, {source.spec.num_layers} layers)")
        for line in [*source.origin.urgent, *_inexpressible(args, source)]:
            report(args, line)
        target = QueueTarget(
            queue,
            uncut_args,
            model_type=args.model_type,
            divisor=getattr(args, "make_vocab_size_divisible_by", None),
        )
        stream(source, target, requested_dtype(args))


#: Options of this project's savers, each of which judges itself what it can express.
_OWN_SAVERS = ("megatron_version", "max_shard_size")


def _inexpressible(args: argparse.Namespace, source: Source) -> list[str]:
    """Warnings of what a saver of another project, which would not say so, loses; raises `ConversionError` unless allowed."""
    if any(hasattr(args, name) for name in _OWN_SAVERS):
        return []
    reasons = inexpressible(sent_conventions(source.spec).spec)
    return check_expressible(reasons, allowed=getattr(args, "allow_inexpressible", False))


def run_saver(queue: Any, args: argparse.Namespace, open_target: Callable[[], Target]) -> None:
    """Save the model that arrives over the queue; a failure leaves nothing behind that looks complete."""
    prepare_process()
    with exit_on_error("saver"), family_of(getattr(args, "family_file", None)):
        source = QueueSource(queue, spec_fields, checking=getattr(args, "checking", True))
        progress = WatchedProgress(make_progress(getattr(args, "quiet", False)))
        lines = convert(source, open_target(), None, progress, restart=getattr(args, "restart", False))
        source.drain()
        for line in lines:
            report(args, line)
