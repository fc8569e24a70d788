"""Common parts of reading Megatron-LM checkpoints of any format: args, parallel sizes, and what they come from."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...assets.code_files import CODE_FOLDER, code_files
from ...assets.origin import Origin, file_identities
from ...basics.errors import ConversionError, one_line
from ...basics.json_files import read_json
from ...families.config_json import wrapper_in
from ...families.quantisation import unquantised
from ...sharding.ranks import Parallel
from ...sharding.stages import PipelineSplit, stages_per_rank
from ...storage.opening import is_name
from ...storage.pickle_reader import StandIn
from .arguments import ATTRIBUTES
from .config_fields import args_of_fields

#: Top-level entries of a checkpoint that do not count as skipped.
_EXPECTED_ENTRIES = re.compile(
    r"args|model\d*|checkpoint_version|iteration|num_floating_point_operations_so_far|content_metadata"
)


@dataclass(frozen=True)
class MegatronReadOptions:
    """Options of the user that supplement a checkpoint's args. `directory_name` is a folder such as `iter_0000008`.

    `missing_args` fill attributes that the stored args lack. `families` limits those that are inferred where nothing names one.
    """

    directory_name: str | None = None
    hf_config: Path | None = None
    true_vocab_size: int | None = None
    source_model_type: str | None = None
    without_mtp: bool = False
    missing_args: Mapping[str, Any] | None = None
    families: tuple[str, ...] = ()
    #: Whether layers of multi-token prediction that a reference has and training ran without come from elsewhere.
    backfilled: bool = False
    #: Where multipliers are, if args do not say it: a value of `--mup`.
    mup: str | None = None
    #: Unknown fields of the reference's config.json that do not matter.
    ignored_config: tuple[str, ...] = ()
    #: Program that trained the checkpoint: a value of `--trained-by`.
    trained_by: str | None = None
    #: Whether args take precedence over a reference model.
    prefer_args: bool = False
    #: Arguments of other programs that change nothing.
    ignore_args: tuple[str, ...] = ()
    #: Patterns of names of tensors that are left out.
    ignore_tensors: tuple[str, ...] = ()


#: Options that take everything from the checkpoint itself.
AS_STORED = MegatronReadOptions()
#: Limits far beyond any training run's args: depth of containers, number of values, bits of an integer.
_MAX_DEPTH, _MAX_VALUES, _MAX_BITS = 32, 1_000_000, 1024
#: More ranks of a stage, or stages, than any run has, so that a damaged size allocates no memory.
_MAX_RANKS = 1 << 18


def args_in(content: Mapping[str, Any], where: object) -> argparse.Namespace | None:
    """Args of a rank's or common file, None if it has none; raises `ConversionError` if a value is too large to show or write.

    A mapping stands for args, too. Namespaces within args, as `--yaml-cfg` makes them, are merged into these.
    """
    args = content.get("args")
    if isinstance(args, Mapping) and all(isinstance(name, str) for name in args):
        args = argparse.Namespace(**args)
    if not isinstance(args, argparse.Namespace):
        return None
    for name, value in vars(args).items():
        if not (is_name(name) and _is_plausible(value)):
            raise ConversionError(
                f"{where}: the args are damaged: the value of {one_line(name)} is not plausible; copy the checkpoint again"
            )
    return _flattened(args, where)


def _flattened(args: argparse.Namespace, where: object) -> argparse.Namespace:
    """Args with those of the namespaces within them, which have the names of a configuration's fields.

    Source: training/yaml_arguments.py, `validate_yaml`, which merges `language_model` and `model_parallel` in the same way.
    """
    groups = {name: value for name, value in vars(args).items() if isinstance(value, argparse.Namespace)}
    if not groups:
        return args
    flat = {name: value for name, value in vars(args).items() if name not in groups}
    for group, values in groups.items():
        for name, value in vars(_flattened(values, where)).items():
            if flat.get(name) is None:
                flat[name] = value
            elif name in ATTRIBUTES and flat[name] != value:
                raise ConversionError(
                    f"{where}: the args have {name}={one_line(repr(flat[name]))} and, in {one_line(group)}, "
                    f"{one_line(repr(value))}; save the checkpoint with the one that its model has"
                )
    return argparse.Namespace(**args_of_fields(flat))


def supplemented(args: argparse.Namespace | None, options: MegatronReadOptions) -> argparse.Namespace | None:
    """Args with the attributes that they lack, or that are None, from the options; None where neither has any."""
    if options.missing_args is None:
        return args
    stored = {} if args is None else {name: value for name, value in vars(args).items() if value is not None}
    absent = {} if args is None else vars(args)
    return argparse.Namespace(**{**absent, **options.missing_args, **stored})


def _is_plausible(value: Any) -> bool:
    """Whether a value is of plausible size; a hostile one may contain itself, or one object a million times."""
    pending, seen = [(value, 0)], 0
    while pending:
        value, depth = pending.pop()
        seen += 1
        if depth > _MAX_DEPTH or seen + len(pending) > _MAX_VALUES:
            return False
        if isinstance(value, int) and value.bit_length() > _MAX_BITS:
            return False
        pending += [(item, depth + 1) for item in _contents(value)]
    return True


def _contents(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return [*value.keys(), *value.values()]
    if isinstance(value, StandIn):
        return value.args, value.kwargs, value.state, value.items
    if isinstance(value, argparse.Namespace):
        return vars(value).values()
    return value if isinstance(value, (list, tuple, set, frozenset)) else ()


def parallel_of(args: argparse.Namespace, where: Path) -> Parallel:
    """Parallel sizes from args; the layers of the stages are still 0, and experts are cut as the args say."""
    tp, pp = (_size(args, f"{kind}_model_parallel_size", where) for kind in ("tensor", "pipeline"))
    split = _pipeline_split(args, where)
    vpp = stages_per_rank(pp, split)
    ep = etp = 1
    if getattr(args, "num_experts", None):
        _size(args, "num_experts", where)
        ep = _size(args, "expert_model_parallel_size", where, absent=1)
        etp = _size(args, "expert_tensor_parallel_size", where, absent=tp)
    if pp * vpp > _MAX_RANKS or math.lcm(tp, ep * etp) > _MAX_RANKS:
        raise ConversionError(
            f"{where}: the args have no valid parallel sizes: together they are more than {_MAX_RANKS} stages or ranks"
        )
    stages = (0,) * (pp * vpp)
    if not getattr(args, "num_experts", None):
        return Parallel(tp, stages, split, etp=tp, vpp=vpp)
    return Parallel(tp, stages, split, ep, etp, vpp)


def _size(args: argparse.Namespace, name: str, where: Path, absent: int | None = None) -> int:
    value = getattr(args, name, None)
    if value is None and absent is not None:
        return absent
    if type(value) is not int or not 1 <= value <= _MAX_RANKS:
        raise ConversionError(
            f"{where}: the args have no valid parallel sizes: {name} is {value!r}, not a positive whole number up to {_MAX_RANKS}"
        )
    return value


def _pipeline_split(args: argparse.Namespace, where: Path) -> PipelineSplit:
    """Split of layers over stages, from args. Some releases store the layout as an object that contains its text."""
    values = vars(args)
    layout = values.get("pipeline_model_parallel_layout")
    if isinstance(layout, StandIn) and isinstance(layout.state, dict):
        layout = layout.state.get("input_data")
    if layout is not None and not isinstance(layout, str):
        raise ConversionError(f"{where}: the args have a pipeline layout that is not text: {layout!r:.80}")
    sizes = (
        "decoder_first_pipeline_num_layers",
        "decoder_last_pipeline_num_layers",
        "virtual_pipeline_model_parallel_size",
    )
    first, last, virtual = (None if values.get(name) is None else _size(args, name, where) for name in sizes)
    return PipelineSplit(
        first,
        last,
        bool(values.get("account_for_embedding_in_pipeline_split")),
        bool(values.get("account_for_loss_in_pipeline_split")),
        virtual,
        layout=layout,
    )


def skipped_entries(content: Mapping[Any, Any]) -> set[str]:
    """Top-level entries of a checkpoint that are neither read nor empty."""
    return {
        one_line(key)
        for key, value in content.items()
        if not _EXPECTED_ENTRIES.fullmatch(one_line(key)) and not _is_empty(value)
    }


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, (dict, list)) and not value)


def origin_of(
    directory: Path,
    args: argparse.Namespace,
    options: MegatronReadOptions,
    iteration: Any,
    files: Iterable[str | Path],
    **more: Any,
) -> Origin:
    """Origin of a checkpoint in these files: what is carried beside its weights. `more` are further fields of `Origin`."""
    reference = options.hf_config
    code = code_files(directory / CODE_FOLDER, links=False) if reference is None else code_files(reference)
    config = _configuration(args, "hf_config", reference, "config.json")
    origin = Origin(
        described=str(directory),
        hf_config=config,
        generation_config=_configuration(args, "hf_generation_config", reference, "generation_config.json"),
        tokenizer=str(reference) if reference else _path(getattr(args, "tokenizer_model", None)),
        margs=args,
        iteration=iteration if isinstance(iteration, int) else None,
        code_files=code,
        identity=file_identities(directory, [*files, *code.values()]),
        **more,
    )
    if wrapper_in(config) is not None:
        _add_carried(origin, directory)
    return origin


def _add_carried(origin: Origin, directory: Path) -> None:
    """Add what a checkpoint has beside the text part of a model of images and text."""
    from ...assets.side_file import PLACE, read_side_file

    carried = origin.carried = read_side_file(directory)
    if carried is None:
        return
    origin.notes.append(carried.note)
    files = [directory / PLACE, *carried.files.values()]
    origin.identity = {**(origin.identity or {}), **file_identities(directory, files)}


def _path(value: Any) -> str | None:
    """Value as a path, if it can be one; else None."""
    return value if isinstance(value, str) and "\0" not in value else None


def _configuration(args: argparse.Namespace, name: str, reference: Path | None, file: str) -> dict[str, Any] | None:
    """Configuration from the reference if one is given, else as a conversion recorded it in args; None if there is none."""
    if reference is not None:
        return unquantised(read_json(reference / file)) if (reference / file).exists() else None
    recorded = getattr(args, name, None)
    return recorded if isinstance(recorded, dict) else None
