"""Write a Megatron-LM checkpoint of the `torch` format: one `mp_rank_*/model_optim_rng.pt` a rank, filled in place.

Format: Megatron-LM core_v0.17.1, training/checkpointing.py, and the files that it writes.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from .. import capacity_bins
from ..capacity_bins import CapacityBins
from ..dtypes import DType
from ..errors import ConversionError, UsageError, raise_all
from ..execute import Executor, Target
from ..layouts import RowMap
from ..margs_json import inheritable
from ..megatron_args import (
    RUN_DEFAULTS,
    expert_args,
    flag_warnings,
    flags,
    inexpressible,
    layout_args,
    model_args,
    plain_args,
    router_args,
    router_warnings,
)
from ..megatron_names import DIALECTS, EXPERTS, EXTRA_STATE_SUFFIX, LAST_EXTRA_STATE, extra_state
from ..parallel import EVEN, Cut, Parallel, PipelineSplit, Rank, homes, kept_etp, padded_vocab, parallel_for
from ..plan import Sources
from ..slots import SLOTS, Ref, refs
from ..spec import ModelSpec
from ..staging import Staging, check_space, opened, write_text
from ..storage import torch_zip
from ..storage.output import OutputFile
from ..storage.tensor import StoredTensor
from .base import Origin

TRACKER = "latest_checkpointed_iteration.txt"
FILE = "model_optim_rng.pt"
FLAGS_FILE = "pretrain_gpt_flags.txt"
_DEFAULT_DIVISOR = 128
_CHECKPOINT_VERSION = 3.0
_DEFAULT_SEQ_LENGTH = 4096
_EMBEDDINGS = "word_embeddings"


@dataclass(frozen=True)
class MegatronOptions:
    """How to cut and name the checkpoint. Sizes left None are the source's, or 1."""

    tp: int | None = None
    pp: int | None = None
    ep: int | None = None
    etp: int | None = None
    split: PipelineSplit = EVEN
    #: "sequential", "grouped" or "dynamic"; None means what current Megatron-LM trains fastest.
    expert_layout: str | None = None
    impl: str = "transformer_engine"
    divisor: int | None = None
    release: bool = False
    overwrite: bool = False
    allow_inexpressible: bool = False
    load_capacity_bins: bool = False
    tokenizer: str | None = None


@dataclass(frozen=True)
class _Place:
    """A slot, or a tied copy of it, on one rank."""

    ref: Ref
    key: str
    cut: Cut


