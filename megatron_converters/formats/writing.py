"""Opening a target: the options that are given decide its format."""

from __future__ import annotations

import os

from ..basics.errors import UsageError
from ..basics.folders import new_folder
from ..conversion.endpoint import Target
from .huggingface.target import HFOptions, HFTarget
from .megatron.rank_files_target import MegatronTarget
from .megatron.torch_dist_target import TorchDistTarget
from .megatron.writing import CheckpointTarget, MegatronOptions

#: By Megatron-LM's name of the format (`--ckpt-format`).
CHECKPOINTS: dict[str, type[CheckpointTarget]] = {kind.format: kind for kind in (MegatronTarget, TorchDistTarget)}


def open_target(path: str | os.PathLike[str], options: HFOptions | MegatronOptions) -> Target:
    """The folder to write; nothing is touched yet."""
    folder = new_folder(path)
    if isinstance(options, HFOptions):
        return HFTarget(folder, options)
    if options.ckpt_format not in CHECKPOINTS:
        raise UsageError(f"ckpt_format {options.ckpt_format!r} is not one of {', '.join(CHECKPOINTS)}")
    return CHECKPOINTS[options.ckpt_format](folder, options)
