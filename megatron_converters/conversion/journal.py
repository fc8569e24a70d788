"""What a run is and what it has finished, kept while it lasts; and the manifest, `conversion.json`, that remains.

The manifest says for each tensor of each file which slots it holds, which source tensors they came from, its shape, where it lies
(first byte, bytes) and the CRC-32 of its bytes, and has a digest of the rest of the file, so that the files can be checked later
without the source. It holds no time and no host: equal runs write equal ones.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..assets.origin import Origin
from ..basics.errors import ConversionError, raise_all, reason_of
from ..basics.json_values import differences, finite
from ..model.layouts import RowMap
from ..model.slots import Ref
from ..storage.checksum import digest
from .composing import Gather
from .outline import Fill, Outline
from .staging import Staging, unfinished_in, write_text

MANIFEST = "conversion.json"
#: The manifest's digest of all its other entries.
_OF_ITSELF = "digest"
_RUN, _COMPLETE, _CLEARED, _FINISHED = "run.json", "complete", "cleared", "finished"
_SESSION = "session"
_SHOWN_DIFFERENCES = 10
#: Parts of a run's description; what follows from earlier ones says less than they do.
_CAUSES = (("tool", "source", "options"), ("content",), ("files",))
#: What is known of a file only once it is finished.
_RESULTS = ("outside", "tensors")

Entries = dict[str, dict[str, Any]]


def describe_run(outline: Outline, origin: Origin) -> dict[str, Any]:
    """What decides every byte of the output: two runs with equal descriptions write the same files."""
    files = {file: {"bytes": layout.nbytes, "structure": layout.structure} for file, layout in outline.files.items()}
    run = {
        "tool": f"megatron-converters {__version__}",
        "source": {"path": os.path.abspath(origin.described), "files": origin.identity},
        "options": outline.options,
        "content": outline.content,
        "files": files,
    }
    plain: dict[str, Any] = json.loads(json.dumps(finite(run)))  # as it is read back, to be compared with that
    return plain


def tensor_entry(entries: Entries, ref: Ref, fill: Fill, gathers: list[Gather]) -> None:
    """Add to the entries of a file what one fill gives to one of its tensors."""
    entry = entries.setdefault(fill.name, {"holds": [], "from": {}, "dtype": str(fill.dtype)})
    entry["holds"].append(str(ref))
    for gather in gathers:
        where, part = str(gather.source.name), _part(gather)
        known = entry["from"].get(where)
        entry["from"][where] = part if known is None else f"{known}; {part}"
    dtypes = {str(gather.source.data.dtype) for gather in gathers} - {str(fill.dtype)}
    if dtypes:
        entry["cast from"] = sorted(dtypes)
    if fill.transposed:
        entry["transposed"] = True
    if fill.padding:
        entry["padding rows"] = fill.padding


def _part(gather: Gather) -> str:
    """Which rows and columns of its source a gather takes, and whether it keeps their order."""
    rows, cols = _rows_taken(gather.rows, gather.source.data.shape[0]), gather.source_cols
    whole = (cols.start, cols.stop) == (0, gather.source.cols)
    return rows if whole else f"{rows}, columns {cols.start}-{cols.stop - 1}"


#: By identity of the row map, which is held so that its identity stays: layers share their maps.
_TAKEN: dict[tuple[int, int], tuple[str, RowMap]] = {}
#: A model has some hundred distinct ones; the bound keeps memory flat if ever one has more.
_MAX_TAKEN = 4096


def _rows_taken(rows: RowMap, count: int) -> str:
    key = (id(rows), count)
    if key not in _TAKEN:
        if len(_TAKEN) >= _MAX_TAKEN:
            _TAKEN.clear()
        taken = rows[rows >= 0]
        first, last = int(taken.min()), int(taken.max())
        order = (
            ""
            if bool((np.diff(taken) == 1).all())
            else " rearranged"
            if taken.size == last - first + 1
            else " in parts"
        )
        whole = (first, last) == (0, count - 1)
        _TAKEN[key] = ("all rows" if whole else f"rows {first}-{last}") + order, rows
    return _TAKEN[key][0]


@dataclass(frozen=True)
class Journal:
    """The state folder of a staging."""

    folder: Path

    def begin(self, run: Mapping[str, Any]) -> None:
        """Record what this run is."""
        _write(self.folder / _RUN, run)

    def run(self) -> dict[str, Any] | None:
        """What the run is that left this folder; None if it left nothing that can be read."""
        return _read(self.folder / _RUN)

    def take(self) -> str:
        """Make the folder this run's, and no other's that may still be writing; returns the mark that says so."""
        mark = secrets.token_hex(8)
        write_text(self.folder / _SESSION, mark)
        return mark

    def session(self) -> str | None:
        """The mark of the run whose folder it is; None if there is none."""
        try:
            return (self.folder / _SESSION).read_text(encoding="utf-8")
        except OSError:
            return None

    def finish(self, file: str, nbytes: int, outside: str, tensors: Mapping[str, Any]) -> None:
        """Record a file that is complete on the disk; `outside` is a digest of its bytes beside the tensors."""
        _write(self._entry(file), {"file": file, "bytes": nbytes, "outside": outside, "tensors": tensors})

    def finished(self) -> dict[str, dict[str, Any]]:
        """The finished files' records, by path."""
        found = filter(None, map(_read, sorted((self.folder / _FINISHED).glob("*.json"))))
        return {record["file"]: record for record in found}

    def finished_in(self, files: Path) -> dict[str, dict[str, Any]]:
        """The records of finished files that are there, or were: once all are finished they move to their final place."""
        found = self.finished()
        if self.complete:
            return found
        return {file: record for file, record in found.items() if size_of(files / file) == record["bytes"]}

    @property
    def complete(self) -> bool:
        """Whether a run had finished all files; what it began to move is then in part at its final place."""
        return (self.folder / _COMPLETE).exists()

    @property
    def cleared(self) -> bool:
        """Whether what the files replace is gone, so that whatever is at the final place is new."""
        return (self.folder / _CLEARED).exists()

    def mark_complete(self) -> None:
        """Record that all files are finished."""
        (self.folder / _COMPLETE).touch()

    def mark_cleared(self) -> None:
        """Record that what the files replace is gone."""
        (self.folder / _CLEARED).touch()

    def _entry(self, file: str) -> Path:
        return self.folder / _FINISHED / (file.replace("/", "~") + ".json")


