"""Write a Megatron-LM checkpoint of the `torch` format: one `mp_rank_*/model_optim_rng.pt` a rank, filled in place.

Format: Megatron-LM core_v0.17.1, training/checkpointing.py, and the files that it writes.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import shlex
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from .. import capacity_bins
from ..capacity_bins import CapacityBins
from ..dtypes import DType
from ..errors import ConversionError, UsageError, raise_all
from ..layouts import RowMap
from ..margs_json import inheritable
from ..megatron_args import (
    RUN_DEFAULTS,
    expert_args,
    inexpressible,
    layout_args,
    model_args,
    plain_args,
    router_args,
    router_dtype,
    router_warnings,
    seq_length_of,
)
from ..megatron_flags import as_shell, flag_warnings, flags
from ..megatron_names import DIALECTS, EXPERTS, EXTRA_STATE_SUFFIX, LAST_EXTRA_STATE, STACKED, extra_state
from ..outline import Fill, Outline
from ..parallel import Cut, Parallel, Rank, homes, kept_etp, padded_vocab, parallel_for
from ..pipeline import EVEN, PipelineSplit
from ..slots import SLOTS, Ref, Shard, refs
from ..spec import ModelSpec
from ..staging import Staging, write_text
from ..storage import torch_zip
from ..storage.output import Layout
from ..storage.tensor import StoredTensor
from .base import Origin

TRACKER = "latest_checkpointed_iteration.txt"
FILE = "model_optim_rng.pt"
FLAGS_FILE = "pretrain_gpt_flags.txt"
DEFAULT_DIVISOR = 128
_CHECKPOINT_VERSION = 3.0
_EMBEDDINGS = "word_embeddings"


@dataclass(frozen=True)
class MegatronOptions:
    """How to cut and name the checkpoint. Sizes left None are the source's, or 1."""

    tp: int | None = None
    pp: int | None = None
    ep: int | None = None
    etp: int | None = None
    split: PipelineSplit = EVEN
    #: A key of `megatron_names.EXPERTS`; None means what current Megatron-LM trains fastest.
    expert_layout: str | None = None
    impl: str = "transformer_engine"
    divisor: int | None = None
    release: bool = False
    overwrite: bool = False
    allow_inexpressible: bool = False
    load_capacity_bins: bool = False
    tokenizer: str | None = None


