"""Distributed checkpoint in a folder: its format, its index, the state that all ranks share, and the tensors of its model.

Formats: Megatron-LM core_v0.9.0 to core_v0.19.0. `torch_dist` is that of core/dist_checkpointing. `torch_dcp` (with torch's FSDP2)
and `fsdp_dtensor` (with Megatron-FSDP) are state dicts, saved by torch.distributed.checkpoint, whose keys begin with `model.` and
which have args and iteration among their objects (training/checkpointing.py, `save_checkpoint`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...basics.errors import ConversionError, one_line
from ...basics.json_files import read_json
from ...conversion.left_out import LeftOut
from ...storage import dcp, marks, torch_zip
from ...storage.dcp import ChunkedTensor
from .locating import COMMON_FILE, FORMAT_FILE, refuse_without_index
from .names import EXTRA_STATE_SUFFIX
from .training_state import is_training_state
from .wrapped_names import prefix_of, without_prefix

#: Object that replaces `COMMON_FILE` since Megatron-LM 0.19: a list whose only element is that file's content.
_COMMON_OBJECT = "common_state/shard_0_1"
#: The formats, which have whole tensors, whatever ranks wrote them.
LOADED_AT_ANY_SIZES = TORCH_DIST, TORCH_DCP, FSDP_DTENSOR = "torch_dist", "torch_dcp", "fsdp_dtensor"
#: Name and version of the only supported format of core/dist_checkpointing.
_BACKEND = (TORCH_DIST, 1)
#: Last releases of Megatron-LM that read other formats of core/dist_checkpointing; they save what they loaded as `torch_dist`, too.
_LAST_READ_BY = {"zarr": "0.15"}
#: Entry of a state dict under which Megatron-LM saves the model, and what Megatron-FSDP adds.
_MODEL, _FSDP = "model.", "model.module."
#: Objects of a state dict that are read: they say what the common state of `torch_dist` does.
_COMMON_KEYS = ("args", "iteration", "checkpoint_version")


@dataclass(frozen=True)
class DistributedFolder:
    """Folder of a distributed checkpoint of the format `format`; `common` was read from `common_file`.

    `tensors` are the model's by key, without the `prefix` that all keys have, and without training state and `_extra_state`.
    """

    directory: Path
    format: str
    index: dcp.Index
    common: Mapping[str, Any]
    common_file: Path
    prefix: str
    tensors: Mapping[str, ChunkedTensor]

    @property
    def has_module_names(self) -> bool:
        """Whether keys are those of a state dict."""
        return self.format != TORCH_DIST

    @property
    def wrapper(self) -> str:
        """Part of the prefix that the format does not add by itself."""
        return self.prefix.removeprefix({TORCH_DCP: _MODEL, FSDP_DTENSOR: _FSDP}.get(self.format, ""))


def read_folder(directory: Path, ignored: LeftOut) -> DistributedFolder:
    """Read index and common state, without the tensors that a user ignores.

    Raises `ConversionError` if the folder is of another format, incomplete or no model's.
    """
    refuse_unreadable(directory)
    described = (directory / FORMAT_FILE).is_file()
    index = dcp.read_index(directory)
    weights = {
        key: tensor
        for key, tensor in index.tensors.items()
        if not is_training_state(key) and not key.endswith(EXTRA_STATE_SUFFIX)
    }
    weights = ignored.kept(weights)
    prefix = prefix_of(weights, directory)
    tensors = without_prefix(weights, prefix, directory)
    if described:
        common, common_file = _read_common(directory, index)
        return DistributedFolder(directory, TORCH_DIST, index, common, common_file, prefix, tensors)
    if not prefix.startswith(_MODEL):
        raise ConversionError(
            f"{directory} has no {FORMAT_FILE}, which Megatron-LM writes last: copy it, too; if it is not where the checkpoint was "
            "saved either, the saving was cut off"
        )
    found = FSDP_DTENSOR if prefix.startswith(_FSDP) else TORCH_DCP
    common = _read_objects(index)
    return DistributedFolder(directory, found, index, common, directory / marks.METADATA, prefix, tensors)


def refuse_unreadable(directory: Path) -> None:
    """Raise if a distributed checkpoint describes itself as one of a format that cannot be read, or has lost its index."""
    if (directory / FORMAT_FILE).is_file():
        _check_format(directory)
    refuse_without_index(directory)


def _check_format(directory: Path) -> None:
    description = read_json(directory / FORMAT_FILE)
    name, version = backend = description.get("sharded_backend"), description.get("sharded_backend_version", 1)
    if backend == _BACKEND:
        return
    last = _LAST_READ_BY.get(name) if isinstance(name, str) else None
    reader = "Megatron-LM" if last is None else f"Megatron-LM {last}, the last release that reads {name},"
    raise ConversionError(
        f"{directory} is of the distributed format {one_line(name)}, version {one_line(version)}; only torch_dist, version 1, "
        f"can be read: load it with {reader} and save it with --ckpt-format torch_dist"
    )


def _read_common(directory: Path, index: dcp.Index) -> tuple[Mapping[str, Any], Path]:
    """Read the common state of all ranks; returns it and the file that holds it."""
    path, item = directory / COMMON_FILE, index.objects.get(_COMMON_OBJECT)
    if path.is_file():  # also if both exist, as in Megatron-LM
        common, where = torch_zip.read(path), str(path)
    elif item is not None:
        path, where = Path(item.path), f"{_COMMON_OBJECT} in {item}"
        content = torch_zip.read_embedded(item.path, item.start, item.nbytes)
        common = content[0] if isinstance(content, list) and len(content) == 1 else content
    else:
        raise ConversionError(
            f"{path} is missing, and {marks.METADATA} has no {_COMMON_OBJECT} in its place; copy the checkpoint again"
        )
    if not isinstance(common, dict):
        raise ConversionError(f"{where} holds a {type(common).__name__}, not a checkpoint's common state")
    return common, path


def _read_objects(index: dcp.Index) -> dict[str, Any]:
    """Common state of a state dict, from its objects."""
    found = {name: index.objects[name] for name in _COMMON_KEYS if name in index.objects}
    return {name: torch_zip.read_embedded(item.path, item.start, item.nbytes) for name, item in found.items()}
