"""Check of an output against its manifest alone: every byte of its files, without the source and without building a model.

The manifest has a CRC-32 for the bytes of each tensor, and a digest for the remaining bytes of each file. If the remaining bytes
changed, the file is parsed to find which tensors are missing, added, moved or of another shape.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from ..basics.dtypes import DType
from ..basics.errors import ConversionError, one_line, reason_of
from ..conversion.copying import default_lanes
from ..conversion.journal import MANIFEST, manifest_of, read_manifest
from ..conversion.progress import Progress
from ..formats.detect import refuse_part
from ..formats.megatron.locating import TRACKER, checkpoint_directory
from ..storage import dcp, marks, safetensors, torch_zip
from ..storage.checksum import blocks, digest, file_crc32
from ..storage.dcp_layout import chunk_name
from ..storage.tensor import StoredTensor, contiguous_strides

#: Names of the entries of a rank's file that are models.
_MODEL = re.compile(r"model\d*")
#: A tensor of a file, or the error of reading it.
_TensorOrError = StoredTensor | ConversionError


@dataclass(frozen=True)
class Fault:
    """Fault of a file, or of one tensor in it; `holds` are the slots of that tensor."""

    file: str
    tensor: str
    holds: tuple[str, ...]
    text: str

    def __str__(self) -> str:
        slots = f" ({', '.join(self.holds[:3])}{', …' if len(self.holds) > 3 else ''})" if self.holds else ""
        return f"{self.file}: {self.tensor}{slots} {self.text}" if self.tensor else f"{self.file} {self.text}"


@dataclass(frozen=True)
class Checked:
    """Result of a check: what was read, and every fault in the order of files and tensors.

    `source` is the path of what the output was written from, `hub` its name and commit on the Hugging Face Hub, if it has one.
    """

    folder: Path
    files: int
    tensors: int
    nbytes: int
    faults: list[Fault]
    source: str | None = None
    hub: str | None = None


class _TensorEntry(NamedTuple):
    """Manifest entry of a tensor; `shape` is None in manifests of earlier versions, which lack it."""

    holds: tuple[str, ...]
    dtype: str
    shape: tuple[int, ...] | None
    offset: int
    nbytes: int
    crc32: int

    @classmethod
    def parse(cls, entry: Any) -> _TensorEntry:
        """Parse an entry. For a damaged one raises KeyError, TypeError, ValueError or AttributeError."""
        offset, nbytes = entry["at"]
        if type(offset) is not int or type(nbytes) is not int or min(offset, nbytes) < 0:
            raise ValueError(f"{offset!r} and {nbytes!r} are not a range of bytes")
        shape = tuple(map(int, entry["shape"])) if "shape" in entry else None
        return cls(tuple(map(str, entry["holds"])), str(entry["dtype"]), shape, offset, nbytes, int(entry["crc32"], 16))

    def shape_fault(self, shape: tuple[int, ...]) -> str | None:
        """Text of the fault if a stored tensor of this shape does not match, else None."""
        return None if self.shape in (None, shape) else _shape_text(shape, self.shape)


@dataclass(frozen=True)
class _FileEntry:
    """Manifest entry of a file, and its path; `outside` is the digest of its bytes outside tensors."""

    name: str
    path: str
    nbytes: int
    outside: str
    tensors: dict[str, _TensorEntry]


class _Task(NamedTuple):
    """Range of bytes in a file to be checked: those of one tensor."""

    file: _FileEntry
    tensor: str
    offset: int
    nbytes: int


def find_output(path: Path, name: str | None) -> Path:
    """Output with a manifest: `name` in `path`, `path` itself, or the folder that its tracker file names."""
    if name is not None:
        return path / name
    if path.is_file() and not manifest_of(path).exists():
        refuse_part(path)
    if (path / MANIFEST).exists() or not (path / TRACKER).exists():
        return path
    return checkpoint_directory(path, None)


def check_output(output: Path, progress: Progress) -> Checked:
    """Compare every file of an output, a folder or a single file, with its manifest.

    Raises `ConversionError` if the manifest is missing or damaged.
    """
    single = output.is_file()
    folder = output.parent if single else output
    manifest = read_manifest(manifest_of(output))
    files = [_file_entry(folder, name, entry) for name, entry in manifest["files"].items()]
    unlisted = [] if single else _unlisted_files(folder, files)
    faults = [Fault(name, "", (), f"is not listed in {MANIFEST}") for name in unlisted]
    faults += _side_file_faults(folder, manifest.get("beside"))
    tasks: list[_Task] = []
    for file in files:
        file_faults, file_tasks = _check_file(file)
        faults += file_faults
        tasks += file_tasks
    if (folder / marks.METADATA).exists() and any(fault.file == marks.METADATA for fault in faults):
        faults += _index_faults(folder, files)
    faults += _check_tensors(tasks, progress)
    order = {(file.name, tensor): number for file in files for number, tensor in enumerate(("", *file.tensors))}
    faults.sort(key=lambda fault: (fault.file, order.get((fault.file, fault.tensor), len(order))))
    nbytes, source = sum(task.nbytes for task in tasks), manifest.get("source") or {}
    return Checked(folder, len(files), len(tasks), nbytes, faults, source.get("path"), source.get("hub"))


def _file_entry(folder: Path, name: str, entry: Any) -> _FileEntry:
    """Parse a file's entry in the manifest; raises `ConversionError` if it is damaged."""
    try:
        if not _is_inside(name):
            raise ValueError("it lies outside the folder")
        tensors = {key: _TensorEntry.parse(value) for key, value in entry["tensors"].items()}
        if type(entry["bytes"]) is not int or type(entry["outside"]) is not str:
            raise ValueError("its size is not a whole number, or its digest is not text")
        if any(tensor.offset + tensor.nbytes > entry["bytes"] for tensor in tensors.values()):
            raise ValueError("a tensor ends beyond the file")
        return _FileEntry(name, str(folder / name), entry["bytes"], entry["outside"], tensors)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConversionError(
            f"{folder / MANIFEST}: the entry for {one_line(name)} is damaged, or of an older version ({error!r}); "
            "compare the output with its source instead"
        ) from error