@dataclass(frozen=True, eq=False)
class _Place:
    """A slot, or a tied copy of it, on one rank; of experts that share a tensor the `index`-th of `count`."""

    ref: Ref
    key: str
    cut: Cut
    index: int = 0
    count: int = 1
    transposed: bool = False

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of the whole tensor. Megatron-LM gives stacks of transposed matrices only two dimensions."""
        if not self.transposed:
            return self.cut.shape
        rows, cols = self.cut.shape
        return (cols, self.count * rows) if self.ref.slot.shard is Shard.COLUMN else (self.count * cols, rows)


class MegatronTarget:
    """A checkpoint directory that appears in `save_dir` when it is complete, the tracker file last."""

    def __init__(self, save_dir: Path, options: MegatronOptions) -> None:
        self.save_dir = save_dir
        self._options = options

    def prepare(self, spec: ModelSpec, origin: Origin, dtype_of: Callable[[Ref], DType]) -> Outline:
        """Check what Megatron-LM can express and how the model can be cut; lay out every rank's file."""
        self._warnings = self._check_expressible(spec)
        self._spec = dataclasses.replace(spec, dtype=dtype_of(Ref(SLOTS[_EMBEDDINGS])))
        self._origin = origin
        self._dtype_of = dtype_of
        self._iteration = 1 if origin.iteration is None else origin.iteration
        self._name = "release" if self._options.release else f"iter_{self._iteration:07d}"
        self._parallel = self._choose_parallel()
        default_layout = "grouped" if self._options.impl == "transformer_engine" else "sequential"
        self._expert_layout = self._options.expert_layout or default_layout
        self._divisor = self._choose_divisor()
        self._padded = padded_vocab(spec.vocab_size, self._divisor, self._parallel.tp)
        self._bins = self._choose_bins()
        self._router = router_dtype(spec, dtype_of)
        self._args = self._make_args()
        files = {self._file(rank): self._layout(rank, places) for rank, places in self._places().items()}
        self._tensors = sum(len(layout.regions) for layout in files.values())
        options = {
            **dataclasses.asdict(self._options),
            "overwrite": None,
            "format": "megatron",
            "dtype": self._spec.dtype.name,
        }
        ranks = [rank for stage in range(self._parallel.pp) for rank in self._parallel.ranks(stage)]
        given = {self._file(rank): self._bins_on(rank) for rank in ranks}
        options |= {"parallel": dataclasses.asdict(self._parallel), "expert_layout": self._expert_layout}
        return Outline(self._name, files, options, given)

    def shown(self) -> Path | None:
        """The directory that the tracker points at, if it is this one."""
        there = self._tracked() == self._tracker_text() and not self._options.overwrite
        return self.save_dir / self._name if there else None

    def _tracked(self) -> str | None:
        path = self.save_dir / TRACKER
        return path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else None

    def _tracker_text(self) -> str:
        return "release" if self._options.release else str(self._iteration)

    def refuse_existing(self) -> None:
        """Neither a checkpoint of this name nor the tracker is replaced unless that is asked for."""
        if self._options.overwrite:
            return
        if (self.save_dir / self._name).exists():
            raise ConversionError(f"{self.save_dir / self._name} already exists; save elsewhere or pass --overwrite")
        current = self._tracked()
        if current is not None:
            raise ConversionError(
                f"{self.save_dir / TRACKER} points at {current!r}, and saving {self._name} there would redirect it; "
                "save elsewhere or pass --overwrite"
            )

    def assets(self, folder: Path) -> None:
        """Write the flags that training needs."""
        (folder / FLAGS_FILE).write_text(self._flags_text(), encoding="utf-8")

    def fills(self, ref: Ref) -> Iterator[Fill]:
        """The slot's share on every rank that holds it."""
        dtype = self._dtype_of(ref)
        for rank, place in self._homes(ref):
            rows = _resolve_padding(place.cut, self._spec.vocab_size)
            start = place.index * math.prod(place.cut.shape) * dtype.itemsize
            yield Fill(
                self._file(rank),
                place.key,
                dtype,
                place.cut.shape,
                rows,
                place.cut.col,
                start,
                place.transposed,
                place.cut.padding,
            )

    def clear(self, staging: Staging) -> None:
        """Nothing: the directory is replaced as a whole."""

    def show(self, staging: Staging) -> list[str]:
        """Show the directory under its name, then point the tracker at it."""
        staging.move_to(self.save_dir / self._name)
        write_text(self.save_dir / TRACKER, self._tracker_text())
        shown = flags(self._args)
        warnings = [*self._warnings, *flag_warnings(self._spec, shown, self._parallel.tp)]
        warnings += router_warnings(self._spec, self._router)
        return [
            self._summary(),
            *self._origin.notes,
            *self._bins_note(),
            *warnings,
            f"pretrain_gpt.py needs:\n{self._flags_text()}".rstrip(),
        ]

    def _flags_text(self) -> str:
        shown = flags(self._args)
        if self._bins is not None:
            shown.append(f"--moe-capacity-bins-num {self._bins.count}")
        return as_shell([f"--load {shlex.quote(str(self.save_dir))}", *shown]) + "\n"

    def _file(self, rank: Rank) -> str:
        return f"{self._parallel.directory(rank)}/{FILE}"

    def _check_expressible(self, spec: ModelSpec) -> list[str]:
        reasons = inexpressible(spec)
        if not self._options.allow_inexpressible:
            raise_all(
                "Megatron-LM cannot express this model (pass --allow-inexpressible to convert the weights all the same):",
                reasons,
            )
        return [f"warning: Megatron-LM will not compute {reason}" for reason in reasons]

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
        return self._options.divisor or inherited or DEFAULT_DIVISOR

    def _choose_bins(self) -> CapacityBins | None:
        bins = self._origin.capacity_bins
        if not self._options.load_capacity_bins:
            return None
        if self._parallel.vpp > 1:
            raise UsageError(
                "--load-capacity-bins: Habana's checkpoints have no virtual pipeline stages; leave one out"
            )
        if bins is None:
            raise UsageError(f"--load-capacity-bins: {self._origin.described} gives no capacity bins; leave it out")
        capacity_bins.check(bins, self._spec, self._parallel)
        return bins

    def _bins_on(self, rank: Rank) -> dict[str, StoredTensor]:
        return {} if self._bins is None else dict(self._bins.on(rank, self._parallel))

    def _bins_note(self) -> list[str]:
        bins = self._origin.capacity_bins
        if bins is None:
            return []
        if self._bins is None:
            return [capacity_bins.left_out(bins, "--load-capacity-bins")]
        return [f"{len(bins.tensors)} capacity-bin buffers of {bins.where} are kept"]

    def _make_args(self) -> dict[str, Any]:
        inherited = plain_args(inheritable(self._origin.margs))
        seq_length = seq_length_of(self._spec, inherited)
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

    def _layout(self, rank: Rank, places: list[_Place]) -> Layout:
        tensors: dict[str, torch_zip.NewTensor] = {}
        for place in places:
            tensor = torch_zip.NewTensor(place.key, self._dtype_of(place.ref), place.stored_shape)
            if tensors.setdefault(place.key, tensor) != tensor:
                raise ConversionError(
                    f"{place.ref} is {tensor.dtype}, but others in {place.key} are not; give one dtype"
                )
        for key, data in self._bins_on(rank).items():
            tensors[key] = torch_zip.NewTensor(key, data.dtype, data.shape)
        tree = {
            "args": argparse.Namespace(**self._args),
            "checkpoint_version": _CHECKPOINT_VERSION,
            "iteration": self._iteration,
            **self._models(rank, tensors),
            "num_floating_point_operations_so_far": 0,
        }
        parts = {place.key: place.count for place in places if place.count > 1}
        return dataclasses.replace(torch_zip.layout(FILE, tree), parts=parts)

    def _models(self, rank: Rank, tensors: Mapping[str, torch_zip.NewTensor]) -> dict[str, OrderedDict[str, Any]]:
        """The state dicts of a rank, one for each of its stages; `tensors` have the stage's prefix."""
        parallel = self._parallel
        models = {}
        for entry, stage in zip(parallel.entries, range(rank.pp, len(parallel.stages), parallel.pp), strict=True):
            prefix = parallel.prefix(stage)
            mine = [(key.removeprefix(prefix), tensor) for key, tensor in tensors.items() if key.startswith(prefix)]
            models[entry] = OrderedDict([*mine, *dict.fromkeys(self._extra_state(stage)).items()])
        return models

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
        stacked = ref.expert is not None and self._expert_layout == STACKED
        stack = (local or 0, experts // parallel.ep, True) if stacked else (0, 1, False)
        for stage, slot, layer in homes(ref, self._spec, parallel):
            key = parallel.prefix(stage) + names[slot].format(layer=layer, expert=local, global_expert=ref.expert)
            for rank in parallel.ranks(stage):
                if parallel.holds(rank, ref.expert, experts):
                    yield rank, _Place(ref, key, parallel.share(ref.slot, self._spec, rank, self._padded), *stack)

    def _extra_state(self, stage: int) -> Iterator[str]:
        parallel, impl = self._parallel, self._options.impl
        before = sum(parallel.stages[:stage])
        experts = self._spec.num_experts // parallel.ep
        for layer in range(parallel.stages[stage]):
            for module in extra_state(impl, self._expert_layout, self._spec, before + layer, experts):
                yield f"{module.format(layer=layer)}.{EXTRA_STATE_SUFFIX}"
        if stage == len(parallel.stages) - 1:
            yield from (f"{module}.{EXTRA_STATE_SUFFIX}" for module in LAST_EXTRA_STATE[impl])

    def _summary(self) -> str:
        padding = self._padded - self._spec.vocab_size
        ranks = sum(len(self._parallel.ranks(stage)) for stage in range(self._parallel.pp))
        return (
            f"wrote {self._tensors} tensors once each on {ranks} rank(s) "
            f"({_sizes(self._parallel)}, layers {'+'.join(map(str, self._parallel.stages))}) "
            f"to {self.save_dir / self._name}; {padding} rows of vocabulary padding repeat the last of {self._spec.vocab_size}"
        )


def _sizes(parallel: Parallel) -> str:
    experts = f", ep={parallel.ep}, etp={parallel.etp}" if parallel.ep > 1 or parallel.etp != parallel.tp else ""
    virtual = f", vpp={parallel.vpp}" if parallel.vpp > 1 else ""
    return f"tp={parallel.tp}, pp={parallel.pp}{virtual}{experts}"


def _resolve_padding(share: Cut, vocab: int) -> RowMap:
    return _padded_rows(share, vocab) if share.padding else share.rows


@lru_cache(maxsize=64)
def _padded_rows(share: Cut, vocab: int) -> RowMap:
    """Padding repeats the last row of the vocabulary, as Megatron-LM's own converters do."""
    return np.where(share.rows < 0, vocab - 1, share.rows)
