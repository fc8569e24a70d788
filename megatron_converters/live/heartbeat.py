"""Heartbeat of the processes that move a model together, so that none waits for one that is lost, whose number it then says.

Each process tells the store of torch.distributed that it lives. The first one looks at all others, and tells them who is lost; the
others look at the first one and at what it tells.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any, cast

from ..basics.errors import ConversionError, one_line

#: Seconds between beats, and without a beat after which a process is lost.
INTERVAL, PATIENCE = 2.0, 16.0
_DONE, _LEFT = "done", "left: "
_NUMBERS = itertools.count()


class Heartbeat:
    """Context in which this process, number `rank` of `size`, tells that it lives, and knows of others that do not.

    All processes must enter their contexts in the same order. One that leaves by an exception tells the others so.
    """

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self._store, self._rank, self._size = _Answering(store), rank, size
        #: Number of this context, the same in all processes.
        self.number = next(_NUMBERS)
        self._prefix = f"megatron_converters/{self.number}"
        self._stop = threading.Event()
        self._lost: str | None = None
        #: What this process tells instead of a number, once it has given up.
        self._left: str | None = None
        #: Processes that are lost, or have given up.
        self._gone: set[int] = set()
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
        if error is not None and not isinstance(error, LostProcess):
            self.give_up(_reason(error))
        self._tell(self._left or _DONE)
        if error is not None and self._rank == 0:
            self._stay()

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
        while self._lost is None and time.monotonic() - begun < PATIENCE + 4 * INTERVAL:
            time.sleep(0.1)
            if time.monotonic() - begun > 2 * INTERVAL:
                self._lose_absent()
        reason = self._lost or f"a transfer between processes failed: {one_line(str(error))}"
        return LostProcess(reason)

    def put(self, name: str, value: bytes) -> None:
        """Leave a value for the others."""
        self._asked("set", name, value)

    def wait_for(self, name: str) -> bytes:
        """Value that a process leaves, as soon as it does; raises `LostProcess` if one is lost."""
        pause = 0.001
        while (found := self._asked("get", name)) is None:
            self.check()
            time.sleep(pause)
            pause = min(2 * pause, 0.1)
        return cast(bytes, found)

    def give_up(self, reason: str) -> None:
        """Tell the others that this process does not go on, unless they know of another one that is lost."""
        if self._lost is None and self._left is None:
            self._left = _LEFT + one_line(reason)
            self._tell(self._left)

    def meet(self, name: str) -> None:
        """Wait for all processes; raises `LostProcess` if one is lost. The first one, which may hold the store, leaves last."""
        self._come(name)
        if self._rank == 0:
            self.put(name, b"")
        self.wait_for(name)
        self._come(f"{name}, seen")

    def _come(self, name: str) -> None:
        """Tell the first process that this one is here; the first one waits for all."""
        self.put(f"{name} {self._rank}", b"")
        for other in range(self._size) if self._rank == 0 else ():
            self.wait_for(f"{name} {other}")

    def _asked(self, what: str, name: str, *value: Any) -> Any:
        """Answer of the store; raises `LostProcess` if it is gone."""
        try:
            return getattr(self._store, what)(f"{self._prefix}/{name}", *value)
        except (RuntimeError, ValueError) as error:
            self._lose(f"process 0 is lost, or the launcher that holds the store of the process group: {error}")
            raise LostProcess(str(self._lost)) from error

    def _tell(self, text: str) -> None:
        with suppress(LostProcess):
            self._asked("set", str(self._rank), text)

    def _stay(self) -> None:
        """Wait until the others know why this process ends, since the store may end with it."""
        deadline = time.monotonic() + 3 * INTERVAL
        with suppress(LostProcess):
            if self._lost is not None:
                self._asked("set", "lost", self._lost)
            left = set(range(1, self._size)) - self._gone
            while left and time.monotonic() < deadline:
                left -= {other for other in left if (self._get(str(other)) or "").startswith((_DONE, _LEFT))}
                time.sleep(0.02)

    def _lose(self, reason: str) -> None:
        """Note that a process is lost, unless one is already."""
        if self._lost is None:
            self._lost = one_line(reason)

    def _beat(self) -> None:
        for number in itertools.count():
            try:
                self._asked("set", str(self._rank), self._left or str(number))
                self._look()
            except LostProcess:
                return
            if self._stop.wait(INTERVAL):
                return

    def _look(self) -> None:
        if self._rank != 0 and (told := self._get("lost")) is not None:
            self._lose(told)
        others = range(1, self._size) if self._rank == 0 else (0,)
        for other in others:
            self._hear(other)
        if self._rank == 0 and self._lost is not None:
            self._asked("set", "lost", self._lost)

    def _hear(self, other: int) -> None:
        """Note what another process told last, and whether it is lost."""
        told, now = self._get(str(other)), time.monotonic()
        if told is None:
            return  # it has not begun; how long that may take is the process group's own limit
        if told.startswith(_LEFT):
            self._gone.add(other)
            self._lose(f"process {other} has given up: {told.removeprefix(_LEFT)}")
        before = self._heard.get(other)
        if before is None or before[0] != told:
            self._heard[other] = told, now
        elif told != _DONE and now - before[1] > PATIENCE:
            self._gone.add(other)
            self._lose(f"process {other} is lost: it has given no sign of life for {PATIENCE:g} seconds")

    def _lose_absent(self) -> None:
        """Note a process that has never told that it lives, where a transfer has failed."""
        with suppress(LostProcess):
            absent = [other for other in range(self._size) if self._get(str(other)) is None]
            if absent:
                self._lose(f"process {absent[0]} is lost: it has given no sign of life")

    def _get(self, name: str) -> str | None:
        found: bytes | None = self._asked("get", name)
        return None if found is None else found.decode()


def _reason(error: BaseException) -> str:
    """Text for the others on why this process leaves."""
    if isinstance(error, GeneratorExit):  # the loop of a user, who may have an error of his own
        return "it has left the loop over the weights before their end"
    return str(error) or type(error).__name__


class _Answering:
    """Store whose answers are waited for no longer than `PATIENCE`: one that is held by a stopped process never answers."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self._silent = False

    def set(self, key: str, value: str | bytes) -> None:
        """Set a value."""
        self._ask(lambda: self._store.set(key, value))

    def get(self, key: str) -> bytes | None:
        """Value of a key; None if there is none yet."""
        found: bytes | None = self._ask(lambda: self._store.get(key) if self._store.check([key]) else None)
        return found

    def _ask(self, question: Callable[[], Any]) -> Any:
        if self._silent:
            raise RuntimeError("the store does not answer")
        asking = _Asking(question)
        asking.start()
        asking.join(PATIENCE)
        if asking.is_alive():
            self._silent = True
            raise RuntimeError(f"the store has given no answer for {PATIENCE:g} seconds")
        if asking.failure is not None:
            raise asking.failure
        return asking.answer


class _Asking(threading.Thread):
    """Thread that waits for an answer."""

    def __init__(self, question: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._question = question
        self.answer: Any = None
        self.failure: Exception | None = None

    def run(self) -> None:
        """Ask."""
        try:
            self.answer = self._question()
        except (RuntimeError, ValueError) as error:
            self.failure = error


class LostProcess(ConversionError):
    """A process that moves a model together with this one is lost, or has given up."""
