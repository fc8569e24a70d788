"""Opening of Megatron-LM checkpoints of any format."""

from __future__ import annotations

from pathlib import Path

from .flat_source import FlatSource
from .locating import checkpoint_directory, has_model_file, is_distributed
from .rank_files_source import MegatronSource, RankFilesSource
from .reading import AS_STORED, MegatronReadOptions
from .torch_dist_source import TorchDistSource


def open_megatron(load_dir: Path, options: MegatronReadOptions = AS_STORED) -> RankFilesSource | TorchDistSource:
    """Open the checkpoint in `load_dir`: as a distributed one if it has an index, else by the files that it has."""
    directory = checkpoint_directory(load_dir, options.directory_name)
    if is_distributed(directory):
        return TorchDistSource(load_dir, options)
    return FlatSource(load_dir, options) if has_model_file(directory) else MegatronSource(load_dir, options)