class MegatronTarget:
    """A checkpoint directory that appears in `save_dir` when it is complete, the tracker file last."""

    def __init__(self, save_dir: Path, options: MegatronOptions) -> None:
        self._dir = save_dir
        self._options = options
        self._staging: Staging | None = None
        self._files: dict[Rank, OutputFile] = {}
        self._written = 0

    def prepare(self, spec: ModelSpec, origin: Origin, dtype_of: Callable[[Ref], DType]) -> int:
        """Check what Megatron-LM can express and how the model can be cut; lay out every rank's file."""
        self._warnings = self._check_expressible(spec)
        self._spec = dataclasses.replace(spec, dtype=dtype_of(Ref(SLOTS[_EMBEDDINGS])))
        self._origin = origin
        self._dtype_of = dtype_of
        self._iteration = 1 if origin.iteration is None else origin.iteration
        self._name = "release" if self._options.release else f"iter_{self._iteration:07d}"
        self._refuse_existing()
        self._parallel = self._choose_parallel()
        default_layout = "grouped" if self._options.impl == "transformer_engine" else "sequential"
        self._expert_layout = self._options.expert_layout or default_layout
        self._divisor = self._choose_divisor()
        self._padded = padded_vocab(spec.vocab_size, self._divisor, self._parallel.tp)
        self._bins = self._choose_bins()
        self._router = _widest(dtype_of(ref) for ref in refs(spec) if ref.slot.keeps_precision)
        self._args = self._make_args()
        layouts = {rank: torch_zip.layout(FILE, self._tree(rank, places)) for rank, places in self._places().items()}
        check_space(self._dir, sum(layout.nbytes for layout in layouts.values()))
        self._staging = staging = Staging(self._dir, self._name)
        for rank, layout in layouts.items():
            folder = staging.path / self._parallel.directory(rank)
            folder.mkdir()
            self._files[rank] = layout.create(folder / FILE)
        small = self._fill_bins()
        return sum(nbytes for layout in layouts.values() for _, nbytes in layout.regions.values()) - small

    def write(self, ref: Ref, sources: Sources, executor: Executor) -> None:
        """Fill the slot's share on every rank that holds it."""
        for rank, place in self._homes(ref):
            rows = _resolve_padding(place.cut, self._spec.vocab_size)
            target = Target(self._files[rank], place.key, self._dtype_of(ref), place.cut.shape, rows, place.cut.col)
            executor.fill(target, sources.pieces)
            self._written += 1

    def commit(self) -> list[str]:
        """Complete every file, show the directory under its name, then point the tracker at it."""
        for file in self._files.values():
            file.close()
        shown = flags(self._spec, self._args)
        if self._bins is not None:
            shown.append(f"--moe-capacity-bins-num {self._bins.count}")
        text = " \\\n  ".join([f"--load {shlex.quote(str(self._dir))}", *shown]) + "\n"
        staging = opened(self._staging)
        (staging.path / FLAGS_FILE).write_text(text, encoding="utf-8")
        staging.move_to(self._dir / self._name)
        write_text(self._dir / TRACKER, "release" if self._options.release else str(self._iteration))
        warnings = [*self._warnings, *flag_warnings(self._spec, shown, self._parallel.tp)]
        warnings += router_warnings(self._spec, self._router)
        return [
            self._summary(),
            *self._origin.notes,
            *self._bins_note(),
            *warnings,
            f"pretrain_gpt.py needs:\n{text}".rstrip(),
        ]

    def abort(self) -> None:
        """Remove the hidden directory."""
        for file in self._files.values():
            file.discard()
        if self._staging is not None:
            self._staging.discard()

    def _check_expressible(self, spec: ModelSpec) -> list[str]:
        reasons = inexpressible(spec)
        if not self._options.allow_inexpressible:
            raise_all(
                "Megatron-LM cannot express this model (pass --allow-inexpressible to convert the weights all the same):",
                reasons,
            )
        return [f"warning: Megatron-LM will not compute {reason}" for reason in reasons]

    def _refuse_existing(self) -> None:
        if self._options.overwrite:
            return
        if (self._dir / self._name).exists():
            raise ConversionError(f"{self._dir / self._name} already exists; save elsewhere or pass --overwrite")
        if (self._dir / TRACKER).exists():
            current = (self._dir / TRACKER).read_text(encoding="utf-8", errors="replace").strip()
            raise ConversionError(
                f"{self._dir / TRACKER} points at {current!r}, and saving {self._name} there would redirect it; "
                "save elsewhere or pass --overwrite"
            )

    def _choose_parallel(self) -> Parallel:
        source, options = self._origin.parallel, self._options
        tp = options.tp or (source.tp if source else 1)
        pp = options.pp or (source.pp if source else 1)
        ep = options.ep or (source.ep if source else 1)
        keeps_stages = source is not None and pp == source.pp and options.split == EVEN
        split = source.split if source is not None and keeps_stages else options.split
        etp = options.etp or (kept_etp(source, tp, ep) if self._spec.num_experts else None)
        return parallel_for(self._spec, tp, pp, split, ep, etp)

    def _choose_divisor(self) -> int:
        inherited = getattr(self._origin.margs, "make_vocab_size_divisible_by", None)
        return self._options.divisor or inherited or _DEFAULT_DIVISOR

    def _choose_bins(self) -> CapacityBins | None:
        bins = self._origin.capacity_bins
        if not self._options.load_capacity_bins:
            return None
        if bins is None:
            raise UsageError(f"--load-capacity-bins: {self._origin.described} gives no capacity bins; leave it out")
        capacity_bins.check(bins, self._spec, self._parallel)
        return bins

    def _bins_on(self, rank: Rank) -> dict[str, StoredTensor]:
        return {} if self._bins is None else dict(self._bins.on(rank, self._parallel))

    def _fill_bins(self) -> int:
        """Write the capacity bins, which are small and no slots; returns their bytes."""
        count = 0
        for rank, file in self._files.items():
            for key, data in self._bins_on(rank).items():
                capacity_bins.fill(file, key, data)
                count += data.nbytes
        return count

    def _bins_note(self) -> list[str]:
        bins = self._origin.capacity_bins
        if bins is None:
            return []
        if self._bins is None:
            return [capacity_bins.left_out(bins, "--load-capacity-bins")]
        return [f"{len(bins.tensors)} capacity-bin buffers of {bins.where} are kept"]

    def _make_args(self) -> dict[str, Any]:
        inherited = plain_args(inheritable(self._origin.margs))
        seq_length = inherited.get("seq_length") or min(_DEFAULT_SEQ_LENGTH, self._spec.max_position_embeddings)
        tokenizer = self._options.tokenizer or self._origin.tokenizer or inherited.get("tokenizer_model")
        args = {
            **RUN_DEFAULTS,
            **inherited,
            **model_args(self._spec),
            **layout_args(self._parallel, self._padded, self._divisor, self._options.impl),
            **expert_args(self._spec, self._parallel, self._expert_layout),
            **router_args(self._spec, self._router),
            **({} if self._bins is None else {"moe_capacity_bins_num": self._bins.count}),
            "seq_length": seq_length,
            "encoder_seq_length": seq_length,
            "tokenizer_model": tokenizer,
            "iteration": self._iteration,
        }
        recorded = {"hf_config": self._origin.hf_config, "hf_generation_config": self._origin.generation_config}
        return {**args, **{name: value for name, value in recorded.items() if value is not None}}

    def _tree(self, rank: Rank, places: list[_Place]) -> dict[str, Any]:
        model: OrderedDict[str, Any] = OrderedDict()
        for place in places:
            model[place.key] = torch_zip.NewTensor(place.key, self._dtype_of(place.ref), place.cut.shape)
        for key, data in self._bins_on(rank).items():
            model[key] = torch_zip.NewTensor(key, data.dtype, data.shape)
        model.update(dict.fromkeys(self._extra_state(rank.pp)))
        return {
            "args": argparse.Namespace(**self._args),
            "checkpoint_version": _CHECKPOINT_VERSION,
            "iteration": self._iteration,
            "model": model,
            "num_floating_point_operations_so_far": 0,
        }

    def _places(self) -> dict[Rank, list[_Place]]:
        """What each rank holds, in the order of its layers."""
        places: dict[Rank, list[_Place]] = {}
        for ref in refs(self._spec):
            for rank, place in self._homes(ref):
                places.setdefault(rank, []).append(place)
        return places

    def _homes(self, ref: Ref) -> Iterator[tuple[Rank, _Place]]:
        """The ranks that hold a ref, with its key and share there."""
        parallel, experts = self._parallel, self._spec.num_experts
        names = {**DIALECTS[self._options.impl], **EXPERTS[self._expert_layout]}
        local = parallel.local_expert(ref.expert, experts)
        for stage, slot, layer in homes(ref, self._spec, parallel):
            key = names[slot].format(layer=layer, expert=local, global_expert=ref.expert)
            for rank in parallel.ranks(stage):
                if parallel.holds(rank, ref.expert, experts):
                    yield rank, _Place(ref, key, parallel.share(ref.slot, self._spec, rank, self._padded))

    def _extra_state(self, pp: int) -> Iterator[str]:
        parallel, impl = self._parallel, self._options.impl
        before = sum(parallel.stages[:pp])
        experts = self._spec.num_experts // parallel.ep
        for layer in range(parallel.stages[pp]):
            for module in extra_state(impl, self._expert_layout, self._spec, before + layer, experts):
                yield f"{module.format(layer=layer)}.{EXTRA_STATE_SUFFIX}"
        if pp == parallel.pp - 1:
            yield from (f"{module}.{EXTRA_STATE_SUFFIX}" for module in LAST_EXTRA_STATE[impl])

    def _summary(self) -> str:
        padding = self._padded - self._spec.vocab_size
        return (
            f"wrote {self._written} tensors once each on {len(self._files)} rank(s) "
            f"({_sizes(self._parallel)}, layers {'+'.join(map(str, self._parallel.stages))}) "
            f"to {self._dir / self._name}; {padding} rows of vocabulary padding repeat the last of {self._spec.vocab_size}"
        )


def _widest(dtypes: Iterable[DType]) -> DType | None:
    return max(dtypes, key=lambda dtype: dtype.itemsize, default=None)


def _sizes(parallel: Parallel) -> str:
    experts = f", ep={parallel.ep}, etp={parallel.etp}" if parallel.ep > 1 or parallel.etp != parallel.tp else ""
    return f"tp={parallel.tp}, pp={parallel.pp}{experts}"


def _resolve_padding(share: Cut, vocab: int) -> RowMap:
    return _padded_rows(share, vocab) if share.padding else share.rows


@lru_cache(maxsize=64)
def _padded_rows(share: Cut, vocab: int) -> RowMap:
    """Padding repeats the last row of the vocabulary, as Megatron-LM's own converters do."""
    return np.where(share.rows < 0, vocab - 1, share.rows)
