"""Conversion of a source into a target: all or nothing, and an interrupted run goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np

from ..assets.origin import changed_files
from ..basics.dtypes import DType
from ..basics.errors import ConversionError, DiskError, Interrupted, Stopped, raise_all, reason_of
from ..families import FAMILIES
from ..model.slots import Ref, refs
from ..storage.output_file import OutputFile
from ..storage.tensor import release_mappings
from .accounting import check_beside, check_target
from .copying import Executor
from .crew import ALONE, Crew, agree, meet, share
from .endpoint import Source, Target, wanted_dtype
from .journal import Journal, Provenance, describe_run, is_output_of, lost_lines, refuse_other, write_manifest
from .outline import Outline
from .progress import Progress
from .staging import Staging, check_place, check_space
from .supplement import supplement

T = TypeVar("T")
#: Seconds that a network file system may take to show what another machine has written.
_PATIENCE = 60.0
#: Seconds that lanes have to end what they are writing after a failure. A disk may keep them longer; nothing waits for it.
_LANE_SECONDS = 1.0


def convert(
    source: Source,
    target: Target,
    override: DType | None,
    progress: Progress,
    *,
    restart: bool = False,
    crew: Crew = ALONE,
) -> list[str]:
    """Write every tensor of `source` to `target`; all or nothing. Returns lines for the user.

    A run that was killed, or stopped by a full disk, leaves its finished files in a hidden folder. The same run goes on from
    there; any other is refused unless `restart`. All processes of a crew call this; only the first gets lines.
    """
    try:
        with _disk_errors():
            outline = target.prepare(source.spec, source.origin, wanted_dtype(source, override))
            check_beside(source.origin, outline)
            check_target(source.spec, outline, target.fills)
            return _Run(source, target, outline, crew, progress).work(restart)
    finally:
        release_mappings()


@contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DiskError(f"cannot read or write {error.filename or 'the output'}: {reason_of(error)}") from error


class _Run:
    """Part of one process in a conversion."""

    def __init__(self, source: Source, target: Target, outline: Outline, crew: Crew, progress: Progress) -> None:
        self._source, self._target, self._outline = source, target, outline
        self._crew, self._progress = crew, progress
        self._staging = Staging(target.save_dir, outline.name)
        self._journal = Journal(self._staging.state)
        self._description = describe_run(outline, source.origin, FAMILIES.file_digest(source.spec.family))
        self._begun = self._shown = self._failed = False
        self._idle = True
        self._session = ""
        self._open: dict[str, OutputFile] = {}
        self._provenance = Provenance()

    def work(self, restart: bool) -> list[str]:
        """Take all steps, each together with the other processes; returns lines for the user."""
        try:
            agree(self._crew, self._together(lambda: self._description), "conversion")
            lines = self._first_alone(self._complete_already)
            if lines:
                return lines
            finished, self._session = self._first_alone(partial(self._begin, restart))
            self._begun = True
            self._together(self._check_folder)
            done = self._together(partial(self._copy, self._take_share(finished)))
            released = self._crew.release()
            if released is None:
                return []
            self._crew = released
            lines = self._first_alone(partial(self._end, set(finished).union(*done)))
            if finished:
                lines.insert(
                    0,
                    f"went on from an interrupted run, with {len(finished)} of {len(self._outline.files)} files finished",
                )
        except BaseException as error:
            for file in self._open.values():
                if self._idle and not file.closed:  # a lane that hangs must not find another file under its number
                    file.discard()
            reason = Interrupted() if isinstance(error, KeyboardInterrupt) else error
            if self._crew.rank == 0:
                self._give_up(reason, alone=self._crew.end_others())
            raise reason from error
        finally:
            self._progress.stop()
        return lines

    def _together(self, action: Callable[[], T]) -> list[T]:
        """Run `action` in every process and wait for all; returns their results by rank. A failure of one fails all."""
        result: T | None = None
        failure: BaseException | None = None
        try:
            result = action()
        except BaseException as error:  # noqa: BLE001 - raised again by `meet`
            failure = error
        return meet(self._crew, result, failure)

    def _first_alone(self, action: Callable[[], T]) -> T:
        """Run `action` in the first process alone; returns its result in all of them."""
        return cast("T", self._together(lambda: action() if self._crew.rank == 0 else None)[0])

    def _complete_already(self) -> list[str]:
        """Lines if this very run was completed before: repeating a command is no error. A tokenizer that is new is added."""
        added = supplement(self._target, self._staging, self._description, self._source.origin)
        if added:
            return added
        if self._target.shown() is None or not is_output_of(self._target.manifest, self._description):
            return []
        if self._staging.path.exists():  # killed while it cleaned up
            self._staging.open()
            self._staging.discard()
        return [f"{self._target.shown()} is complete already; nothing to do (--overwrite writes it again)"]

    def _begin(self, restart: bool) -> tuple[list[str], str]:
        """Open the hidden folder, anew or where the same run stopped; returns the finished files and the session's mark."""
        if not self._staging.path.exists():
            check_place(self._target.save_dir)
            self._target.refuse_existing()
            check_space(self._target.save_dir, self._outline.nbytes)
        self._staging.open()
        old, finished = self._journal.run(), self._finished()
        if restart or old is None or old["source"]["files"] is None or not finished:
            self._target.refuse_existing()
            self._staging.empty()
            self._journal.begin(self._description)
            finished = {}
        else:
            refuse_other(self._staging, old, self._description, len(finished))
            if self._journal.complete:
                return list(self._outline.files), self._journal.take()
            self._target.refuse_existing()
            self._staging.keep_only(list(finished))
        left = self._outline.files.keys() - finished.keys()
        check_space(self._target.save_dir, sum(self._outline.files[file].nbytes for file in left))
        self._target.assets(self._staging.files)
        return list(finished), self._journal.take()

    def _check_folder(self) -> None:
        """Raise in a process that does not see the hidden folder of the first."""
        if self._await(self._journal.run, lambda run: run == self._description) != self._description:
            raise ConversionError(
                f"process {self._crew.rank} does not see {self._staging.path}, which process 0 has made; all must share that folder"
            )

    def _finished(self) -> dict[str, dict[str, Any]]:
        """Records of the finished files, by path."""
        return self._journal.finished_in(self._staging.files)

    def _take_share(self, finished: list[str]) -> set[str]:
        """Files that this process is to fill."""
        left = {file: self._outline.tensor_bytes(file) for file in self._outline.files if file not in finished}
        mine = share(left, self._crew)
        self._progress.start(sum(left[file] for file in mine))
        return mine

    def _copy(self, mine: set[str]) -> list[str]:
        """Fill these files; returns them."""
        executor = Executor(
            self._progress, self._finish, lost=self._provenance.add_lost, check=self._crew.check, files=len(mine)
        )
        try:
            for number, ref in enumerate(refs(self._source.spec)):
                self._copy_ref(executor, ref, mine, replicas=number % self._crew.size == self._crew.rank)
            executor.finish()
        except BaseException:
            self._failed = True
            self._idle = executor.cancel(_LANE_SECONDS)
            raise
        self._source.close()
        raise_all(
            f"the source changed while it was read, so nothing of this run is kept: {self._source.origin.described}",
            changed_files(self._source.origin),
            remedy="wait until nothing writes there, and run the same command again",
        )
        for path in sorted(mine):  # a file without tensors is finished by nobody else; one with gaps says so here
            if not self._file(path).closed:
                self._finish(self._file(path))
        return sorted(mine)

    def _copy_ref(self, executor: Executor[OutputFile], ref: Ref, mine: set[str], *, replicas: bool) -> None:
        """Queue what these files have of a ref. Nothing of it is held afterwards: a source may wait until it is written."""
        sources = self._source.read(ref)
        executor.check(ref, self._source.spec, sources, replicas=replicas)
        held = str(ref)
        for fill in self._target.fills(ref):
            if fill.constant is not None:
                if replicas:
                    executor.expect(fill, sources.pieces, held)
            elif fill.file in mine:
                gathers = executor.plan(fill, sources.pieces)
                self._provenance.add_fill(held, fill, gathers)
                executor.fill(self._file(fill.file), fill, gathers)

    def _file(self, path: str) -> OutputFile:
        file = self._open.get(path)
        if file is None:
            place = self._staging.files / path
            place.parent.mkdir(parents=True, exist_ok=True)
            file = self._open[path] = self._outline.files[path].create(place)
            self._write_extra_tensors(file, path)
        return file

    def _write_extra_tensors(self, file: OutputFile, path: str) -> None:
        """Write a file's small tensors that belong to no slot."""
        for name, data in self._outline.extra_tensors.get(path, {}).items():
            file.write(name, 0, np.ascontiguousarray(data.array()))
            self._progress(data.nbytes)
            self._provenance.add_given(path, name, data)

    def _finish(self, file: OutputFile) -> None:
        """Complete a file and record it; the lane that wrote its last tensor calls this."""
        file.close(self._go_on)
        path = str(Path(file.path).relative_to(self._staging.files))
        tensors = self._provenance.take(path)
        checksums = file.checksums()
        layout = self._outline.files[path]
        for name, region in layout.regions.items():
            placed = {"shape": list(layout.shapes[name]), "at": list(region)}
            tensors[name] |= {**placed, "crc32": f"{checksums[name]:08x}"}
        session = self._journal.session()
        if session != self._session:  # this process is what is left of a run that another one continues
            cause = "someone has removed" if session is None else "another run has taken over"
            raise Stopped(f"{cause} {self._staging.path}")
        self._journal.finish(path, file.nbytes, file.outside, tensors)

    def _go_on(self) -> None:
        """Raise if the run has failed meanwhile: a large file takes long to reach the disk."""
        if self._failed:
            raise Stopped("the conversion has failed")

    def _end(self, done: set[str]) -> list[str]:
        """Show the result, once every file is finished."""
        finished = self._await(self._finished, lambda found: done <= found.keys())
        if not self._journal.complete:
            lost = sorted(self._outline.files.keys() - finished.keys())
            if lost:
                raise ConversionError(f"{', '.join(lost)} should be finished and are not; run the same command again")
            self._refuse_newcomers()
            manifest = self._staging.files / self._target.manifest.name
            write_manifest(manifest, self._description, finished, self._source.origin)
            self._journal.mark_complete()
        if not self._journal.cleared:
            self._target.clear(self._staging)
            self._journal.mark_cleared()
        lines = [*self._target.show(self._staging), *lost_lines(finished)]
        self._shown = True
        self._staging.discard()
        return lines

    def _refuse_newcomers(self) -> None:
        """Raise if something has appeared at the final place since the start; finished files are kept."""
        try:
            self._target.refuse_existing()
        except ConversionError as error:
            raise Stopped(f"something else was saved there meanwhile: {error}") from error

    def _await(self, look: Callable[[], T], good: Callable[[T], bool]) -> T:
        """Look until the result is good or patience ends: files of other machines may take a while to be visible here."""
        deadline = time.monotonic() + (_PATIENCE if self._crew.size > 1 else 0.0)
        while not good(found := look()) and time.monotonic() < deadline:
            self._crew.check()
            time.sleep(1.0)
        return found

    def _give_up(self, error: BaseException, *, alone: bool) -> None:
        """Leave nothing but what the same run can use when it is started again; `alone` if no other process writes there."""
        if not self._staging.held:
            return
        if self._shown:  # the next run takes the hidden folder away
            self._staging.leave()
            if isinstance(error, ConversionError):
                error.hint = "; the output is complete all the same"
            return
        finished = self._finished()
        resumable = self._begun and self._source.origin.identity is not None
        worth_keeping = isinstance(error, (Stopped, OSError)) if resumable else not self._begun
        if not self._journal.complete and not (finished and worth_keeping):
            self._staging.discard()
            return
        if alone and self._begun and not self._journal.complete:
            self._staging.keep_only(list(finished))
        self._staging.leave()
        if resumable and isinstance(error, ConversionError):
            count = f"{len(finished)} of {len(self._outline.files)}"
            error.hint = f"; {count} files are finished and kept, run the same command again to go on"
