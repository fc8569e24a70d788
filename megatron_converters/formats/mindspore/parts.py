"""Folder of files that together hold whole tensors, with or without param_name_map.json."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from ...basics.errors import ConversionError, one_line, raise_all
from ...basics.json_files import read_json
from ...storage.opening import is_name
from .nonweights import RUN_STATE
from .recognising import MAP
from .tensors import Tensor, WeightFiles
from .weight_file import FileContent, read_file

#: File of `mindspore.unified_safetensors` for what the strategy does not name: steps, epochs, scalars of an optimizer.
_HYPER = "hyper_param.safetensors"


def read_parts(folder: Path, files: list[Path]) -> WeightFiles:
    """Read all files of a folder; the map must agree with them in both directions."""
    hyper = [path for path in files if path.name == _HYPER]
    contents = {path.name: read_file(path) for path in files if path.name != _HYPER}
    if (folder / MAP).exists():
        _check_map(folder / MAP, contents)
    weights: dict[str, Tensor] = {}
    others: dict[str, str] = {}
    twice = []
    for name_of_file, content in [*contents.items(), *((path.name, _hyper(path)) for path in hyper)]:
        twice += [f"{name} (again in {name_of_file})" for name in content.weights if name in weights]
        weights.update(content.weights)
        others.update(content.others)
    raise_all(f"{folder} holds tensors in more than one file; leave the files of one checkpoint there:", twice)
    read = [*files, folder / MAP] if (folder / MAP).exists() else files
    form = "a directory of parts" if len(read) > 1 else "one file"
    return WeightFiles(folder, weights, Counter(others.values()), tuple(read), form)


def _hyper(path: Path) -> FileContent:
    """Content of the file of what no strategy names; a scalar in it is no weight whatever its name."""
    content = read_file(path)
    scalars = {name for name, tensor in content.weights.items() if tensor.shape in ((), (1,))}
    weights = {name: tensor for name, tensor in content.weights.items() if name not in scalars}
    return FileContent(weights, {**content.others, **dict.fromkeys(scalars, RUN_STATE)})


def other_parts(path: Path) -> list[str]:
    """Names of the other files that the map beside a file lists."""
    listed = _listed(path.parent / MAP) if (path.parent / MAP).exists() else {}
    return sorted({*listed.values()} - {path.name})


def _listed(path: Path) -> dict[str, str]:
    """File of each tensor, as the map states it in either of its shapes."""
    value = read_json(path)
    listed = value.get("weight_map", value)
    if not isinstance(listed, dict) or not all(is_name(name) and is_name(file) for name, file in listed.items()):
        raise ConversionError(f"{path} is not a map of tensor names to file names; copy it again")
    return listed


def _check_map(path: Path, contents: dict[str, FileContent]) -> None:
    listed = _listed(path)
    problems = []
    for file in sorted({*listed.values()} - contents.keys()):
        problems.append(f"it lists {one_line(file)}, which is not in the folder")
    for name, file in listed.items():
        content = contents.get(file)
        if content is not None and name not in content.weights and name not in content.others:
            problems.append(f"it lists {one_line(name)}, which {file} does not hold")
    for file, content in contents.items():
        problems += [f"it does not list {name} of {file}" for name in content.weights if listed.get(name) != file]
    raise_all(f"{path} does not describe the files beside it:", problems, remedy="copy the folder again")
