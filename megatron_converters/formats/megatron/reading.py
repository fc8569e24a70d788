"""What reading a Megatron-LM checkpoint of any format has in common: its folder, and the model that its args describe."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...assets.origin import Origin
from ...basics.dtypes import DType
from ...basics.errors import ConversionError, Unclear, UsageError, one_line, reason_of
from ...basics.json_files import read_json
from ...families.config_json import differences, infer_family, spec_from_config
from ...model.spec import ModelSpec, is_whole
from ...sharding.ranks import Parallel, padded_vocab
from ...sharding.stages import PipelineSplit, stages_per_rank
from ...storage import dcp
from ...storage.opening import is_name
from ...storage.pickle_reader import StandIn
from .arguments import expert_args, model_args, spec_fields, stated_heads
from .writing import TRACKER

#: What a distributed checkpoint says of its format (core/dist_checkpointing/core.py).
FORMAT_FILE = "metadata.json"
#: The folder of one rank in the `torch` format.
RANK = re.compile(r"mp_rank_\d{2,}(_\d{3,})*$")
_ITERATION = re.compile(r"[0-9]{1,18}")
#: Top-level entries of a checkpoint that are not left-out state.
_EXPECTED_ENTRIES = re.compile(
    r"args|model\d*|checkpoint_version|iteration|num_floating_point_operations_so_far|content_metadata"
)


@dataclass(frozen=True)
class MegatronReadOptions:
    """What the user says about a checkpoint beyond its own args. `directory_name` is a folder such as `iter_0000008`."""

    directory_name: str | None = None
    hf_config: Path | None = None
    true_vocab_size: int | None = None
    source_model_type: str | None = None


#: Nothing beyond the checkpoint itself.
AS_STORED = MegatronReadOptions()
#: Far beyond any training run's args: containers in containers, values in all, bits of a number.
_DEEPEST, _MOST_VALUES, _WIDEST = 32, 1_000_000, 1024


def checkpoint_directory(load_dir: Path, name: str | None) -> Path:
    """The folder of one iteration: `name`, what the tracker file names, or `load_dir` itself."""
    if name is not None:
        if not (load_dir / name).is_dir():
            found = sorted(path.name for path in load_dir.glob("*") if path.is_dir())
            raise ConversionError(f"{load_dir} has no folder {name!r}; it has {', '.join(found) or 'none'}")
        return load_dir / name
    tracker = load_dir / TRACKER
    if tracker.is_file():
        text = tracker.read_text(encoding="utf-8", errors="replace").strip()
        if text != "release" and not _ITERATION.fullmatch(text):
            raise ConversionError(f"{tracker} says {text[:80]!r}; it must hold an iteration number or 'release'")
        directory = load_dir / (text if text == "release" else f"iter_{int(text):07d}")
        if not directory.is_dir():
            raise ConversionError(
                f"{tracker} names {directory.name}, which is not there; copy it or name another folder"
            )
        return directory
    if is_distributed(load_dir) or any(RANK.match(path.name) for path in listing(load_dir)):
        return load_dir
    raise ConversionError(
        f"{load_dir} is no Megatron-LM checkpoint: it has neither {TRACKER} nor mp_rank_* folders nor a {dcp.METADATA} file"
    )


def is_distributed(directory: Path) -> bool:
    """Whether an iteration's folder is of the `torch_dist` format, or of another that keeps its index in one file."""
    return any((directory / name).exists() for name in (dcp.METADATA, FORMAT_FILE))


def listing(folder: Path) -> list[Path]:
    """What is in a folder, in order."""
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise ConversionError(f"cannot list {folder}: {reason_of(error)}") from error


def args_in(content: Mapping[str, Any], where: object) -> argparse.Namespace | None:
    """The args of a file, None where it has none; raises for such as could neither be shown nor written."""
    args = content.get("args")
    if not isinstance(args, argparse.Namespace):
        return None
    for name, value in vars(args).items():
        if not (is_name(name) and _is_sound(value)):
            raise ConversionError(f"{where}: the args are damaged: no run has such a value of {one_line(name)}")
    return args


def _is_sound(value: Any) -> bool:
    """Whether a value is of a size that can be shown: a hostile one may hold itself, or one thing a million times."""
    left, seen = [(value, 0)], 0
    while left:
        value, depth = left.pop()
        seen += 1
        if depth > _DEEPEST or seen + len(left) > _MOST_VALUES:
            return False
        if isinstance(value, int) and value.bit_length() > _WIDEST:
            return False
        left += [(item, depth + 1) for item in _held_by(value)]
    return True