def _is_inside(name: str) -> bool:
    """Whether `name` is a relative path that stays within the folder."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\0" not in name


def _side_file_faults(folder: Path, recorded: Any) -> Iterator[Fault]:
    """Faults of the small files beside the weights: configuration, tokenizer, arguments."""
    for name, value in (recorded if isinstance(recorded, dict) else {}).items():
        if not _is_inside(name):
            raise ConversionError(
                f"{folder / MANIFEST}: {one_line(name)} lies outside the folder; the manifest is damaged"
            )
        try:
            same = digest([(folder / name).read_bytes()]) == value
        except OSError as error:
            yield Fault(
                name,
                "",
                (),
                "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {reason_of(error)}",
            )
        else:
            if not same:
                yield Fault(name, "", (), "has changed since it was written")


def _unlisted_files(folder: Path, files: Iterable[_FileEntry]) -> list[str]:
    """Files that the manifest lacks, beside listed ones and of the same suffix: a reader would take them for parts of the model."""
    known = {file.name for file in files}
    paths = [Path(name) for name in known if Path(name).suffix]
    patterns = {"/".join(["*"] * (len(path.parts) - 1) + [f"*{path.suffix}"]) for path in paths}
    found = {path.relative_to(folder).as_posix() for pattern in patterns for path in folder.glob(pattern)}
    return sorted(found - known)


def _check_file(file: _FileEntry) -> tuple[list[Fault], list[_Task]]:
    """Faults of a file as a whole, and the ranges of bytes where its tensors can be checked."""
    at_written_offsets = [_Task(file, name, tensor.offset, tensor.nbytes) for name, tensor in file.tensors.items()]
    try:
        size = os.path.getsize(file.path)
        if size == file.nbytes and digest(_bytes_outside_tensors(file)) == file.outside:
            return [], at_written_offsets
    except FileNotFoundError:
        return [Fault(file.name, "", (), "is missing")], []
    except OSError as error:
        return [Fault(file.name, "", (), f"cannot be read: {reason_of(error)}")], []
    except EOFError as error:  # truncated while it is read
        return [Fault(file.name, "", (), f"cannot be read: {error}")], []
    same_size = size == file.nbytes
    fault = "has changed outside its tensors" if same_size else f"has {size} bytes instead of {file.nbytes}"
    faults = [Fault(file.name, "", (), fault)]
    read = _READERS.get(Path(file.name).suffix)
    if read is None:  # a format whose tensors cannot be found from one file alone
        return faults, at_written_offsets if same_size else []
    try:
        found = read(file.path)
    except ConversionError as error:
        faults.append(Fault(file.name, "", (), _unreadable(error)))
        return faults, at_written_offsets if same_size else []
    return _match_tensors(file, found, faults)


def _bytes_outside_tensors(file: _FileEntry) -> Iterator[bytes]:
    end = 0
    for tensor in sorted(file.tensors.values(), key=lambda tensor: tensor.offset):
        yield from blocks(file.path, end, max(tensor.offset - end, 0))
        end = max(end, tensor.offset + tensor.nbytes)
    yield from blocks(file.path, end, max(file.nbytes - end, 0))


def _match_tensors(
    file: _FileEntry, found: Mapping[str, _TensorOrError], faults: list[Fault]
) -> tuple[list[Fault], list[_Task]]:
    """Faults of a file that was rewritten, and the ranges of bytes of its tensors there."""
    tasks = []
    faults += [
        Fault(file.name, name, (), f"is not listed in {MANIFEST}") for name in sorted(found.keys() - file.tensors)
    ]
    for name, recorded in file.tensors.items():
        data = found.get(name)
        if data is None:
            faults.append(Fault(file.name, name, recorded.holds, "is missing"))
        elif isinstance(data, ConversionError):
            faults.append(Fault(file.name, name, recorded.holds, _unreadable(data)))
        elif str(data.dtype) != recorded.dtype or data.nbytes != recorded.nbytes:
            text = f"is {data.nbytes} bytes of {data.dtype} instead of {recorded.nbytes} of {recorded.dtype}"
            faults.append(Fault(file.name, name, recorded.holds, text))
        elif (fault := recorded.shape_fault(data.shape)) is not None:
            faults.append(Fault(file.name, name, recorded.holds, fault))
        elif data.strides != contiguous_strides(data.shape):
            faults.append(Fault(file.name, name, recorded.holds, "is stored in another order of its elements"))
        else:
            tasks.append(_Task(file, name, data.offset, data.nbytes))
    return faults, tasks


def _read_rank_file(path: str) -> Mapping[str, StoredTensor]:
    """Tensors of a rank's models by key; with virtual pipeline stages the model's name comes first, as in the manifest.

    A file without such entries holds one model alone.
    """
    content = torch_zip.read(path)
    entries = content.items() if isinstance(content, dict) else ()
    models = [(name, model) for name, model in entries if _MODEL.fullmatch(str(name)) and isinstance(model, Mapping)]
    models = models or [("model", dict(entries))]
    return {
        (key if name == "model" else f"{name}.{key}"): value
        for name, model in models
        for key, value in model.items()
        if isinstance(value, StoredTensor)
    }


def _read_chunks(path: str) -> Mapping[str, _TensorOrError]:
    """Chunks of a distributed checkpoint's file, located by its index."""
    index = dcp.read_index(Path(path).parent)
    return {
        chunk_name(key, chunk.offsets): _stored_chunk(chunk, tensor.dtype)
        for key, tensor in index.tensors.items()
        for chunk in tensor.chunks
        if chunk.item.path == path
    }


