"""Check an output against its manifest alone: every byte of its files, without the source and without a model.

Each tensor's bytes have a CRC-32 in the manifest, and the bytes beside the tensors a digest. A file whose other bytes changed is
read as its format says, to tell which tensors it lost, gained, moved or holds in another shape.
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
from ..conversion.journal import MANIFEST, read_manifest
from ..conversion.progress import Progress
from ..formats.megatron.reading import checkpoint_directory
from ..formats.megatron.writing import TRACKER
from ..storage import dcp, safetensors, torch_zip
from ..storage.checksum import blocks, digest, file_crc32
from ..storage.dcp_layout import chunk_name
from ..storage.tensor import StoredTensor, contiguous_strides

#: Entries of a rank's file that are models.
_MODEL = re.compile(r"model\d*")
#: A tensor of a file, or why it cannot be read.
_Found = StoredTensor | ConversionError


@dataclass(frozen=True)
class Fault:
    """What is wrong with a file, or with one tensor of it and the slots that this holds."""

    file: str
    tensor: str
    holds: tuple[str, ...]
    text: str

    def __str__(self) -> str:
        slots = f" ({', '.join(self.holds[:3])}{', …' if len(self.holds) > 3 else ''})" if self.holds else ""
        return f"{self.file}: {self.tensor}{slots} {self.text}" if self.tensor else f"{self.file} {self.text}"


@dataclass(frozen=True)
class Checked:
    """What was checked, and every fault in the order of files and tensors."""

    folder: Path
    files: int
    tensors: int
    nbytes: int
    faults: list[Fault]


class _Recorded(NamedTuple):
    """What the manifest says of a tensor. Those of earlier versions say no shape."""

    holds: tuple[str, ...]
    dtype: str
    shape: tuple[int, ...] | None
    offset: int
    nbytes: int
    crc32: int

    @classmethod
    def of(cls, entry: Any) -> _Recorded:
        """From the manifest's entry; raises what a damaged one makes it raise."""
        offset, nbytes = entry["at"]
        if type(offset) is not int or type(nbytes) is not int or min(offset, nbytes) < 0:
            raise ValueError(f"{offset!r} and {nbytes!r} are no stretch of a file")
        shape = tuple(map(int, entry["shape"])) if "shape" in entry else None
        return cls(tuple(map(str, entry["holds"])), str(entry["dtype"]), shape, offset, nbytes, int(entry["crc32"], 16))

    def other_shape(self, shape: tuple[int, ...]) -> str | None:
        """What is wrong with a stored tensor of this shape."""
        return None if self.shape in (None, shape) else _instead(shape, self.shape)


@dataclass(frozen=True)
class _File:
    """What the manifest says of a file, and where it should be."""

    name: str
    path: str
    nbytes: int
    outside: str
    tensors: dict[str, _Recorded]


class _Task(NamedTuple):
    """A stretch of a file whose checksum is known."""

    file: _File
    tensor: str
    offset: int
    nbytes: int


def find_output(path: Path, name: str | None) -> Path:
    """The folder with the manifest: `name` in `path`, `path` itself, or the one that its tracker names."""
    if name is not None:
        return path / name
    if (path / MANIFEST).exists() or not (path / TRACKER).exists():
        return path
    return checkpoint_directory(path, None)


def check_output(folder: Path, progress: Progress) -> Checked:
    """Compare every file of an output with the manifest in `folder`; raises `ConversionError` if that is missing or damaged."""
    manifest = read_manifest(folder / MANIFEST)
    files = [_recorded(folder, name, entry) for name, entry in manifest["files"].items()]
    faults = [Fault(name, "", (), f"is there, but not in {MANIFEST}") for name in _strangers(folder, files)]
    faults += _beside(folder, manifest.get("beside"))
    tasks: list[_Task] = []
    for file in files:
        found, to_read = _look_at(file)
        faults += found
        tasks += to_read
    if (folder / dcp.METADATA).exists() and any(fault.file == dcp.METADATA for fault in faults):
        faults += _of_index(folder, files)
    faults += _check_tensors(tasks, progress)
    order = {(file.name, tensor): number for file in files for number, tensor in enumerate(("", *file.tensors))}
    faults.sort(key=lambda fault: (fault.file, order.get((fault.file, fault.tensor), len(order))))
    return Checked(folder, len(files), len(tasks), sum(task.nbytes for task in tasks), faults)


