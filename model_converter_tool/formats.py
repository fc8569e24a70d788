"""Formats by the names that users give them, and recognition of what a folder holds."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from megatron_converters.basics.errors import ConversionError, UsageError, one_line

#: Formats of the library, as `megatron_converters.formats.detect` names them.
HF, MEGATRON, META = "hf", "megatron", "meta"
#: Value of `MegatronOptions.ckpt_format` for a checkpoint of one file, model.pt with metadata.json.
SINGLE_FILE = "model_pt"
#: What a folder is called in results.
SHOWN = {HF: "huggingface", MEGATRON: "megatron", META: "meta"}


class OutputFormat(NamedTuple):
    """Format to write: the library's name, the formats that it is written from, and its part of an output folder's name."""

    writes: str
    reads: tuple[str, ...]
    suffix: str
    words: str


_ANY = (HF, MEGATRON, META)
OUTPUT_FORMATS = {
    "hf2megatron": OutputFormat(
        MEGATRON,
        _ANY,
        "hf2megatron",
        "model.pt with metadata.json, or with sizes the ranks of a Megatron-LM checkpoint",
    ),
    "megatron2hf": OutputFormat(HF, (MEGATRON,), "megatron2hf", "a Hugging Face folder, from a Megatron-LM checkpoint"),
    "hf": OutputFormat(HF, _ANY, "huggingface", "a Hugging Face folder, from any format"),
    "huggingface": OutputFormat(HF, _ANY, "huggingface", "the same as hf"),
}
#: Formats of the Model Converter Tool that are not written, and what to do instead.
NOT_WRITTEN = {
    **dict.fromkeys(("gguf", "mlx"), "convert to hf, and give the folder to the converter of llama.cpp or mlx-lm"),
    **dict.fromkeys(("onnx", "torchscript"), "convert to hf, and export the folder with optimum or torch"),
    **dict.fromkeys(("awq", "gptq"), "convert to hf, and quantise the folder with llm-compressor or gptqmodel"),
    **dict.fromkeys(("mtk", "rk", "ax", "qnn"), "convert to hf, and give the folder to the maker's own tool"),
    "safetensors": "hf writes a folder with safetensors",
}


def output_format(name: str) -> OutputFormat:
    """Format of this name; raises `UsageError` for one that is not written."""
    if name in OUTPUT_FORMATS:
        return OUTPUT_FORMATS[name]
    if name in NOT_WRITTEN:
        raise UsageError(f"the format {name} is not written here: {NOT_WRITTEN[name]}")
    raise UsageError(f"there is no format {one_line(repr(name))}; the formats are {', '.join(OUTPUT_FORMATS)}")


def detected_format(folder: Path) -> str:
    """Format of the library that a folder is of; raises `ConversionError` with what was found there."""
    from megatron_converters.formats.detect import format_of

    try:
        return format_of(folder)
    except ConversionError as error:
        names: list[str] = []
        with suppress(OSError):
            names = sorted(os.listdir(folder))
        shown = ", ".join(map(one_line, names[:_SHOWN_NAMES])) + (", …" if len(names) > _SHOWN_NAMES else "")
        raise ConversionError(f"Format detection failed: {error}. It has {shown or 'no files'}") from error


_SHOWN_NAMES = 12
