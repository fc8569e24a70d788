"""Files of a checkpoint's ranks, and what they hold: args, sizes, and tensors by key, which nothing has matched yet.

Format: Megatron-LM core_v0.8.0 to core_v0.19.0, training/checkpointing.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...basics.errors import ConversionError, one_line, raise_all
from ...conversion.left_out import LeftOut
from ...sharding.ranks import Parallel, Rank
from ...storage import torch_zip
from ...storage.opening import is_name
from ...storage.tensor import StoredTensor
from .arguments import rank_invariants
from .foreign_args import foreign
from .locating import RANK, RANK_FILE, listing
from .names import EMBEDDINGS, EXTRA_STATE_SUFFIX
from .reading import MegatronReadOptions, args_in, parallel_of, skipped_entries, supplemented
from .run_config import Record, recorded_beside
from .shared_tensors import SINGLE_SUFFIXES, STACKED_SUFFIXES
from .trained_by import VOCABULARY
from .wrapped_names import prefix_of, without_prefix

#: Key of an expert's first linear, in any expert layout.
_EXPERT_FC1 = re.compile(r"\.experts\.(.*linear_fc1[._]weight\d*|weight1)$")

#: Names of a folder that a message has at most.
_MOST_NAMED = 5
#: File of a distributed optimizer beside a rank's, and the entry in the rank's file of any other for weights in float32.
_DISTRIBUTED_OPTIMIZER, _ORIGINALS = "distrib_optim.pt", "fp32_from_fp16_params"
#: Attribute that Habana's saver records otherwise in the first stage than in the others.
_PADDED = "padded_vocab_size"


@dataclass(frozen=True)
class RankFile:
    """File of one rank: its path, its name in messages, and its tensors by key."""

    path: Path
    name: str
    tensors: Mapping[str, StoredTensor]


@dataclass(frozen=True)
class RankFiles:
    """All files of a checkpoint in `folder`, which is of the format `format`, and what the first one says beside its tensors.

    The layers of the stages of `parallel` are still 0. `left_out` has the names of entries that are not converted, `beside` the
    paths of other files that were read, `float32_originals` says where the optimizer has the weights in float32. `wrapper` is a
    prefix that all names of tensors had.
    """

    format: str
    folder: Path
    args: argparse.Namespace
    iteration: Any
    parallel: Parallel
    ranks: Mapping[Rank, RankFile]
    left_out: set[str]
    beside: tuple[Path, ...] = ()
    float32_originals: str = ""
    wrapper: str = ""
    #: Tensors that a user ignores, which `ranks` do not have.
    ignored: LeftOut = field(default_factory=LeftOut)
    #: File that says the args of a checkpoint without any.
    record: Record | None = None


def read_rank_files(folder: Path, options: MegatronReadOptions) -> RankFiles:
    """Read the files of all ranks in a folder; raises `ConversionError` if some are missing or of different saves."""
    first_name = _first_rank(folder)
    first = read_file(folder / first_name / RANK_FILE)
    stored = args_in(first, folder)
    args = supplemented(stored, options)
    record = recorded_beside(folder) if args is None else None
    args = args if record is None else record.args
    if args is None:
        raise ConversionError(
            f"{folder}: the file of rank 0 has no args, which describe the model; copy it again or save the checkpoint with its "
            "args"
        )
    parallel = _stored_sizes(args, first, folder)
    ignored = LeftOut(options.ignore_tensors)
    wrapper = wrapper_of(first, parallel, folder / first_name, ignored)
    wanted = {parallel.directory(rank): rank for stage in range(parallel.pp) for rank in parallel.ranks(stage)}
    present = {path.name for path in listing(folder) if RANK.match(path.name)}
    problems = [f"{name} is missing" for name in sorted(wanted.keys() - present)]
    problems += [f"{name} is there, but the args have no such rank" for name in sorted(present - wanted.keys())]
    raise_all(
        f"{folder}: the folders do not match the args' tp={parallel.tp}, pp={parallel.pp}, ep={parallel.ep}:", problems
    )
    ranks: dict[Rank, RankFile] = {}
    left_out: set[str] = set()
    decisive = {*VOCABULARY, *foreign({} if stored is None else vars(stored))}
    for name, rank in wanted.items():
        content = first if name == first_name else read_file(folder / name / RANK_FILE)
        own = args_in(content, folder / name)
        also = decisive.union(foreign({} if own is None else vars(own)))
        tensors = tensors_of(content, parallel, folder / name, wrapper, ignored)
        ranks[rank] = RankFile(folder / name / RANK_FILE, name, tensors)
        expected = rank_invariants(first.get("iteration"), stored, also)
        expected = _with_whole_vocabulary(expected, next(iter(ranks.values())), parallel.tp)
        found = rank_invariants(content.get("iteration"), own, also)
        found = _with_whole_vocabulary(found, ranks[rank], parallel.tp)
        differing = (key for key in expected.keys() & found.keys() if found[key] != expected[key])
        problems += [
            f"{name}: {key} is {one_line(repr(found[key]))}, not {one_line(repr(expected[key]))}"
            for key in sorted(differing)
        ]
        left_out |= skipped_entries(content)
    remedy = "They are of different saves; copy all ranks of one save again."
    raise_all(f"{folder}: the ranks' files contradict {first_name}:", problems, remedy=remedy)
    originals = _float32_originals(first, folder / first_name)
    return RankFiles(
        *("torch", folder, args, first.get("iteration"), parallel, ranks, left_out),
        beside=() if record is None else (record.path,),
        float32_originals=originals,
        wrapper=wrapper,
        record=record,
        ignored=ignored,
    )


def _with_whole_vocabulary(values: dict[str, Any], rank: RankFile, tp: int) -> dict[str, Any]:
    """Values of a rank's args, `padded_vocab_size` among them that of all ranks.

    Habana's saver records the rows of one rank's part in the first stage (tools/checkpoint/saver_core.py, 1.24.0).
    """
    embeddings, size = rank.tensors.get(EMBEDDINGS), values.get(_PADDED)
    if embeddings is None or size != embeddings.shape[0]:
        return values
    return {**values, _PADDED: size * tp}


def _float32_originals(content: Mapping[str, Any], rank: Path) -> str:
    """Where a rank has the optimizer's float32 originals of the weights, in words; no text if nowhere.

    Source: core/optimizer/optimizer.py (`Float16OptimizerWithFloat16Params.state_dict`) and distrib_optimizer.py.
    """
    if (rank / _DISTRIBUTED_OPTIMIZER).is_file():
        return f"in {_DISTRIBUTED_OPTIMIZER}"
    optimizer = content.get("optimizer")
    held = isinstance(optimizer, Mapping) and bool(optimizer.get(_ORIGINALS))
    return f"{_ORIGINALS} of the optimizer" if held else ""


def _first_rank(folder: Path) -> str:
    for name in ("mp_rank_00", "mp_rank_00_000", "mp_rank_00_000_000"):
        if (folder / name).is_dir():
            return name
    raise ConversionError(
        f"{folder} has no mp_rank_00, mp_rank_00_000 or mp_rank_00_000_000; copy the folder of rank 0"
    )


def read_file(path: Path) -> dict[str, Any]:
    """What a rank's file, or `common.pt`, holds; raises `ConversionError` if it is missing or no dictionary."""
    if not path.is_file():
        names = (
            ", ".join(one_line(entry.name) for entry in listing(path.parent)[:_MOST_NAMED])
            if path.parent.is_dir()
            else ""
        )
        raise ConversionError(
            f"{path} is missing; copy the checkpoint again{f' (the folder has {names})' if names else ''}"
        )
    content = torch_zip.read(path)
    if not isinstance(content, dict):
        raise ConversionError(f"{path} holds a {type(content).__name__}, not a checkpoint")
    return content


