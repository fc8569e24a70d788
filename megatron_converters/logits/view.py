"""A distributed checkpoint as megatron-core is given it: the same files, under an index that is written here.

megatron-core unpickles `.metadata`, `common.pt` and each object, and with them whatever they name. The restricted unpickler makes
any class of torch.distributed or Megatron an inert stand-in; what it accepts may therefore still do harm where classes are real,
and to have checked a file does not make it safe. So none of these is shown: the index is written anew, from what was read of the
old one, without objects, and what ranks have in common is empty. What is left is the archive of each tensor. The restricted
unpickler has read it before, and torch then reads it with `weights_only` (filesystem.py of torch 2.6 to 2.13; `cpu.join` makes it
so for all), also where somebody has exchanged the file since.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from ..conversion.composing import Planner
from ..formats.megatron.names import DISTRIBUTED, DISTRIBUTED_LOCAL, GATE_AND_UP
from ..formats.megatron.reading import FORMAT_FILE
from ..formats.megatron.torch_dist_source import COMMON_FILE, TorchDistSource
from ..formats.megatron.torch_dist_target import FORMAT
from ..model.slots import refs
from ..storage import dcp, dcp_layout, torch_zip
from ..storage.dcp import ChunkedTensor
from ..storage.dcp_layout import NewChunk, Placed

_FLOAT32_BYTES = 4
#: Ends of keys that megatron-core's local layers have another name for.
_RENAMED = {
    stored.rpartition("}.")[2]: DISTRIBUTED_LOCAL[slot].rpartition("}.")[2]
    for slot, stored in DISTRIBUTED.items()
    if stored != DISTRIBUTED_LOCAL[slot]
}


def write(source: TorchDistSource, folder: Path) -> None:
    """Make `folder` a checkpoint of the source's tensors, with links to its files and names of local layers.

    Raises `ConversionError` for a chunk that is not the tensor that it should be, and for gaps and overlaps between chunks,
    which megatron-core would fill with whatever lies in memory.
    """
    planner = Planner()
    for ref in refs(source.spec):
        planner.check_cover(ref, source.spec, source.read(ref))
    folder.mkdir()
    links = _link({chunk.item.path for tensor in source.weights.values() for chunk in tensor.chunks}, folder)
    dcp_layout.index(list(_placed(source.weights, links))).create(folder / dcp.METADATA).close()
    torch_zip.layout(COMMON_FILE, {}).create(folder / COMMON_FILE).close()
    (folder / FORMAT_FILE).write_text(json.dumps(FORMAT), encoding="utf-8")


def in_passing(source: TorchDistSource) -> int:
    """What a load needs beside the model, as a number of parameters in float32.

    megatron-core loads gate and up one by one and joins all of them before it fills the model, and torch reads whole chunks.
    """
    joined = sum(
        math.prod(ref.slot.shape(source.spec)) for ref in refs(source.spec) if ref.slot.blocks == len(GATE_AND_UP)
    )
    chunks = (chunk for tensor in source.weights.values() for chunk in tensor.chunks)
    return joined + max(chunk.item.nbytes for chunk in chunks) // _FLOAT32_BYTES


def _link(paths: set[str], folder: Path) -> dict[str, str]:
    """By path, the name of a link to it in the folder. Theirs could be those of other files there."""
    names = {path: f"{number}.distcp" for number, path in enumerate(sorted(paths))}
    for path, name in names.items():
        (folder / name).symlink_to(os.path.abspath(path))
    return names


def _placed(tensors: Mapping[str, ChunkedTensor], links: Mapping[str, str]) -> Iterator[Placed]:
    for key, tensor in tensors.items():
        for chunk in tensor.chunks:
            dcp.stored(chunk, tensor.dtype)  # raises where the archive holds anything else
            item = NewChunk(_local(key), tensor.shape, tensor.dtype, chunk.offsets, chunk.sizes)
            yield Placed(item, links[chunk.item.path], chunk.item.start, chunk.item.nbytes)


def _local(key: str) -> str:
    for stored, wanted in _RENAMED.items():
        if key.endswith(stored):
            return key.removesuffix(stored) + wanted
    return key
