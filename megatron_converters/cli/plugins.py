"""Common code of the loader and saver plugins: shared options, running, and reporting failures.

A plugin file declares its options and makes one call here; it works with our convert.py and with Megatron-LM's. Help declares the
options alone, so what carries tensors (`transfer.py`) is imported when it is called.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from ..basics.errors import ConversionError, Interrupted
from ..formats.queue.channel import EXIT, check_exit, try_send
from .console import exit_on_error, fail, prepare_process
from .interrupts import watched
from .numpy_threads import import_numpy
from .options.reading import add_hf_source_arguments, open_hf_source
from .options.shared import add_common_arguments

if TYPE_CHECKING:
    from ..conversion.endpoint import Source, Target

#: Seconds that an interrupted loader waits for room in the queue, to tell the saver, which is usually interrupted, too.
_INTERRUPTED_SECONDS = 0.5


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
            import_numpy()
            from .transfer import send_source

            send_source(queue, args, open_source)
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


def run_saver(queue: Any, args: argparse.Namespace, open_target: Callable[[], Target]) -> None:
    """Save the model that arrives over the queue; a failure leaves nothing behind that looks complete."""
    prepare_process()
    with exit_on_error("saver"):
        import_numpy()
        from .transfer import save_received

        save_received(queue, args, open_target)
