"""Transfer of parameters between processes: one buffer for each pair of processes, or from one to all."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from .heartbeat import Heartbeat
from .layout import Key
from .parameters import Parameters

T = TypeVar("T")
#: Seconds between looks at transfers under way.
_POLL = 0.0005
#: Alignment of parameters in a buffer, in bytes.
_ALIGNED = 16


class Wanted(NamedTuple):
    """Parameter of the process `owner`, of this shape and dtype."""

    owner: int
    key: Key
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Bytes of the parameter."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes in a buffer."""
        return -(-self.size // _ALIGNED) * _ALIGNED


#: Parameters by owner and key, as tensors.
Received = dict[tuple[int, Key], torch.Tensor]


class Exchange:
    """Transfers of `parameters` of this process and of the others, which must all ask for the same at the same time."""

    def __init__(self, parameters: Parameters, process: int, heartbeat: Heartbeat | None) -> None:
        self._parameters, self._process, self._heartbeat = parameters, process, heartbeat
        self._device = torch.device("cpu")
        if heartbeat is not None and "nccl" in dist.get_backend():
            self._device = torch.device("cuda", torch.cuda.current_device())
        # Of its own, so that no transfer of an earlier run that was given up is taken for one of this; nccl knows no tags.
        self._tag = heartbeat.number if heartbeat is not None and self._device.type == "cpu" else 0

    def begin(self) -> None:
        """Wait until all processes are about to transfer: what one refuses before leaves no transfer of another one behind."""
        if self._heartbeat is not None:
            self._heartbeat.meet("begin")

    def send(self, wanted: Mapping[int, Iterable[Wanted]]) -> Received:
        """Give each process the parameters that it wants; returns those of this one."""
        received, operations = self._own(wanted.get(self._process, ())), []
        for target, (owner, parts) in _pairs(wanted):
            if self._process not in (owner, target):
                continue
            buffer = self._buffer(parts, filled=owner == self._process)
            if owner == self._process:
                operations.append(dist.P2POp(dist.isend, buffer, target, tag=self._tag))
            else:
                operations.append(dist.P2POp(dist.irecv, buffer, owner, tag=self._tag))
                received |= _views(buffer, parts)
        if operations:
            self._wait(dist.batch_isend_irecv(operations))
        return received

    def broadcast(self, wanted: Sequence[Wanted]) -> Received:
        """Give all processes these parameters."""
        received: Received = {}
        for owner, parts in _by_owner(wanted):
            if self._heartbeat is None:
                received |= self._own(parts)
                continue
            buffer = self._buffer(parts, filled=owner == self._process)
            self._wait([dist.broadcast(buffer, owner, async_op=True)])
            received |= _views(buffer, parts)
        return received

    def _own(self, wanted: Iterable[Wanted]) -> Received:
        return {
            (each.owner, each.key): self._parameters[each.key].detach()
            for each in wanted
            if each.owner == self._process
        }

    def _buffer(self, parts: Sequence[Wanted], *, filled: bool) -> torch.Tensor:
        """Buffer for these parameters, with those of this process if `filled`."""
        buffer = torch.empty(sum(part.nbytes for part in parts), dtype=torch.uint8, device=self._device)
        if filled:
            for (_, key), view in _views(buffer, parts).items():
                view.copy_(self._parameters[key].detach())
        return buffer

    def _wait(self, works: Sequence[Any]) -> None:
        """Wait for transfers, as long as no process is lost."""
        if self._device.type == "cuda":
            _poll(lambda: all(work.is_completed() for work in works), self._heartbeat)
            for work in works:
                work.wait()
        else:  # a transfer of gloo does not tell whether it is complete but by waiting
            _run_watched(lambda: [work.wait() for work in works], self._heartbeat)


def gathered(mine: Any, heartbeat: Heartbeat | None) -> list[Any]:
    """Values that all processes pass in, by process, as long as none is lost."""
    if heartbeat is None:
        return [mine]
    values: list[Any] = [None] * dist.get_world_size()
    if "nccl" in dist.get_backend():  # a thread of its own would take another device
        dist.all_gather_object(values, mine)
    else:
        _run_watched(lambda: dist.all_gather_object(values, mine), heartbeat)
    return values


def _run_watched(action: Callable[[], Any], heartbeat: Heartbeat | None) -> None:
    """Run an action that waits for other processes, and wait for it as long as none of them is lost."""
    waiting = _Waiting(action)
    waiting.start()
    _poll(lambda: not waiting.is_alive(), heartbeat)
    if waiting.failure is not None:
        raise (waiting.failure if heartbeat is None else heartbeat.explain(waiting.failure)) from waiting.failure


def _poll(done: Callable[[], bool], heartbeat: Heartbeat | None) -> None:
    pause = _POLL
    while not done():
        if heartbeat is not None:
            heartbeat.check()
        time.sleep(pause)
        pause = min(2 * pause, 0.02)


class _Waiting(threading.Thread):
    """Thread that runs an action which waits for other processes."""

    def __init__(self, action: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._action = action
        self.failure: BaseException | None = None

    def run(self) -> None:
        """Run it, and keep its failure."""
        try:
            self._action()
        except RuntimeError as error:
            self.failure = error


def in_buckets(items: Iterable[T], nbytes: Callable[[T], int], limit: int) -> Iterator[list[T]]:
    """Items in their order, in buckets of at most `limit` bytes, unless one item is larger."""
    bucket: list[T] = []
    filled = 0
    for item in items:
        size = nbytes(item)
        if bucket and filled + size > limit:
            yield bucket
            bucket, filled = [], 0
        bucket.append(item)
        filled += size
    yield bucket


def _by_owner(wanted: Iterable[Wanted]) -> Iterator[tuple[int, list[Wanted]]]:
    """Different parameters of each owner, in an order that is the same in all processes."""
    found: dict[int, dict[Key, Wanted]] = {}
    for each in wanted:
        found.setdefault(each.owner, {})[each.key] = each
    for owner in sorted(found):
        yield owner, list(found[owner].values())


def _pairs(wanted: Mapping[int, Iterable[Wanted]]) -> Iterator[tuple[int, tuple[int, list[Wanted]]]]:
    """Each target with each other process whose parameters it wants."""
    for target in sorted(wanted):
        for owner, parts in _by_owner(wanted[target]):
            if owner != target:
                yield target, (owner, parts)


def _views(buffer: torch.Tensor, parts: Sequence[Wanted]) -> Received:
    """Views of a buffer as its parameters."""
    found: Received = {}
    start = 0
    for part in parts:
        found[part.owner, part.key] = buffer[start : start + part.size].view(part.dtype).view(part.shape)
        start += part.nbytes
    return found
