"""Open a Megatron-LM checkpoint of whatever format it is."""

from __future__ import annotations

from pathlib import Path

from .rank_files_source import MegatronSource
from .reading import AS_STORED, MegatronReadOptions, checkpoint_directory, is_distributed
from .torch_dist_source import TorchDistSource


def open_megatron(load_dir: Path, options: MegatronReadOptions = AS_STORED) -> MegatronSource | TorchDistSource:
    """The checkpoint in `load_dir`: of the `torch_dist` format if it has that format's index, else of the `torch` format."""
    distributed = is_distributed(checkpoint_directory(load_dir, options.directory_name))
    return TorchDistSource(load_dir, options) if distributed else MegatronSource(load_dir, options)
