"""Weight files of Meta's and Mistral's own format: one `torch.save` file per model-parallel rank, or safetensors of a whole model.

Names of the latter: mistralai's repositories, `consolidated.safetensors` or `consolidated-00001-of-00051.safetensors`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...basics.errors import ConversionError, raise_all
from ...storage import safetensors, torch_zip
from ...storage.tensor import StoredTensor

_SHARD = re.compile(r"consolidated-(?P<number>\d{5})-of-(?P<total>\d{5})\.safetensors")
_WHOLE = "consolidated.safetensors"


def read_ranks(folder: Path) -> list[Mapping[str, StoredTensor]]:
    """Tensors of each model-parallel rank by name; raises `ConversionError` where files are missing."""
    files = sorted(folder.glob("consolidated.*.pth"))
    whole = sorted(folder.glob("consolidated*.safetensors"))
    if whole and not files:
        return [_read_whole(folder, whole)]
    if [path.name for path in files] != [f"consolidated.{rank:02d}.pth" for rank in range(len(files))] or not files:
        found = ", ".join(path.name for path in files) or "none"
        raise ConversionError(
            f"{folder} must hold consolidated.00.pth, consolidated.01.pth and so on, or {_WHOLE}; it has {found}"
        )
    return [_read_rank(path) for path in files]


def _read_rank(path: Path) -> Mapping[str, StoredTensor]:
    content: Any = torch_zip.read(path)
    if not isinstance(content, Mapping) or not all(isinstance(value, StoredTensor) for value in content.values()):
        raise ConversionError(f"{path} does not hold a flat dictionary of tensors, so it is not a checkpoint of Meta's")
    return content


def _read_whole(folder: Path, files: list[Path]) -> Mapping[str, StoredTensor]:
    """Tensors of a whole model, from one file or from all shards of one save."""
    if (folder / _WHOLE).exists():
        return safetensors.read(folder / _WHOLE).tensors
    shards = {path.name: match for path in files if (match := _SHARD.fullmatch(path.name))}
    total = max((int(match["total"]) for match in shards.values()), default=0)
    wanted = [f"consolidated-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1)]
    problems = [f"{name} is missing" for name in wanted if name not in shards]
    problems += [f"{path.name} is not one of them" for path in files if path.name not in wanted]
    raise_all(f"{folder}: the shards are not those of one save:", problems, remedy="copy them again")
    found: dict[str, StoredTensor] = {}
    for name in wanted:
        held = safetensors.read(folder / name).tensors
        problems += [f"{tensor} is in {name} and in an earlier shard" for tensor in held.keys() & found.keys()]
        found |= held
    raise_all(f"{folder}: the shards hold tensors twice:", problems, remedy="copy them again")
    return found
