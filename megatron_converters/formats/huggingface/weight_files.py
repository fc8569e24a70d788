"""Files that hold the weights of a Hugging Face folder: one file, or shards and their index; safetensors or `torch.save`'s."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...basics.errors import ConversionError, one_line, raise_all
from ...basics.json_files import read_json
from ...basics.quantities import count, few
from ...storage import safetensors, torch_zip
from ...storage.opening import is_name
from ...storage.tensor import StoredTensor

#: Weight files of unsharded models, in the order of preference of `from_pretrained`; '.index.json' is appended for an index.
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
#: Maximum number of names listed in a message.
_SHOWN_NAMES = 40
#: Name of a shard: its number, and that of all shards of its save.
_SHARD = re.compile(r"(?P<start>.+-)(?P<number>\d+)-of-(?P<total>\d+)(?P<end>\.safetensors|\.bin)")
_WEIGHTS = ("*.safetensors", "*.bin")
_CONFIG = "config.json"
#: Configuration of an adapter, of which another model is the base.
ADAPTER = "adapter_config.json"
#: Weights as Mistral's and Meta's own programs name them, of which transformers reads none.
_OWN = "consolidated"
_CONSOLIDATED = f"{_OWN}*.safetensors"


@dataclass
class WeightFiles:
    """Tensors of a folder by name. `ghosts` are names that only the index has, each with the file that it names for it.

    `notes` say what transformers would not read as it is.
    """

    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    ghosts: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def paths(self) -> set[str]:
        """Files that hold tensors."""
        return {data.path for data in self.tensors.values()}


def read_weights(folder: Path) -> WeightFiles:
    """Read the header of every weight file, from a single file or an index of shards; safetensors are preferred.

    A folder that has the name of a single file is read, too: `zero_to_fp32.py` of DeepSpeed (0.15.3 on) takes the name that it is
    given for that of a folder.
    """
    found = _read_files(folder)
    if found is not None:
        return found
    for inner in (folder / single for single in SINGLE_FILES):
        nested = _read_files(inner) if inner.is_dir() else None
        if nested is not None:
            note = f"{inner} is a folder; its files, which belong one level up, are read as if they were there"
            return WeightFiles(nested.tensors, nested.ghosts, [note, *nested.notes])
    raise ConversionError(f"{folder} has neither {' nor '.join(SINGLE_FILES)} nor an index of shards{_hint(folder)}")


def _read_files(folder: Path) -> WeightFiles | None:
    """Weights that lie in the folder itself; None where it has no complete ones."""
    for single in SINGLE_FILES:
        index = folder / f"{single}.index.json"
        if (folder / single).exists() and not (folder / single).is_dir():
            return WeightFiles(read_file(folder / single))
        if index.exists():
            return _read_sharded(folder, index)
    sets = _complete_sets(folder)
    if len(sets) != 1:
        return None
    (shards,) = sets
    note = f"{folder} has no index of its {count(len(shards), 'shard')}; every tensor of theirs is read"
    return WeightFiles(_union(shards), notes=[note])


def weight_map(index: Path) -> dict[str, str]:
    """File of each tensor, by an index of shards."""
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not all(map(is_name, itertools.chain(*found.items()))):
        raise ConversionError(f"{index} has no weight_map from tensor names to file names; copy it again")
    return found


def read_file(path: Path) -> dict[str, StoredTensor]:
    """Tensors of one file."""
    if path.suffix == ".safetensors":
        return safetensors.read(path).tensors
    state: Any = torch_zip.read(path)
    if not isinstance(state, Mapping):
        raise ConversionError(f"{path} holds a {type(state).__name__}, not a dictionary of tensors")
    others = [one_line(key) for key, value in state.items() if not (is_name(key) and isinstance(value, StoredTensor))]
    if others:
        raise ConversionError(f"{path} holds entries that are not named tensors: {', '.join(others[:_SHOWN_NAMES])}")
    return dict(state)


def _read_sharded(folder: Path, index: Path) -> WeightFiles:
    found = WeightFiles()
    problems = []
    listed_in: dict[str, set[str]] = {}
    for tensor, name in weight_map(index).items():
        listed_in.setdefault(name, set()).add(tensor)
    for name, listed in sorted(listed_in.items()):
        path = folder / name
        if Path(name).name != name or not os.path.isfile(path):  # `isfile` is also False for a name that is too long
            problems.append(f"{path} is named by {index.name}, but is not there; copy it again")
            continue
        held = read_file(path)
        found.ghosts.update(dict.fromkeys(sorted(listed - held.keys()), name))
        problems += [f"{tensor} is in {name}, but not in {index.name}" for tensor in sorted(held.keys() - listed)]
        found.tensors.update(held)
    if problems:
        problems += [ghost_line(tensor, name, index.name) for tensor, name in found.ghosts.items()]
    raise_all(
        f"{folder}: the shards and their index disagree:", problems, remedy=_unindexed(folder, index, listed_in.keys())
    )
    return found


def ghost_line(tensor: str, file: str, index: str = "the index") -> str:
    """Problem of a tensor that only the index has."""
    return f"{tensor} should be in {file} by {index}, but is not"


def _unindexed(folder: Path, index: Path, listed: Iterable[str]) -> str | None:
    """Remedy for an index of another save than the shards; None where no complete shards lie there that it does not name."""
    known = set(listed)
    sets = [shards for shards in _complete_sets(folder) if known.isdisjoint(path.name for path in shards)]
    if not sets:
        return None
    shards = sets[0]
    return (
        f"{count(len(shards), 'complete shard')} that {index.name} does not name lie there ({shards[0].name}, …): the index is of "
        "another save; copy theirs, or remove it to have all their tensors read"
    )


def _complete_sets(folder: Path) -> list[list[Path]]:
    """Shards of each save of which all are there, by their names; safetensors first."""
    sets: dict[tuple[str, str, str], dict[int, Path]] = {}
    for path in sorted(folder.glob("*-of-*")):
        match = _SHARD.fullmatch(path.name)
        if match and path.is_file():
            key = match["end"], match["start"], match["total"]
            sets.setdefault(key, {})[int(match["number"])] = path
    complete = {
        key: list(shards.values())
        for key, shards in sets.items()
        if (min(shards), max(shards), len(shards)) == (1, len(shards), int(key[2])) and not key[1].startswith(_OWN)
    }
    preferred = max(complete, default=("", "", ""))[0]
    return [shards for key, shards in sorted(complete.items()) if key[0] == preferred]


def _union(shards: Iterable[Path]) -> dict[str, StoredTensor]:
    """Tensors of all shards; raises `ConversionError` for one that is in two."""
    tensors: dict[str, StoredTensor] = {}
    problems = []
    for path in shards:
        for name, data in read_file(path).items():
            if name in tensors:
                problems.append(f"{name} is in {os.path.basename(tensors[name].path)} and in {path.name}")
            tensors[name] = data
    raise_all(
        "the shards, which have no index, hold tensors twice:", problems, remedy="copy them and their index again"
    )
    return tensors


def _hint(folder: Path) -> str:
    """What a folder without the weights of transformers has instead, with the remedy."""
    own = sorted(path.name for path in folder.glob(_CONSOLIDATED))
    if own:
        beside = "--from meta reads it" if (folder / "params.json").exists() else "it needs its params.json, too"
        return f"; {own[0]} is of Mistral's own format: {beside}, or copy the files of transformers' format"
    shards = sorted(path.name for pattern in _WEIGHTS for path in folder.glob(pattern))
    if not shards:
        below = sorted({path.parent.name for pattern in _WEIGHTS for path in folder.glob(f"*/{pattern}")})
        return f"; its folder {below[0]} holds weights: move them one level up, beside {_CONFIG}" if below else ""
    return f"; it has {few(shards, _SHOWN_NAMES)}, but the index of these shards is missing"
