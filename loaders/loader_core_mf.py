"""Loader plugin: weights of MindSpore Transformers (mindformers)."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from megatron_converters.cli.options.mindspore import add_mindspore_loader_arguments, open_mindspore_loader
from megatron_converters.cli.options.shared import add_common_arguments
from megatron_converters.cli.plugins import run_loader


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare this loader's options."""
    group = parser.add_argument_group(title="MindSpore Transformers loader")
    add_mindspore_loader_arguments(group)
    add_common_arguments(group)


def load_checkpoint(queue: Any, args: argparse.Namespace) -> None:
    """Send the model in --load-dir over the queue."""
    run_loader(queue, args, partial(open_mindspore_loader, args))
