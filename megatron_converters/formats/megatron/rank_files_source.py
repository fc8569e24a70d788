"""Source for Megatron-LM checkpoints of the `torch` format: `mp_rank_*/model_optim_rng.pt`, memory-mapped, at any parallel sizes.

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
from ...conversion.matching import Matcher
from ...model.slots import Ref, Shard, refs
from ...sharding.placement import Placement, Share
from ...sharding.ranks import Parallel, Rank, parallel_for
from ...storage import torch_zip
from ...storage.opening import is_name
from ...storage.tensor import StoredTensor, contiguous_strides
from .arguments import rank_invariants
from .conventions import CUT_DOWN_PROJECTIONS, conventions_of
from .names import EMBEDDINGS, EXPERTS, EXTRA_STATE_SUFFIX, STACKED, keys
from .rank_files_target import FILE
from .reading import (
    AS_STORED,
    RANK,
    MegatronReadOptions,
    args_in,
    checkpoint_directory,
    listing,
    origin_of,
    padding_note,
    parallel_of,
    skipped_entries,
    spec_and_notes,
    supplemented,
    without_prediction,
)

#: Rank and name of a tensor.
_Key = tuple[Rank, str]
_Matcher = Matcher[_Key, StoredTensor]
#: Key of an expert's first linear, in any expert layout.
_EXPERT_FC1 = re.compile(r"\.experts\.(.*linear_fc1[._]weight\d*|weight1)$")
#: Last parts of the keys of stacked experts.
_STACKED_SUFFIXES = tuple(name.rpartition("}")[2] for name in EXPERTS[STACKED].values())


@dataclass(frozen=True)
class _RankFile:
    """File of one rank: the name of its folder, and its tensors by key."""

    folder: str
    tensors: Mapping[str, StoredTensor]


class MegatronSource:
    """Checkpoint of the `torch` format, with every rank and tensor checked against its args by name and shape."""

    def __init__(self, load_dir: Path, options: MegatronReadOptions = AS_STORED) -> None:
        self._dir = checkpoint_directory(load_dir, options.directory_name)
        first = self._read_file(self._first_rank())
        args = _args_of(first, self._dir, options)
        self.parallel, self._ranks, left_out = self._read_ranks(args, first)
        self._embeddings = self.parallel.prefix(0) + EMBEDDINGS
        padded = self._padded_vocab()
        spec, notes = spec_and_notes(args, padded, self._embedding_dtype(), options)
        sizes = self.parallel
        self.parallel = parallel_for(spec, sizes.tp, sizes.pp, sizes.split, sizes.ep, sizes.etp)
        self.spec = spec
        self.conventions = conventions_of(vars(args), spec, options.mup)
        self._padded = padded
        self._pieces, self._replicas = self._match()
        self.spec, left_out_notes = without_prediction(spec, options)
        notes += padding_note(padded, spec) + left_out_notes
        if left_out:
            notes.append(f"left out of the conversion: {', '.join(sorted(left_out))} (optimizer and training state)")
        self.origin = origin_of(
            self._dir,
            args,
            options,
            first.get("iteration"),
            parallel=self.parallel,
            mup=self.conventions.mup,
            notes=notes,
            identity=file_identities(self._dir, [self._dir / file.folder / FILE for file in self._ranks.values()]),
            capacity_bins=from_rank_files(
                str(self._dir), self.parallel, {rank: file.tensors for rank, file in self._ranks.items()}
            ),
        )

    def dtype_of(self, ref: Ref) -> DType:
        """Dtype of a ref in the files."""
        return first_dtype(self._pieces[ref])

    def read(self, ref: Ref) -> Sources:
        """Pieces of a ref from the ranks that make it up; copies on other ranks are replicas."""
        return Sources(self._pieces[ref], self._replicas.get(ref, ()))

    def close(self) -> None:
        """Do nothing: every tensor was matched when the checkpoint was opened."""

    def _first_rank(self) -> str:
        for name in ("mp_rank_00", "mp_rank_00_000", "mp_rank_00_000_000"):
            if (self._dir / name).is_dir():
                return name
        raise ConversionError(
            f"{self._dir} has no mp_rank_00, mp_rank_00_000 or mp_rank_00_000_000; copy the folder of rank 0"
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
        """Read the files of all ranks; returns parallel sizes, files by rank, and the names of entries that are not converted."""
        parallel = _stored_sizes(args, first, self._dir)
        stages = range(parallel.pp)
        wanted = {parallel.directory(rank): rank for stage in stages for rank in parallel.ranks(stage)}
        present = {path.name for path in listing(self._dir) if RANK.match(path.name)}
        problems = [f"{name} is missing" for name in sorted(wanted.keys() - present)]
        problems += [f"{name} is there, but the args have no such rank" for name in sorted(present - wanted.keys())]
        raise_all(
            f"{self._dir}: the folders do not match the args' tp={parallel.tp}, pp={parallel.pp}, ep={parallel.ep}:",
            problems,
        )
        ranks, left_out = {}, set()
        expected = rank_invariants(first.get("iteration"), args_in(first, self._dir))
        for name, rank in wanted.items():
            content = self._read_file(name)
            found = rank_invariants(content.get("iteration"), args_in(content, self._dir / name))
            differing = (key for key in expected.keys() & found.keys() if found[key] != expected[key])
            problems += [
                f"{name}: {key} is {one_line(repr(found[key]))}, not {one_line(repr(expected[key]))}"
                for key in sorted(differing)
            ]
            ranks[rank] = _RankFile(name, _tensors_of(content, parallel, self._dir / name))
            left_out |= skipped_entries(content)
        remedy = "They are of different saves; copy all ranks of one save again."
        raise_all(f"{self._dir}: the ranks' files contradict {self._first_rank()}:", problems, remedy=remedy)
        return parallel, ranks, left_out

    def _padded_vocab(self) -> int:
        """Number of embedding rows on all tensor-parallel ranks, padding included."""
        rows: dict[int, int] = {}
        for rank in self.parallel.ranks(0):
            data = self._ranks[rank].tensors.get(self._embeddings)
            if data is None or len(data.shape) != 2:
                raise ConversionError(f"{self._ranks[rank].folder}: {self._embeddings} is missing or not a matrix")
            rows[rank.tp] = data.shape[0]
        return sum(rows.values())

    def _embedding_dtype(self) -> DType:
        return self._ranks[self.parallel.ranks(0)[0]].tensors[self._embeddings].dtype

    def _match(self) -> tuple[dict[Ref, tuple[Piece, ...]], dict[Ref, tuple[Piece, ...]]]:
        """Match tensors with refs; returns pieces and replicas of every ref. All problems are raised together."""
        stored = {(rank, key): data for rank, file in self._ranks.items() for key, data in file.tensors.items()}
        ignored = {
            (rank, key) for rank, key in stored if key.endswith(EXTRA_STATE_SUFFIX) or CAPACITY_BINS.fullmatch(key)
        }
        heading = f"{self._dir}: the tensors do not match the model that the args describe:"
        matcher = Matcher(stored, ignored, heading, "the args require", self._shown)
        pieces: dict[Ref, tuple[Piece, ...]] = {}
        replicas: dict[Ref, tuple[Piece, ...]] = {}
        placement = Placement(self.spec, self.parallel, self._padded, self._cuts(stored))
        names: dict[tuple[str, int, str], tuple[str, ...]] = {}
        for ref in refs(self.spec):
            shares: dict[int, list[Piece]] = {}
            copies: list[Piece] = []
            for home in placement.locations(ref):
                kind = home.slot, ref.kind_number(self.spec), ref.stack
                if kind not in names:
                    names[kind] = keys(home.slot, ref.kind(self.spec), ref.stack)
                candidates = [home.key(name, ref.expert) for name in names[kind]]
                for share in home.shares:
                    piece = self._piece(ref, share, candidates, matcher)
                    found = [] if piece is None else self.conventions.pieces(ref, piece)
                    if found and shares.setdefault(share.number, found) is not found:
                        copies += found
            pieces[ref] = tuple(piece for found in shares.values() for piece in found)
            replicas[ref] = tuple(copies)
        matcher.close("is not a tensor of this model")
        return pieces, replicas

    def _shown(self, key: _Key) -> str:
        return f"{self._ranks[key[0]].folder}: {key[1]}"

    def _cuts(self, stored: Mapping[_Key, StoredTensor]) -> Mapping[str, Shard]:
        """Slots that these files cut as older releases did, recognised by a shape."""
        ref = next((ref for ref in refs(self.spec) if ref.slot.name in CUT_DOWN_PROJECTIONS), None)
        if ref is None or self.parallel.tp == 1:
            return {}
        home = next(Placement(self.spec, self.parallel, self._padded).locations(ref))
        found = (home.key(name, None) for name in keys(home.slot, ref.kind(self.spec), ref.stack))
        rank = home.shares[0].rank
        shapes = [stored[rank, key].shape for key in found if (rank, key) in stored]
        return CUT_DOWN_PROJECTIONS if shapes and shapes[0][0] < ref.shape(self.spec)[0] else {}

    def _piece(self, ref: Ref, share: Share, names: Sequence[str], matcher: _Matcher) -> Piece | None:
        """Piece for one share; None, with a problem noted, if it is not stored as the args require."""
        rank, cut, _ = share
        file = self._ranks[rank]
        present = [name for name in names if name in file.tensors]
        if len(present) != 1:
            fault = f"{' and '.join(present)} are both there" if present else f"{names[0]} is missing"
            matcher.note(f"{file.folder}: {ref}: {fault}")
            return None
        (key,) = present
        view = None
        if ref.expert is not None and key.endswith(_STACKED_SUFFIXES):
            view = _one_of_stack(file.tensors[key], ref.expert, self.spec.num_experts // self.parallel.ep, cut.shape)
        data = matcher.take((rank, key), ref, cut.shape, view)
        return None if data is None else Piece(data, cut.rows, cut.col, StoredName(file.folder, key))


def _one_of_stack(stack: StoredTensor, expert: int, experts: int, shape: tuple[int, ...]) -> StoredTensor:
    """View of one expert's matrix, stored transposed; a stack of another size is returned itself, so that its shape is reported."""
    rows, cols = shape
    if math.prod(stack.shape) != experts * rows * cols or stack.strides != contiguous_strides(stack.shape):
        return stack
    offset = stack.offset + expert % experts * rows * cols * stack.dtype.itemsize
    return StoredTensor(stack.path, offset, stack.dtype, shape, (1, rows))


