"""Saver plugin: weights of MindSpore Transformers."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from megatron_converters.cli.options.shared import add_common_arguments
from megatron_converters.cli.options.writing import add_mindspore_target_arguments, open_mindspore_target
from megatron_converters.cli.plugins import run_saver


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare this saver's options."""
    group = parser.add_argument_group(title="MindSpore Transformers saver")
    add_mindspore_target_arguments(group)
    add_common_arguments(group)


def save_checkpoint(queue: Any, args: argparse.Namespace) -> None:
    """Save the model that arrives over the queue in --save-dir."""
    run_saver(queue, args, partial(open_mindspore_target, args))
