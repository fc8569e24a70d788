"""Read a Megatron-LM checkpoint of the `torch` format: `mp_rank_*/model_optim_rng.pt`, mapped, in any TP and PP.

Format: Megatron-LM core_v0.8.0 to core_v0.19.0, training/checkpointing.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...assets.capacity_bins import CAPACITY_BINS, from_rank_files
from ...assets.origin import file_identities
from ...basics.dtypes import DType
from ...basics.errors import ConversionError, one_line, raise_all
from ...conversion.composing import Piece, Sources, StoredName
from ...conversion.endpoint import first_dtype
from ...model.slots import Ref, refs
from ...sharding.placement import Placement, Share
from ...sharding.ranks import Parallel, Rank, parallel_for
from ...storage import torch_zip
from ...storage.opening import is_name
from ...storage.tensor import StoredTensor, contiguous_strides
from .arguments import stamp
from .names import EXPERTS, EXTRA_STATE_SUFFIX, LOCAL, STACKED, keys
from .rank_files_target import FILE
from .reading import (
    AS_STORED,
    RANK,
    MegatronReadOptions,
    args_in,
    checkpoint_directory,
    describe,
    left_out_of,
    listing,
    origin_of,
    padding_note,
    parallel_of,
)

#: Any layout's name of an expert's first linear.
_EXPERT_FC1 = re.compile(r"\.experts\.(.*linear_fc1[._]weight\d*|weight1)$")
_STACKED = tuple(name.rpartition("}")[2] for name in EXPERTS[STACKED].values())


@dataclass(frozen=True)
class _RankFile:
    """One rank's file: its name for messages, and its tensors by key."""

    where: str
    tensors: Mapping[str, StoredTensor]


