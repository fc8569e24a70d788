"""Names of a stored model's tensors under what wraps it: a uniform prefix, which is taken off, and adapters, which are refused."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import TypeVar

from ...basics.errors import ConversionError, one_line
from ...basics.quantities import count
from .names import EMBEDDINGS

T = TypeVar("T")
#: Parts of names that adapters add, and the tools that merge them. The first row is of Megatron-Bridge (0.2 on, peft/) and NeMo 2,
#: the second of peft, which ms-swift uses for Megatron-LM, too.
_ADAPTERS = (
    (
        re.compile(r"\.(to_wrap|adapters?)\."),
        "Megatron-Bridge's examples/peft/merge_lora.py, or NeMo's llm.peft.merge_lora",
    ),
    (
        re.compile(r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|base_layer)(\.|$)"),
        "the program that trained them, such as ms-swift's megatron export --merge_lora true",
    ),
)
#: The same of the wrapped weights, which an adapter alone does not have.
_WRAPPED = re.compile(r"\.(to_wrap|base_layer)\.")
_SHOWN = 3


def prefix_of(names: Iterable[str], where: object) -> str:
    """Prefix that wrappers of the model put before its names, such as `module.`, by that of the embeddings; no text if none.

    Raises `ConversionError` if the embeddings are missing, or there several times.
    """
    listed = list(names)
    refuse_adapters(listed, where)
    found = sorted(
        name.removesuffix(EMBEDDINGS) for name in listed if name == EMBEDDINGS or name.endswith(f".{EMBEDDINGS}")
    )
    if len(found) == 1:
        return found[0]
    if found:
        both = " and ".join(one_line(prefix + EMBEDDINGS) for prefix in found[:_SHOWN])
        raise ConversionError(f"{where} holds several models, with {both}; save one of them alone")
    shown = ", ".join(map(one_line, sorted(listed)[:_SHOWN]))
    held = f"the names are {shown} and the like" if shown else "there are no weights"
    raise ConversionError(
        f"{where}: {EMBEDDINGS} is missing or not a matrix, so this is not a checkpoint of a GPT; {held}"
    )


def without_prefix(tensors: Mapping[str, T], prefix: str, where: object) -> dict[str, T]:
    """Tensors by their names without a prefix; raises `ConversionError` if some lack it, since they are of something else."""
    others = sorted(name for name in tensors if not name.startswith(prefix))
    if others:
        raise ConversionError(
            f"{where}: the model's names begin with {one_line(prefix)}, but not those of {count(len(others), 'tensor')}, such as "
            f"{', '.join(map(one_line, others[:_SHOWN]))}; --ignore-tensors PATTERN leaves such tensors out"
        )
    return {name.removeprefix(prefix): data for name, data in tensors.items()}


def prefix_note(prefix: str) -> list[str]:
    """Note on a prefix that is taken off."""
    return [f"all names begin with {one_line(prefix)}, which is taken off"] if prefix else []


def refuse_adapters(names: Collection[str], where: object) -> None:
    """Raise if names are those of adapters (LoRA and the like) that are not merged into a model."""
    for pattern, tool in _ADAPTERS:
        adapters = sorted(name for name in names if pattern.search(name))
        if adapters:
            whole = any(_WRAPPED.search(name) for name in adapters)
            what = (
                "a model with LoRA adapters that are not merged into it"
                if whole
                else "LoRA adapters alone, not a model"
            )
            raise ConversionError(
                f"{where} holds {what} ({count(len(adapters), 'tensor')} such as {one_line(adapters[0])}); merge them with {tool}, "
                "and convert the result"
            )
