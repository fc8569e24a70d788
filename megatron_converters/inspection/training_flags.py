"""What Megatron-LM's `args` would say of any folder: the model, and for a checkpoint how it is cut and was trained."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..assets.tokenizer import is_tiktoken_file
from ..assets.training_args import inheritable
from ..conversion.endpoint import Source
from ..formats.detect import MEGATRON
from ..formats.megatron.arguments import (
    expert_args,
    layout_args,
    model_args,
    plain_args,
    router_args,
    router_dtype,
    router_warnings,
    seq_length_of,
    training_args,
)
from ..formats.megatron.flags import LAYOUT_ATTRIBUTES
from ..formats.megatron.writing import DEFAULT_DIVISOR, TRACKER
from ..sharding.ranks import Parallel, padded_vocab
from .inventory import Survey

#: What a checkpoint is given unless another layout is asked for.
_EXPERT_LAYOUT = "grouped"
_HF_TOKENIZER, _SENTENCEPIECE_TOKENIZER = "HuggingFaceTokenizer", "Llama2Tokenizer"


def arguments(found: Survey, source: Source, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """The arguments by attribute, and what a user should know of them.

    `folder` is what the user named; `--load` names it too if it holds a tracker file.
    """
    spec, origin = found.spec, found.origin
    own = {} if origin.margs is None else plain_args(vars(origin.margs))
    router = router_dtype(spec, source.dtype_of)
    said = {**model_args(spec), "seq_length": seq_length_of(spec, plain_args(inheritable(origin.margs)))}
    if found.kind == MEGATRON and origin.parallel is not None:
        said |= _layout(found, origin.parallel, own)
        said |= expert_args(spec, origin.parallel, found.expert_layout or _EXPERT_LAYOUT)
        if (folder / TRACKER).exists():
            said["load"] = os.path.abspath(folder)
    else:
        of_experts = expert_args(spec, Parallel(1, (spec.num_layers,)), _EXPERT_LAYOUT)
        said |= {name: value for name, value in of_experts.items() if name not in LAYOUT_ATTRIBUTES}
    said |= router_args(spec, router)
    said |= training_args(spec, own)
    tokenizer, notes = _tokenizer(origin.tokenizer, own)
    notes += router_warnings(spec, router)
    if said.get("moe_dynamic_hpu"):
        notes.append(
            "experts have Habana's names, which its Megatron-LM reads with --moe-dynamic-hpu and NVIDIA's does not"
        )
    return {**said, **tokenizer}, notes


def _layout(found: Survey, parallel: Parallel, own: Mapping[str, Any]) -> dict[str, Any]:
    impl = found.names or own.get("transformer_impl") or "transformer_engine"
    ckpt_format = found.checkpoint_format or "torch"
    layout = layout_args(parallel, found.padded_vocab, _divisor(found, parallel, own), impl, ckpt_format)
    return {**layout, **{name: bool(own.get(name)) for name in ("no_save_optim", "no_save_rng")}}


def _divisor(found: Survey, parallel: Parallel, own: Mapping[str, Any]) -> int:
    """The recorded or the usual divisor if it gives the embeddings' rows, else one that does."""
    rows = found.padded_vocab
    for divisor in (own.get("make_vocab_size_divisible_by"), DEFAULT_DIVISOR):
        if (
            isinstance(divisor, int)
            and divisor > 0
            and padded_vocab(found.spec.vocab_size, divisor, parallel.tp) == rows
        ):
            return divisor
    return rows // parallel.tp


def _tokenizer(source: str | None, own: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The tokenizer's arguments, and a note where it has none: the recorded type, or what the file or folder is."""
    if source is None:
        return {}, ["no tokenizer is known; add --tokenizer-type and --tokenizer-model"]
    path = Path(source)
    model = os.path.abspath(path) if path.exists() else source
    if own.get("tokenizer_type"):
        return {"tokenizer_type": own["tokenizer_type"], "tokenizer_model": model}, []
    if not path.is_file():
        return {"tokenizer_type": _HF_TOKENIZER, "tokenizer_model": model}, []
    if path.suffix == ".json":
        return {"tokenizer_type": _HF_TOKENIZER, "tokenizer_model": os.path.dirname(model)}, []
    if is_tiktoken_file(path):
        return {}, [
            f"{source} is Llama 3's tiktoken file, which Megatron-LM cannot read; name its Hugging Face tokenizer"
        ]
    return {"tokenizer_type": _SENTENCEPIECE_TOKENIZER, "tokenizer_model": model}, []
