"""Journal of a running conversion (its description and finished files), and the manifest `conversion.json` of the output.

For each tensor of each file the manifest has the refs that it holds, the source tensors that they came from, its shape, its place
(first byte, bytes) and the CRC-32 of its bytes; for each file also a digest of its other bytes. So the files can be checked later
without the source. The manifest holds no time and no host name: equal runs write equal manifests.
"""

from __future__ import annotations

import json
import os
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..assets.origin import Origin
from ..basics.errors import ConversionError, raise_all, reason_of
from ..basics.json_values import differences, finite, indented
from ..basics.quantities import count
from ..model.layouts import RowMap
from ..storage.checksum import digest
from ..storage.tensor import MemoryTensor, StoredTensor
from .composing import Gather, Lookup
from .computing import Computation
from .outline import Fill, Outline
from .staging import Staging, unfinished_in, write_text

MANIFEST = "conversion.json"
#: Levels of a manifest whose items have lines of their own: entries, files, entries of a file, tensors.
_LEVELS = 4
#: Manifest key of the digest of all other entries.
_DIGEST_KEY = "digest"
_RUN, _COMPLETE, _CLEARED, _FINISHED = "run.json", "complete", "cleared", "finished"
_SESSION = "session"
_SHOWN_DIFFERENCES = 10
#: Manifest keys of a tensor that is not only copied or cast: what was computed, in words, and the number of its elements from which
#: their stored bits cannot be computed again.
_COMPUTED, _LOST = "computed", "not restored"
#: Text between what was computed for parts of a tensor.
_AND = "; "
#: Keys of a run's description, causes before their effects: a difference is reported for the first group that has one.
_KEY_GROUPS = (("tool", "source", "options"), ("content",), ("files",))
#: Manifest keys of a file that are known only once it is finished.
_RESULT_KEYS = ("outside", "tensors")

#: Manifest entries of one file, by tensor.
Entries = dict[str, dict[str, Any]]
#: Texts about what gathers take kept at most. A model has some hundred distinct ones; the bound limits memory if one has more.
_MAX_TEXTS = 4096


def describe_run(outline: Outline, origin: Origin, family_file: str | None = None) -> dict[str, Any]:
    """Description of a run: all that decides the output. Two runs with equal descriptions write the same bytes.

    `family_file` is the digest of the file that describes the model's family, if it is from one.
    """
    files = {file: {"bytes": layout.nbytes, "structure": layout.structure} for file, layout in outline.files.items()}
    run = {
        "tool": f"megatron-converters {__version__}",
        "source": {
            "path": os.path.abspath(origin.described),
            **({} if origin.hub is None else {"hub": origin.hub}),
            "files": origin.identity,
        },
        "options": {**outline.options, **({} if family_file is None else {"family file": family_file})},
        "content": outline.content,
        "files": files,
    }
    plain: dict[str, Any] = json.loads(json.dumps(finite(run)))  # in the form in which it is read back, for comparison
    return plain


