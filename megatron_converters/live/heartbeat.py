"""Heartbeat of the processes that move a model together, so that none waits for one that is lost, whose number it then says.

Each process tells the store of torch.distributed that it lives. The first one looks at all others, and tells them who is lost; the
others look at the first one and at what it tells.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from types import TracebackType
from typing import Any

from ..basics.errors import ConversionError, one_line

#: Seconds between beats, and without a beat after which a process is lost.
INTERVAL, PATIENCE = 2.0, 16.0
#: Seconds in which a failed transfer is explained by a lost process, if it is one.
_EXPLAINED = PATIENCE + 4 * INTERVAL
_DONE, _LEFT = "done", "left: "
_NUMBERS = itertools.count()


class Heartbeat:
    """Context in which this process, number `rank` of `size`, tells that it lives, and knows of others that do not.

    All processes must enter their contexts in the same order. One that leaves by an exception tells the others so.
    """

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self._store, self._rank, self._size = store, rank, size
        self._prefix = f"megatron_converters/{next(_NUMBERS)}"
        self._stop = threading.Event()
        self._lost: str | None = None
        #: By process: what it told last, and when that was new.
        self._heard: dict[int, tuple[str, float]] = {}
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        gave_up = error is not None and not isinstance(error, LostProcess)
        self._tell(f"{_LEFT}{_reason(error)}" if gave_up else _DONE)
        if self._rank == 0 and self._lost is not None:
            self._wait_for_listeners()

    @property
    def rank(self) -> int:
        """Number of this process."""
        return self._rank

    def check(self) -> None:
        """Raise `LostProcess` if a process is known to be lost."""
        if self._lost is not None:
            raise LostProcess(self._lost)

    def explain(self, error: BaseException) -> ConversionError:
        """Error for a transfer that has failed: the process that is lost, if one is found to be so in time."""
        begun = time.monotonic()
        while self._lost is None and time.monotonic() - begun < _EXPLAINED:
            time.sleep(0.1)
            if time.monotonic() - begun > 2 * INTERVAL:
                self._lose_absent()
        return LostProcess(self._lost or f"a transfer between processes failed: {one_line(str(error))}")

    def put(self, name: str, value: bytes) -> None:
        """Leave a value for the others."""
        self._store.set(f"{self._prefix}/{name}", value)

    def wait_for(self, name: str) -> bytes:
        """Value that a process leaves, as soon as it does; raises `LostProcess` if one is lost."""
        pause = 0.001
        key = f"{self._prefix}/{name}"
        while not self._store.check([key]):
            self.check()
            time.sleep(pause)
            pause = min(2 * pause, 0.1)
        found: bytes = self._store.get(key)
        return found

    def meet(self) -> None:
        """Wait for all processes; raises `LostProcess` if one is lost."""
        self.put(f"met {self._rank}", b"")
        for other in range(self._size):
            self.wait_for(f"met {other}")

    def _tell(self, text: str) -> None:
        try:
            self._store.set(f"{self._prefix}/{self._rank}", text)
        except (RuntimeError, ValueError) as error:
            self._lose(
                f"the store of the process group, which its first process or the launcher holds, is gone: {error}"
            )

    def _lose(self, reason: str) -> None:
        """Note that a process is lost, unless one is already."""
        if self._lost is None:
            self._lost = one_line(reason)

    def _beat(self) -> None:
        for number in itertools.count():
            self._tell(str(number))
            try:
                self._look()
            except (RuntimeError, ValueError) as error:
                self._lose(f"{_store_holder()} is lost: the store of the process group is gone ({error})")
            if self._stop.wait(INTERVAL):
                return

    def _look(self) -> None:
        others = range(1, self._size) if self._rank == 0 else (0,)
        for other in others:
            self._hear(other)
        if self._rank != 0 and (told := self._get("lost")) is not None:
            self._lose(told)
        if self._rank == 0 and self._lost is not None:
            self._store.set(f"{self._prefix}/lost", self._lost)

    def _hear(self, other: int) -> None:
        """Note what another process told last, and whether it is lost."""
        told, now = self._get(str(other)), time.monotonic()
        if told is None:
            return  # it has not begun; how long that may take is the process group's own limit
        if told.startswith(_LEFT):
            self._lose(f"process {other} has given up: {told.removeprefix(_LEFT)}")
        before = self._heard.get(other)
        if before is None or before[0] != told:
            self._heard[other] = told, now
        elif told != _DONE and now - before[1] > PATIENCE:
            self._lose(f"process {other} is lost: it has given no sign of life for {PATIENCE:g} seconds")

    def _lose_absent(self) -> None:
        """Note a process that has never told that it lives, where a transfer has failed."""
        try:
            absent = [other for other in range(self._size) if self._get(str(other)) is None]
        except (RuntimeError, ValueError):
            return  # the beat tells of a store that is gone
        if absent:
            self._lose(f"process {absent[0]} is lost: it has given no sign of life")

    def _wait_for_listeners(self) -> None:
        """Keep the store, which may end with this process, until the others know who is lost."""
        deadline = time.monotonic() + 3 * INTERVAL
        try:
            self._store.set(f"{self._prefix}/lost", self._lost)
            while time.monotonic() < deadline and not all(map(self._has_left, range(1, self._size))):
                time.sleep(0.1)
        except (RuntimeError, ValueError):
            return  # then the others know that from the store

    def _has_left(self, other: int) -> bool:
        return (self._get(str(other)) or "").startswith((_DONE, _LEFT))

    def _get(self, name: str) -> str | None:
        key = f"{self._prefix}/{name}"
        return self._store.get(key).decode() if self._store.check([key]) else None


def _reason(error: BaseException | None) -> str:
    """Why a process gave up, in a line."""
    if isinstance(error, GeneratorExit):
        return "its loop over the weights ended early"
    return one_line(str(error) or type(error).__name__)


def _store_holder() -> str:
    """Process that holds the store."""
    return "the launcher" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "process 0"


class LostProcess(ConversionError):
    """A process that moves a model together with this one is lost, or has given up."""