def _args_of(content: Mapping[str, Any], where: Path, options: MegatronReadOptions) -> argparse.Namespace:
    args = supplemented(args_in(content, where), options)
    if args is None:
        raise ConversionError(
            f"{where}: the file of rank 0 has no args, which describe the model; copy it again or save the checkpoint with its args"
        )
    return args


def _stored_sizes(args: argparse.Namespace, first: Mapping[str, Any], where: Path) -> Parallel:
    """Parallel sizes from args, that of experts from their shapes. Stages get their layers later, once the number is checked."""
    parallel, values = parallel_of(args, where), vars(args)
    if not values.get("num_experts"):
        return parallel
    tensors = _tensors_of(first, parallel, where)
    return dataclasses.replace(parallel, etp=_expert_tensor_parallel(values, tensors, parallel, where))


def _expert_tensor_parallel(
    values: Mapping[str, Any], tensors: Mapping[str, StoredTensor], parallel: Parallel, where: Path
) -> int:
    """Expert-tensor-parallel size, from the experts' shapes: stock savers always record 1, and old ones nothing."""
    size = values.get("moe_ffn_hidden_size") or values.get("ffn_hidden_size") or 0
    local_experts = max(values["num_experts"] // parallel.ep, 1)
    stored_rows = [
        value.shape[1] // local_experts if key.endswith(_STACKED_SUFFIXES) else value.shape[0]
        for key, value in tensors.items()
        if _EXPERT_FC1.search(key) and len(value.shape) == 2
    ]
    if not stored_rows:  # this stage has only dense layers
        return parallel.etp
    if not isinstance(size, int) or 2 * size % stored_rows[0]:
        raise ConversionError(
            f"{where}: experts have {stored_rows[0]} rows of gate and up, but the args require a divisor of 2 x {size}"
        )
    return 2 * size // stored_rows[0]


def _tensors_of(content: Mapping[str, Any], parallel: Parallel, where: Path) -> Mapping[str, StoredTensor]:
    """Tensors of all models of a rank, by key; keys of virtual stages have the prefix of their model."""
    tensors: dict[str, StoredTensor] = {}
    unnamed = []
    for number, entry in enumerate(parallel.entries):
        model = content.get(entry)
        if not isinstance(model, Mapping):
            held = ", ".join(map(one_line, content))
            reason = (
                f", though the args have {parallel.vpp} virtual pipeline stages per rank" if parallel.vpp > 1 else ""
            )
            raise ConversionError(f"{where}: there is no {entry!r} entry{reason}; the file holds {held}")
        prefix = parallel.prefix(number * parallel.pp)
        for key, value in model.items():
            if isinstance(value, StoredTensor) and is_name(key):
                tensors[prefix + key] = value
            elif not one_line(key).endswith(EXTRA_STATE_SUFFIX):
                unnamed.append(f"{prefix}{one_line(key)}")
    if unnamed:
        raise ConversionError(f"{where}: model entries that are not named tensors: {', '.join(unnamed[:20])}")
    return tensors
