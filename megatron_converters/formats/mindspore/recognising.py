"""Recognition of MindSpore's weights by names, and by the header of one file. Every folder that is opened is looked at so."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from ...basics.errors import ConversionError
from ...storage import safetensors

SAFETENSORS, CKPT = ".safetensors", ".ckpt"
#: Names of a folder of checkpoint 2.0, of its files, and of those that lie beside them.
TRACKER, METADATA = "latest_checkpointed_iteration.txt", "metadata.json"
_ITERATION = re.compile(r"iteration_[0-9]{8,18}")
ITERATION_FILE = re.compile(r"(?:.+-)?(model|opt)-([0-9]{7,18})-([0-9]{7,18})\.safetensors")
#: Name of a rank's folder, and that of a strategy.
RANK = re.compile(r"rank_([0-9]{1,7})")
_STRATEGY = re.compile(r".*strategy.*\.(ckpt|json)")
#: Map of the names of tensors to files.
MAP = "param_name_map.json"
#: First byte of a .ckpt file that is not encrypted: field 1, a message.
_FIELD_1 = b"\n"
#: Parts of Hugging Face's names, which MindSpore Transformers' never have: other libraries on mindspore save those with its mark.
_FOREIGN = (".self_attn.", "embed_tokens.", "transformer.h.")


def is_mindspore(path: Path) -> bool:
    """Whether a path looks like weights of MindSpore: by names, and by the header of one file."""
    try:
        return _is_file(path) if path.is_file() else path.is_dir() and holds_weights(path)
    except (ConversionError, OSError):
        return False


def _is_file(path: Path) -> bool:
    if path.suffix == CKPT:  # a name that others use, too
        with open(path, "rb") as file:
            return not is_strategy(path) and file.read(1) == _FIELD_1
    if path.suffix != SAFETENSORS or safetensors.read_metadata(path).get("format") != "ms":
        return False
    return not _are_foreign(safetensors.read(path).tensors)


def _is_foreign(path: Path) -> bool:
    """Whether a file of safetensors has Hugging Face's names; not if it is damaged, which reading it says."""
    try:
        return _are_foreign(safetensors.read(path).tensors)
    except ConversionError:
        return False


def _are_foreign(names: Iterable[str]) -> bool:
    return any(part in name for name in names for part in _FOREIGN)


def holds_weights(path: Path) -> bool:
    """Whether a folder looks like one of MindSpore's weights."""
    if is_root(path) or is_iteration(path) or any(map(weights_in, rank_folders(path).values())):
        return True
    files = weights_in(path)
    if (path / MAP).exists():
        return not (files and files[0].suffix == SAFETENSORS and _is_foreign(files[0]))
    return bool(files) and _is_file(files[0])


def is_root(folder: Path) -> bool:
    """Whether a folder holds iterations, and not those of Megatron-LM, whose tracker has the same name."""
    return (folder / TRACKER).is_file() and any(_ITERATION.fullmatch(path.name) for path in folder.iterdir())


def is_iteration(folder: Path) -> bool:
    """Whether a folder is one iteration."""
    return any(ITERATION_FILE.fullmatch(path.name) for path in folder.iterdir())


def is_one_of_several(path: Path) -> bool:
    """Whether a file is one of an iteration's, so that it may hold slices only."""
    match = ITERATION_FILE.fullmatch(path.name)
    return match is not None and (int(match[3]) > 1 or (path.parent / METADATA).exists())


def rank_folders(folder: Path) -> dict[int, Path]:
    """Folders of ranks in a folder, by rank."""
    matches = ((RANK.fullmatch(path.name), path) for path in folder.iterdir() if path.is_dir())
    return dict(sorted((int(match[1]), path) for match, path in matches if match))


def is_strategy(path: Path) -> bool:
    """Whether a file is named as a strategy, not as weights."""
    return _STRATEGY.fullmatch(path.name) is not None


def weights_in(folder: Path) -> list[Path]:
    """Files of weights in a folder, sorted by name."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix in (SAFETENSORS, CKPT) and path.is_file() and not is_strategy(path)
    )
