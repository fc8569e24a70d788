"""Source of tensors in files of ranks, memory-mapped, at any parallel sizes; `mp_rank_*/model_optim_rng.pt` are such files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ...assets.capacity_bins import CAPACITY_BINS, from_rank_files
from ...basics.dtypes import DType
from ...basics.errors import ConversionError
from ...conversion.composing import Piece, Sources, StoredName
from ...conversion.endpoint import first_dtype, with_main_dtype
from ...conversion.matching import Matcher
from ...conversion.zero_bias import without_absent
from ...model.slots import Ref, Shard, refs
from ...sharding.placement import Placement, Share
from ...sharding.ranks import Rank, parallel_for
from ...storage.tensor import StoredTensor
from .conventions import CUT_DOWN_PROJECTIONS, conventions_of
from .describing import padding_note, spec_and_notes
from .locating import checkpoint_directory
from .names import EMBEDDINGS, EXTRA_STATE_SUFFIX, OUTPUT_BIAS, keys
from .prediction import as_stored, stored_layers, without_prediction
from .rank_files import RankFiles, read_rank_files
from .reading import (
    AS_STORED,
    MegatronReadOptions,
    origin_of,
)
from .shared_tensors import member_of, view_of
from .wrapped_names import prefix_note

#: Rank and name of a tensor.
_Key = tuple[Rank, str]
_Matcher = Matcher[_Key, StoredTensor]


class RankFilesSource:
    """Checkpoint in files of ranks, with every rank and tensor checked against its args by name and shape."""

    def __init__(self, files: RankFiles, options: MegatronReadOptions) -> None:
        self._dir, self._ranks, args = files.folder, files.ranks, files.args
        self._left_out = files.ignored
        self.parallel = files.parallel
        self._embeddings = self.parallel.prefix(0) + EMBEDDINGS
        padded = self._padded_vocab()
        spec, notes = spec_and_notes(args, padded, self._embedding_dtype(), options, files.record)
        stored = stored_layers(key for file in self._ranks.values() for key in file.tensors)
        spec = as_stored(spec, stored, args, options, self._dir)
        biased = any(key.endswith(OUTPUT_BIAS) for file in self._ranks.values() for key in file.tensors)
        spec, bias_notes = without_absent(spec, stored=biased)
        notes += bias_notes
        self.spec = spec
        self.conventions = conventions_of(vars(args), spec, options.mup)
        notes += self._check(padded)
        sizes = self.parallel
        self.parallel = parallel_for(spec, sizes.tp, sizes.pp, sizes.split, sizes.ep, sizes.etp)
        self._padded = padded
        self._pieces, self._replicas = self._match()
        spec, dtype_notes = with_main_dtype(spec, self.dtype_of)
        self.spec, left_out_notes = without_prediction(spec, options.without_mtp)
        notes += prefix_note(files.wrapper) + padding_note(padded, spec) + left_out_notes + self._left_out.notes
        notes += dtype_notes
        if files.left_out:
            notes.append(
                f"left out of the conversion: {', '.join(sorted(files.left_out))} (optimizer and training state)"
            )
        self.origin = origin_of(
            self._dir,
            args if files.record is None else files.record.margs,
            options,
            files.iteration,
            [*(file.path for file in self._ranks.values()), *files.beside],
            checkpoint_format=files.format,
            parallel=self.parallel,
            mup=self.conventions.mup,
            notes=notes,
            float32_originals=files.float32_originals,
            ignored=self._left_out.ignored,
            capacity_bins=from_rank_files(
                str(self._dir), self.parallel, {rank: file.tensors for rank, file in self._ranks.items()}
            ),
        )

    @property
    def files(self) -> dict[str, Path]:
        """Files of the ranks, by the name of the folder that a rank has in the `torch` format."""
        return {self.parallel.directory(rank): file.path for rank, file in self._ranks.items()}

    def dtype_of(self, ref: Ref) -> DType:
        """Dtype of a ref in the files."""
        return first_dtype(self._pieces[ref])

    def read(self, ref: Ref) -> Sources:
        """Pieces of a ref from the ranks that make it up; copies on other ranks are replicas."""
        return Sources(self._pieces[ref], self._replicas.get(ref, ()))

    def close(self) -> None:
        """Do nothing: every tensor was matched when the checkpoint was opened."""

    def _check(self, padded: int) -> list[str]:
        """Check what else describes the model, before its tensors are matched; returns notes."""
        return []

    def _padded_vocab(self) -> int:
        """Number of embedding rows on all tensor-parallel ranks, padding included."""
        rows: dict[int, int] = {}
        for rank in self.parallel.ranks(0):
            data = self._ranks[rank].tensors.get(self._embeddings)
            if data is None or len(data.shape) != 2:
                raise ConversionError(f"{self._ranks[rank].name}: {self._embeddings} is missing or not a matrix")
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
        matcher = Matcher(stored, ignored, heading, "the args require", self._shown, left_out=self._left_out)
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
                candidates = [home.prefix + home.key(name, ref.expert) for name in names[kind]]
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
        return f"{self._ranks[key[0]].name}: {key[1]}"

    def _cuts(self, stored: Mapping[_Key, StoredTensor]) -> Mapping[str, Shard]:
        """Slots that these files cut as older releases did, recognised by a shape."""
        ref = next((ref for ref in refs(self.spec) if ref.slot.name in CUT_DOWN_PROJECTIONS), None)
        if ref is None or self.parallel.tp == 1:
            return {}
        home = next(Placement(self.spec, self.parallel, self._padded).locations(ref))
        found = (home.prefix + home.key(name, None) for name in keys(home.slot, ref.kind(self.spec), ref.stack))
        rank = home.shares[0].rank
        for key in found:
            if (rank, key) in stored:
                whole = ref.shape(self.spec)
                member = member_of(key, ref, whole, self.spec, 0)
                rows = (whole if member is None else member.shape)[0]
                return CUT_DOWN_PROJECTIONS if stored[rank, key].shape[0] < rows else {}
        return {}

    def _piece(self, ref: Ref, share: Share, names: Sequence[str], matcher: _Matcher) -> Piece | None:
        """Piece for one share; None, with a problem noted, if it is not stored as the args require."""
        rank, cut, _ = share
        file = self._ranks[rank]
        present = [name for name in names if name in file.tensors]
        if len(present) != 1:
            fault = f"{' and '.join(present)} are both there" if present else f"{names[0]} is missing"
            matcher.note(f"{file.name}: {ref}: {fault}")
            return None
        (key,) = present
        view, wanted = None, cut.shape
        member = member_of(key, ref, cut.shape, self.spec, self.spec.num_experts // self.parallel.ep)
        if member is not None:
            whole = file.tensors[key]
            view = view_of(whole, member, cut.shape)
            wanted = member.shape if view is whole and whole.shape != member.shape else cut.shape
        data = matcher.take((rank, key), ref, wanted, view)
        return None if data is None else Piece(data, cut.rows, cut.col, StoredName(file.name, key))


class MegatronSource(RankFilesSource):
    """Checkpoint of the `torch` format: one file per rank."""

    def __init__(self, load_dir: Path, options: MegatronReadOptions = AS_STORED) -> None:
        super().__init__(read_rank_files(checkpoint_directory(load_dir, options.directory_name), options), options)
