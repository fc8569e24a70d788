"""Source for a whole model in one file: `model.pt`, the state dict of megatron-core's GPTModel, described by `metadata.json`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...basics.errors import ConversionError
from ...conversion.left_out import LeftOut
from ...sharding.ranks import Parallel
from ...storage import torch_zip
from .flat_metadata import METADATA_FILE, args_of, check_metadata, describe, read_metadata, refuse_undescribed
from .locating import MODEL_FILE, checkpoint_directory
from .options import MODEL_PT
from .rank_files import RankFile, RankFiles, tensors_of, wrapper_of
from .rank_files_source import RankFilesSource
from .reading import (
    AS_STORED,
    MegatronReadOptions,
    args_in,
    parallel_of,
    skipped_entries,
    supplemented,
)

#: Entry of a rank's file that holds the model.
_MODEL = "model"
#: Sizes of what is not cut.
_UNCUT = Parallel(1, (0,))


class FlatSource(RankFilesSource):
    """Whole model in one file, checked against its metadata."""

    def __init__(self, load_dir: Path, options: MegatronReadOptions = AS_STORED) -> None:
        folder = checkpoint_directory(load_dir, options.directory_name)
        self._metadata = read_metadata(folder)
        self._reference = options.hf_config
        super().__init__(_read(folder, self._metadata, options), options)

    def _check(self, padded: int) -> list[str]:
        described = describe(self.conventions.spec, padded)
        return check_metadata(self._dir, self._metadata, described, self._reference) if self._metadata else []


def _read(folder: Path, metadata: Mapping[str, Any] | None, options: MegatronReadOptions) -> RankFiles:
    """The file of the only rank. A reference, or args of the caller's, may replace those that are missing."""
    path = folder / MODEL_FILE
    content = torch_zip.read(path)
    if not isinstance(content, Mapping):
        raise ConversionError(f"{path} holds a {type(content).__name__}, not a state dict")
    is_rank_file = isinstance(content.get(_MODEL), Mapping)
    args = args_of(folder, metadata)
    if args is None and is_rank_file:
        args = args_in(content, path)
    args = supplemented(args, options)
    if args is None and options.hf_config is None:
        refuse_undescribed(folder, metadata)
    if args is not None:
        _refuse_shares(args, path)
    held = content if is_rank_file else {_MODEL: content}
    ignored = LeftOut(options.ignore_tensors)
    wrapper = wrapper_of(held, _UNCUT, path, ignored)
    return RankFiles(
        format=MODEL_PT,
        folder=folder,
        args=args or argparse.Namespace(),
        iteration=getattr(args, "iteration", None),
        parallel=_UNCUT,
        ranks={
            rank: RankFile(path, MODEL_FILE, tensors_of(held, _UNCUT, path, wrapper, ignored))
            for rank in _UNCUT.ranks(0)
        },
        left_out=skipped_entries(content) if is_rank_file else set(),
        beside=() if metadata is None else (folder / METADATA_FILE,),
        wrapper=wrapper,
        ignored=ignored,
    )


def _refuse_shares(args: argparse.Namespace, path: Path) -> None:
    """Raise unless the args are those of a whole model: a rank's file under another name has only its share."""
    sizes = parallel_of(args, path)
    found = {"tp": sizes.tp, "pp": sizes.pp, "ep": sizes.ep, "virtual stages": sizes.vpp}
    cut = ", ".join(f"{name}={size}" for name, size in found.items() if size != 1)
    if cut:
        raise ConversionError(
            f"{path} holds one rank's share of a model with {cut} by its args, not a whole model; give the checkpoint's own folder"
        )
