"""Loader plugin: Megatron-LM checkpoints in the torch and torch_dist formats, of any parallel sizes."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from megatron_converters.cli.options.reading import add_core_loader_arguments, open_core_loader
from megatron_converters.cli.options.shared import add_common_arguments
from megatron_converters.cli.plugins import run_loader


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare this loader's options."""
    group = parser.add_argument_group(title="Megatron core loader")
    add_core_loader_arguments(group)
    add_common_arguments(group)


def load_checkpoint(queue: Any, args: argparse.Namespace) -> None:
    """Send the model in --load-dir over the queue."""
    run_loader(queue, args, partial(open_core_loader, args))
