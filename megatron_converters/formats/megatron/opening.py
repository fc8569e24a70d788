"""Opening of Megatron-LM checkpoints of any format."""

from __future__ import annotations

from pathlib import Path

from .rank_files_source import MegatronSource
from .reading import AS_STORED, MegatronReadOptions, checkpoint_directory, is_distributed
from .torch_dist_source import TorchDistSource


def open_megatron(load_dir: Path, options: MegatronReadOptions = AS_STORED) -> MegatronSource | TorchDistSource:
    """Open the checkpoint in `load_dir`: as `torch_dist` if it has that format's index, else as `torch`."""
    distributed = is_distributed(checkpoint_directory(load_dir, options.directory_name))
    return TorchDistSource(load_dir, options) if distributed else MegatronSource(load_dir, options)