class Provenance:
    """Manifest entries of files that are being filled, by tensor: the slots it holds, and where each came from."""

    def __init__(self) -> None:
        self._files: dict[str, Entries] = {}
        self._lock = threading.Lock()
        #: By file and tensor, the number of computed elements from which their stored bits cannot be computed again.
        self._lost: dict[str, Counter[str]] = {}
        #: Texts by the id of the look-up, the piece's shape and the columns. Layers share look-ups; holding one keeps its id valid.
        self._texts: dict[tuple[int, tuple[int, ...], int, int], tuple[str, Lookup]] = {}

    def add_fill(self, held: str, fill: Fill, gathers: Sequence[Gather]) -> None:
        """Add one fill of the ref of the text `held`, and what its sources give to it."""
        entries = self._files.setdefault(fill.file, {})
        entry = entries.get(fill.name)
        if entry is None:
            entry = entries[fill.name] = {"holds": [], "from": {}, "dtype": fill.dtype.name}
        entry["holds"].append(held)
        origins, casts = entry["from"], set()
        for gather in gathers:
            piece = gather.source
            stored = piece.is_stored
            name, *others = [str(piece.name)] if stored else map(str, piece.names)
            part, known = self._range_text(gather), origins.get(name)
            origins[name] = part if known is None else f"{known}; {part}"
            if others:
                origins.update(dict.fromkeys(others, f"with {piece.name.tensor}"))
            if gather.value is not None or not stored:
                self._add_computed(entry, Computation.of(piece, fill.dtype, gather.value).described())
            if piece.data.dtype is not fill.dtype and Computation.of(piece, fill.dtype, gather.value).is_cast:
                casts.add(str(piece.data.dtype))
        if casts:
            entry["cast from"] = sorted(casts)
        if fill.transposed:
            entry["transposed"] = True
        if fill.padding:
            entry["padding rows"] = fill.padding

    @staticmethod
    def _add_computed(entry: dict[str, Any], steps: Sequence[str]) -> None:
        """Add what is computed for a part of a tensor, in words."""
        known = entry.get(_COMPUTED)
        text = ", ".join(steps)
        if text and (known is None or text not in known.split(_AND)):
            entry[_COMPUTED] = text if known is None else f"{known}{_AND}{text}"

    def add_lost(self, fill: Fill, count: int) -> None:
        """Count computed elements of a fill from which their stored bits cannot be computed again; lanes call this."""
        if count:
            with self._lock:
                self._lost.setdefault(fill.file, Counter())[fill.name] += count

    def add_given(self, file: str, name: str, data: StoredTensor | MemoryTensor) -> None:
        """Add a small tensor that belongs to no slot: one that is copied as it is, or one in memory, which the target made up."""
        origin = {data.path: "all"} if isinstance(data, StoredTensor) else {}
        entry = {"holds": [], "from": origin, "dtype": str(data.dtype)}
        self._files.setdefault(file, {})[name] = entry

    def take(self, file: str) -> Entries:
        """The entries of a file, which is complete."""
        entries = self._files.pop(file, {})
        for name, number in self._lost.pop(file, Counter()).items():  # last, so that the order is that of no lane
            entries[name][_LOST] = number
        return entries

    def _range_text(self, gather: Gather) -> str:
        """Text for the rows and columns that a gather takes from its piece, and whether they keep their order."""
        shape, cols = gather.source.data.shape, gather.source_cols
        key = id(gather.lookup), shape, cols.start, cols.stop
        known = self._texts.get(key)
        if known is None:
            if len(self._texts) >= _MAX_TEXTS:
                self._texts.clear()
            rows = _describe_rows(gather.rows, shape[0])
            whole = (cols.start, cols.stop) == (0, gather.source.cols)
            text = rows if whole else f"{rows}, columns {cols.start}-{cols.stop - 1}"
            known = self._texts[key] = text, gather.lookup
        return known[0]


def _describe_rows(rows: RowMap, count: int) -> str:
    taken = rows[rows >= 0]
    first, last = int(taken.min()), int(taken.max())
    order = (
        "" if bool((np.diff(taken) == 1).all()) else " rearranged" if taken.size == last - first + 1 else " in parts"
    )
    return ("all rows" if (first, last) == (0, count - 1) else f"rows {first}-{last}") + order


