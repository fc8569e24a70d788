"""Shard map: which rows and columns of which process's parameters make up each tensor of Hugging Face, as plain data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..basics.dtypes import DType
from ..basics.errors import raise_all
from ..conversion.composing import Gather, Piece, Planner, Sources, StoredName
from ..conversion.outline import Fill, Outline
from ..formats.huggingface.target import HFTarget
from ..model.layouts import RowMap, runs
from ..model.slots import Ref, refs
from ..model.values import Affine, composed
from ..storage.tensor import MemoryTensor
from .layout import Holding, LiveLayout

#: Mark of the data that `ShardMap.to_dict` gives.
FORMAT = "megatron_converters shard map, version 1"

#: Runs of consecutive rows: first row of a tensor of Hugging Face, first row of a parameter, number of rows.
Runs = tuple[tuple[int, int, int], ...]


class Part(NamedTuple):
    """Part of a tensor of Hugging Face that is in a parameter, of shape `parameter_shape`, of each process in `ranks`.

    `model` is the number of the model in such a process's list. Both are taken as matrices [first dimension, product of the
    rest]: the tensor's rows of `runs`, from its column `column` on, are `columns` of the parameter's from `parameter_column`. Of a
    tensor that stacks experts, the matrix is entry `entry` of its first dimension; a `transposed` one is the transposed matrix.
    The tensor's elements are `value` of the parameter's, computed in float32, where that is given.
    """

    ranks: tuple[int, ...]
    model: int
    parameter: str
    parameter_shape: tuple[int, ...]
    runs: Runs
    column: int
    parameter_column: int
    columns: int
    entry: int | None = None
    transposed: bool = False
    value: Affine | None = None


class MappedTensor(NamedTuple):
    """Tensor of Hugging Face: its name, shape, parts, and the file of the saved model that it is in.

    `copies` are parts of parameters that hold the same again, such as tied embeddings on the last pipeline stage.
    """

    name: str
    shape: tuple[int, ...]
    file: str
    parts: tuple[Part, ...]
    copies: tuple[Part, ...] = ()

    @property
    def elements(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True)
class ShardMap:
    """Tensors of Hugging Face in the order of the model, by name, and the sizes by which the model is cut.

    `parallel` has "tp", "pp", "vpp", "ep", "etp" and "world", the number of processes.
    """

    parallel: Mapping[str, int]
    tensors: Mapping[str, MappedTensor]

    def of_rank(self, rank: int) -> dict[tuple[int, str], list[tuple[str, Part]]]:
        """The way back: for each parameter of a process, by (model, name), the tensors and parts of them that it holds.

        Parameters that are padding alone have none.
        """
        found: dict[tuple[int, str], list[tuple[str, Part]]] = {}
        for tensor in self.tensors.values():
            for part in (*tensor.parts, *tensor.copies):
                if rank in part.ranks:
                    found.setdefault((part.model, part.parameter), []).append((tensor.name, part))
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON: parts refer to their runs, which repeat from layer to layer, by number."""
        numbers: dict[Runs, int] = {}
        tensors = {
            tensor.name: {
                "shape": list(tensor.shape),
                "file": tensor.file,
                **{
                    kind: [_plain(part, numbers.setdefault(part.runs, len(numbers))) for part in parts]
                    for kind, parts in (("parts", tensor.parts), ("copies", tensor.copies))
                },
            }
            for tensor in self.tensors.values()
        }
        runs_by_number = [[list(run) for run in found] for found in numbers]
        return {"format": FORMAT, "parallel": dict(self.parallel), "runs": runs_by_number, "tensors": tensors}


def _plain(part: Part, number: int) -> dict[str, Any]:
    value = part.value
    plain = {**part._asdict(), "runs": number, "ranks": list(part.ranks), "parameter_shape": list(part.parameter_shape)}
    return plain | {"value": None if value is None else {"scale": float(value.scale), "shift": float(value.shift)}}


class _Parameter(NamedTuple):
    """Parameter of some processes, as data of a piece that has a shape and no elements here."""

    holding: Holding
    shape: tuple[int, ...]
    dtype: DType


def shard_map(layout: LiveLayout, target: HFTarget, outline: Outline) -> ShardMap:
    """Shard map of a live model and a Hugging Face folder, whose target is prepared and has this outline.

    Raises `ConversionError` for elements that are not mapped exactly once.
    """
    return _Mapper(layout, target).map(outline)


