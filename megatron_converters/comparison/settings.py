"""What differs between two sources beside their tensors: sizes and switches, training arguments, config.json."""

from __future__ import annotations

from typing import Any

from ..assets.training_args import inheritable, margs_to_json
from ..basics.json_values import differences
from ..conversion.endpoint import Source
from .tensors import in_a_and_b, spec_differences

#: Arguments that repeat what is compared by itself.
_RECORDED = ("hf_config", "hf_generation_config")
#: Fields of config.json that say who wrote the file, not what the model is.
_OF_THE_WRITER = ("transformers_version", "_name_or_path")


def settings_differences(one: Source, other: Source) -> dict[str, list[str]]:
    """By kind, each difference as `name: A has this, B that`; a kind that only one side has is not compared.

    Arguments that belong to one run on one machine, such as paths and ranks, are left out.
    """
    found = {"model": spec_differences(one, other)}
    if one.origin.margs is not None and other.origin.margs is not None:
        found["arguments"] = differences(_arguments(one), _arguments(other), "", in_a_and_b)
    if one.origin.hf_config is not None and other.origin.hf_config is not None:
        found["config.json"] = differences(_config(one), _config(other), "", in_a_and_b)
    return found


def _arguments(source: Source) -> dict[str, Any]:
    margs = source.origin.margs
    kept = inheritable(margs)
    plain = {} if margs is None else margs_to_json(margs)
    return {name: value for name, value in plain.items() if name in kept and name not in _RECORDED}


def _config(source: Source) -> dict[str, Any]:
    return {name: value for name, value in (source.origin.hf_config or {}).items() if name not in _OF_THE_WRITER}