def _recorded(folder: Path, name: str, entry: Any) -> _File:
    """An entry of the manifest, which may have been damaged like everything else."""
    try:
        if not _is_inside(name):
            raise ValueError("it lies outside the folder")
        tensors = {key: _Recorded.of(value) for key, value in entry["tensors"].items()}
        if type(entry["bytes"]) is not int or type(entry["outside"]) is not str:
            raise ValueError("bytes or digest are none")
        if any(tensor.offset + tensor.nbytes > entry["bytes"] for tensor in tensors.values()):
            raise ValueError("a tensor ends beyond the file")
        return _File(name, str(folder / name), entry["bytes"], entry["outside"], tensors)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConversionError(
            f"{folder / MANIFEST}: the entry for {one_line(name)} is damaged, or of an older version ({error!r}); "
            "compare the output with its source instead"
        ) from error


def _is_inside(name: str) -> bool:
    """Whether it is the path of a file within the folder."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\0" not in name


def _beside(folder: Path, recorded: Any) -> Iterator[Fault]:
    """Small files that are not as they were written: configuration, tokenizer, arguments."""
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
                yield Fault(name, "", (), "is not as it was written")


def _strangers(folder: Path, files: Iterable[_File]) -> list[str]:
    """Files that lie and end like those of the manifest, and are none of them: a reader would take them for parts of the model."""
    known = {file.name for file in files}
    paths = [Path(name) for name in known if Path(name).suffix]
    patterns = {"/".join(["*"] * (len(path.parts) - 1) + [f"*{path.suffix}"]) for path in paths}
    found = {path.relative_to(folder).as_posix() for pattern in patterns for path in folder.glob(pattern)}
    return sorted(found - known)


def _look_at(file: _File) -> tuple[list[Fault], list[_Task]]:
    """What is wrong with a file as a whole, and where the bytes of its tensors can be checked."""
    as_written = [_Task(file, name, tensor.offset, tensor.nbytes) for name, tensor in file.tensors.items()]
    try:
        size = os.path.getsize(file.path)
        if size == file.nbytes and digest(_beside_tensors(file)) == file.outside:
            return [], as_written
    except FileNotFoundError:
        return [Fault(file.name, "", (), "is missing")], []
    except OSError as error:
        return [Fault(file.name, "", (), f"cannot be read: {reason_of(error)}")], []
    except EOFError as error:  # cut while it is read
        return [Fault(file.name, "", (), f"cannot be read: {error}")], []
    same_size = size == file.nbytes
    fault = "has other bytes beside its tensors" if same_size else f"has {size} bytes instead of {file.nbytes}"
    faults = [Fault(file.name, "", (), fault)]
    read = _READERS.get(Path(file.name).suffix)
    if read is None:  # a format whose names cannot be looked up file by file
        return faults, as_written if same_size else []
    try:
        found = read(file.path)
    except ConversionError as error:
        faults.append(Fault(file.name, "", (), _unreadable(error)))
        return faults, as_written if same_size else []
    return _match(file, found, faults)


def _beside_tensors(file: _File) -> Iterator[bytes]:
    end = 0
    for tensor in sorted(file.tensors.values(), key=lambda tensor: tensor.offset):
        yield from blocks(file.path, end, max(tensor.offset - end, 0))
        end = max(end, tensor.offset + tensor.nbytes)
    yield from blocks(file.path, end, max(file.nbytes - end, 0))


def _match(file: _File, found: Mapping[str, _Found], faults: list[Fault]) -> tuple[list[Fault], list[_Task]]:
    """Faults of a file that was written anew, and where its tensors lie now."""
    tasks = []
    faults += [
        Fault(file.name, name, (), "is no tensor of the manifest") for name in sorted(found.keys() - file.tensors)
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
        elif (other := recorded.other_shape(data.shape)) is not None:
            faults.append(Fault(file.name, name, recorded.holds, other))
        elif data.strides != contiguous_strides(data.shape):
            faults.append(Fault(file.name, name, recorded.holds, "is stored in another order of its elements"))
        else:
            tasks.append(_Task(file, name, data.offset, data.nbytes))
    return faults, tasks


def _model_of_torch(path: str) -> Mapping[str, StoredTensor]:
    """The tensors of a rank's models; those of virtual pipeline stages after the model's name, as the manifest has them."""
    content = torch_zip.read(path)
    entries = content.items() if isinstance(content, dict) else ()
    models = [(name, model) for name, model in entries if _MODEL.fullmatch(str(name)) and isinstance(model, Mapping)]
    return {
        (key if name == "model" else f"{name}.{key}"): value
        for name, model in models
        for key, value in model.items()
        if isinstance(value, StoredTensor)
    }


def _chunks_of(path: str) -> Mapping[str, _Found]:
    """The chunks of a distributed checkpoint's file, as its index finds them."""
    index = dcp.read_index(Path(path).parent)
    return {
        chunk_name(key, chunk.offsets): _stored(chunk, tensor.dtype)
        for key, tensor in index.tensors.items()
        for chunk in tensor.chunks
        if chunk.item.path == path
    }


