"""Opening of targets; the type of the options decides the format."""

from __future__ import annotations

import os

from ..basics.errors import UsageError
from ..basics.folders import new_folder
from ..conversion.endpoint import Target
from .huggingface.single_file import SingleFileTarget
from .huggingface.target import HFOptions, HFTarget
from .megatron.flat_target import FlatTarget
from .megatron.rank_files_target import MegatronTarget
from .megatron.torch_dist_target import TorchDistTarget
from .megatron.writing import CheckpointTarget, MegatronOptions
from .mindspore.target import MindSporeOptions, MindSporeTarget

#: Options of all formats.
TargetOptions = HFOptions | MegatronOptions | MindSporeOptions

#: Targets by the name of their format (`--ckpt-format`).
CHECKPOINTS: dict[str, type[CheckpointTarget]] = {
    kind.format: kind for kind in (MegatronTarget, TorchDistTarget, FlatTarget)
}


def open_target(path: str | os.PathLike[str], options: TargetOptions) -> Target:
    """Target for a folder, or a single file, which is not touched yet."""
    folder = new_folder(path)
    if isinstance(options, HFOptions):
        return (SingleFileTarget if options.single_file else HFTarget)(folder, options)
    if isinstance(options, MindSporeOptions):
        return MindSporeTarget(folder, options)
    if options.ckpt_format not in CHECKPOINTS:
        raise UsageError(f"ckpt_format {options.ckpt_format!r} is not one of {', '.join(CHECKPOINTS)}")
    return CHECKPOINTS[options.ckpt_format](folder, options)
