"""Megatron-LM arguments that describe any folder: the model and, for a checkpoint, its parallel sizes and training."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..assets.tokenizer import is_tiktoken_file
from ..assets.training_args import inheritable
from ..basics.dtypes import DType
from ..conversion.endpoint import Source
from ..formats.kinds import MEGATRON
from ..formats.megatron.argument import Context, Group
from ..formats.megatron.arguments import (
    plain_args,
    router_dtype,
    router_warnings,
    seq_length_of,
    training_args,
    written_args,
)
from ..formats.megatron.conventions import conventions, conventions_of
from ..formats.megatron.locating import TRACKER
from ..formats.megatron.writing import DEFAULT_DIVISOR
from ..model.spec import ModelSpec
from ..sharding.ranks import Parallel, padded_vocab
from .inventory import Survey

#: Expert layout that a new checkpoint gets by default.
_EXPERT_LAYOUT = "grouped"
_HF_TOKENIZER, _SENTENCEPIECE_TOKENIZER = "HuggingFaceTokenizer", "Llama2Tokenizer"


def arguments(found: Survey, source: Source, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Arguments by attribute name, and notes for the user.

    `folder` is the one that the user named; `load` is set to it if it holds a tracker file.
    """
    spec, origin = found.spec, found.origin
    recorded = {} if origin.margs is None else plain_args(vars(origin.margs))
    router = router_dtype(spec, source.dtype_of)
    groups: tuple[Group, ...] = (Group.MODEL, Group.EXPERTS, Group.ROUTER)
    stored = conventions(spec)
    context = Context(stored.spec, Parallel(1, (spec.num_layers,)), _EXPERT_LAYOUT, router=router)
    if found.kind == MEGATRON and origin.parallel is not None:
        groups += (Group.LAYOUT, Group.EXPERT_LAYOUT)
        stored = conventions_of(recorded, spec, origin.mup)
        context = _context(found, stored.spec, origin.parallel, recorded, router)
    result = {**written_args(context, groups), **stored.marks}
    result["seq_length"] = seq_length_of(spec, plain_args(inheritable(origin.margs)))
    if found.kind == MEGATRON and origin.parallel is not None:
        result |= {name: bool(recorded.get(name)) for name in ("no_save_optim", "no_save_rng")}
        if (folder / TRACKER).exists():
            result["load"] = os.path.abspath(folder)
    result |= training_args(spec, recorded)
    tokenizer, notes = _tokenizer(origin.tokenizer, recorded)
    notes += router_warnings(spec, router)
    if result.get("moe_dynamic_hpu"):
        notes.append(
            "experts have Habana's names, which its Megatron-LM reads with --moe-dynamic-hpu and NVIDIA's does not"
        )
    return dict(sorted({**result, **tokenizer}.items())), notes


def _context(
    found: Survey, spec: ModelSpec, parallel: Parallel, recorded: Mapping[str, Any], router: DType | None
) -> Context:
    """What the arguments of a checkpoint are written for, as far as it tells."""
    return Context(
        spec,
        parallel,
        found.expert_layout or _EXPERT_LAYOUT,
        found.padded_vocab,
        _divisor(found, parallel, recorded),
        found.names or recorded.get("transformer_impl") or "transformer_engine",
        found.origin.checkpoint_format or "torch",
        router,
    )


def _divisor(found: Survey, parallel: Parallel, recorded: Mapping[str, Any]) -> int:
    """Vocabulary divisor that gives the embeddings' rows: the recorded one, the default, or else the rows of a TP rank."""
    rows = found.padded_vocab
    for divisor in (recorded.get("make_vocab_size_divisible_by"), DEFAULT_DIVISOR):
        if (
            isinstance(divisor, int)
            and divisor > 0
            and padded_vocab(found.spec.vocab_size, divisor, parallel.tp) == rows
        ):
            return divisor
    return rows // parallel.tp


def _tokenizer(source: str | None, recorded: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Tokenizer arguments, from the recorded type or else the kind of file or folder; a note where there are none."""
    if source is None:
        return {}, ["no tokenizer is known; add --tokenizer-type and --tokenizer-model"]
    path = Path(source)
    model = os.path.abspath(path) if path.exists() else source
    if recorded.get("tokenizer_type"):
        return {"tokenizer_type": recorded["tokenizer_type"], "tokenizer_model": model}, []
    if not path.is_file():
        return {"tokenizer_type": _HF_TOKENIZER, "tokenizer_model": model}, []
    if path.suffix == ".json":
        return {"tokenizer_type": _HF_TOKENIZER, "tokenizer_model": os.path.dirname(model)}, []
    if is_tiktoken_file(path):
        return {}, [
            f"{source} is Llama 3's tiktoken file, which Megatron-LM cannot read; name its Hugging Face tokenizer"
        ]
    return {"tokenizer_type": _SENTENCEPIECE_TOKENIZER, "tokenizer_model": model}, []