class _Mapper:
    """Mapper of a model's tensors."""

    def __init__(self, layout: LiveLayout, target: HFTarget) -> None:
        self._layout, self._target = layout, target
        self._planner = Planner()
        self._runs: dict[int, tuple[RowMap, Runs]] = {}

    def map(self, outline: Outline) -> ShardMap:
        """Shard map, checked to be complete."""
        raise_all(
            "these tensors, or rows of them, are 0, and no parameter of a live model holds that, so that they cannot be exported "
            "from it:",
            (
                name
                for given in outline.extra_tensors.values()
                for name, data in given.items()
                if isinstance(data, MemoryTensor)  # others lie beside a text part, which the live model is
            ),
            remedy="save the model with save_hf_pretrained, which writes them",
        )
        files = {name: file for file, found in outline.files.items() for name in found.shapes}
        raise_all(
            "no tensor of Hugging Face holds these, so that an export of tensors would lose them unseen:",
            (
                str(ref)
                for ref in refs(self._layout.spec)
                if any(fill.constant is not None for fill in self._target.fills(ref))
            ),
            remedy="save the model with save_hf_pretrained, which checks that they are what the architecture has in their place",
        )
        shapes = {name: tuple(shape) for found in outline.files.values() for name, shape in found.shapes.items()}
        parts: dict[str, list[Part]] = {}
        copies: dict[str, list[Part]] = {}
        for ref in refs(self._layout.spec):
            for number, place in enumerate(self._layout.holdings(ref)):
                sources = self._sources(ref, place)
                self._planner.check_cover(ref, self._layout.spec, sources)
                for fill in self._target.fills(ref):
                    found = self._parts(fill, sources.pieces, shapes[fill.name])
                    (copies if number else parts).setdefault(fill.name, []).extend(found)
        tensors = {
            name: MappedTensor(name, shapes[name], files[name], tuple(own), tuple(copies.get(name, ())))
            for name, own in parts.items()
        }
        raise_all("elements are not mapped once; this is a fault of this program, please report it:", _faults(tensors))
        sizes = {name: getattr(self._layout.parallel, name) for name in ("tp", "pp", "vpp", "ep", "etp")}
        return ShardMap({**sizes, "world": len(self._layout.ranks)}, tensors)

    def _sources(self, ref: Ref, place: Iterable[Holding]) -> Sources:
        dtype = self._layout.spec.dtype
        pieces = []
        for holding in place:
            data: Any = _Parameter(holding, holding.cut.shape, dtype)
            name = StoredName(f"rank {holding.holders[0]}", holding.key.parameter)
            pieces += self._layout.pieces(ref, Piece(data, holding.cut.rows, holding.cut.col, name))
        return Sources(tuple(pieces))

    def _parts(self, fill: Fill, pieces: Sequence[Piece], shape: tuple[int, ...]) -> Iterator[Part]:
        gathers = self._planner.compose_fill(fill, pieces)
        stacked = len(shape) > len(fill.shape)
        size = int(np.prod(fill.shape, dtype=np.int64)) * fill.dtype.itemsize
        for gather in gathers:
            yield self._part(gather, fill, fill.start // size if stacked else None)

    def _part(self, gather: Gather, fill: Fill, index: int | None) -> Part:
        data: Any = gather.source.data
        holding: Holding = data.holding
        return Part(
            holding.holders,
            holding.key.model,
            holding.key.parameter,
            holding.cut.shape,
            self._runs_of(gather.rows),
            gather.target_cols.start,
            gather.source_cols.start,
            gather.target_cols.stop - gather.target_cols.start,
            index,
            fill.transposed,
            _value(gather),
        )

    def _runs_of(self, rows: RowMap) -> Runs:
        """Runs of a row map, of which equal ones are one object; the map is held, so that its id stays its own."""
        if id(rows) not in self._runs:
            self._runs[id(rows)] = rows, tuple(runs(rows))
        return self._runs[id(rows)][1]


def _value(gather: Gather) -> Affine | None:
    return composed(gather.source.value, gather.value)


def _faults(tensors: Mapping[str, MappedTensor]) -> Iterator[str]:
    """Tensors whose parts have another number of elements."""
    for tensor in tensors.values():
        mapped, again = (
            sum(count * part.columns for part in parts for _, _, count in part.runs)
            for parts in (tensor.parts, tensor.copies)
        )
        if mapped != tensor.elements or again % tensor.elements:
            yield f"{tensor.name}: {mapped} of {tensor.elements}, and {again} in copies"
