"""Safe view of a distributed checkpoint for megatron-core: links to the same files, under an index that is written here.

megatron-core unpickles `.metadata`, `common.pt` and each object, and thereby calls whatever they name. Our restricted unpickler
replaces any class of torch.distributed or Megatron by an inert stand-in; a file that it accepts may still do harm where the
classes are real, so checking a file does not make it safe. Therefore megatron-core sees none of these: the index is rewritten
from what was read of the old one, without objects, and `common.pt` is empty. Only the archive of each tensor remains. The
restricted unpickler has read it before, and torch then reads it with `weights_only` (filesystem.py of torch 2.6 to 2.13;
`cpu.join` enforces it for every load), which is safe even if the file was exchanged in between.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from ..conversion.composing import Planner
from ..formats.megatron.locating import COMMON_FILE, FORMAT_FILE
from ..formats.megatron.names import GATE_AND_UP, LOCAL_ENDS
from ..formats.megatron.torch_dist_source import TorchDistSource
from ..formats.megatron.torch_dist_target import FORMAT
from ..model.slots import refs
from ..storage import dcp, dcp_layout, marks, torch_zip
from ..storage.dcp import ChunkedTensor
from ..storage.dcp_layout import NewChunk, Placed

_FLOAT32_BYTES = 4


def write(source: TorchDistSource, folder: Path) -> None:
    """Make `folder` a checkpoint of the source's tensors, with links to its files and names of local layers.

    Raises `ConversionError` for a chunk that is not the tensor it should be, and for gaps and overlaps between chunks: in gaps,
    megatron-core would leave arbitrary memory.
    """
    planner = Planner()
    for ref in refs(source.spec):
        planner.check_cover(ref, source.spec, source.read(ref))
    folder.mkdir()
    links = _link({chunk.item.path for tensor in source.weights.values() for chunk in tensor.chunks}, folder)
    dcp_layout.index(list(_placed_chunks(source.weights, links))).create(folder / marks.METADATA).close()
    torch_zip.layout(COMMON_FILE, {}).create(folder / COMMON_FILE).close()
    (folder / FORMAT_FILE).write_text(json.dumps(FORMAT), encoding="utf-8")


def load_overhead(source: TorchDistSource) -> int:
    """Memory that loading needs in addition to the model, as a number of float32 parameters.

    megatron-core loads gate and up separately and joins all of them before it fills the model, and torch reads whole chunks.
    """
    gate_and_up = sum(
        math.prod(ref.shape(source.spec))
        for ref in refs(source.spec)
        if len(ref.slot.size(source.spec, ref.kind(source.spec)).blocks) == len(GATE_AND_UP)
    )
    chunks = (chunk for tensor in source.weights.values() for chunk in tensor.chunks)
    return gate_and_up + max(chunk.item.nbytes for chunk in chunks) // _FLOAT32_BYTES


def _link(paths: set[str], folder: Path) -> dict[str, str]:
    """Link each path into the folder; returns path to link name. Links are numbered, since file names could clash there."""
    names = {path: f"{number}.distcp" for number, path in enumerate(sorted(paths))}
    for path, name in names.items():
        (folder / name).symlink_to(os.path.abspath(path))
    return names


def _placed_chunks(tensors: Mapping[str, ChunkedTensor], links: Mapping[str, str]) -> Iterator[Placed]:
    for key, tensor in tensors.items():
        for chunk in tensor.chunks:
            dcp.stored(chunk, tensor.dtype)  # raises if the archive holds anything else
            item = NewChunk(_local_key(key), tensor.shape, tensor.dtype, chunk.offsets, chunk.sizes)
            yield Placed(item, links[chunk.item.path], chunk.item.start, chunk.item.nbytes)


def _local_key(key: str) -> str:
    for stored, wanted in LOCAL_ENDS.items():
        if key.endswith(stored):
            return key.removesuffix(stored) + wanted
    return key