def write_manifest(folder: Path, run: Mapping[str, Any], finished: Mapping[str, Any], origin: Origin) -> None:
    """Write `conversion.json` for a finished run into the folder of its files. Small files beside the weights get a digest."""
    files = {
        file: {**described, **{key: finished[file][key] for key in _RESULTS}}
        for file, described in run["files"].items()
    }
    beside = {
        path.relative_to(folder).as_posix(): digest([path.read_bytes()])
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).as_posix() not in files
    }
    told = {"notes": origin.notes, "ignored": origin.ignored}
    _write(folder / MANIFEST, signed({**run, **told, "beside": beside, "files": files}))


def is_output_of(folder: Path, run: Mapping[str, Any]) -> bool:
    """Whether a folder is the complete output of this run: its manifest says so, and all files are there.

    A run whose source came as messages is never the same as another.
    """
    if run["source"]["files"] is None:
        return False
    try:
        manifest = read_manifest(folder / MANIFEST)
    except ConversionError:
        return False
    files = {
        file: {key: value for key, value in entry.items() if key not in _RESULTS}
        for file, entry in manifest["files"].items()
    }
    wanted = run["files"]
    same = files == wanted and all(manifest.get(key) == run[key] for key in run.keys() - {"files"})
    beside = manifest.get("beside")
    there = isinstance(beside, dict) and all(size_of(folder / file) >= 0 for file in beside)
    return same and there and all(size_of(folder / file) == entry["bytes"] for file, entry in wanted.items())


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest at `path`; raises where it is missing, or not as it was written."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        unfinished = unfinished_in(path.parent)
        what = "is no output of a conversion that can be checked alone: it has no"
        raise ConversionError(f"{path.parent} {unfinished or f'{what} {MANIFEST}'}") from None
    except OSError as error:
        raise ConversionError(f"cannot read {path}: {reason_of(error)}") from error
    try:
        manifest = json.loads(text)
        sound = signed(manifest) == manifest and isinstance(manifest["files"], dict)
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError):
        sound = False
    if not sound:
        raise ConversionError(
            f"{path} is damaged, or of an older version; give the source, too, to compare the output with that"
        )
    plain: dict[str, Any] = manifest
    return plain


def signed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest with the digest of its other entries."""
    others = {key: value for key, value in manifest.items() if key != _OF_ITSELF}
    return {**others, _OF_ITSELF: digest([json.dumps(others, sort_keys=True).encode()])}


def _old_not_new(place: str, old: Any, new: Any) -> str:
    if place.startswith("source files "):
        old, new = _file_in_words(old), _file_in_words(new)
    return f"{place}: {old}, not {new}"


def _file_in_words(identity: Any) -> str:
    if not (isinstance(identity, list) and len(identity) == 2 and all(isinstance(number, int) for number in identity)):
        return "no such file" if identity is None else str(identity)
    nbytes, nanoseconds = identity
    return f"{nbytes:,} bytes of {datetime.fromtimestamp(nanoseconds / 1e9).isoformat(' ', 'milliseconds')}"


def refuse_other(staging: Staging, old: Mapping[str, Any], new: Mapping[str, Any], finished: int) -> None:
    """Raise if an unfinished run with finished files is not the one that is asked for."""
    for keys in _CAUSES:
        found = [line for key in keys for line in differences(old.get(key), new[key], key, _old_not_new)]
        if found:
            break
    raise_all(
        f"{staging.path} holds {finished} finished file(s) of another run, which differs in",
        found,
        _SHOWN_DIFFERENCES,
        "repeat that run to finish it, or pass --restart to throw its files away",
    )


def size_of(path: Path) -> int:
    """Bytes of a file, -1 where there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    write_text(path, json.dumps(value, indent=1) + "\n")  # in ASCII, since paths need not be text


def _read(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # a run that was killed while it wrote its first state
        return None
    return value if isinstance(value, dict) else None
