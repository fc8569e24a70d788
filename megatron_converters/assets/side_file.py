"""Side file of a checkpoint: what a model of images and text has beside its text part, in one file of safetensors.

It lies in the folder of the model's other files, with the small ones. Its metadata say how names of the text part are written.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..basics.errors import ConversionError, raise_all
from ..basics.json_files import write_json
from ..basics.quantities import count, few
from ..families.config_json import text_part, wrapper_in
from ..storage import safetensors, shards
from ..storage.decoding_8bit import VALUES
from ..storage.output_file import FileLayout
from ..storage.shards import Stored
from .code_files import CODE_FOLDER
from .origin import EXPERTS, MODEL, TEXT, Carried, Origin

#: Name of the side file, and of the whole model's configuration beside it.
SIDE_FILE, _CONFIG = "carried.safetensors", "config.json"
PLACE = f"{CODE_FOLDER}/{SIDE_FILE}"
#: Small files that say how images are prepared, and how both are put into a prompt.
_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
    "chat_template.jinja",
)


def small_files(folder: Path, *, links: bool = True) -> dict[str, Path]:
    """Small files of a folder by name; as for code, a checkpoint's are no links."""
    paths = {name: folder / name for name in _FILES}
    return {name: path for name, path in paths.items() if path.is_file() and (links or not path.is_symlink())}


def layout(carried: Carried) -> FileLayout:
    """Layout of the side file."""
    stored = [Stored(name, data.dtype, data.shape, 1) for name, data in carried.tensors.items()]
    return shards.layout(stored, {"format": "pt", **carried.marks})


def read_side_file(directory: Path) -> Carried | None:
    """What a checkpoint's directory has beside the text part; None where it has no side file."""
    folder = directory / CODE_FOLDER
    path = folder / SIDE_FILE
    if folder.is_symlink() or path.is_symlink() or not path.is_file():
        return None
    found = safetensors.read(path)
    marks = {key: value for key, value in found.metadata.items() if key in (MODEL, TEXT, EXPERTS)}
    if not {MODEL, TEXT} <= marks.keys():
        raise ConversionError(
            f"{path} does not say of which model it is, so that it is not as it was written; copy it again"
        )
    return Carried(found.tensors, marks, small_files(folder, links=False))


def write_small_files(carried: Carried, folder: Path, config: Mapping[str, Any] | None = None) -> None:
    """Copy the small files into a folder, and write the configuration of the whole model there if it is given."""
    folder.mkdir(exist_ok=True)
    for name, path in carried.files.items():
        shutil.copyfile(path, folder / name)
    if config is not None:
        write_json(folder / _CONFIG, dict(config))


def require_carried(origin: Origin) -> None:
    """Raise `ConversionError` for the text part of a model without what lies beside it, or where that is quantised."""
    wrapper, carried = wrapper_in(origin.hf_config), origin.carried
    if wrapper is None:
        return
    if carried is None:
        raise ConversionError(
            f"{origin.described} holds the text part of {wrapper.architecture}, and there is no {PLACE} with what lay beside it; "
            "copy that file there again, give the folder of the whole model with --hf-config DIR, or pass --text-only for a model "
            "of text alone"
        )
    raise_all(
        f"{origin.described}: tensors beside the text part are quantised, which config.json would not say any more:",
        [name for name, data in carried.tensors.items() if data.dtype.name in VALUES],
        remedy="convert the unquantised model, or the text part alone with --text-only",
    )


def refuse_carried(origin: Origin, where: str, remedy: str = "pass --text-only to leave it out") -> None:
    """Raise `ConversionError` if a source has something beside a text part that has no place in what is written."""
    require_carried(origin)
    if origin.carried is not None:
        raise ConversionError(
            f"{origin.described} has {origin.carried.summary} ({few(sorted(origin.carried.tensors))}), for which {where} has no "
            f"place; {remedy}"
        )


def check_carried(origin: Origin, copied: Iterable[tuple[str, object]]) -> None:
    """Check that what a source has beside a text part is there, and is once among the tensors that are `copied` as they are."""
    require_carried(origin)
    if origin.carried is None:
        return
    found: dict[str, int] = {}
    for name, data in copied:
        if origin.carried.tensors.get(name) is data:
            found[name] = found.get(name, 0) + 1
    if any(found.get(name) != 1 for name in origin.carried.tensors):
        refuse_carried(origin, "this format")


def leave_out_carried(origin: Origin) -> None:
    """Make a source one of the text part alone, with the configuration of that; one of text stays as it is."""
    if wrapper_in(origin.hf_config) is None:
        return
    origin.hf_config = dict(text_part(origin.hf_config or {}))
    carried, origin.carried = origin.carried, None
    if carried is not None:
        origin.notes[:] = [note for note in origin.notes if note != carried.note]
        origin.notes.append(f"{carried.summary}: left out, as --text-only says")
        kinds = Counter(".".join(name.split(".")[: 2 if name.startswith("model.") else 1]) for name in carried.tensors)
        origin.ignored += [
            f"{kind}.* ({count(number, 'tensor')}, --text-only)" for kind, number in sorted(kinds.items())
        ]
