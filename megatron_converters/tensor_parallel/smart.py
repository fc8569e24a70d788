"""`SmartConverter` and the functions of one call: conversions that find out type, size and parallel sizes themselves."""

from __future__ import annotations

import os
from typing import Any

from ..api import Result
from ..basics.folders import existing_folder
from ..formats.megatron.detecting import detect
from .converting import LOG, Wishes, to_hf, to_megatron
from .numbers import Numbers
from .presets import LLAMA, MINICPM, PRESETS
from .recognising import recognise, variant

Folder = str | os.PathLike[str]
_NUMBERS = ("num_layer", "tp_size", "pp_size", "num_kv_heads", "num_query_heads")


def _wishes(model_type: str | None, model_size: str | None, options: dict[str, Any]) -> Wishes:
    """Wishes of a caller, whose options are numbers and fields of `Wishes`."""
    numbers = Numbers(**{name: options.pop(name) for name in _NUMBERS if name in options})
    return Wishes(numbers, model_type, model_size, **options)


class SmartConverter:
    """Converter that detects what it is not told."""

    #: Numbers by type and size.
    model_configs = PRESETS

    def detect_model_type_and_size(self, path: Folder) -> tuple[str, str]:
        """Type ("minicpm" or "llama") and size ("8b", "unknown", …) of the model in a checkpoint or a Hugging Face folder."""
        found = recognise(path)
        return found.model_type, found.size

    def detect_parallel_config(self, path: Folder) -> dict[str, int]:
        """Sizes `tp_size` and `pp_size` of a checkpoint, and `ep_size` where its experts are spread over ranks."""
        found = detect(existing_folder(path))
        sizes = {"tp_size": found.sizes.tp, "pp_size": found.sizes.pp}
        LOG.debug("%s: %s (by %s)", found.directory, found.sizes, found.decided_by)
        return sizes | ({"ep_size": found.sizes.ep} if found.sizes.ep > 1 else {})

    def detect_model_variant(self, path: Folder) -> str:
        """Variant of MiniCPM: "minicpm4" for its fourth generation and for mixtures of experts, else "minicpm"."""
        return variant(path)

    def convert_megatron_to_hf(
        self,
        checkpoint_path: Folder,
        output_path: Folder,
        model_type: str | None = None,
        model_size: str | None = None,
        **options: Any,
    ) -> Result:
        """Convert a checkpoint to one file of weights under Hugging Face's names, or a folder with `format="directory"`.

        `options` are numbers (`num_layer`, `tp_size`, `pp_size`, `num_kv_heads`, `num_query_heads`), which must agree with what
        the checkpoint says, and fields of `converting.Wishes` (`hf_config`, `dtype`, `overwrite`, …).
        """
        return to_hf(checkpoint_path, output_path, _wishes(model_type, model_size, options))

    def convert_hf_to_megatron(
        self,
        checkpoint_path: Folder,
        output_path: Folder,
        model_type: str | None = None,
        model_size: str | None = None,
        **options: Any,
    ) -> Result:
        """Convert a Hugging Face folder, or a file of weights, to a checkpoint of `tp_size` and `pp_size`.

        Without these sizes, those of the preset `model_size` are taken, or 1. A file needs a config.json beside it, or `hf_config`.
        Further `options` are other numbers, to be checked, and fields of `converting.Wishes` (`transformer_impl`, `dtype`, …).
        """
        return to_megatron(checkpoint_path, output_path, _wishes(model_type, model_size, options))


def smart_convert_megatron_to_hf(checkpoint_path: Folder, output_path: Folder, **options: Any) -> Result:
    """Convert as `SmartConverter.convert_megatron_to_hf` does."""
    return SmartConverter().convert_megatron_to_hf(checkpoint_path, output_path, **options)


def smart_convert_hf_to_megatron(
    checkpoint_path: Folder, output_path: Folder, tp_size: int = 1, pp_size: int = 1, **options: Any
) -> Result:
    """Convert as `SmartConverter.convert_hf_to_megatron` does."""
    return SmartConverter().convert_hf_to_megatron(
        checkpoint_path, output_path, tp_size=tp_size, pp_size=pp_size, **options
    )


def convert_minicpm_8b(checkpoint_path: Folder, output_path: Folder, **options: Any) -> Result:
    """Convert a checkpoint of MiniCPM 8B, whose preset fills what neither args nor shapes say."""
    return SmartConverter().convert_megatron_to_hf(checkpoint_path, output_path, MINICPM, "8b", **options)


def convert_minicpm_3b(checkpoint_path: Folder, output_path: Folder, **options: Any) -> Result:
    """Convert a checkpoint of MiniCPM 3B, whose preset fills what neither args nor shapes say."""
    return SmartConverter().convert_megatron_to_hf(checkpoint_path, output_path, MINICPM, "3b", **options)


def convert_minicpm4_8b(checkpoint_path: Folder, output_path: Folder, **options: Any) -> Result:
    """Convert a checkpoint of MiniCPM4 8B, whose preset fills what neither args nor shapes say."""
    return SmartConverter().convert_megatron_to_hf(checkpoint_path, output_path, MINICPM, "8b", **options)


def convert_llama_7b(checkpoint_path: Folder, output_path: Folder, **options: Any) -> Result:
    """Convert a checkpoint of Llama 7B, whose preset fills what neither args nor shapes say."""
    return SmartConverter().convert_megatron_to_hf(checkpoint_path, output_path, LLAMA, "7b", **options)