@dataclass(frozen=True)
class Journal:
    """Files in the state folder of a `Staging`."""

    folder: Path

    def begin(self, run: Mapping[str, Any]) -> None:
        """Record the description of this run."""
        _write(self.folder / _RUN, run)

    def run(self) -> dict[str, Any] | None:
        """Description of the run that left this folder; None if there is none that can be read."""
        return _read(self.folder / _RUN)

    def take(self) -> str:
        """Claim the folder for this run, against any other that may still be writing; returns its session mark."""
        mark = os.urandom(8).hex()
        write_text(self.folder / _SESSION, mark)
        return mark

    def session(self) -> str | None:
        """Session mark of the run that claimed the folder; None if there is none."""
        try:
            return (self.folder / _SESSION).read_text(encoding="utf-8")
        except OSError:
            return None

    def finish(self, file: str, nbytes: int, outside: str, tensors: Mapping[str, Any]) -> None:
        """Record a file that is complete on disk; `outside` is the digest of its bytes outside the tensors."""
        path = self._entry(file)
        path.parent.mkdir(exist_ok=True)
        write_text(path, json.dumps({"file": file, "bytes": nbytes, "outside": outside, "tensors": tensors}))

    def finished(self) -> dict[str, dict[str, Any]]:
        """Records of finished files, by path."""
        found = filter(None, map(_read, sorted((self.folder / _FINISHED).glob("*.json"))))
        return {record["file"]: record for record in found}

    def finished_in(self, files: Path) -> dict[str, dict[str, Any]]:
        """Records of finished files that have their full size in `files`; of all, once a complete run may have moved them."""
        found = self.finished()
        if self.complete:
            return found
        return {file: record for file, record in found.items() if size_of(files / file) == record["bytes"]}

    @property
    def complete(self) -> bool:
        """Whether all files were finished. Some may already be at their final place."""
        return (self.folder / _COMPLETE).exists()

    @property
    def cleared(self) -> bool:
        """Whether the files to be replaced are removed, so that all files at the final place are new."""
        return (self.folder / _CLEARED).exists()

    def mark_complete(self) -> None:
        """Record that all files are finished."""
        (self.folder / _COMPLETE).touch()

    def mark_cleared(self) -> None:
        """Record that the files to be replaced are removed."""
        (self.folder / _CLEARED).touch()

    def _entry(self, file: str) -> Path:
        return self.folder / _FINISHED / (file.replace("/", "~") + ".json")


def manifest_of(output: Path) -> Path:
    """Manifest of an output: in its folder, or beside a single file and named after it, since several may lie in one folder."""
    return output.with_name(f"{output.name}.{MANIFEST}") if output.is_file() else output / MANIFEST


def write_manifest(path: Path, run: Mapping[str, Any], finished: Mapping[str, Any], origin: Origin) -> None:
    """Write the manifest of a finished run beside its files; small files beside the weights get a digest."""
    folder = path.parent
    files = {
        file: {**described, **{key: finished[file][key] for key in _RESULT_KEYS}}
        for file, described in run["files"].items()
    }
    beside = {
        path.relative_to(folder).as_posix(): digest([path.read_bytes()])
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).as_posix() not in files
    }
    remarks: dict[str, Any] = {"notes": origin.notes, "ignored": origin.ignored}
    remarks |= {"backfilled": origin.backfilled} if origin.backfilled else {}
    _write(path, with_digest({**run, **remarks, "beside": beside, "files": files}))


def lost_lines(finished: Mapping[str, Any]) -> list[str]:
    """Lines for the user, one for each kind of slot, on elements that the way back would not restore; `finished` are all files."""
    totals: dict[str, tuple[int, int, dict[str, None]]] = {}
    for record in finished.values():
        for entry in record["tensors"].values():
            if _LOST in entry:
                slot = entry["holds"][0].rpartition(" ")[2]  # a ref's text ends with its slot
                elements, tensors, texts = totals.get(slot, (0, 0, {}))
                totals[slot] = elements + entry[_LOST], tensors + 1, {**texts, entry[_COMPUTED]: None}
    return [
        f"{slot}: computing back would not restore the bits of {count(elements, 'element')} in {count(tensors, 'tensor')} "
        f"({_AND.join(texts)})"
        for slot, (elements, tensors, texts) in totals.items()
    ]


def is_output_of(path: Path, run: Mapping[str, Any]) -> bool:
    """Whether the manifest at `path` is that of this run, and lies beside all files.

    Always false for a run whose source came as messages.
    """
    manifest = finished_weights(path, run)
    beside = None if manifest is None else manifest.get("beside")
    return isinstance(beside, dict) and all(size_of(path.parent / file) >= 0 for file in beside)


