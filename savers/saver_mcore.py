"""Saver plugin: a Megatron-LM checkpoint in the torch or torch_dist format."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from megatron_converters.cli.options.shared import add_common_arguments
from megatron_converters.cli.options.writing import add_megatron_target_arguments, open_megatron_target
from megatron_converters.cli.plugins import run_saver


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare this saver's options."""
    group = parser.add_argument_group(title="Megatron core saver")
    add_megatron_target_arguments(group)
    add_common_arguments(group)


def save_checkpoint(queue: Any, args: argparse.Namespace) -> None:
    """Save the model that arrives over the queue in --save-dir."""
    run_saver(queue, args, partial(open_megatron_target, args))
