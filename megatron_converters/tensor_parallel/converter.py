"""`TensorParallelConverter`: conversions of checkpoints by their numbers, and their tensors merged over pipeline stages."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from ..api import Result
from ..basics.errors import ConversionError, InvalidConfiguration
from ..basics.folders import existing_folder
from ..formats.megatron.detecting import detect, models_of_rank
from ..storage.tensor import as_torch
from .converting import LOG, Wishes, to_hf
from .numbers import Numbers, check_detected
from .presets import LLAMA, MINICPM, PRESETS

Folder = str | os.PathLike[str]
_LAYER = re.compile(r"^(decoder\.layers\.)(\d+)(\..+)$")


class TensorParallelConverter:
    """Converter of checkpoints that are cut over tensor- and pipeline-parallel ranks.

    Every method that converts reads with memory mapped and writes in place, so that the ones called memory-efficient are the same.
    """

    #: Numbers by type and size, as the command line's `--model_size` means them.
    model_configs = PRESETS

    def validate_parallel_config(
        self, num_layer: int, tp_size: int, pp_size: int, num_kv_heads: int, num_query_heads: int
    ) -> None:
        """Raise `InvalidConfiguration`, an `AssertionError`, unless a model with these numbers can be cut so."""
        Numbers(num_layer, tp_size, pp_size, num_kv_heads, num_query_heads)

    def convert_minicpm_megatron_to_hf_tp_pp(
        self,
        num_layer: int,
        tp_size: int,
        pp_size: int,
        in_dir: Folder,
        save_path: Folder,
        num_kv_heads: int,
        num_query_heads: int,
        **options: Any,
    ) -> Result:
        """Convert a MiniCPM checkpoint to one file of weights under Hugging Face's names, or a folder with `format="directory"`.

        `options` are fields of `converting.Wishes`: `hf_config`, `dtype`, `overwrite`, `true_vocab_size`, `ckpt_dir_name`, …
        """
        numbers = Numbers(num_layer, tp_size, pp_size, num_kv_heads, num_query_heads)
        return to_hf(in_dir, save_path, Wishes(numbers, MINICPM, **options))

    def convert_llama_megatron_to_hf_tp_pp(
        self,
        num_layer: int,
        tp_size: int,
        pp_size: int,
        in_dir: Folder,
        save_path: Folder,
        num_kv_heads: int,
        num_query_heads: int,
        **options: Any,
    ) -> Result:
        """Convert a Llama checkpoint, as `convert_minicpm_megatron_to_hf_tp_pp` does a MiniCPM's."""
        numbers = Numbers(num_layer, tp_size, pp_size, num_kv_heads, num_query_heads)
        return to_hf(in_dir, save_path, Wishes(numbers, LLAMA, **options))

    def convert_minicpm_megatron_to_hf_tp_pp_memory_efficient(
        self, *args: Any, batch_size: int = 4, **options: Any
    ) -> Result:
        """Convert as `convert_minicpm_megatron_to_hf_tp_pp`; `batch_size` does not matter, since no layers are held in memory."""
        _check_batch(batch_size)
        return self.convert_minicpm_megatron_to_hf_tp_pp(*args, **options)

    def convert_llama_megatron_to_hf_tp_pp_memory_efficient(
        self, *args: Any, batch_size: int = 4, **options: Any
    ) -> Result:
        """Convert as `convert_llama_megatron_to_hf_tp_pp`; `batch_size` does not matter, since no layers are held in memory."""
        _check_batch(batch_size)
        return self.convert_llama_megatron_to_hf_tp_pp(*args, **options)

    def load_distributed_checkpoints(self, in_dir: Folder, tp_size: int, pp_size: int) -> list[dict[str, Any]]:
        """Tensors of each tensor-parallel rank, with the layers of all pipeline stages numbered through, mapped from the files.

        They are torch tensors that share no memory with the files once they are written to. Nothing of the files is executed.
        Raises `MissingPath` and `InvalidConfiguration` as conversions do.
        """
        found = detect(existing_folder(in_dir))
        check_detected(Numbers(tp_size=tp_size, pp_size=pp_size), found)
        if found.sizes.ep > 1 or not found.stages or found.is_flat:
            raise ConversionError(
                f"{found.directory} is cut over experts, or has no mp_rank_* folders; convert it with smart_convert_megatron_to_hf"
            )
        return [_merged(found.directory, tp, found.sizes.pp) for tp in range(found.sizes.tp)]


def _merged(directory: Path, tp: int, pp: int) -> dict[str, Any]:
    """Tensors of one tensor-parallel rank. Stages follow each other first by virtual stage, then by pipeline rank."""
    ranks = [models_of_rank(directory, (tp, stage) if pp > 1 else (tp,)) for stage in range(pp)]
    merged: dict[str, Any] = {}
    before = 0
    for entry in range(max(map(len, ranks))):
        for models in ranks:
            numbers = set()
            for key, data in models[entry].items():
                match = _LAYER.match(key)
                if match:
                    numbers.add(match[2])
                    key = f"{match[1]}{before + int(match[2])}{match[3]}"
                merged.setdefault(key, as_torch(data))
            before += len(numbers)
    LOG.debug("%s: tensor-parallel rank %d has %d tensors, %d layers", directory, tp, len(merged), before)
    return merged


def _check_batch(size: int) -> None:
    if type(size) is not int or size < 1:
        raise InvalidConfiguration(f"batch_size {size!r} must be a whole number from 1 on")
    LOG.debug("batch_size %d changes nothing: tensors are copied from file to file", size)
