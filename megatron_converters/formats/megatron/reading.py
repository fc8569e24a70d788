"""Common parts of reading Megatron-LM checkpoints of any format: their folder, and the model that their args describe."""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...assets.code_files import CODE_FOLDER, code_files
from ...assets.origin import Origin, file_identities
from ...basics.dtypes import DType
from ...basics.errors import ConversionError, Unclear, UsageError, one_line, reason_of
from ...basics.json_files import read_json
from ...basics.quantities import count
from ...families import FAMILIES
from ...families.config_json import config_notes, differences, infer_family, spec_from_config
from ...families.quantisation import unquantised
from ...model.layers import is_whole
from ...model.spec import ModelSpec
from ...sharding.ranks import Parallel, padded_vocab
from ...sharding.stages import PipelineSplit, stages_per_rank
from ...storage import dcp
from ...storage.opening import is_name
from ...storage.pickle_reader import StandIn
from .arguments import model_args, spec_fields, stated_heads
from .conventions import conventions_of
from .flags import ignored_notes
from .writing import FAMILY_FILE, MODEL_FILE, TRACKER

#: File that describes the format of a distributed checkpoint (core/dist_checkpointing/core.py).
FORMAT_FILE = "metadata.json"
#: Name of a rank's folder in the `torch` format.
RANK = re.compile(r"mp_rank_\d{2,}(_\d{3,})*$")
_ITERATION = re.compile(r"[0-9]{1,18}")
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
    #: Where multipliers are, if args do not say it: a value of `--mup`.
    mup: str | None = None
    #: Unknown fields of the reference's config.json that do not matter.
    ignored_config: tuple[str, ...] = ()
    #: Patterns of names of tensors that are left out.
    ignore_tensors: tuple[str, ...] = ()


#: Options that take everything from the checkpoint itself.
AS_STORED = MegatronReadOptions()
#: Limits far beyond any training run's args: depth of containers, number of values, bits of an integer.
_MAX_DEPTH, _MAX_VALUES, _MAX_BITS = 32, 1_000_000, 1024
#: More ranks of a stage, or stages, than any run has, so that a damaged size allocates no memory.
_MAX_RANKS = 1 << 18


def checkpoint_directory(load_dir: Path, name: str | None) -> Path:
    """Folder of one iteration: `name` if given, else the one that the tracker file names, else `load_dir` itself."""
    if name is not None:
        if not (load_dir / name).is_dir():
            found = sorted(path.name for path in load_dir.glob("*") if path.is_dir())
            raise ConversionError(f"{load_dir} has no folder {name!r}; it has {', '.join(found) or 'none'}")
        return load_dir / name
    tracker = load_dir / TRACKER
    if tracker.is_file():
        text = tracker.read_text(encoding="utf-8", errors="replace").strip()
        if text != "release" and not _ITERATION.fullmatch(text):
            raise ConversionError(f"{tracker} holds {text[:80]!r}; it must hold an iteration number or 'release'")
        directory = load_dir / (text if text == "release" else f"iter_{int(text):07d}")
        if not directory.is_dir():
            raise ConversionError(
                f"{tracker} names {directory.name}, which does not exist; copy that folder or select another"
            )
        return directory
    if has_model_file(load_dir) or is_distributed(load_dir) or any(RANK.match(path.name) for path in listing(load_dir)):
        return load_dir
    raise ConversionError(
        f"{load_dir} is not a Megatron-LM checkpoint: it has neither {TRACKER} nor mp_rank_* folders nor a {dcp.METADATA} or "
        f"{MODEL_FILE} file"
    )


def is_distributed(directory: Path) -> bool:
    """Whether an iteration's folder is a distributed checkpoint: of the `torch_dist` format, or another with an index file."""
    return any((directory / name).exists() for name in (dcp.METADATA, FORMAT_FILE)) and not has_model_file(directory)


def has_model_file(directory: Path) -> bool:
    """Whether a folder holds a whole model in one file."""
    return (directory / MODEL_FILE).exists() and not (directory / dcp.METADATA).exists()


def listing(folder: Path) -> list[Path]:
    """Entries of a folder, sorted; raises `ConversionError` if it cannot be listed."""
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise ConversionError(f"cannot list {folder}: {reason_of(error)}") from error


