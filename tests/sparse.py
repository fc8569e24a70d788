"""Sparse folders of models of published sizes: real headers and full file lengths, but no weights and no space on disk."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from megatron_converters.assets.origin import Origin
from megatron_converters.basics.dtypes import dtype_named
from megatron_converters.cli.options.reading import add_reading_arguments, open_any
from megatron_converters.conversion.endpoint import Target
from megatron_converters.formats.huggingface.target import HFOptions, HFTarget
from megatron_converters.formats.megatron.rank_files_target import MegatronTarget
from megatron_converters.formats.megatron.writing import TRACKER, MegatronOptions
from megatron_converters.inspection.inventory import Survey, survey
from megatron_converters.model.layers import EACH_HEAD
from megatron_converters.model.rotary import RopeScaling
from megatron_converters.model.spec import ModelSpec

_LLAMA3: dict[str, Any] = dict(
    family="llama",
    kv_channels=128,
    num_query_groups=8,
    vocab_size=128256,
    max_position_embeddings=131072,
    norm_epsilon=1e-5,
    rotary_base=5e5,
    rope_scaling=RopeScaling("llama3", 8.0),
    dtype=dtype_named("bf16"),
)
_MIXTRAL: dict[str, Any] = _LLAMA3 | dict(
    family="mixtral",
    rope_scaling=None,
    rotary_base=1e6,
    num_experts=8,
    moe_router_topk=2,
    max_position_embeddings=32768,
)


def _sizes(base: dict[str, Any], layers: int, hidden: int, ffn: int, heads: int, **more: Any) -> ModelSpec:
    sizes = dict(num_layers=layers, hidden_size=hidden, ffn_hidden_size=ffn, num_attention_heads=heads)
    return ModelSpec.of(**{**base, **sizes, **more})


#: Sizes from the published config.json of each model.
PUBLISHED = {
    "Llama-3.2-1B": _sizes(
        _LLAMA3, 16, 2048, 8192, 32, kv_channels=64, tied=True, rope_scaling=RopeScaling("llama3", 32.0)
    ),
    "Llama-3.1-8B": _sizes(_LLAMA3, 32, 4096, 14336, 32),
    "Llama-3.1-70B": _sizes(_LLAMA3, 80, 8192, 28672, 64),
    "Llama-3.1-405B": _sizes(_LLAMA3, 126, 16384, 53248, 128),
    "Mixtral-8x7B": _sizes(_MIXTRAL, 32, 4096, 14336, 32, moe_ffn_hidden_size=14336, vocab_size=32000),
    "Mixtral-8x22B": _sizes(_MIXTRAL, 56, 6144, 16384, 48, moe_ffn_hidden_size=16384, vocab_size=32768),
    "Qwen3-30B-A3B": _sizes(
        _MIXTRAL | dict(family="qwen3_moe", num_experts=128, moe_router_topk=8, num_query_groups=4, vocab_size=151936),
        *(48, 2048, 6144, 32),
        moe_ffn_hidden_size=768,
        qk_norm=EACH_HEAD,
        norm_epsilon=1e-6,
    ),
}


def sparse_hf(spec: ModelSpec, folder: Path, **options: Any) -> Path:
    """Write a sparse Hugging Face folder; `options` are those of `HFOptions`."""
    folder.mkdir()
    _write(HFTarget(folder, HFOptions(**options)), spec, folder)
    return folder


def sparse_megatron(spec: ModelSpec, folder: Path, **options: Any) -> Path:
    """Write a sparse checkpoint of rank files; `options` are those of `MegatronOptions`."""
    _write(MegatronTarget(folder, MegatronOptions(**options)), spec, folder / "iter_0000001")
    (folder / TRACKER).write_text("1")
    return folder


def _write(target: Target, spec: ModelSpec, folder: Path) -> None:
    outline = target.prepare(spec, Origin("nowhere"), lambda ref: spec.dtype)
    for name, layout in outline.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            file.truncate(layout.nbytes)
            for offset, data in layout.finish(dict.fromkeys(layout.regions, 0)):
                os.pwrite(file.fileno(), data, offset)
    target.assets(folder)


def surveyed(folder: Path) -> Survey:
    """What is found in a folder, read by default options."""
    parser = argparse.ArgumentParser()
    add_reading_arguments(parser)
    return survey(*open_any(str(folder), parser.parse_args([])))
