"""`metadata.json` beside a `model.pt`: the keys of Model Converter Tool, and what else it takes to come back exactly.

That tool writes `_ORIGINAL` only, which do not describe a model: sizes of MLP and key heads, epsilon and RoPE are missing.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ...assets.training_args import margs_from_values, margs_to_json
from ...basics.errors import ConversionError, one_line
from ...basics.json_files import read_json
from ...conversion.staging import unfinished_in
from ...families import FAMILIES
from ...families.rules_attention import written_scaling
from ...model.spec import ModelSpec
from .arguments import model_args
from .locating import MODEL_FILE
from .reading import args_in

METADATA_FILE = "metadata.json"
#: Name and version of what this project adds to the keys of the original.
_FORMAT, _VERSION = "megatron-converters", 1
_ARGS = "args"
_ORIGINAL = (
    *("model_type", "num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings", "vocab_size"),
    *("position_embedding_type", "swiglu", "linear_bias", "output_layer"),
)
#: Keys without which the tensors would be read as another model's.
_SHAPES = ("num_layers", "hidden_size", "num_attention_heads")
#: Properties of a model that keep their names.
_PROPERTIES = ("num_query_groups", "ffn_hidden_size", "kv_channels", "norm_epsilon", "rotary_base", "rope_scaling")


def describe(spec: ModelSpec, padded: int) -> dict[str, Any]:
    """Values by key, for a model as its args describe it and embeddings of `padded` rows."""
    args, plain = model_args(spec), spec.to_dict()
    plain["rope_scaling"] = written_scaling(spec.values.get("rope_scaling"))  # as config.json has it
    named = {
        "model_type": FAMILIES[spec.family].model_type,
        "position_embedding_type": args["position_embedding_type"],
        "swiglu": args["swiglu"],
        "linear_bias": args["add_bias_linear"],
        # The original always writes true, and no reader of it looks at this.
        "output_layer": not spec.tied,
        "tie_word_embeddings": spec.tied,
        "padded_vocab_size": padded,
        "true_vocab_size": spec.vocab_size,
    }
    return {key: named.get(key, plain.get(key)) for key in dict.fromkeys((*_ORIGINAL, *_PROPERTIES, *named, "dtype"))}


def complete(described: Mapping[str, Any], args: Mapping[str, Any], code: Iterable[str]) -> dict[str, Any]:
    """Content of the file: a description, the args of the checkpoint, and the names of code files that are beside it."""
    marks = {"format": _FORMAT, "format_version": _VERSION, "hf_files": sorted(code)}
    return {**described, **marks, _ARGS: margs_to_json(argparse.Namespace(**args))}


def read_metadata(folder: Path) -> dict[str, Any] | None:
    """Content of the file; None if there is none. Raises `ConversionError` for a version that is not known."""
    path = folder / METADATA_FILE
    if not path.exists():
        return None
    metadata = read_json(path)
    version = metadata.get("format_version")
    if "format" in metadata and version != _VERSION:
        raise ConversionError(
            f"{path} is of format_version {one_line(version)}, and only version {_VERSION} can be read; use the release that "
            "wrote it"
        )
    return metadata


def args_of(folder: Path, metadata: Mapping[str, Any] | None) -> argparse.Namespace | None:
    """Args in the metadata of a folder; None if there are none."""
    values = (metadata or {}).get(_ARGS)
    if not isinstance(values, dict):
        return None
    return args_in({"args": margs_from_values(values)}, folder / METADATA_FILE)


def refuse_undescribed(folder: Path, metadata: Mapping[str, Any] | None) -> None:
    """Raise `ConversionError` for a model without args, with what is missing."""
    remedy = "give a reference model with --hf-config DIR"
    unfinished = unfinished_in(folder)
    if unfinished is not None:
        raise ConversionError(f"{folder} {unfinished}")
    if metadata is None:
        raise ConversionError(f"{folder} has no {METADATA_FILE}, which describes the model in {MODEL_FILE}; {remedy}")
    missing = [*(key for key in (*_PROPERTIES, "tie_word_embeddings") if key not in metadata), _ARGS]
    raise ConversionError(
        f"{folder / METADATA_FILE} does not describe the model (Model Converter Tool's never does): it lacks "
        f"{', '.join(missing)}; {remedy}"
    )


def check_metadata(
    folder: Path, metadata: Mapping[str, Any], described: Mapping[str, Any], reference: Path | None
) -> list[str]:
    """Compare metadata with the model that is read: by its tensors and args, or by a reference; returns notes.

    Raises `ConversionError` for contradictions, beside a reference only for those of shapes.
    """
    differing = {key: value for key, value in described.items() if metadata.get(key, value) != value}
    path, whose = folder / METADATA_FILE, str(reference or "its args and tensors")
    wrong = [
        f"{key} {one_line(metadata[key])}, but {whose} {one_line(value)}"
        for key, value in differing.items()
        if reference is None or key in _SHAPES
    ]
    if wrong:
        remedy = (
            "give the reference of this model" if reference else "correct it, or give a reference with --hf-config DIR"
        )
        raise ConversionError(f"{path} says {'; '.join(wrong)}; {remedy}")
    notes = [
        f"taken from {whose}: {key}: {value}, not {one_line(metadata[key])} of {path}"
        for key, value in differing.items()
    ]
    if _ARGS not in metadata:
        notes.append(
            f"warning: {path} is Model Converter Tool's, which leaves norms and output layer of {MODEL_FILE} as they were "
            "initialised; look at what the model computes before you use it"
        )
    return notes