def args_in(content: Mapping[str, Any], where: object) -> argparse.Namespace | None:
    """Args of a rank's or common file, None if it has none; raises `ConversionError` if a value is too large to show or write."""
    args = content.get("args")
    if not isinstance(args, argparse.Namespace):
        return None
    for name, value in vars(args).items():
        if not (is_name(name) and _is_plausible(value)):
            raise ConversionError(
                f"{where}: the args are damaged: the value of {one_line(name)} is not plausible; copy the checkpoint again"
            )
    return args


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


def spec_and_notes(
    args: argparse.Namespace, padded: int, dtype: DType, options: MegatronReadOptions
) -> tuple[ModelSpec, list[str]]:
    """Spec of the model that args describe, or of the reference if one is given, and notes for the user."""
    if options.hf_config is not None:
        return _reference_spec(options.hf_config, args, dtype, options)
    fields = spec_fields(args)
    vocab, notes = _vocab_size(args, padded, options.true_vocab_size)
    fields = {**fields, "vocab_size": vocab, "dtype": dtype}
    recorded = getattr(args, "hf_config", None)
    if isinstance(recorded, dict):
        _check_family_file(args, recorded)
        return _updated_spec(_recorded_spec(recorded), fields, args, options.mup), notes + ignored_notes(vars(args))
    spec = infer_family(fields, options.families)
    notes += ignored_notes(vars(args))
    return spec, [*notes, f"no Hugging Face configuration is recorded; the {spec.family} family fits the args"]


def _check_family_file(args: argparse.Namespace, config: Mapping[str, Any]) -> None:
    """Raise unless the family file is in use with which the recorded configuration was written, if it was one."""
    mark, file = getattr(args, FAMILY_FILE, None), FAMILIES.file
    if mark is None or (file is not None and mark == file.digest):
        return
    other = "" if file is None else f", and {file.path} says something else"
    raise ConversionError(
        f"the configuration that a conversion recorded in the args needs the family file of that conversion, which describes "
        f"{one_line(config.get('architectures') or config.get('model_type'))}{other}; give it with --family-file FILE, or a "
        "reference model with --hf-config DIR"
    )


def _recorded_spec(config: Mapping[str, Any]) -> ModelSpec:
    """Spec of a recorded configuration; unknown fields are ignored, since its user has accepted them."""
    try:
        return spec_from_config(config, ignored=config)
    except ConversionError as error:
        raise ConversionError(
            f"the configuration that a conversion recorded in the args is not valid: {error}; give a reference model with "
            "--hf-config DIR"
        ) from error


def _updated_spec(
    recorded: ModelSpec, fields: Mapping[str, Any], args: argparse.Namespace, mup: str | None
) -> ModelSpec:
    """Spec of the recorded configuration, updated by the fields of args that have changed since.

    Args cannot express every model (`inexpressible`), so only fields that differ from the args of the recorded model count.
    """
    stored = conventions_of(vars(args), recorded, mup)
    original = spec_fields(argparse.Namespace(**{**model_args(stored.spec), **stored.marks}))
    changed = {name: value for name, value in fields.items() if name not in original or original[name] != value}
    return recorded.replaced(**changed)


def _reference_spec(
    folder: Path, args: argparse.Namespace, dtype: DType, options: MegatronReadOptions
) -> tuple[ModelSpec, list[str]]:
    config, vocab = read_json(folder / "config.json"), options.true_vocab_size
    spec = dataclasses.replace(spec_from_config(config, options.ignored_config), dtype=dtype)
    notes = config_notes(config)
    if vocab is not None and vocab != spec.vocab_size:
        raise UsageError(
            f"--true-vocab-size {vocab} disagrees with vocab_size {spec.vocab_size} of {folder / 'config.json'}"
        )
    try:
        fields = {**spec_fields(args), "vocab_size": spec.vocab_size, "dtype": dtype}
    except Unclear as error:
        return spec, [*notes, f"taken from {folder} alone, since {error}"]
    args_spec = ModelSpec.of(family=spec.family, **fields)
    stored = conventions_of(vars(args), spec, options.mup).spec
    heads = [name for name in stated_heads(args) if args_spec.values.get(name) != spec.values.get(name)]
    if heads:
        raise ConversionError(
            f"{folder} is another model than the checkpoint: {'; '.join(differences(spec, args_spec, heads))} of the args, by "
            "which queries, keys and values are packed; give the reference of this model"
        )
    notes += [f"taken from {folder}: {difference} of the args" for difference in differences(stored, args_spec)]
    return spec, notes


