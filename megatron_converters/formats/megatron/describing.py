"""Model that a checkpoint's args describe, together with a recorded configuration or a reference model."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from ...basics.dtypes import DType
from ...basics.errors import ConversionError, Unclear, UsageError, one_line
from ...basics.json_files import read_json
from ...families import FAMILIES
from ...families.config_json import config_notes, differences, spec_from_config, text_part
from ...model.checks import is_whole
from ...model.spec import ModelSpec
from ...sharding.ranks import padded_vocab
from .arguments import missing_sizes, model_args, spec_fields, stated_heads
from .conventions import conventions_of
from .foreign_args import foreign_notes
from .prediction import PREDICTION, inferred, without_layers
from .reading import MegatronReadOptions
from .run_config import Record
from .trained_by import as_built, doubts, recorded_vocab
from .writing import FAMILY_FILE

#: Properties in which a reference may differ from the args without being another model: they matter to training, or are limits.
_ASIDE = ("initializer_range", "attention_dropout", "moe_aux_loss_coeff", "max_position_embeddings")
_EPSILONS = ("norm_epsilon", "layernorm_epsilon")
#: Attributes that say the same, of which args may have one.
_SYNONYMS = (_EPSILONS, ("apply_layernorm_1p", "layernorm_zero_centered_gamma"))


def spec_and_notes(
    args: argparse.Namespace, padded: int, dtype: DType, options: MegatronReadOptions, record: Record | None = None
) -> tuple[ModelSpec, list[str]]:
    """Spec of the model that args describe, or of the reference if one is given, and notes for the user.

    `record` is the file that says the model of a checkpoint without args; `args` are then its.
    """
    args, notes = as_built(args, options.trained_by)
    reference = None if options.hf_config is None else options.hf_config / "config.json"
    settled = "" if reference is None or options.prefer_args else str(reference)
    notes += foreign_notes(vars(args), options.ignore_args, settled=settled)
    if record is not None:
        notes.append(f"the checkpoint has no args; {record.path} describes its model")
    if reference is not None:
        spec, more = _of_reference(reference, args, padded, dtype, options, record)
        return spec, notes + more
    if record is not None:
        record.require()
    fields = without_layers(spec_fields(args), options.without_mtp)
    vocab, vocab_notes = _vocab_size(args, padded, options)
    fields = {**fields, "vocab_size": vocab, "dtype": dtype}
    recorded = getattr(args, "hf_config", None)
    if isinstance(recorded, dict):
        _check_family_file(args, recorded)
        return _updated_spec(_recorded_spec(recorded), fields, args, options.mup), notes + vocab_notes
    spec = inferred(fields, options.families)
    notes += [*vocab_notes, *_doubts(args, options, record)]
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
        return spec_from_config(config, ignored={*config, *text_part(config)})
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


def _of_reference(
    path: Path, args: argparse.Namespace, padded: int, dtype: DType, options: MegatronReadOptions, record: Record | None
) -> tuple[ModelSpec, list[str]]:
    """Spec of the reference model whose config.json `path` is; with `--prefer-args` what args say takes precedence."""
    config, vocab = read_json(path), options.true_vocab_size
    spec = dataclasses.replace(spec_from_config(config, options.ignored_config), dtype=dtype)
    if options.prefer_args:
        vocab, notes = _vocab_size(args, padded, options)
        fields = {
            **without_layers(spec_fields(_completed(args, spec, options, missing_sizes(args))), options.without_mtp),
            "vocab_size": vocab,
            "dtype": dtype,
        }
        updated = _updated_spec(spec, fields, args, options.mup)
        changed = [f"taken from the args: {difference} of {path}" for difference in differences(updated, spec)]
        return updated, [*config_notes(config), *notes, *changed, *_doubts(args, options, record)]
    if vocab is not None and vocab != spec.vocab_size:
        raise UsageError(f"--true-vocab-size {vocab} disagrees with vocab_size {spec.vocab_size} of {path}")
    return spec, [*config_notes(config), *_reference_notes(path, spec, args, options, record)]


def _reference_notes(
    path: Path, spec: ModelSpec, args: argparse.Namespace, options: MegatronReadOptions, record: Record | None
) -> Iterator[str]:
    """Notes on where a reference differs from what args say; raises `ConversionError` if it cannot be the same model."""
    if not vars(args):
        yield f"taken from {path.parent} alone, since the checkpoint has no args"
        return
    whose = "the args" if record is None else str(record.path)
    try:
        values = spec_fields(args if record is None else _completed(args, spec, options))
    except Unclear as error:
        yield f"taken from {path.parent} where the args do not say it: {error.what}"
        unclear = (*missing_sizes(args), *error.attributes)
        values = spec_fields(_completed(args, spec, options, unclear))
    stored = conventions_of(vars(args), spec, options.mup).spec
    decided = {"vocab_size": spec.vocab_size, "dtype": spec.dtype, "absent_biases": spec.absent_biases}
    said = ModelSpec.of(family=spec.family, **{**values, **decided})
    heads = [name for name in stated_heads(args) if said.values.get(name) != spec.values.get(name)]
    if heads:
        raise ConversionError(
            f"{path.parent} is another model than the checkpoint: {'; '.join(differences(spec, said, heads))} of {whose}, by "
            "which queries, keys and values are packed; give the reference of this model"
        )
    settled = (PREDICTION,) if options.without_mtp or options.backfilled else ()
    for name in [each for each in dict.fromkeys((*stored.values, *said.values)) if each not in settled]:
        for difference in differences(stored, said, [name]):
            kind, remedy = ("", "") if name in _ASIDE else ("warning: ", "; --prefer-args takes what they say")
            yield f"{kind}taken from {path.parent}: {difference} of {whose}{remedy}"


def _doubts(args: argparse.Namespace, options: MegatronReadOptions, record: Record | None) -> list[str]:
    """Warnings of args that their program may have ignored; a configuration is what its program has built."""
    return doubts(vars(args), options.trained_by) if record is None else []


def _completed(
    args: argparse.Namespace, spec: ModelSpec, options: MegatronReadOptions, without: Collection[str] = ()
) -> argparse.Namespace:
    """Args in which those of a model stand where they say nothing, and for the attributes `without`."""
    stored = conventions_of(vars(args), spec, options.mup)
    given = {name: value for name, value in vars(args).items() if value is not None and name not in without}
    said = {name for synonyms in _SYNONYMS if given.keys() & {*synonyms} for name in synonyms}
    base = {name: value for name, value in model_args(stored.spec).items() if name not in said}
    return argparse.Namespace(**{**base, **stored.marks, **given})


def padding_note(padded: int, spec: ModelSpec) -> list[str]:
    """Note on vocabulary padding, whose rows are not converted."""
    surplus = padded - spec.vocab_size
    return [f"{surplus} rows of vocabulary padding are left out (vocabulary {spec.vocab_size})"] if surplus > 0 else []


def _vocab_size(args: argparse.Namespace, padded: int, options: MegatronReadOptions) -> tuple[int, list[str]]:
    """Vocabulary size without padding, from the options or args, and notes on it; `padded` is the number of embedding rows."""
    given, recorded = options.true_vocab_size, recorded_vocab(args, options.trained_by)
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
