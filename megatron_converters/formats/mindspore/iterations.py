"""Checkpoint 2.0 of MindSpore Transformers: iteration folders with model and optimizer files, and metadata.json for slices.

Source: mindformers 1.7.0 to 2.1.0, checkpoint/ (metadata.py, sharded_tensor.py `_rank_id_with_slice_id`, utils.py).
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...basics.errors import ConversionError, one_line, raise_all, reason_of
from ...basics.json_files import read_json
from ...storage.opening import is_name
from .nonweights import OPTIMIZER, group_of
from .recognising import ITERATION_FILE, METADATA, SAFETENSORS, TRACKER
from .tensors import Placed, Tensor, WeightFiles, assembled
from .weight_file import FileContent, read_file

#: Key of a slice: Python's text of (name, (index,)), where the index may be a number of numpy's.
_SLICE = re.compile(r"\((['\"])(?P<name>[^'\"\\]+)\1, \((?:np\.int64\()?(?P<index>[0-9]{1,18})\)?,\)\)")
_FORM = "checkpoint 2.0"
_TOO_LARGE = 1 << 63

#: Files that hold a slice, by the slice's index.
_Places = Mapping[int, list[str]]


def read_root(folder: Path) -> WeightFiles:
    """Read the iteration that the tracker names."""
    try:
        text = (folder / TRACKER).read_text(encoding="utf-8", errors="replace").strip()
    except OSError as error:
        raise ConversionError(f"cannot read {folder / TRACKER}: {reason_of(error)}") from error
    if not re.fullmatch("[0-9]{1,18}", text):
        raise ConversionError(
            f"{folder / TRACKER} holds {one_line(text)!r} instead of an iteration; give the folder of one"
        )
    iteration = folder / f"iteration_{int(text):08d}"
    if not iteration.is_dir():
        raise ConversionError(
            f"{folder / TRACKER} names {iteration.name}, which is not there; give the folder of another"
        )
    return read_iteration(iteration)


def read_iteration(folder: Path) -> WeightFiles:
    """Read the model files of one iteration, in slices where metadata.json describes them."""
    kinds = defaultdict(list)
    for path in sorted(folder.glob(f"*{SAFETENSORS}")):
        match = ITERATION_FILE.fullmatch(path.name)
        if match is None:
            raise ConversionError(f"{path} is not named as a file of this checkpoint; move it elsewhere")
        kinds[match[1]].append(path)
    if not kinds["model"]:
        raise ConversionError(f"{folder} holds no model-*{SAFETENSORS}; copy it again")
    contents = {path.name: read_file(path) for path in kinds["model"]}
    others = {name: group for content in contents.values() for name, group in content.others.items()}
    metadata = folder / METADATA
    if metadata.exists():
        tensors, optimizer = _described(metadata, contents)
        others |= dict.fromkeys(optimizer, OPTIMIZER)
    else:
        tensors = _undescribed(folder, contents)
    notes = (f"{len(kinds['opt'])} files of optimizer states were not read",) if kinds["opt"] else ()
    files = (*kinds["model"], *([metadata] if metadata.exists() else []))
    return WeightFiles(folder, tensors, Counter(others.values()), files, _FORM, notes)


def _undescribed(folder: Path, contents: Mapping[str, FileContent]) -> dict[str, Tensor]:
    """Whole tensors; all files that their names count must be there, and a name in two of them would be a slice."""
    numbered: dict[tuple[str, int], set[int]] = defaultdict(set)
    for match in (ITERATION_FILE.fullmatch(name) for name in contents):
        if match is not None:
            numbered[match.string[: match.start(2)], int(match[3])].add(int(match[2]))
    if len(numbered) > 1 or any(
        len(indices) != total or max(indices) >= total for (_, total), indices in numbered.items()
    ):
        raise ConversionError(
            f"{folder} lacks model files or mixes those of two runs; copy it again, with {METADATA} if there is one"
        )
    tensors: dict[str, Tensor] = {}
    twice = []
    for content in contents.values():
        twice += [name for name in content.weights if name in tensors]
        tensors.update(content.weights)
    raise_all(f"{folder} holds slices, but no {METADATA} that describes them:", twice, remedy=f"copy {METADATA}, too")
    return tensors


def _described(path: Path, contents: Mapping[str, FileContent]) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors of the model files as metadata.json joins them, and names of the optimizer's tensors."""
    content = read_json(path)
    described, stored = content.get("state_dict_metadata"), content.get("storage_data")
    if not isinstance(described, dict) or not isinstance(stored, dict):
        raise ConversionError(f"{path} lacks state_dict_metadata or storage_data; copy it again")
    places = _places(path, stored)
    optimizer = {name for name in described if group_of(name) == OPTIMIZER or _only_optimizer(places.get(name, {}))}
    weights = {name: places.get(name, {}) for name in described if name not in optimizer and group_of(name) is None}
    _check_listed(path, weights, contents)
    tensors = {}
    for name, files_of in weights.items():
        held = {index: [contents[file].weights[name] for file in files] for index, files in files_of.items()}
        tensors[name] = _tensor(f"{path}: {one_line(name)}", described[name], held)
    return tensors, sorted(optimizer)