def _stored_chunk(chunk: dcp.Chunk, dtype: DType) -> _TensorOrError:
    try:
        return dcp.stored(chunk, dtype)
    except ConversionError as error:
        return error


def _index_faults(folder: Path, files: Iterable[_FileEntry]) -> Iterator[Fault]:
    """Faults of a distributed checkpoint's index, compared with the chunks as they were written; one fault if it is unreadable."""
    try:
        index = dcp.read_index(folder)
    except ConversionError as error:
        yield Fault(marks.METADATA, "", (), _unreadable(error))
        return
    unmatched = {name: (file, tensor) for file in files for name, tensor in file.tensors.items()}
    for key, tensor in index.tensors.items():
        ends = []
        for chunk in tensor.chunks:
            name = chunk_name(key, chunk.offsets)
            if name not in unmatched:
                yield Fault(marks.METADATA, name, (), f"is not listed in {MANIFEST}")
                continue
            file, recorded = unmatched.pop(name)
            yield from (
                Fault(marks.METADATA, name, recorded.holds, text)
                for text in _chunk_faults(chunk, tensor, file, recorded)
            )
            if recorded.shape is not None:
                ends.append([offset + size for offset, size in zip(chunk.offsets, recorded.shape, strict=False)])
        whole = tuple(map(max, zip(*ends, strict=False)))
        if len(ends) == len(tensor.chunks) and whole != tensor.shape:
            yield Fault(marks.METADATA, key, (), _shape_text(tensor.shape, whole))
    yield from (Fault(marks.METADATA, name, recorded.holds, "is missing") for name, (_, recorded) in unmatched.items())


