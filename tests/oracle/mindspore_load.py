"""Program for mindspore's own Python: load a checkpoint with mindspore and write what it holds as JSON.

$MINDSPORE_PYTHON mindspore_load.py CHECKPOINT RESULT
"""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mindspore
from mindspore import parallel

from .mindspore_cells import cells, parameters_of


def described(tensors: Mapping[str, mindspore.Tensor]) -> dict[str, Any]:
    """Dtype, shape and CRC-32 of each tensor's bytes."""
    return {name: [_dtype(x), list(x.shape), zlib.crc32(x.asnumpy().tobytes())] for name, x in tensors.items()}


def _dtype(tensor: mindspore.Tensor) -> str:
    return str(tensor.dtype).lower()


def load(path: Path) -> dict[str, mindspore.Parameter]:
    """Parameters of a file, or of all `.safetensors` of a folder, in which each name may occur once."""
    if path.is_file():
        return mindspore.load_checkpoint(str(path), format=path.suffix[1:])
    loaded: dict[str, mindspore.Parameter] = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors = mindspore.load_checkpoint(str(file), format="safetensors")
        if twice := loaded.keys() & tensors.keys():
            raise ValueError(f"{file} holds {sorted(twice)}, which another file of {path} holds, too")
        loaded |= tensors
    return loaded


def load_into_network(path: Path, loaded: Mapping[str, mindspore.Parameter]) -> dict[str, Any]:
    """What a network with these parameters holds after mindspore has loaded the checkpoint into it."""
    network = cells({name: mindspore.ops.zeros_like(parameter) for name, parameter in loaded.items()})
    if (path / "param_name_map.json").is_file():  # mindspore looks up in it which file holds a parameter
        missing, left = parallel.load_distributed_checkpoint(
            network, format="safetensors", unified_safetensors_dir=str(path)
        )
    else:
        missing, left = mindspore.load_param_into_net(network, dict(loaded), strict_load=True)
    if missing or left:
        raise ValueError(f"{path}: mindspore has not loaded {missing} and left {left}")
    return described(parameters_of(network, set(loaded)))


def main() -> None:
    """Load the checkpoint both ways, which must give the same."""
    path, result = map(Path, sys.argv[1:])
    loaded = load(path)
    found = described(loaded)
    if load_into_network(path, loaded) != found:
        raise ValueError(f"{path}: the network does not hold what its files hold")
    result.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