def _check_listed(path: Path, weights: Mapping[str, _Places], contents: Mapping[str, FileContent]) -> None:
    """Every slice that is listed must be in its file, and every weight of a file must be listed."""
    listed = {(file, name) for name, places in weights.items() for files in places.values() for file in files}
    problems = [
        f"it lists {file}, which is not there" for file in sorted({file for file, _ in listed} - contents.keys())
    ]
    for file, name in sorted(listed):
        if file in contents and name not in contents[file].weights:
            problems.append(f"it lists {one_line(name)} in {file}, which does not hold it")
    for file, content in contents.items():
        problems += [f"it does not list {name} of {file}" for name in content.weights if (file, name) not in listed]
    raise_all(f"{path} does not describe the files beside it:", problems, remedy="copy the folder again")


def _places(path: Path, stored: Mapping[str, Any]) -> dict[str, dict[int, list[str]]]:
    found: dict[str, dict[int, list[str]]] = defaultdict(dict)
    for key, entries in stored.items():
        match = _SLICE.fullmatch(key)
        files = [_file_name(entry) for entry in entries] if isinstance(entries, list) else []
        if match is None or not files or "" in files:
            raise ConversionError(f"{path}: {one_line(key)} of storage_data is no slice or has no file; copy it again")
        found[match["name"]][int(match["index"])] = files
    return found


def _file_name(entry: Any) -> str:
    """Name of a file in storage_data; empty if the entry has none."""
    name = entry.get("file_name") if isinstance(entry, dict) else None
    return name if is_name(name) else ""


def _only_optimizer(places: _Places) -> bool:
    matches = [ITERATION_FILE.fullmatch(file) for files in places.values() for file in files]
    return bool(matches) and all(match is not None and match[1] == "opt" for match in matches)


def _tensor(where: str, entry: Any, held: Mapping[int, list[Tensor]]) -> Tensor:
    """Tensor of one entry; `global_offset` is not an element but the row-major number of the slice in `axis_fragmentations`."""
    shape, cuts = _whole_numbers(where, entry, "global_shape"), _whole_numbers(where, entry, "axis_fragmentations")
    if len(shape) != len(cuts) or any(count < 1 or size % count for size, count in zip(shape, cuts, strict=True)):
        raise ConversionError(f"{where}: {one_line(cuts)} slices do not divide the shape {one_line(shape)}")
    chunks = entry.get("chunk")
    if not isinstance(chunks, list):
        raise ConversionError(f"{where} lists no slices; copy it again")
    local = tuple(size // count for size, count in zip(shape, cuts, strict=True))
    indices: list[int] = []
    for chunk in chunks:
        if _whole_numbers(where, chunk, "local_shape") != local:
            raise ConversionError(f"{where}: a slice does not have the shape {one_line(local)} of an even cut")
        indices += _whole_numbers(where, chunk, "global_offset")[:1]
    count = math.prod(cuts)
    if len({*indices}) != count or {*indices} != held.keys() or max(indices) >= count:
        raise ConversionError(
            f"{where} is cut into {one_line(count)} slices, but slices {one_line(sorted({*indices}))} are listed "
            f"and {one_line(sorted(held))} stored; copy the folder again"
        )
    return assembled(where, shape, _parts(where, shape, local, cuts, held))


def _parts(
    where: str, shape: tuple[int, ...], local: tuple[int, ...], cuts: tuple[int, ...], held: Mapping[int, list[Tensor]]
) -> Iterator[Placed]:
    for index, tensors in sorted(held.items()):
        for tensor in tensors:
            if tensor.shape == local:
                yield Placed(tensor, tuple(at * size for at, size in zip(_unravelled(index, cuts), local, strict=True)))
            elif tensor.shape == shape:  # a save of whole tensors, which lists them as if they were slices
                yield Placed(tensor, (0,) * len(shape))
            else:
                raise ConversionError(
                    f"{where}: a slice has the shape {tensor.shape} instead of {one_line(local)}; copy the folder again"
                )


def _unravelled(index: int, counts: tuple[int, ...]) -> tuple[int, ...]:
    place = []
    for count in reversed(counts):
        index, at = divmod(index, count)
        place.append(at)
    return tuple(reversed(place))


def _whole_numbers(where: str, entry: Any, key: str) -> tuple[int, ...]:
    value = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(value, list) or not all(type(number) is int and 0 <= number < _TOO_LARGE for number in value):
        raise ConversionError(f"{where}: {key} is not a list of whole numbers; copy it again")
    return tuple(value)
