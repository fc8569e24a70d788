"""What lies beside the text part of a model of images and text, where a checkpoint of that part has come without it."""

from __future__ import annotations

from pathlib import Path

from ..assets.origin import Origin, file_identities, folder_of
from ..assets.side_file import PLACE
from ..families.config_json import wrapper_in
from .huggingface.source import HFSource
from .huggingface.weight_files import SINGLE_FILES


def complete(origin: Origin, reference: Path | None) -> None:
    """Take what lies beside the text part from the reference model's folder, if that has weights; else warn that it is missing."""
    wrapper = wrapper_in(origin.hf_config)
    if wrapper is None or origin.carried is not None:
        return
    if reference is None or not _has_weights(reference):
        origin.tell_at_once(
            f"warning: this is the text part of {wrapper.architecture}, without {PLACE}, which lies beside it"
        )
        return
    other = HFSource(reference).origin
    origin.carried = other.carried
    if other.carried is not None:
        origin.notes.append(f"{other.carried.summary}: taken from {reference} as they are")
    if origin.identity is not None:
        files = [reference / name for name in other.identity or ()]
        origin.identity |= file_identities(folder_of(origin.described), files)


def _has_weights(folder: Path) -> bool:
    return any((folder / f"{name}{end}").exists() for name in SINGLE_FILES for end in ("", ".index.json"))
