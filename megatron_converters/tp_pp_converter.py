"""Converters of checkpoints cut over tensor- and pipeline-parallel ranks: `python -m megatron_converters.tp_pp_converter …`."""

from __future__ import annotations

from .tensor_parallel.converter import TensorParallelConverter
from .tensor_parallel.smart import (
    SmartConverter,
    convert_llama_7b,
    convert_minicpm4_8b,
    convert_minicpm_3b,
    convert_minicpm_8b,
    smart_convert_hf_to_megatron,
    smart_convert_megatron_to_hf,
)

__all__ = [
    "SmartConverter",
    "TensorParallelConverter",
    "convert_llama_7b",
    "convert_minicpm4_8b",
    "convert_minicpm_3b",
    "convert_minicpm_8b",
    "smart_convert_hf_to_megatron",
    "smart_convert_megatron_to_hf",
]

if __name__ == "__main__":
    from .cli.tensor_parallel import main

    main()