def _held_by(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return [*value.keys(), *value.values()]
    if isinstance(value, StandIn):
        return value.args, value.kwargs, value.state, value.items
    if isinstance(value, argparse.Namespace):
        return vars(value).values()
    return value if isinstance(value, (list, tuple, set, frozenset)) else ()


def describe(
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
        return _updated(_recorded_spec(recorded), fields), notes
    spec = infer_family(fields)
    return spec, [*notes, f"no Hugging Face configuration is recorded; the {spec.family} family fits the args"]


def _recorded_spec(config: Mapping[str, Any]) -> ModelSpec:
    """The model of a recorded configuration, whatever unknown fields its user vouched for."""
    try:
        return spec_from_config(config, ignored=config)
    except ConversionError as error:
        raise ConversionError(
            f"the configuration that a conversion recorded in the args is no model's: {error}; name a reference with "
            "--hf-config DIR"
        ) from error


def _updated(recorded: ModelSpec, fields: Mapping[str, Any]) -> ModelSpec:
    """The model whose configuration a conversion recorded, and what the args have come to say otherwise since.

    Args cannot say all of every model (`inexpressible`): what they say as they would of the recorded one is no news.
    """
    said = spec_fields(
        argparse.Namespace(**model_args(recorded), **expert_args(recorded, Parallel(1, (0,)), "grouped"))
    )
    news = {name: value for name, value in fields.items() if name not in said or said[name] != value}
    return dataclasses.replace(recorded, **news)


def _reference(folder: Path, args: argparse.Namespace, dtype: DType, vocab: int | None) -> tuple[ModelSpec, list[str]]:
    config = read_json(folder / "config.json")
    spec = dataclasses.replace(spec_from_config(config), dtype=dtype)
    if vocab is not None and vocab != spec.vocab_size:
        raise UsageError(
            f"--true-vocab-size {vocab} disagrees with vocab_size {spec.vocab_size} of {folder / 'config.json'}"
        )
    try:
        fields = {**spec_fields(args), "vocab_size": spec.vocab_size, "dtype": dtype}
    except Unclear as error:
        return spec, [f"taken from {folder} alone, since {error}"]
    said = ModelSpec(family=spec.family, **fields)
    packed = [name for name in stated_heads(args) if getattr(said, name) != getattr(spec, name)]
    if packed:
        raise ConversionError(
            f"{folder} is another model than the checkpoint: {'; '.join(differences(spec, said, packed))} of the args, by "
            "which queries, keys and values are packed; name the reference of this model"
        )
    return spec, [f"taken from {folder}: {difference} of the args" for difference in differences(spec, said)]


def parallel_of(args: argparse.Namespace, where: Path) -> Parallel:
    """Sizes from args, with the stages still uncounted and experts cut as the args say."""
    tp, pp = (_size(args, f"{kind}_model_parallel_size", where) for kind in ("tensor", "pipeline"))
    split = _split_of(args, where)
    vpp = stages_per_rank(pp, split)
    stages = (0,) * (pp * vpp)
    if not getattr(args, "num_experts", None):
        return Parallel(tp, stages, split, etp=tp, vpp=vpp)
    _size(args, "num_experts", where)
    ep = _size(args, "expert_model_parallel_size", where, absent=1)
    etp = _size(args, "expert_tensor_parallel_size", where, absent=tp)
    return Parallel(tp, stages, split, ep, etp, vpp)


def _size(args: argparse.Namespace, name: str, where: Path, absent: int | None = None) -> int:
    value = getattr(args, name, None)
    if value is None and absent is not None:
        return absent
    if type(value) is not int or value < 1:
        raise ConversionError(f"{where}: the args have no sound parallel sizes: {name} is {value!r}")
    return value


def _split_of(args: argparse.Namespace, where: Path) -> PipelineSplit:
    """How the args spread layers over stages. Some versions keep the layout as an object that holds its text."""
    values = vars(args)
    layout = values.get("pipeline_model_parallel_layout")
    if isinstance(layout, StandIn) and isinstance(layout.state, dict):
        layout = layout.state.get("input_data")
    if layout is not None and not isinstance(layout, str):
        raise ConversionError(f"{where}: the args have a pipeline layout that is no text: {layout!r:.80}")
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


def left_out_of(content: Mapping[Any, Any]) -> set[str]:
    """Entries of a checkpoint's top level that are not read and not empty."""
    return {
        one_line(key)
        for key, value in content.items()
        if not _EXPECTED_ENTRIES.fullmatch(one_line(key)) and not _is_empty(value)
    }


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, (dict, list)) and not value)


def origin_of(
    directory: Path, args: argparse.Namespace, options: MegatronReadOptions, iteration: Any, **more: Any
) -> Origin:
    """What travels beside the weights of a checkpoint; `more` are further fields of it."""
    reference = options.hf_config
    return Origin(
        described=str(directory),
        hf_config=_beside(args, "hf_config", reference, "config.json"),
        generation_config=_beside(args, "hf_generation_config", reference, "generation_config.json"),
        tokenizer=str(reference) if reference else _path(getattr(args, "tokenizer_model", None)),
        margs=args,
        iteration=iteration if isinstance(iteration, int) else None,
        **more,
    )


def _path(value: Any) -> str | None:
    """What the args name as a path, if a system can have such a one."""
    return value if isinstance(value, str) and "\0" not in value else None


def padding_note(padded: int, spec: ModelSpec) -> list[str]:
    """What to say about rows of the vocabulary that are not converted."""
    surplus = padded - spec.vocab_size
    return [f"{surplus} rows of vocabulary padding are left out (vocabulary {spec.vocab_size})"] if surplus > 0 else []


def _beside(args: argparse.Namespace, name: str, reference: Path | None, file: str) -> dict[str, Any] | None:
    """A configuration from the reference if there is one, else as a conversion recorded it in args."""
    if reference is not None:
        return read_json(reference / file) if (reference / file).exists() else None
    recorded = getattr(args, name, None)
    return recorded if isinstance(recorded, dict) else None


def _vocab_size(args: argparse.Namespace, padded: int, given: int | None) -> tuple[int, list[str]]:
    recorded = getattr(args, "vocab_size", None)
    if isinstance(recorded, int) and getattr(args, "tokenizer_type", None) == "NullTokenizer":
        recorded += (
            1  # the end-of-document token comes on top (core_v0.17.1, core/tokenizers/text/libraries/null_tokenizer.py)
        )
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
    """What to say where padding does not explain that there are so many more rows than the args' vocabulary has."""
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
