"""Differences between two sources apart from their tensors: model fields, training arguments, config.json."""

from __future__ import annotations

from typing import Any

from ..assets.training_args import inheritable, margs_to_json
from ..basics.json_values import differences
from ..conversion.endpoint import Source
from .tensors import difference_text, spec_differences

#: Arguments that repeat config.json, which is compared on its own.
_COPIES_OF_CONFIG = ("hf_config", "hf_generation_config")
#: Fields of config.json that describe who wrote the file, not the model.
_WRITER_FIELDS = ("transformers_version", "_name_or_path")


def settings_differences(one: Source, other: Source) -> dict[str, list[str]]:
    """Differences by kind, each as `name: A has this, B has that`; a kind that only one side has is not compared.

    Arguments of one run on one machine, such as paths and ranks, are left out.
    """
    found = {"model": spec_differences(one, other)}
    if one.origin.margs is not None and other.origin.margs is not None:
        found["arguments"] = differences(_arguments(one), _arguments(other), "", difference_text)
    if one.origin.hf_config is not None and other.origin.hf_config is not None:
        found["config.json"] = differences(_config(one), _config(other), "", difference_text)
    return found


def _arguments(source: Source) -> dict[str, Any]:
    margs = source.origin.margs
    kept = inheritable(margs)
    plain = {} if margs is None else margs_to_json(margs)
    return {name: value for name, value in plain.items() if name in kept and name not in _COPIES_OF_CONFIG}


def _config(source: Source) -> dict[str, Any]:
    return {name: value for name, value in (source.origin.hf_config or {}).items() if name not in _WRITER_FIELDS}