class MegatronSource:
    """A checkpoint whose every rank and tensor is known, named and shaped as its args say."""

    def __init__(self, load_dir: Path, options: MegatronReadOptions = AS_STORED) -> None:
        self._dir = checkpoint_directory(load_dir, options.directory_name)
        first = self._read_file(self._first_rank())
        args = _args_of(first, self._dir)
        self.parallel, self._ranks, left_out = self._read_ranks(args, first)
        self._embeddings = self.parallel.prefix(0) + LOCAL["word_embeddings"]
        padded = self._padded_vocab()
        spec, notes = describe(args, padded, self._embedding_dtype(), options)
        sizes = self.parallel
        self.parallel = parallel_for(spec, sizes.tp, sizes.pp, sizes.split, sizes.ep, sizes.etp)
        self.spec = spec
        self._padded = padded
        self._pieces, self._replicas = self._match()
        notes += padding_note(padded, spec)
        if left_out:
            notes.append(f"left out of the conversion: {', '.join(sorted(left_out))} (optimizer and training state)")
        self.origin = origin_of(
            self._dir,
            args,
            options,
            first.get("iteration"),
            parallel=self.parallel,
            notes=notes,
            identity=file_identities(self._dir, [self._dir / file.where / FILE for file in self._ranks.values()]),
            capacity_bins=from_rank_files(
                str(self._dir), self.parallel, {rank: file.tensors for rank, file in self._ranks.items()}
            ),
        )

    def dtype_of(self, ref: Ref) -> DType:
        """The dtype in the files."""
        return first_dtype(self._pieces[ref])

    def read(self, ref: Ref) -> Sources:
        """The shares of all ranks that make up the slot, and the copies on other ranks."""
        return Sources(self._pieces[ref], self._replicas.get(ref, ()))

    def close(self) -> None:
        """Nothing is left: every tensor was matched when the checkpoint was opened."""

    def _first_rank(self) -> str:
        for name in ("mp_rank_00", "mp_rank_00_000", "mp_rank_00_000_000"):
            if (self._dir / name).is_dir():
                return name
        raise ConversionError(
            f"{self._dir} has no mp_rank_00, mp_rank_00_000 or mp_rank_00_000_000; copy rank 0's folder"
        )

    def _read_file(self, rank: str) -> dict[str, Any]:
        path = self._dir / rank / FILE
        if not path.is_file():
            raise ConversionError(f"{path} is missing; copy the checkpoint again")
        content = torch_zip.read(path)
        if not isinstance(content, dict):
            raise ConversionError(f"{path} holds a {type(content).__name__}, not a checkpoint")
        return content

    def _read_ranks(
        self, args: argparse.Namespace, first: Mapping[str, Any]
    ) -> tuple[Parallel, dict[Rank, _RankFile], set[str]]:
        parallel = _cut_as_stored(args, first, self._dir)
        stages = range(parallel.pp)
        wanted = {parallel.directory(rank): rank for stage in stages for rank in parallel.ranks(stage)}
        present = {path.name for path in listing(self._dir) if RANK.match(path.name)}
        problems = [f"{name} is missing" for name in sorted(wanted.keys() - present)]
        problems += [f"{name} is there, but the args mean other ranks" for name in sorted(present - wanted.keys())]
        raise_all(f"{self._dir}: the args say tp={parallel.tp}, pp={parallel.pp}, ep={parallel.ep}, but", problems)
        ranks, left_out, expected = {}, set(), stamp(first.get("iteration"), args)
        for name, rank in wanted.items():
            content = self._read_file(name)
            said = stamp(content.get("iteration"), args_in(content, self._dir / name))
            others = (key for key in expected.keys() & said.keys() if said[key] != expected[key])
            problems += [
                f"{name}: {key} is {one_line(repr(said[key]))}, not {one_line(repr(expected[key]))}"
                for key in sorted(others)
            ]
            ranks[rank] = _RankFile(name, _tensors_of(content, parallel, self._dir / name))
            left_out |= left_out_of(content)
        remedy = "They are of different saves; copy all ranks of one again."
        raise_all(f"{self._dir}: the ranks' files contradict {self._first_rank()}:", problems, remedy=remedy)
        return parallel, ranks, left_out

    def _padded_vocab(self) -> int:
        rows: dict[int, int] = {}
        for rank in self.parallel.ranks(0):
            data = self._ranks[rank].tensors.get(self._embeddings)
            if data is None or len(data.shape) != 2:
                raise ConversionError(f"{self._ranks[rank].where}: {self._embeddings} is missing or no matrix")
            rows[rank.tp] = data.shape[0]
        return sum(rows.values())

    def _embedding_dtype(self) -> DType:
        return self._ranks[self.parallel.ranks(0)[0]].tensors[self._embeddings].dtype

    def _match(self) -> tuple[dict[Ref, tuple[Piece, ...]], dict[Ref, tuple[Piece, ...]]]:
        """Pieces and replicas of every ref; missing, extra and misshapen tensors are listed together."""
        problems: list[str] = []
        unused = {
            (rank, key)
            for rank, file in self._ranks.items()
            for key in file.tensors
            if not key.endswith(EXTRA_STATE_SUFFIX) and not CAPACITY_BINS.fullmatch(key)
        }
        pieces: dict[Ref, tuple[Piece, ...]] = {}
        replicas: dict[Ref, tuple[Piece, ...]] = {}
        placement = Placement(self.spec, self.parallel, self._padded)
        for ref in refs(self.spec):
            shares: dict[int, Piece] = {}
            copies: list[Piece] = []
            for home in placement.locations(ref):
                names = tuple(home.prefix + key for key in keys(home.slot, home.layer, home.expert, ref.expert))
                for share in home.shares:
                    piece = self._piece(ref, share, names, unused, problems)
                    if piece is not None and shares.setdefault(share.number, piece) is not piece:
                        copies.append(piece)
            pieces[ref], replicas[ref] = tuple(shares.values()), tuple(copies)
        problems += [
            f"{self._ranks[rank].where}: {key} is no tensor of this model" for rank, key in sorted(unused, key=str)
        ]
        raise_all(f"{self._dir}: the tensors are not those of the model that the args describe", problems)
        return pieces, replicas

    def _piece(
        self, ref: Ref, share: Share, names: Sequence[str], unused: set[tuple[Rank, str]], problems: list[str]
    ) -> Piece | None:
        rank, cut, _ = share
        file = self._ranks[rank]
        present = [name for name in names if name in file.tensors]
        if len(present) != 1:
            fault = f"{' and '.join(present)} are both there" if present else f"{names[0]} is missing"
            problems.append(f"{file.where}: {ref}: {fault}")
            return None
        (key,) = present
        unused.discard((rank, key))
        data = file.tensors[key]
        if ref.expert is not None and key.endswith(_STACKED):
            data = _one_of_stack(data, ref.expert, self.spec.num_experts // self.parallel.ep, cut.shape)
        if data.shape != cut.shape:
            problems.append(
                f"{file.where}: {key} ({ref}) has shape {list(data.shape)}; the args mean {list(cut.shape)}"
            )
            return None
        return Piece(data, cut.rows, cut.col, StoredName(file.where, key))


def _one_of_stack(stack: StoredTensor, expert: int, experts: int, shape: tuple[int, ...]) -> StoredTensor:
    """A view of one expert's matrix, stored transposed; the stack itself if its size is another, to be reported."""
    rows, cols = shape
    if math.prod(stack.shape) != experts * rows * cols or stack.strides != contiguous_strides(stack.shape):
        return stack
    offset = stack.offset + expert % experts * rows * cols * stack.dtype.itemsize
    return StoredTensor(stack.path, offset, stack.dtype, shape, (1, rows))


def _args_of(content: Mapping[str, Any], where: Path) -> argparse.Namespace:
    args = args_in(content, where)
    if args is None:
        raise ConversionError(
            f"{where}: rank 0's file has no args; a checkpoint without them does not say what its tensors mean"
        )
    return args


def _cut_as_stored(args: argparse.Namespace, first: Mapping[str, Any], where: Path) -> Parallel:
    """Sizes from args; the stages are counted later, when the number of layers is known to be sound."""
    parallel, values = parallel_of(args, where), vars(args)
    if not values.get("num_experts"):
        return parallel
    tensors = _tensors_of(first, parallel, where)
    return dataclasses.replace(parallel, etp=_expert_tensor_parallel(values, tensors, parallel, where))


def _expert_tensor_parallel(
    values: Mapping[str, Any], tensors: Mapping[str, StoredTensor], parallel: Parallel, where: Path
) -> int:
    """From the experts' shapes: stock savers record 1 whatever they do, and old ones nothing."""
    size = values.get("moe_ffn_hidden_size") or values.get("ffn_hidden_size") or 0
    local = max(values["num_experts"] // parallel.ep, 1)
    stored = [
        value.shape[1] // local if key.endswith(_STACKED) else value.shape[0]
        for key, value in tensors.items()
        if _EXPERT_FC1.search(key) and len(value.shape) == 2
    ]
    if not stored:  # this stage has dense layers alone
        return parallel.etp
    if not isinstance(size, int) or 2 * size % stored[0]:
        raise ConversionError(f"{where}: experts have {stored[0]} rows of gate and up, but the args say 2 x {size}")
    return 2 * size // stored[0]


def _tensors_of(content: Mapping[str, Any], parallel: Parallel, where: Path) -> Mapping[str, StoredTensor]:
    """The tensors of all models of a rank, by key; those of virtual stages after the model's prefix."""
    tensors: dict[str, StoredTensor] = {}
    odd = []
    for number, entry in enumerate(parallel.entries):
        model = content.get(entry)
        if not isinstance(model, Mapping):
            held = ", ".join(map(one_line, content))
            why = f", though the args mean {parallel.vpp} virtual pipeline stages a rank" if parallel.vpp > 1 else ""
            raise ConversionError(f"{where}: there is no {entry!r} entry{why}; the file holds {held}")
        prefix = parallel.prefix(number * parallel.pp)
        for key, value in model.items():
            if isinstance(value, StoredTensor) and is_name(key):
                tensors[prefix + key] = value
            elif not one_line(key).endswith(EXTRA_STATE_SUFFIX):
                odd.append(f"{prefix}{one_line(key)}")
    if odd:
        raise ConversionError(f"{where}: model entries that are no named tensors: {', '.join(odd[:20])}")
    return tensors
