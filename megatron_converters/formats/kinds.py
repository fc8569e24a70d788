"""Formats of models, by the names that options and reports have for them."""

from __future__ import annotations

HF, META, MEGATRON, MINDSPORE = "hf", "meta", "megatron", "mindspore"
#: A file of weights under Hugging Face's names, without a configuration.
WEIGHTS = "weights"
#: Formats that can be read.
FORMATS = (HF, META, MEGATRON, MINDSPORE)
#: Formats that can be written, in words.
TARGETS = {
    HF: "a Hugging Face folder",
    MEGATRON: "a Megatron-LM checkpoint",
    MINDSPORE: "weights of MindSpore Transformers",
}