def without_prediction(spec: ModelSpec, options: MegatronReadOptions) -> tuple[ModelSpec, list[str]]:
    """Spec without layers of multi-token prediction, if the options leave them out, and a note on it."""
    if not (options.without_mtp and spec.mtp):
        return spec, []
    note = f"{count(len(spec.mtp), 'layer')} of multi-token prediction: left out, as --without-mtp says"
    return dataclasses.replace(spec, mtp=()), [note]


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
    return Origin(
        described=str(directory),
        hf_config=_configuration(args, "hf_config", reference, "config.json"),
        generation_config=_configuration(args, "hf_generation_config", reference, "generation_config.json"),
        tokenizer=str(reference) if reference else _path(getattr(args, "tokenizer_model", None)),
        margs=args,
        iteration=iteration if isinstance(iteration, int) else None,
        code_files=code,
        identity=file_identities(directory, [*files, *code.values()]),
        **more,
    )


def _path(value: Any) -> str | None:
    """Value as a path, if it can be one; else None."""
    return value if isinstance(value, str) and "\0" not in value else None


def padding_note(padded: int, spec: ModelSpec) -> list[str]:
    """Note on vocabulary padding, whose rows are not converted."""
    surplus = padded - spec.vocab_size
    return [f"{surplus} rows of vocabulary padding are left out (vocabulary {spec.vocab_size})"] if surplus > 0 else []


def _configuration(args: argparse.Namespace, name: str, reference: Path | None, file: str) -> dict[str, Any] | None:
    """Configuration from the reference if one is given, else as a conversion recorded it in args; None if there is none."""
    if reference is not None:
        return unquantised(read_json(reference / file)) if (reference / file).exists() else None
    recorded = getattr(args, name, None)
    return recorded if isinstance(recorded, dict) else None


def _vocab_size(args: argparse.Namespace, padded: int, given: int | None) -> tuple[int, list[str]]:
    """Vocabulary size without padding, from `given` or args, and notes on it; `padded` is the number of embedding rows."""
    recorded = getattr(args, "vocab_size", None)
    if isinstance(recorded, int) and getattr(args, "tokenizer_type", None) == "NullTokenizer":
        recorded += 1  # plus the end-of-document token (core_v0.17.1, core/tokenizers/text/libraries/null_tokenizer.py)
    if given is not None:
        if given > padded:
            raise UsageError(f"--true-vocab-size {given} exceeds the {padded} rows of the embeddings")
        other = isinstance(recorded, int) and recorded != given
        return given, [
            f"warning: --true-vocab-size {given} is taken, although the args say {recorded}"
        ] if other else []
    if isinstance(recorded, int) and 0 < recorded <= padded:
        return recorded, _surplus_warning(args, recorded, padded)
    return padded, [
        f"the args do not say the true vocabulary size; all {padded} rows are kept, padding included "
        "(give --true-vocab-size or --hf-config to trim it)"
    ]


def _surplus_warning(args: argparse.Namespace, vocab: int, padded: int) -> list[str]:
    """Warning that the embeddings have more rows than the args' vocabulary size and its padding explain."""
    divisor, tp = getattr(args, "make_vocab_size_divisible_by", None), getattr(args, "tensor_model_parallel_size", None)
    if (
        not (is_whole(divisor) and is_whole(tp) and divisor > 0 and tp > 0)
        or padded_vocab(vocab, divisor, tp) >= padded
    ):
        return []
    return [
        f"warning: the args' vocab_size of {vocab} needs {padded_vocab(vocab, divisor, tp)} rows, but there are {padded}; rows "
        f"from {vocab} on are left out as padding (if the tokenizer has more, say so with --true-vocab-size)"
    ]
