"""Read a Megatron-LM checkpoint of the `torch` format: `mp_rank_*/model_optim_rng.pt`, mapped, in any TP and PP.

Format: Megatron-LM core_v0.8.0 to core_v0.19.0, training/checkpointing.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..capacity_bins import of_ranks
from ..dtypes import DType
from ..errors import ConversionError, Unclear, UsageError, raise_all
from ..hf_config import differences, family_of_config, infer_family, read_json, spec_of_config
from ..megatron_args import spec_fields
from ..megatron_names import CAPACITY_BINS, EXPERTS, EXTRA_STATE_SUFFIX, LOCAL, STACKED, keys
from ..parallel import Parallel, PipelineSplit, Rank, homes, parallel_for
from ..plan import Piece, Sources
from ..slots import Ref, refs
from ..spec import ModelSpec
from ..storage import torch_zip
from ..storage.tensor import StoredTensor, contiguous_strides
from .base import Origin, first_dtype, identity_of
from .megatron_target import FILE, TRACKER

#: Any layout's name of an expert's first linear.
_EXPERT_FC1 = re.compile(r"\.experts\.(.*linear_fc1[._]weight\d*|weight1)$")
_STACKED = tuple(name.rpartition("}")[2] for name in EXPERTS[STACKED].values())
_RANK = re.compile(r"mp_rank_\d{2,}(_\d{3,})*$")
_EMBEDDINGS = "word_embeddings"
#: Top-level entries of a checkpoint that are not left-out state.
_EXPECTED_ENTRIES = frozenset(
    {"args", "model", "checkpoint_version", "iteration", "num_floating_point_operations_so_far"}
)


@dataclass(frozen=True)
class MegatronReadOptions:
    """What the user says about a checkpoint beyond its own args."""

    directory_name: str | None = None
    hf_config: Path | None = None
    true_vocab_size: int | None = None
    source_model_type: str | None = None


@dataclass(frozen=True)
class _RankFile:
    """One rank's file: its name for messages, and its tensors by key."""

    where: str
    tensors: Mapping[str, StoredTensor]


def checkpoint_directory(load_dir: Path, name: str | None) -> Path:
    """The folder that holds the ranks: `name`, what the tracker file names, or `load_dir` itself."""
    if name is not None:
        if not (load_dir / name).is_dir():
            found = sorted(path.name for path in load_dir.glob("*") if path.is_dir())
            raise ConversionError(f"{load_dir} has no folder {name!r}; it has {', '.join(found) or 'none'}")
        return load_dir / name
    tracker = load_dir / TRACKER
    if tracker.is_file():
        text = tracker.read_text(encoding="utf-8", errors="replace").strip()
        if text != "release" and not text.isdigit():
            raise ConversionError(f"{tracker} says {text!r}; it must hold an iteration number or 'release'")
        directory = load_dir / (text if text == "release" else f"iter_{int(text):07d}")
        if not directory.is_dir():
            raise ConversionError(
                f"{tracker} names {directory.name}, which is not there; copy it or name another folder"
            )
        return directory
    if any(_RANK.match(path.name) for path in _listing(load_dir)):
        return load_dir
    raise ConversionError(f"{load_dir} is no Megatron-LM checkpoint: it has neither {TRACKER} nor mp_rank_* folders")


