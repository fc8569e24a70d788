"""A tokenizer that is named, or found, after a conversion: it is written beside the finished weights, which stay as they are.

All small files are made anew, since the configuration has token ids of the tokenizer. The file that makes the folder a model is
taken away first and comes back last, so that a kill in between leaves nothing that looks complete; the same command then goes on.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..assets.origin import Origin
from ..assets.tokenizer import FILES as TOKENIZER_FILES
from ..assets.tokenizer import holds_tokenizer, tokenizer_files
from ..basics.errors import ConversionError
from ..storage.checksum import digest
from .endpoint import Target
from .journal import finished_weights, write_manifest
from .staging import Staging, sync_folder

#: Option of a run that decides nothing but small files.
_TOKENIZER = "tokenizer"


def awaits_tokenizer(target: Target, run: Mapping[str, Any], origin: Origin) -> bool:
    """Whether the weights of a run are finished, and only its tokenizer is not the one that is beside them."""
    manifest = _manifest(target, run)
    return manifest is not None and _is_wanted(target, manifest, run, origin)


def supplement(target: Target, staging: Staging, run: Mapping[str, Any], origin: Origin) -> list[str]:
    """Write the tokenizer of a finished run anew where another one is named, or one is found now; returns lines for the user.

    Returns none where that is not what is to be done. Raises `ConversionError` if a file that it would replace was edited since.
    """
    manifest = _manifest(target, run)
    if manifest is None or target.marker is None:
        return []
    if run["options"][_TOKENIZER] is None and manifest["options"][_TOKENIZER] is not None and _is_whole(target):
        named = manifest["options"][_TOKENIZER]
        return [f"{target.output} is complete already, with the tokenizer {named}; nothing to do"]
    if not _is_wanted(target, manifest, run, origin):
        return []
    staging.open()
    staging.empty()
    try:
        target.assets(staging.files)
        if run["options"][_TOKENIZER] is None and _is_whole(target) and not tokenizer_files(staging.files):
            return []  # what the source names cannot be read, or does not fit
        _refuse_edited(target, staging, manifest)
        write_manifest(staging.files / target.manifest.name, run, manifest["files"], origin)
        return _replace(target, staging, manifest)
    finally:
        staging.discard()


def _manifest(target: Target, run: Mapping[str, Any]) -> dict[str, Any] | None:
    """Manifest of the same weights, maybe with another tokenizer; None where small files cannot be replaced alone."""
    return None if target.marker is None else finished_weights(target.manifest, run, but=_TOKENIZER)


def _is_whole(target: Target) -> bool:
    return target.marker is not None and (target.output / target.marker).exists()


def _is_wanted(target: Target, manifest: Mapping[str, Any], run: Mapping[str, Any], origin: Origin) -> bool:
    """Whether there is something to write: a tokenizer that is new, or what a killed run has not put back."""
    wanted, written = run["options"][_TOKENIZER], manifest["options"][_TOKENIZER]
    if not _is_whole(target):
        return True
    if wanted != written:
        return wanted is not None
    return wanted is None and not tokenizer_files(target.output) and holds_tokenizer(origin.tokenizer)


def _refuse_edited(target: Target, staging: Staging, manifest: Mapping[str, Any]) -> None:
    """Raise if someone has edited a file that would be replaced or removed."""
    edited = []
    for name, written in manifest["beside"].items():
        path, new = target.output / name, staging.files / name
        if path.exists():
            now = path.read_bytes()
            same = digest([now]) == written or (new.exists() and new.read_bytes() == now)
            edited += [] if same else [name]
    if edited:
        raise ConversionError(
            f"{target.output}: {', '.join(edited)} changed since the conversion, and would be written again with the tokenizer; "
            "copy the tokenizer's files there by hand, or write all again with --overwrite"
        )


def _replace(target: Target, staging: Staging, manifest: Mapping[str, Any]) -> list[str]:
    """Move the small files to their place, between taking the marker away and putting the new one there."""
    folder, marker = target.output, str(target.marker)
    new = {path.relative_to(staging.files).as_posix() for path in staging.files.rglob("*") if path.is_file()}
    (folder / marker).unlink(missing_ok=True)
    sync_folder(folder)
    for name in manifest["beside"].keys() - new:
        (folder / name).unlink(missing_ok=True)
    for name in sorted(new, key=lambda name: (name == marker, name == target.manifest.name, name)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(staging.files / name, folder / name)
    sync_folder(folder)
    tokenizer = [name for name in sorted(new) if any(Path(name).match(pattern) for pattern in TOKENIZER_FILES)]
    return [
        f"wrote {', '.join(tokenizer) or 'no tokenizer'} beside the finished weights of {folder}, which stay as they are"
    ]