def _stored(chunk: dcp.Chunk, dtype: DType) -> _Found:
    try:
        return dcp.stored(chunk, dtype)
    except ConversionError as error:
        return error


def _of_index(folder: Path, files: Iterable[_File]) -> Iterator[Fault]:
    """What a distributed checkpoint's index says of its chunks otherwise than they were written; of another's index, that alone."""
    try:
        index = dcp.read_index(folder)
    except ConversionError as error:
        yield Fault(dcp.METADATA, "", (), _unreadable(error))
        return
    left = {name: (file, tensor) for file in files for name, tensor in file.tensors.items()}
    for key, tensor in index.tensors.items():
        ends = []
        for chunk in tensor.chunks:
            name = chunk_name(key, chunk.offsets)
            if name not in left:
                yield Fault(dcp.METADATA, name, (), "is no tensor of the manifest")
                continue
            file, recorded = left.pop(name)
            yield from (
                Fault(dcp.METADATA, name, recorded.holds, text) for text in _faults_of(chunk, tensor, file, recorded)
            )
            if recorded.shape is not None:
                ends.append([offset + size for offset, size in zip(chunk.offsets, recorded.shape, strict=False)])
        whole = tuple(map(max, zip(*ends, strict=False)))
        if len(ends) == len(tensor.chunks) and whole != tensor.shape:
            yield Fault(dcp.METADATA, key, (), _instead(tensor.shape, whole))
    yield from (Fault(dcp.METADATA, name, recorded.holds, "is missing") for name, (_, recorded) in left.items())


def _faults_of(chunk: dcp.Chunk, tensor: dcp.ChunkedTensor, file: _File, recorded: _Recorded) -> Iterator[str]:
    """What the index says wrongly of one chunk."""
    item = chunk.item
    if str(tensor.dtype) != recorded.dtype:
        yield f"is {tensor.dtype} instead of {recorded.dtype}"
    if (other := recorded.other_shape(chunk.sizes)) is not None:
        yield other
    if item.path != file.path or not item.start <= recorded.offset <= item.start + item.nbytes - recorded.nbytes:
        yield f"is said to lie in {item}, where it does not"


def _unreadable(error: ConversionError) -> str:
    """In one line, of whatever lists the error consists."""
    return f"cannot be read: {' '.join(str(error).split())}"


def _instead(shape: Iterable[int], written: Iterable[int] | None) -> str:
    return f"has shape {list(shape)} instead of {list(written or ())}"


_READERS: dict[str, Callable[[str], Mapping[str, _Found]]] = {
    ".distcp": _chunks_of,
    ".safetensors": lambda path: safetensors.read(path).tensors,
    ".pt": _model_of_torch,
}


def _check_tensors(tasks: Iterable[_Task], progress: Progress) -> list[Fault]:
    """Read all tensors, the largest first, so that no thread is left alone with one at the end."""
    queued = sorted(tasks, key=lambda task: -task.nbytes)
    progress.start(sum(task.nbytes for task in queued))
    pool = ThreadPoolExecutor(default_lanes())
    try:
        return [fault for fault in pool.map(lambda task: _check(task, progress), queued) if fault is not None]
    finally:
        pool.shutdown(cancel_futures=True)
        progress.stop()


def _check(task: _Task, progress: Progress) -> Fault | None:
    recorded = task.file.tensors[task.tensor]
    try:
        crc = file_crc32(task.file.path, task.offset, task.nbytes, progress)
    except (OSError, EOFError) as error:
        return Fault(task.file.name, task.tensor, recorded.holds, f"cannot be read: {error}")
    if crc == recorded.crc32:
        return None
    text = f"has other bytes than were written (CRC-32 {crc:08x} instead of {recorded.crc32:08x})"
    return Fault(task.file.name, task.tensor, recorded.holds, text)