def _listing(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise ConversionError(f"cannot list {folder}: {error.strerror}") from error


class MegatronSource:
    """A checkpoint whose every rank and tensor is known, named and shaped as its args say."""

    def __init__(self, load_dir: Path, options: MegatronReadOptions = MegatronReadOptions()) -> None:
        self._dir = checkpoint_directory(load_dir, options.directory_name)
        if (self._dir / ".metadata").exists():
            raise ConversionError(
                f"{self._dir} is a torch_dist checkpoint; this version reads the torch format (mp_rank_*) only"
            )
        first = self._read_file(self._first_rank())
        args = _args_of(first, self._dir)
        self.parallel, self._ranks, left_out = self._read_ranks(args, first)
        padded = self._padded_vocab()
        spec, notes = _describe(args, padded, self._embedding_dtype(), options)
        sizes = self.parallel
        self.parallel = parallel_for(spec, sizes.tp, sizes.pp, sizes.split, sizes.ep, sizes.etp)
        self.spec = spec
        self._padded = padded
        self._pieces, self._replicas = self._match()
        if padded > spec.vocab_size:
            notes.append(
                f"{padded - spec.vocab_size} rows of vocabulary padding are left out (vocabulary {spec.vocab_size})"
            )
        if left_out:
            notes.append(f"left out of the conversion: {', '.join(sorted(left_out))} (optimizer and training state)")
        reference = options.hf_config
        iteration = first.get("iteration")
        self.origin = Origin(
            described=str(self._dir),
            hf_config=_beside(args, "hf_config", reference, "config.json"),
            generation_config=_beside(args, "hf_generation_config", reference, "generation_config.json"),
            tokenizer=str(reference) if reference else getattr(args, "tokenizer_model", None),
            margs=args,
            iteration=iteration if isinstance(iteration, int) else None,
            parallel=self.parallel,
            capacity_bins=of_ranks(
                str(self._dir), self.parallel, {rank: file.tensors for rank, file in self._ranks.items()}
            ),
            notes=notes,
            identity=identity_of(self._dir, [self._dir / file.where / FILE for file in self._ranks.values()]),
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
        parallel = _parallel_of(args, first, self._dir)
        stages = range(parallel.pp)
        wanted = {parallel.directory(rank): rank for stage in stages for rank in parallel.ranks(stage)}
        present = {path.name for path in _listing(self._dir) if _RANK.match(path.name)}
        problems = [f"{name} is missing" for name in sorted(wanted.keys() - present)]
        problems += [f"{name} is there, but the args mean other ranks" for name in sorted(present - wanted.keys())]
        raise_all(f"{self._dir}: the args say tp={parallel.tp}, pp={parallel.pp}, ep={parallel.ep}, but", problems)
        ranks, left_out = {}, set()
        for name, rank in wanted.items():
            content = self._read_file(name)
            ranks[rank] = _RankFile(name, _model_of(content, self._dir / name))
            left_out |= {
                str(key)
                for key, value in content.items()
                if key not in _EXPECTED_ENTRIES and value not in (None, {}, [])
            }
        return parallel, ranks, left_out

    def _padded_vocab(self) -> int:
        rows: dict[int, int] = {}
        for rank in self.parallel.ranks(0):
            data = self._ranks[rank].tensors.get(LOCAL[_EMBEDDINGS])
            if data is None or len(data.shape) != 2:
                raise ConversionError(f"{self._ranks[rank].where}: {LOCAL[_EMBEDDINGS]} is missing or no matrix")
            rows[rank.tp] = data.shape[0]
        return sum(rows.values())

    def _embedding_dtype(self) -> DType:
        return self._ranks[self.parallel.ranks(0)[0]].tensors[LOCAL[_EMBEDDINGS]].dtype

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
        for ref in refs(self.spec):
            shares: dict[int, Piece] = {}
            copies: list[Piece] = []
            for rank, names in self._homes(ref):
                piece = self._piece(ref, rank, names, unused, problems)
                share = self.parallel.share_number(ref.slot, rank)
                if piece is not None and shares.setdefault(share, piece) is not piece:
                    copies.append(piece)
            pieces[ref], replicas[ref] = tuple(shares.values()), tuple(copies)
        problems += [
            f"{self._ranks[rank].where}: {key} is no tensor of this model" for rank, key in sorted(unused, key=str)
        ]
        raise_all(f"{self._dir}: the tensors are not those of the model that the args describe", problems)
        return pieces, replicas

    def _homes(self, ref: Ref) -> Iterator[tuple[Rank, tuple[str, ...]]]:
        """The ranks that hold a ref, with the keys that it may have there."""
        experts = self.spec.num_experts
        local = self.parallel.local_expert(ref.expert, experts)
        for stage, slot, layer in homes(ref, self.spec, self.parallel):
            names = keys(slot, layer, local, ref.expert)
            for rank in self.parallel.ranks(stage):
                if self.parallel.holds(rank, ref.expert, experts):
                    yield rank, names

    def _piece(
        self, ref: Ref, rank: Rank, names: Sequence[str], unused: set[tuple[Rank, str]], problems: list[str]
    ) -> Piece | None:
        file = self._ranks[rank]
        present = [name for name in names if name in file.tensors]
        if len(present) != 1:
            fault = f"{' and '.join(present)} are both there" if present else f"{names[0]} is missing"
            problems.append(f"{file.where}: {ref}: {fault}")
            return None
        (key,) = present
        unused.discard((rank, key))
        share = self.parallel.share(ref.slot, self.spec, rank, self._padded)
        data = file.tensors[key]
        if ref.expert is not None and key.endswith(_STACKED):
            data = _one_of_stack(data, ref.expert, self.spec.num_experts // self.parallel.ep, share.shape)
        if data.shape != share.shape:
            problems.append(
                f"{file.where}: {key} ({ref}) has shape {list(data.shape)}; the args mean {list(share.shape)}"
            )
            return None
        return Piece(data, share.rows, share.col, f"{file.where}: {key}")


def _one_of_stack(stack: StoredTensor, expert: int, experts: int, shape: tuple[int, ...]) -> StoredTensor:
    """A view of one expert's matrix, stored transposed; the stack itself if its size is another, to be reported."""
    rows, cols = shape
    if math.prod(stack.shape) != experts * rows * cols or stack.strides != contiguous_strides(stack.shape):
        return stack
    offset = stack.offset + expert % experts * rows * cols * stack.dtype.itemsize
    return StoredTensor(stack.path, offset, stack.dtype, shape, (1, rows))


def _args_of(content: Mapping[str, Any], where: Path) -> argparse.Namespace:
    args = content.get("args")
    if not isinstance(args, argparse.Namespace):
        raise ConversionError(
            f"{where}: rank 0's file has no args; a checkpoint without them does not say what its tensors mean"
        )
    return args


def _parallel_of(args: argparse.Namespace, first: Mapping[str, Any], where: Path) -> Parallel:
    """Sizes from args; the stages are counted later, when the number of layers is known to be sound."""
    values = vars(args)
    if (values.get("virtual_pipeline_model_parallel_size") or 1) > 1:
        raise ConversionError(f"{where} has virtual pipeline stages; this version does not read them")
    sizes = [values.get(name) for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size")]
    if any(not isinstance(size, int) or size < 1 for size in sizes):
        raise ConversionError(f"{where}: the args have no sound tensor- and pipeline-parallel sizes: {sizes}")
    split = PipelineSplit(
        values.get("decoder_first_pipeline_num_layers"),
        values.get("decoder_last_pipeline_num_layers"),
        bool(values.get("account_for_embedding_in_pipeline_split")),
        bool(values.get("account_for_loss_in_pipeline_split")),
    )
    tp, pp = (int(size or 0) for size in sizes)
    if not values.get("num_experts"):
        return Parallel(tp, (0,) * pp, split, etp=tp)
    ep = values.get("expert_model_parallel_size") or 1
    return Parallel(tp, (0,) * pp, split, ep, _expert_tensor_parallel(values, first.get("model"), where, tp))


def _expert_tensor_parallel(values: Mapping[str, Any], model: Any, where: Path, tp: int) -> int:
    """From the experts' shapes: stock savers record 1 whatever they do, and old ones nothing."""
    size = values.get("moe_ffn_hidden_size") or values.get("ffn_hidden_size") or 0
    local = (values["num_experts"] or 1) // (values.get("expert_model_parallel_size") or 1)
    stored = [
        value.shape[1] // max(local, 1) if key.endswith(_STACKED) else value.shape[0]
        for key, value in (model.items() if isinstance(model, Mapping) else ())
        if isinstance(value, StoredTensor) and _EXPERT_FC1.search(key) and len(value.shape) == 2
    ]
    if not stored:  # this stage has dense layers alone
        return int(values.get("expert_tensor_parallel_size") or tp)
    if not isinstance(size, int) or 2 * size % stored[0]:
        raise ConversionError(f"{where}: experts have {stored[0]} rows of gate and up, but the args say 2 x {size}")
    return 2 * size // stored[0]


def _model_of(content: Mapping[str, Any], where: Path) -> Mapping[str, StoredTensor]:
    model = content.get("model")
    if not isinstance(model, Mapping):
        held = ", ".join(map(str, content))
        raise ConversionError(f"{where}: there is no 'model' entry; the file holds {held}")
    odd = [
        key
        for key, value in model.items()
        if not key.endswith(EXTRA_STATE_SUFFIX) and not isinstance(value, StoredTensor)
    ]
    if odd:
        raise ConversionError(f"{where}: model entries that are no tensors: {', '.join(odd[:20])}")
    return {key: value for key, value in model.items() if isinstance(value, StoredTensor)}


def _describe(
    args: argparse.Namespace, padded: int, dtype: DType, options: MegatronReadOptions
) -> tuple[ModelSpec, list[str]]:
    """The model that args describe, or the reference's where one is given, with what the user should know."""
    if options.hf_config is not None:
        return _reference(options.hf_config, args, dtype, options.true_vocab_size)
    fields = spec_fields(args)
    vocab, notes = _vocab_size(args, padded, options.true_vocab_size)
    fields = {**fields, "vocab_size": vocab, "dtype": dtype}
    recorded = getattr(args, "hf_config", None)
    if isinstance(recorded, dict):
        return ModelSpec(family=family_of_config(recorded).name, **fields), notes
    spec = infer_family(fields)
    return spec, [*notes, f"no Hugging Face configuration is recorded; the {spec.family} family fits the args"]


def _reference(folder: Path, args: argparse.Namespace, dtype: DType, vocab: int | None) -> tuple[ModelSpec, list[str]]:
    config = read_json(folder / "config.json")
    spec = dataclasses.replace(spec_of_config(config), dtype=dtype)
    if vocab is not None and vocab != spec.vocab_size:
        raise UsageError(
            f"--true-vocab-size {vocab} disagrees with vocab_size {spec.vocab_size} of {folder / 'config.json'}"
        )
    try:
        fields = {**spec_fields(args), "vocab_size": spec.vocab_size, "dtype": dtype}
    except Unclear as error:
        return spec, [f"taken from {folder} alone, since {error}"]
    said = ModelSpec(family=spec.family, **fields)
    return spec, [f"taken from {folder}: {difference} of the args" for difference in differences(spec, said)]


def _beside(args: argparse.Namespace, name: str, reference: Path | None, file: str) -> dict[str, Any] | None:
    """A configuration from the reference if there is one, else as a conversion recorded it in args."""
    if reference is not None:
        return read_json(reference / file) if (reference / file).exists() else None
    recorded = getattr(args, name, None)
    return recorded if isinstance(recorded, dict) else None


def _vocab_size(args: argparse.Namespace, padded: int, given: int | None) -> tuple[int, list[str]]:
    recorded = getattr(args, "vocab_size", None)
    if given is not None:
        if given > padded:
            raise UsageError(f"--true-vocab-size {given} exceeds the {padded} rows of the embeddings")
        return given, []
    if isinstance(recorded, int) and 0 < recorded <= padded:
        return recorded, []
    return padded, [
        f"the args do not say the true vocabulary size; all {padded} rows are kept, padding included "
        "(give --true-vocab-size or --hf-config to trim it)"
    ]
