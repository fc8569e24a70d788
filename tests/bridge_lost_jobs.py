"""Jobs of processes that hold a live model together, one of which ends early."""

from __future__ import annotations

import faulthandler
import itertools
import os
import signal
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from megatron_converters.basics.errors import ConversionError

from .bridge_oracle_jobs import SMALL, loaded


def export_until(folder: Path, victim: int, how: str) -> None:
    """Export everything to all processes; one of them ends early, `how` is a key of `ENDS`."""
    bridge, models = loaded(folder, dict(tp=2, pp=2))
    exported = bridge.export_hf_weights(models, mode="replicate", bucket_bytes=SMALL, show_progress=False)
    for number, _ in enumerate(exported):
        if number == _EARLY and dist.get_rank() == victim:
            ENDS[how]()
            break


def save_until(folder: Path, victim: int, how: str, out: Path, options: Mapping[str, Any]) -> None:
    """Save a model, weight by weight; one of the processes ends in the middle."""
    from megatron_converters.bridge import weights
    from megatron_converters.live.exchange import Exchange
    from megatron_converters.live.source import LiveSource

    bridge, models = loaded(folder, dict(tp=2, pp=2))
    send, calls = Exchange.send, itertools.count()

    def ending(self: Exchange, wanted: Any) -> Any:
        if next(calls) == _EARLY and dist.get_rank() == victim:
            ENDS[how]()
        return send(self, wanted)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "LiveSource", partial(LiveSource, bucket_bytes=SMALL))
        patch.setattr(Exchange, "send", ending)
        bridge.save_hf_pretrained(models, out, show_progress=False, **options)


#: Weights or buckets after which a process ends.
_EARLY = 5


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _fail() -> None:
    raise ValueError("the trainer has failed")


#: Ways in which a process ends early.
ENDS: Mapping[str, Callable[[], None]] = {"stopped": _stop, "killed": _kill, "failed": _fail, "left": lambda: None}


def own_process(
    rank: int, size: int, folder: Path, times: tuple[float, float], job: Callable[..., Any], args: Any
) -> None:
    """Process of a job's own: run it with the others, and leave the text of its error, or none, in the folder.

    The heartbeat has these times, INTERVAL and PATIENCE.
    """
    from megatron_converters.live import heartbeat

    heartbeat.INTERVAL, heartbeat.PATIENCE = times
    faulthandler.dump_traceback_later(60, exit=True)
    dist.init_process_group("gloo", store=_store(rank, size, folder), rank=rank, world_size=size)
    text = ""
    try:
        job(*args)
    except (ConversionError, ValueError) as error:
        text = f"{type(error).__name__}: {error}"
    (folder / f"{rank}.partial").write_text(text)
    (folder / f"{rank}.partial").rename(folder / f"{rank}.txt")
    os._exit(0)  # at once, as a program whose other threads wait for ever


def _store(rank: int, size: int, folder: Path) -> Any:
    """Store that the first process holds, as where nothing but the program starts its processes."""
    path = folder / "port"
    if rank == 0:
        store = TCPStore("127.0.0.1", 0, size, is_master=True, wait_for_workers=False)
        path.with_suffix(".partial").write_text(str(store.port))
        path.with_suffix(".partial").rename(path)
        return store
    while not path.exists():
        time.sleep(0.01)
    return TCPStore("127.0.0.1", int(path.read_text()), size, is_master=False)
