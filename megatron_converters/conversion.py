"""The loop that joins a source and a target: all or nothing, and what was interrupted goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from .crew import ALONE, Crew, share
from .dtypes import DType
from .endpoints.base import Source, Target, wanted_dtype
from .endpoints.queue_target import QueueTarget
from .errors import ConversionError, DiskError, Interrupted, Stopped
from .execute import Executor
from .journal import MANIFEST, Entries, Journal, describe_run, refuse_other, tensor_entry, write_manifest
from .outline import Outline
from .progress import Progress
from .slots import refs
from .staging import Staging, check_space
from .storage.output import OutputFile

T = TypeVar("T")


def convert(
    source: Source,
    target: Target,
    override: DType | None,
    progress: Progress,
    *,
    restart: bool = False,
    crew: Crew = ALONE,
) -> list[str]:
    """Write every tensor of `source` to `target`; all or nothing. Returns what to tell the user.

    A run that was killed, or stopped by a full disk, left its finished files in a hidden folder; the same run goes on from
    there, and any other is refused unless `restart`. All processes of a crew call this alike; only the first returns lines.
    """
    with _disk_errors():
        outline = target.prepare(source.spec, source.origin, wanted_dtype(source, override))
        return _Run(source, target, outline, crew, progress).work(restart)


def stream(source: Source, target: QueueTarget, override: DType | None) -> None:
    """Send every tensor of `source` as messages."""
    executor = Executor()
    try:
        target.begin(source.spec, source.origin, wanted_dtype(source, override))
        for ref in refs(source.spec):
            sources = source.read(ref)
            executor.check(ref, source.spec, sources)
            target.write(ref, sources)
        executor.finish()
    except BaseException:
        executor.cancel()
        raise
    source.close()
    target.end()


@contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DiskError(f"cannot write {error.filename or 'the output'}: {error.strerror}") from error


class _Run:
    """One process's part in one conversion."""

    def __init__(self, source: Source, target: Target, outline: Outline, crew: Crew, progress: Progress) -> None:
        self._source, self._target, self._outline = source, target, outline
        self._crew, self._progress = crew, progress
        self._staging = Staging(target.save_dir, outline.name)
        self._journal = Journal(self._staging.state)
        self._begun = False
        self._mine: set[str] = set()
        self._open: dict[str, OutputFile] = {}
        self._entries: dict[str, Entries] = {}

    def work(self, restart: bool) -> list[str]:
        try:
            self._step(partial(self._begin, restart), leader_only=True)
            self._begun = True
            self._step(self._take_share)
            self._step(self._copy)
            return self._step(self._end, leader_only=True) or []
        except BaseException as error:
            for file in self._open.values():
                file.discard()
            reason = Interrupted() if isinstance(error, KeyboardInterrupt) else error
            if self._crew.rank == 0:
                self._give_up(reason)
            raise reason from error
        finally:
            self._progress.stop()

    def _step(self, action: Callable[[], T], leader_only: bool = False) -> T | None:
        """Do something and wait for the others; a failure of one is a failure of all."""
        result: T | None = None
        failure: BaseException | None = None
        try:
            if not leader_only or self._crew.rank == 0:
                result = action()
        except BaseException as error:  # noqa: BLE001 - raised again by `meet`
            failure = error
        self._crew.meet(failure)
        return result

    def _begin(self, restart: bool) -> None:
        """Open the hidden folder, anew or where the same run has stopped."""
        run = describe_run(self._outline, self._source.origin)
        if not self._staging.path.exists():
            self._target.refuse_existing()
            check_space(self._target.save_dir, self._outline.nbytes)
        self._staging.open()
        old, finished = self._journal.run(), self._finished()
        if restart or old is None or old["source"]["files"] is None or not finished:
            self._target.refuse_existing()
            self._staging.empty()
            self._journal.begin(run)
            finished = {}
        else:
            refuse_other(self._staging, old, run, len(finished))
            if self._journal.complete:
                return
            self._target.refuse_existing()
            self._staging.keep_only(list(finished))
        left = self._outline.files.keys() - finished.keys()
        check_space(self._target.save_dir, sum(self._outline.files[file].nbytes for file in left))
        self._target.assets(self._staging.files)

    def _finished(self) -> dict[str, dict[str, Any]]:
        """The records of files that an earlier run has finished, and that are there."""
        found = self._journal.finished()
        if self._journal.complete:
            return found
        return {file: record for file, record in found.items() if _size(self._staging.files / file) == record["bytes"]}

    def _take_share(self) -> None:
        """Decide which files this process fills; a step of its own, since a file that is finished meanwhile would change it."""
        finished = self._finished()
        left = {file: self._outline.tensor_bytes(file) for file in self._outline.files if file not in finished}
        self._mine = share(left, self._crew)
        self._progress.start(sum(left[file] for file in self._mine))

    def _copy(self) -> None:
        """Fill this process's share of the files."""
        mine = self._mine
        executor = Executor(self._progress, self._finish)
        try:
            for number, ref in enumerate(refs(self._source.spec)):
                sources = self._source.read(ref)
                executor.check(ref, self._source.spec, sources, replicas=number % self._crew.size == self._crew.rank)
                for fill in self._target.fills(ref):
                    if fill.file in mine:
                        gathers = executor.plan(fill, sources.pieces)
                        tensor_entry(self._entries.setdefault(fill.file, {}), ref, fill, gathers)
                        executor.fill(self._file(fill.file), fill, gathers)
            executor.finish()
        except BaseException:
            executor.cancel()
            raise
        self._source.close()
        for path in sorted(mine):  # a file without tensors is finished by nobody else; one with gaps says so here
            self._finish(self._file(path))

    def _file(self, path: str) -> OutputFile:
        file = self._open.get(path)
        if file is None:
            place = self._staging.files / path
            place.parent.mkdir(parents=True, exist_ok=True)
            file = self._open[path] = self._outline.files[path].create(place)
            self._give(file, path)
        return file

    def _give(self, file: OutputFile, path: str) -> None:
        """Write the small tensors of a file that belong to no slot."""
        for name, data in self._outline.given.get(path, {}).items():
            file.write(name, 0, np.ascontiguousarray(data.array()))
            self._progress(data.nbytes)
            self._entries.setdefault(path, {})[name] = {"holds": [], "from": [data.path], "dtype": str(data.dtype)}

    def _finish(self, file: OutputFile) -> None:
        """Complete a file and record it; called once its last tensor is written, from the lane that wrote it."""
        if file.closed:
            return
        file.close()
        path = str(Path(file.path).relative_to(self._staging.files))
        tensors = self._entries.pop(path, {})
        for name, checksum in file.checksums().items():
            tensors[name]["crc32"] = f"{checksum:08x}"
        self._journal.finish(path, file.nbytes, tensors)

    def _end(self) -> list[str]:
        """Show the result, once every file is finished."""
        if not self._journal.complete:
            finished = self._finished()
            lost = sorted(self._outline.files.keys() - finished.keys())
            if lost:
                raise ConversionError(f"{', '.join(lost)} should be finished and are not; run the same command again")
            run = describe_run(self._outline, self._source.origin)
            write_manifest(self._staging.files / MANIFEST, run, finished, self._source.origin)
            self._journal.mark_complete()
        if not self._journal.cleared:
            self._target.clear(self._staging)
            self._journal.mark_cleared()
        lines = self._target.show(self._staging)
        self._staging.discard()
        return lines

    def _give_up(self, error: BaseException) -> None:
        """Leave nothing, but what the same run can use when it is started again."""
        if not self._staging.held:
            return
        finished = self._finished()
        of_this_run = self._begun and self._source.origin.identity is not None
        worth_keeping = isinstance(error, (Stopped, OSError)) if of_this_run else not self._begun
        if not self._journal.complete and not (finished and worth_keeping):
            self._staging.discard()
            return
        self._staging.leave()
        if of_this_run and isinstance(error, ConversionError):
            count = f"{len(finished)} of {len(self._outline.files)}"
            error.hint = f"; {count} files are finished and kept, run the same command again to go on"


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1