def _chunk_faults(
    chunk: dcp.Chunk, tensor: dcp.ChunkedTensor, file: _FileEntry, recorded: _TensorEntry
) -> Iterator[str]:
    """Texts of what the index has wrong about one chunk."""
    item = chunk.item
    if str(tensor.dtype) != recorded.dtype:
        yield f"is {tensor.dtype} instead of {recorded.dtype}"
    if (fault := recorded.shape_fault(chunk.sizes)) is not None:
        yield fault
    if item.path != file.path or not item.start <= recorded.offset <= item.start + item.nbytes - recorded.nbytes:
        yield f"is not in {item}, where the index places it"


def _unreadable(error: ConversionError) -> str:
    """One line of text, even for an error that is a list."""
    return f"cannot be read: {' '.join(str(error).split())}"


def _shape_text(shape: Iterable[int], written: Iterable[int] | None) -> str:
    return f"has shape {list(shape)} instead of {list(written or ())}"


_READERS: dict[str, Callable[[str], Mapping[str, _TensorOrError]]] = {
    ".distcp": _read_chunks,
    ".safetensors": lambda path: safetensors.read(path).tensors,
    ".pt": _read_rank_file,
}


def _check_tensors(tasks: Iterable[_Task], progress: Progress) -> list[Fault]:
    """Faults of the tensors' bytes. Reads the largest first, so that no thread is left with a large one at the end."""
    queued = sorted(tasks, key=lambda task: -task.nbytes)
    progress.start(sum(task.nbytes for task in queued))
    pool = ThreadPoolExecutor(default_lanes())
    try:
        return [fault for fault in pool.map(lambda task: _check_tensor(task, progress), queued) if fault is not None]
    finally:
        pool.shutdown(cancel_futures=True)
        progress.stop()


def _check_tensor(task: _Task, progress: Progress) -> Fault | None:
    recorded = task.file.tensors[task.tensor]
    try:
        crc = file_crc32(task.file.path, task.offset, task.nbytes, progress)
    except (OSError, EOFError) as error:
        return Fault(task.file.name, task.tensor, recorded.holds, f"cannot be read: {error}")
    if crc == recorded.crc32:
        return None
    text = f"has changed since it was written (CRC-32 {crc:08x} instead of {recorded.crc32:08x})"
    return Fault(task.file.name, task.tensor, recorded.holds, text)
