"""What tells readers that a folder holds a model of a format, so that no target writes another model beside it."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Collection, Sequence
from pathlib import Path

from ..basics.errors import ConversionError

#: Index of a distributed checkpoint.
METADATA = ".metadata"
#: Patterns of names, by format.
HF = (
    "config.json",
    "*.index.json",
    "model*.safetensors",
    "pytorch_model*.bin",
    "consolidated*.safetensors",
)
META = ("consolidated.*.pth",)
RANKS = ("latest_checkpointed_iteration.txt", "mp_rank_*", METADATA)
MODEL_PT = ("model.pt",)
MINDSPORE = ("param_name_map.json",)
#: Formats that no source reads: patterns of names, what they are, and the remedy. Names: deepspeed 0.15 runtime/engine.py, verl 0.7
#: utils/checkpoint/fsdp_checkpoint_manager.py.
_FOREIGN = (
    (
        ("zero_to_fp32.py", "*_model_states.pt", "*_optim_states.pt"),
        "a checkpoint of DeepSpeed; collect its weights with its zero_to_fp32.py, and give the folder with these and config.json",
    ),
    (
        ("model_world_size_*_rank_*.pt",),
        "a checkpoint of verl with FSDP; merge it with `python -m verl.model_merger merge --backend fsdp`, and give the result",
    ),
    (("*.nemo",), "an archive of NeMo 1; unpack it with tar, or export it with NeMo"),
    (("*.gguf",), "a model of llama.cpp; give the one that it was converted from"),
)


def refuse_others(folder: Path, *others: tuple[str, ...]) -> None:
    """Raise if the folder holds a model of another format, which these patterns find, `overwrite` or not."""
    found = [path.name for patterns in others for pattern in patterns for path in sorted(folder.glob(pattern))]
    if found:
        raise ConversionError(
            f"{folder} holds a model of another format ({found[0]}), which readers could take for this one; save elsewhere"
        )


def refuse_files(folder: Path, paths: Sequence[Path]) -> None:
    """Raise if any of these paths of the folder is there."""
    there = [path.name for path in paths if os.path.lexists(path)]
    if there:
        raise ConversionError(
            f"{folder} already holds files of a model ({', '.join(there)}); save elsewhere or pass --overwrite"
        )


def foreign(names: Collection[str]) -> str:
    """What a folder with these names is, with the remedy, where it is of a format that no source reads; else no text."""
    return next(
        (words for patterns, words in _FOREIGN if any(fnmatch.filter(names, pattern) for pattern in patterns)), ""
    )
