"""What the loader and saver plugins have in common: options, and how they run and fail.

A plugin file declares its options and makes one call here, so that it works under our convert.py and Megatron-LM's alike.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Callable
from typing import Any

from ..basics.dtypes import DType, dtype_named
from ..basics.errors import ConversionError, Interrupted, UsageError
from ..conversion.endpoint import Source, Target
from ..conversion.progress import make_progress
from ..conversion.run import convert
from ..formats.megatron.arguments import spec_fields, uncut_args
from ..formats.queue.channel import WatchedProgress, check_exit, try_send
from ..formats.queue.messages import EXIT
from ..formats.queue.source import QueueSource
from ..formats.queue.target import QueueTarget, stream
from .console import errors_told, fail, prepare_process, report
from .options.shared import add_argument, add_shared


def add_common_arguments(parser: Any) -> None:
    """Options that either side reads and stock convert.py lacks."""
    add_shared(parser, "--quiet", "--overwrite", "--restart")
    add_argument(
        parser,
        "--megatron-path",
        metavar="DIR",
        default=None,
        help="Accepted for compatibility; not needed, since Megatron-LM is never imported.",
    )


def wanted_dtype_of(args: argparse.Namespace) -> DType | None:
    """The dtype that --bf16 or --fp16 asks for; None keeps the source's."""
    bf16, fp16 = getattr(args, "bf16", False), getattr(args, "fp16", False)
    if bf16 and fp16:
        raise UsageError("--bf16 and --fp16 exclude each other; give one")
    return dtype_named("bf16") if bf16 else dtype_named("fp16") if fp16 else None


def run_loader(queue: Any, args: argparse.Namespace, open_source: Callable[[], Source]) -> None:
    """Send a source over the queue; on failure tell the saver, say why and exit."""
    prepare_process()
    savers = multiprocessing.active_children()
    try:
        if args.model_type != "GPT":
            raise UsageError(f"--model-type {args.model_type} cannot be converted; only GPT can")
        source = open_source()
        report(args, f"loading {source.origin.described} ({source.spec.family}, {source.spec.num_layers} layers)")
        target = QueueTarget(
            queue, uncut_args, model_type=args.model_type, divisor=getattr(args, "make_vocab_size_divisible_by", None)
        )
        stream(source, target, wanted_dtype_of(args))
        for saver in savers:  # Megatron-LM's own convert.py ends with 0 whatever becomes of its saver
            check_exit(saver)
    except ConversionError as error:
        try_send(queue, EXIT)
        fail("loader", error)
    except KeyboardInterrupt:
        try_send(queue, EXIT)
        fail("loader", Interrupted())
    except BaseException:
        try_send(queue, EXIT)
        raise


def run_saver(queue: Any, args: argparse.Namespace, open_target: Callable[[], Target]) -> None:
    """Save what comes over the queue; on failure nothing stays behind that looks complete."""
    prepare_process()
    with errors_told("saver"):
        source = QueueSource(queue, spec_fields, checking=getattr(args, "checking", True))
        progress = WatchedProgress(make_progress(getattr(args, "quiet", False)))
        lines = convert(source, open_target(), None, progress, restart=getattr(args, "restart", False))
        source.drain()
        for line in lines:
            report(args, line)
