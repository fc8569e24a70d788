"""Inputs as users name them: a local folder, or a model on the Hub, which is downloaded."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import NamedTuple

from megatron_converters.basics.errors import ConversionError, MissingPath

_LOG = logging.getLogger(__name__)


class Input(NamedTuple):
    """Folder to read, and notes for the user."""

    folder: Path
    notes: list[str]


def on_hub(name: str) -> bool:
    """Whether this names a model on the Hub, since there is no such folder here."""
    from megatron_converters.formats import hub

    return hub.on_hub(name)


def resolve(name: str) -> Input:
    """Folder of an input; a model on the Hub is downloaded. Raises `ConversionError` if it is neither."""
    if os.path.isdir(name):  # asked before the library is imported
        return Input(Path(name), [])
    from megatron_converters.formats import hub

    if os.path.exists(name):
        raise ConversionError(f"Format detection failed: {name} is a file; give the folder that holds the model")
    _LOG.debug("there is no folder %s here, so it is asked whether it is a model on the Hub", name)
    try:
        folder, notes = hub.resolve(name)
    except MissingPath as error:  # a failure as any other here, and no wrong use of the command
        raise ConversionError(str(error)) from error
    return Input(folder, [f"{name} is read from {folder}", *notes])


def output_name(name: str, suffix: str) -> str:
    """Name of the folder for an output whose path is not given."""
    path, _, revision = name.partition("@") if on_hub(name) else (os.path.abspath(name), "", "")
    return "_".join(filter(None, (os.path.basename(path), re.sub(r"\W", "-", revision), suffix)))
