"""Transfer of a model over the queue of a loader and a saver: what the plugins' processes do, for any source and target."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from ..basics.dtypes import DType, dtype_named
from ..basics.errors import UsageError
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
from ..formats.queue.channel import WatchedProgress
from ..formats.queue.source import QueueSource
from ..formats.queue.target import QueueTarget, stream
from .console import report


def send_source(queue: Any, args: argparse.Namespace, open_source: Callable[[], Source]) -> None:
    """Send a source over the queue."""
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


def save_received(queue: Any, args: argparse.Namespace, open_target: Callable[[], Target]) -> None:
    """Save the model that arrives over the queue."""
    with family_of(getattr(args, "family_file", None)):
        source = QueueSource(queue, spec_fields, checking=getattr(args, "checking", True))
        progress = WatchedProgress(make_progress(getattr(args, "quiet", False)))
        lines = convert(source, open_target(), None, progress, restart=getattr(args, "restart", False))
        source.drain()
        for line in lines:
            report(args, line)


def requested_dtype(args: argparse.Namespace) -> DType | None:
    """Dtype that --bf16, --fp16 or --dtype requests; None keeps that of the source."""
    given = {f"--{name}": name for name in ("bf16", "fp16") if getattr(args, name, False)}
    named = getattr(args, "dtype", None)
    given |= {} if named is None else {f"--dtype {named}": named}
    if len(set(given.values())) > 1:
        raise UsageError(f"{' and '.join(given)} exclude each other; give only one")
    return dtype_named(next(iter(given.values()))) if given else None