def finished_weights(path: Path, run: Mapping[str, Any], *, but: str | None = None) -> dict[str, Any] | None:
    """Manifest at `path` if it is that of this run, `but` for one option, and lies beside all files of weights; else None.

    Always None for a run whose source came as messages.
    """
    if run["source"]["files"] is None:
        return None
    try:
        manifest = read_manifest(path)
    except ConversionError:
        return None
    files = {
        file: {key: value for key, value in entry.items() if key not in _RESULT_KEYS}
        for file, entry in manifest["files"].items()
    }
    expected = run["files"]
    same = files == expected and all(_equal_but(manifest.get(key), run[key], but) for key in run.keys() - {"files"})
    whole = all(size_of(path.parent / file) == entry["bytes"] for file, entry in expected.items())
    return manifest if same and whole else None


def _equal_but(one: Any, other: Any, name: str | None) -> bool:
    """Whether two entries of a manifest are equal, apart from an option of this name."""
    if name is None or not (isinstance(one, dict) and isinstance(other, dict) and name in one and name in other):
        return bool(one == other)
    return {**one, name: None} == {**other, name: None}


def unchanged_beside(path: Path) -> list[str]:
    """Small files beside the manifest at `path` that are as it says; none if there is no manifest."""
    try:
        beside = read_manifest(path).get("beside")
    except ConversionError:
        return []
    recorded: dict[str, Any] = beside if isinstance(beside, dict) else {}
    files = {name: path.parent / name for name in recorded}
    return [name for name, file in files.items() if file.is_file() and digest([file.read_bytes()]) == recorded[name]]


def read_manifest(path: Path) -> dict[str, Any]:
    """Read the manifest at `path`; raises `ConversionError` if it is missing or was changed."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        unfinished = unfinished_in(path.parent)
        missing = f"is no output of a conversion that can be checked alone: it has no {path.name}"
        raise ConversionError(f"{path.parent} {unfinished or missing}") from None
    except OSError as error:
        raise ConversionError(f"cannot read {path}: {reason_of(error)}") from error
    try:
        manifest = json.loads(text)
        valid = with_digest(manifest) == manifest and isinstance(manifest["files"], dict)
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError):
        valid = False
    if not valid:
        raise ConversionError(
            f"{path} is damaged, or of an older version; give the source as well, to compare the output with it"
        )
    plain: dict[str, Any] = manifest
    return plain


def with_digest(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Manifest with the digest of its other entries."""
    others = {key: value for key, value in manifest.items() if key != _DIGEST_KEY}
    return {**others, _DIGEST_KEY: digest([json.dumps(others, sort_keys=True).encode()])}


def _difference_line(place: str, old: Any, new: Any) -> str:
    if place.startswith("source files "):
        old, new = _identity_text(old), _identity_text(new)
    return f"{place}: {old}, not {new}"


def _identity_text(identity: Any) -> str:
    """Text for a source file's identity: its size in bytes and its modification time in nanoseconds."""
    if not (isinstance(identity, list) and len(identity) == 2 and all(isinstance(number, int) for number in identity)):
        return "no such file" if identity is None else str(identity)
    nbytes, nanoseconds = identity
    return f"{nbytes:,} bytes of {datetime.fromtimestamp(nanoseconds / 1e9).isoformat(' ', 'milliseconds')}"


def refuse_other(staging: Staging, old: Mapping[str, Any], new: Mapping[str, Any], finished: int) -> None:
    """Raise with the differences between the description of an unfinished run (`old`) and of this one (`new`), if any.

    `finished` is the number of files that the unfinished run has finished.
    """
    for keys in _KEY_GROUPS:
        found = [line for key in keys for line in differences(old.get(key), new[key], key, _difference_line)]
        if found:
            break
    raise_all(
        f"{staging.path} holds {finished} finished file(s) of another run, which differs in:",
        found,
        _SHOWN_DIFFERENCES,
        "repeat that run to finish it, or pass --restart to discard its files",
    )


def size_of(path: Path) -> int:
    """Size of a file in bytes; -1 if there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _write(path: Path, value: Any) -> None:
    write_text(path, indented(value, _LEVELS) + "\n")  # in ASCII, since a path may not be valid UTF-8


def _read(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # for example of a run that was killed while it wrote its first state
        return None
    return value if isinstance(value, dict) else None
