"""Common parts of writing Megatron-LM checkpoints of any format: checks, parallel sizes, args, flags and final renaming.

Format: Megatron-LM core_v0.17.1, training/checkpointing.py, and the files that it writes.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import shlex
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from ...assets import capacity_bins
from ...assets.capacity_bins import CapacityBins
from ...assets.code_files import CODE_FOLDER, write_code_files
from ...assets.origin import Carried, Origin
from ...assets.tokenizer import check_named, recorded_name
from ...assets.training_args import inheritable, margs_to_json
from ...basics.dtypes import DType, dtype_named
from ...basics.errors import ConversionError, UsageError, raise_all
from ...basics.quantities import count
from ...conversion.endpoint import main_dtype
from ...conversion.journal import MANIFEST
from ...conversion.outline import Fill, Outline
from ...conversion.staging import Staging
from ...families import FAMILIES
from ...model.checks import is_whole
from ...model.slots import Precision, Ref
from ...model.spec import ModelSpec
from ...sharding.ranks import Parallel, kept_etp, padded_vocab, parallel_for
from ...sharding.stages import EVEN
from ...storage import marks
from ...storage.output_file import FileLayout
from ...storage.tensor import StoredTensor
from .argument import Context
from .arguments import (
    RUN_DEFAULTS,
    check_expressible,
    inexpressible,
    plain_args,
    router_dtype,
    router_warnings,
    seq_length_of,
    training_args,
    written_args,
)
from .conventions import CUT_DOWN_PROJECTIONS, conventions
from .flags import as_shell, flag_warnings, flags, least_release, unknown_flags
from .layout_choice import expert_layout, mla_layout
from .locating import TRACKER
from .options import FLAGS, FOLD, FUSED, RAW, SEPARATE, MegatronOptions
from .releases import NEWEST, parse
from .rounding import rounding_warnings
from .rows_layers import layer_notes
from .rows_sparse import stage_warnings

#: Attribute of args for the digest of the family file that describes the recorded configuration's family.
FAMILY_FILE = "hf_family_file"
FLAGS_FILE = "pretrain_gpt_flags.txt"
DEFAULT_DIVISOR = 128
_CHECKPOINT_VERSION = 3.0
#: What a user should know of where multipliers are, by the value of `--mup`.
_MUP_REMARKS: Mapping[str | None, tuple[str, ...]] = {
    None: (),
    FLAGS: ("multipliers are said by flags of muP (--mup flags): no weight is changed",),
    FOLD: ("multipliers are folded into weights (--mup fold), which rounds them; the args record it for the way back",),
    RAW: (
        "warning: multipliers are left to the training program (--mup raw), which must heed --scale-emb, --scale-depth and "
        "--dim-model-base, as MindSpeed-LLM does; Megatron-LM does not know them",
    ),
}
_FLOAT32 = dtype_named("float32")


class CheckpointTarget(ABC):
    """Checkpoint directory that appears in `save_dir` only when it is complete; the tracker file is written last."""

    #: Name of the format (`--ckpt-format`).
    format: ClassVar[str]
    #: Key of `names.DIALECTS` whose names are written by default.
    default_impl: ClassVar[str] = "transformer_engine"
    #: Whether each rank has its own `mp_rank_*` directory.
    directories: ClassVar[bool] = True

    def __init__(self, save_dir: Path, options: MegatronOptions) -> None:
        self.save_dir = save_dir
        self._options = options

    def prepare(self, spec: ModelSpec, origin: Origin, dtype_of: Callable[[Ref], DType]) -> Outline:
        """Check that Megatron-LM can express the model and that it can be cut as requested; lay out every file."""
        asked = self._options.megatron_version
        self._release = NEWEST if asked is None else parse(asked)
        self._conventions = conventions(spec, self._release, self._options.mup)
        self._impl = self._options.impl or self.default_impl
        self._mla_layout = mla_layout(self._options.mla_layout, spec, self._impl)
        if self._mla_layout == FUSED:
            self._conventions = dataclasses.replace(self._conventions, shards=CUT_DOWN_PROJECTIONS)
        reasons = inexpressible(self._conventions.spec)
        lacking = check_expressible(reasons, allowed=self._options.allow_inexpressible)
        self._warnings = [*_MUP_REMARKS[self._conventions.mup], *lacking, *layer_notes(self._conventions.spec)]
        self._spec = dataclasses.replace(spec, dtype=main_dtype(spec, dtype_of))
        self._origin = origin
        self._source_dtype = dtype_of
        self._warnings += [*check_named(self._options.tokenizer), *rounding_warnings(self._spec, dtype_of)]
        self._iteration = 1 if origin.iteration is None else origin.iteration
        self._name = self._choose_name()
        self._parallel = self._choose_parallel()
        self._expert_layout = expert_layout(self._options.expert_layout, self._spec, self._impl)
        self._divisor = self._choose_divisor()
        self._padded = padded_vocab(spec.vocab_size, self._divisor, self._parallel.tp)
        self._bins = self._choose_bins()
        self._router = router_dtype(spec, dtype_of)
        self._args = self._make_args()
        if asked is not None:
            raise_all(
                f"Megatron-LM {self._release}, as --megatron-version says, does not know or heed:",
                unknown_flags(self._args, self._release),
                remedy="Choose a later release, or leave --megatron-version out.",
            )
        files, extra_tensors = _with_side_file(*self._lay_out(), origin.carried)
        content = {"args": margs_to_json(argparse.Namespace(**self._args))}
        return Outline(self._name, files, self._effective_options(), extra_tensors, content, tuple(self._warnings))

    def _effective_options(self) -> dict[str, Any]:
        """Options with defaults resolved, so that options with the same effect are equal."""
        options = self._options
        return {
            "format": f"megatron, {self.format}",
            "dtype": self._spec.dtype.name,
            "parallel": dataclasses.asdict(self._parallel),
            "expert_layout": self._expert_layout,
            **({} if self._mla_layout == SEPARATE else {"mla_layout": self._mla_layout}),
            "vocabulary divisor": self._divisor,
            "names": self._impl,
            "release": options.release,
            "allow_inexpressible": options.allow_inexpressible,
            "load_capacity_bins": options.load_capacity_bins,
            "tokenizer": recorded_name(options.tokenizer),
            **({} if options.megatron_version is None else {"megatron_version": self._release}),
            **({} if self._conventions.mup is None else {"mup": self._conventions.mup}),
            **self._conventions.marks,
        }

    @abstractmethod
    def _lay_out(self) -> tuple[dict[str, FileLayout], dict[str, dict[str, StoredTensor]]]:
        """Lay out every file; returns the layouts, and by file the small tensors that belong to no slot."""

    @abstractmethod
    def fills(self, ref: Ref) -> Iterator[Fill]:
        """Fills of one ref."""

    @abstractmethod
    def _summary(self) -> str:
        """Summary of what was written, without its place."""

    def _tree(self, models: Mapping[str, Any]) -> dict[str, Any]:
        """Content of a checkpoint file: the given models and what is stored besides tensors."""
        return {
            "args": argparse.Namespace(**self._args),
            "checkpoint_version": _CHECKPOINT_VERSION,
            "iteration": self._iteration,
            **models,
            "num_floating_point_operations_so_far": 0,
        }

    @property
    def parallel(self) -> Parallel:
        """Sizes that the checkpoint is cut for, known once the target is prepared."""
        return self._parallel

    @property
    def output(self) -> Path:
        """Directory of the iteration."""
        return self.save_dir / self._name

    @property
    def manifest(self) -> Path:
        """Manifest in the directory of the iteration."""
        return self.output / MANIFEST

    @property
    def marker(self) -> str | None:
        """None: args, which name the tokenizer, lie in the files of weights."""
        return None

    def shown(self) -> Path | None:
        """Directory of this checkpoint if the tracker points at it and it is not to be overwritten; else None."""
        current = self._tracked() == self._tracker_text() and not self._options.overwrite
        return self.output if current else None

    def _tracked(self) -> str | None:
        """Content of the tracker file; None if there is none."""
        path = self.save_dir / TRACKER
        return path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else None

    def _tracker_text(self) -> str:
        return "release" if self._options.release else str(self._iteration)

    def refuse_existing(self) -> None:
        """Raise if a checkpoint of this name or a tracker exists, unless `overwrite` is set, or a model of another format."""
        marks.refuse_others(self.save_dir, marks.HF, marks.META, marks.MODEL_PT, marks.MINDSPORE)
        if self._options.overwrite:
            return
        if os.path.lexists(self.output):
            raise ConversionError(
                f"{self.output} already exists; save elsewhere or pass --overwrite{self._tokenizer_hint()}"
            )
        current = self._tracked()
        if current is not None:
            raise ConversionError(
                f"{self.save_dir / TRACKER} points at {current!r}, and saving {self._name} there would redirect it; "
                "save elsewhere or pass --overwrite"
            )

    def _tokenizer_hint(self) -> str:
        """For one who converts again to change the tokenizer, which does not need that."""
        if self._options.tokenizer is None:
            return ""
        return " (to change the tokenizer alone, name it to pretrain_gpt.py and on the way back; args only record it)"

    def assets(self, folder: Path) -> None:
        """Write the flags that training needs, and the model's own code."""
        write_code_files(self._origin.code_files, folder / CODE_FOLDER)
        if self._origin.carried is not None:
            from ...assets.side_file import write_small_files

            write_small_files(self._origin.carried, folder / CODE_FOLDER, self._origin.hf_config)
        (folder / FLAGS_FILE).write_text(self._flags_text(), encoding="utf-8", errors="surrogateescape")

    def clear(self, staging: Staging) -> None:  # noqa: B027 - a format may override it
        """Do nothing: the directory is replaced as a whole."""

    def show(self, staging: Staging) -> list[str]:
        """Move the files to their final place; returns lines for the user."""
        self._place(staging)
        warnings = [*self._warnings, *flag_warnings(self._conventions.spec, self._model_flags(), self._parallel.tp)]
        warnings += [*router_warnings(self._spec, self._router), *stage_warnings(self._spec, self._parallel)]
        least = least_release(self._spec, self._args, self._parallel.tp, self._needed_releases())
        newest = self._newest_release()
        return [
            f"wrote {self._summary()} to {self.output}{self._padding_note()}",
            f"needs Megatron-LM {least} " + (f"to {newest}" if newest else "or later"),
            *self._origin.notes,
            *self._bins_note(),
            *warnings,
            *self._loading_notes(),
            f"pretrain_gpt.py needs:\n{self._flags_text()}".rstrip(),
        ]

    def _place(self, staging: Staging) -> None:
        """Rename the directory to its final name, then point the tracker at it."""
        staging.move_to(self.output)
        staging.put(self.save_dir / TRACKER, self._tracker_text())

    def _choose_name(self) -> str:
        return "release" if self._options.release else f"iter_{self._iteration:07d}"

    def _dtype_of(self, ref: Ref) -> DType:
        """Dtype to write a ref in."""
        return _FLOAT32 if ref.slot.precision is Precision.FLOAT32 else self._source_dtype(ref)

    def _needed_releases(self) -> Iterable[str]:
        """Releases from which on what the files hold is read as it is meant."""
        return ()

    def _newest_release(self) -> str:
        """Last release that reads the files as they are meant; no text for the newest one."""
        return ""

    def _loading_notes(self) -> Iterable[str]:
        """Notes on how a run can load the files."""
        return ()

    def _padding_note(self) -> str:
        rows = self._padded - self._spec.vocab_size
        return (
            f"; {count(rows, 'row')} of padding repeat the last of the vocabulary's {self._spec.vocab_size}"
            if rows
            else ""
        )

    @property
    def flags(self) -> list[str]:
        """Flags that `pretrain_gpt.py` needs for the checkpoint, quoted for a shell; known once the target is prepared."""
        shown = self._model_flags()
        return shown if self._bins is None else [*shown, f"--moe-capacity-bins-num {self._bins.count}"]

    def _model_flags(self) -> list[str]:
        """The same without those of capacity bins."""
        return [f"--load {shlex.quote(os.path.abspath(self.save_dir))}", *flags(self._args, self._release)]

    def _flags_text(self) -> str:
        return as_shell(self.flags) + "\n"

    def _choose_parallel(self) -> Parallel:
        source, options = self._origin.parallel, self._options
        tp = options.tp or (source.tp if source else 1)
        pp = options.pp or (source.pp if source else 1)
        ep = options.ep or (source.ep if source else 1)
        keeps_stages = source is not None and pp == source.pp and options.split == EVEN
        split = source.split if source is not None and keeps_stages else options.split
        etp = options.etp or (kept_etp(source, tp, ep) if self._spec.num_experts else None)
        return parallel_for(self._spec, tp, pp, split, ep, etp, directories=self.directories)

    def _choose_divisor(self) -> int:
        inherited = getattr(self._origin.margs, "make_vocab_size_divisible_by", None)
        divisor = self._options.divisor or (inherited if is_whole(inherited) and inherited > 0 else DEFAULT_DIVISOR)
        tp = self._parallel.tp
        return divisor * math.lcm(tp, self._options.pad_vocab_for_tp or tp) // tp

    def _choose_bins(self) -> CapacityBins | None:
        bins = self._origin.capacity_bins
        if not self._options.load_capacity_bins:
            return None
        if self._parallel.vpp > 1:
            raise UsageError(
                "--load-capacity-bins: Habana's checkpoints have no virtual pipeline stages; leave one of the two out"
            )
        if bins is None:
            raise UsageError(f"--load-capacity-bins: {self._origin.described} gives no capacity bins; leave it out")
        capacity_bins.check(bins, self._spec, self._parallel)
        return bins

    def _bins_note(self) -> list[str]:
        bins = self._origin.capacity_bins
        if bins is None:
            return []
        if self._bins is None:
            return [capacity_bins.left_out_note(bins, "--load-capacity-bins")]
        return [f"{len(bins.tensors)} capacity-bin buffers of {bins.where} are kept"]

    def _make_args(self) -> dict[str, Any]:
        inherited = plain_args(inheritable(self._origin.margs))
        seq_length = seq_length_of(self._spec, inherited)
        tokenizer = recorded_name(self._options.tokenizer or self._origin.tokenizer or inherited.get("tokenizer_model"))
        context = Context(
            dataclasses.replace(self._conventions.spec, dtype=self._spec.dtype),
            self._parallel,
            self._expert_layout,
            self._padded,
            self._divisor,
            self._impl,
            self.format,
            self._router,
            self._mla_layout,
        )
        args = {
            **RUN_DEFAULTS,
            **inherited,
            **written_args(context),
            **self._conventions.marks,
            **training_args(self._spec, inherited),
            **({} if self._bins is None else {"moe_capacity_bins_num": self._bins.count}),
            "seq_length": seq_length,
            "encoder_seq_length": seq_length,
            "tokenizer_model": tokenizer,
            "iteration": self._iteration,
        }
        configs = {"hf_config": self._origin.hf_config, "hf_generation_config": self._origin.generation_config}
        args |= {name: value for name, value in configs.items() if value is not None}
        digest = FAMILIES.file_digest(self._spec.family)
        if digest is not None and "hf_config" in args:
            args[FAMILY_FILE] = digest
        return dict(sorted(args.items()))


def _with_side_file(
    files: Mapping[str, FileLayout],
    extra_tensors: Mapping[str, Mapping[str, StoredTensor]],
    carried: Carried | None,
) -> tuple[dict[str, FileLayout], dict[str, Mapping[str, StoredTensor]]]:
    """Files of a checkpoint and their tensors that belong to no slot, with the file of what lies beside a text part."""
    if carried is None:
        return dict(files), dict(extra_tensors)
    from ...assets.side_file import PLACE, layout

    return {**files, PLACE: layout(carried)}, {**extra_tensors, PLACE: carried.tensors}


def sizes(parallel: Parallel) -> str:
    """Parallel sizes as text."""
    experts = f", ep={parallel.ep}, etp={parallel.etp}" if parallel.ep > 1 or parallel.etp != parallel.tp else ""
    virtual = f", vpp={parallel.vpp}" if parallel.vpp > 1 else ""
    return f"tp={parallel.tp}, pp={parallel.pp}{virtual}{experts}"
