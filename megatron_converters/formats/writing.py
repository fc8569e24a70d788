"""Opening of targets; the type of the options decides the format, whose module is imported when it is opened."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING

from ..basics.errors import UsageError
from ..basics.folders import new_folder
from .huggingface.options import HFOptions
from .megatron.options import MODEL_PT, TORCH, TORCH_DIST, MegatronOptions
from .mindspore.options import MindSporeOptions

if TYPE_CHECKING:
    from ..conversion.endpoint import Target

#: Options of all formats.
TargetOptions = HFOptions | MegatronOptions | MindSporeOptions

#: Modules and classes of targets by the name of their format (`--ckpt-format`).
_CHECKPOINTS = {
    TORCH: (".megatron.rank_files_target", "MegatronTarget"),
    TORCH_DIST: (".megatron.torch_dist_target", "TorchDistTarget"),
    MODEL_PT: (".megatron.flat_target", "FlatTarget"),
}


def open_target(path: str | os.PathLike[str], options: TargetOptions) -> Target:
    """Target for a folder, or a single file, which is not touched yet."""
    folder = new_folder(path)
    if isinstance(options, HFOptions):
        name = (
            (".huggingface.single_file", "SingleFileTarget")
            if options.single_file
            else (".huggingface.target", "HFTarget")
        )
    elif isinstance(options, MindSporeOptions):
        name = (".mindspore.target", "MindSporeTarget")
    elif options.ckpt_format in _CHECKPOINTS:
        name = _CHECKPOINTS[options.ckpt_format]
    else:
        raise UsageError(f"ckpt_format {options.ckpt_format!r} is not one of {', '.join(_CHECKPOINTS)}")
    module, kind = name
    target: Target = getattr(importlib.import_module(module, __package__), kind)(folder, options)
    return target
