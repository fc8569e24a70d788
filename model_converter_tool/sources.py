"""Inputs as users name them: a local folder, or a model on the Hub, which is downloaded."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import NamedTuple

from megatron_converters.basics.errors import ConversionError

_LOG = logging.getLogger(__name__)
_LOCAL = (".", "/", "~")


class Input(NamedTuple):
    """Folder to read, and notes for the user."""

    folder: Path
    notes: list[str]


def on_hub(name: str) -> bool:
    """Whether this names a model on the Hub, since there is no such folder here."""
    from megatron_converters.formats.hub import is_hub_id

    return not name.startswith(_LOCAL) and not os.path.lexists(name) and is_hub_id(name)


def resolve(name: str) -> Input:
    """Folder of an input; a model on the Hub is downloaded. Raises `ConversionError` if it is neither."""
    if os.path.isdir(name):
        return Input(Path(name), [])
    if on_hub(name):
        from megatron_converters.formats.hub import download

        _LOG.debug("there is no folder %s here, so it is looked for on the Hub", name)
        folder, notes = download(name)
        return Input(folder, [f"{name} is read from {folder}", *notes])
    if os.path.exists(name):
        raise ConversionError(f"Format detection failed: {name} is a file; give the folder that holds the model")
    raise ConversionError(f"{name} is no folder here, and no name of a model on the Hub (owner/name); correct it")


def output_name(name: str, suffix: str) -> str:
    """Name of the folder for an output whose path is not given."""
    path, _, revision = name.partition("@") if on_hub(name) else (os.path.abspath(name), "", "")
    return "_".join(filter(None, (os.path.basename(path), re.sub(r"\W", "-", revision), suffix)))