def _stored_sizes(args: argparse.Namespace, first: Mapping[str, Any], where: Path) -> Parallel:
    """Parallel sizes from args, that of experts from their shapes. Stages get their layers later, once the number is checked."""
    parallel, values = parallel_of(args, where), vars(args)
    if not values.get("num_experts"):
        return parallel
    tensors = tensors_of(first, parallel, where)
    return dataclasses.replace(parallel, etp=_expert_tensor_parallel(values, tensors, parallel, where))


def _expert_tensor_parallel(
    values: Mapping[str, Any], tensors: Mapping[str, StoredTensor], parallel: Parallel, where: Path
) -> int:
    """Expert-tensor-parallel size, from the experts' shapes: stock savers always record 1, and old ones nothing."""
    size = values.get("moe_ffn_hidden_size") or values.get("ffn_hidden_size") or 0
    local_experts = max(values["num_experts"] // parallel.ep, 1)
    stored_rows = [
        _rows_of_expert(key, value.shape, local_experts)
        for key, value in tensors.items()
        if _EXPERT_FC1.search(key) and len(value.shape) >= 2
    ]
    if not stored_rows:  # this stage has only dense layers
        return parallel.etp
    if not isinstance(size, int) or 2 * size % stored_rows[0]:
        raise ConversionError(
            f"{where}: experts have {stored_rows[0]} rows of gate and up, but the args require a divisor of 2 x {size}"
        )
    return 2 * size // stored_rows[0]


def _rows_of_expert(key: str, shape: tuple[int, ...], experts: int) -> int:
    """Rows of one expert's first linear in a tensor; `experts` counts those that share it, if it is of several."""
    if key.endswith(STACKED_SUFFIXES):
        return shape[1] // experts
    return math.prod(shape[:-1]) // (experts if key.endswith(SINGLE_SUFFIXES) else 1)


def wrapper_of(content: Mapping[str, Any], parallel: Parallel, where: object, ignored: LeftOut) -> str:
    """Prefix that wrappers of the model put before all names in a checkpoint, by the file of the rank with the embeddings."""
    model = content.get(parallel.entries[0])
    stored = model if isinstance(model, Mapping) else {}
    tensors = {key: value for key, value in stored.items() if isinstance(value, StoredTensor) and is_name(key)}
    kept = ignored.kept(tensors, parallel.prefix(0).__add__)
    return prefix_of(kept, where) if kept else ""


def tensors_of(
    content: Mapping[str, Any], parallel: Parallel, where: Path, wrapper: str = "", ignored: LeftOut | None = None
) -> Mapping[str, StoredTensor]:
    """Tensors of all models of a rank, but those that are ignored, by key without `wrapper`.

    Keys of virtual stages have the prefix of their model.
    """
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
        found: dict[str, StoredTensor] = {}
        for key, value in model.items():
            if isinstance(value, StoredTensor) and is_name(key):
                found[key] = value
            elif not one_line(key).endswith(EXTRA_STATE_SUFFIX):
                unnamed.append(f"{prefix}{one_line(key)}")
        kept = found if ignored is None else ignored.kept(found, prefix.__add__)
        tensors |= {prefix + key: value for key, value in without_prefix(kept, wrapper, where).items()}
    if unnamed:
        raise ConversionError(f"{where}: model entries that are not named tensors: {', '.join(unnamed[:20])}")
    return tensors
