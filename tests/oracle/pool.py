"""A pool of processes that hold the real megatron-core, so that its start-up is paid once in a test session."""

from __future__ import annotations

import multiprocessing
import pickle
import tempfile
import time
import traceback
from argparse import Namespace
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, cast

import torch

from . import checkpoint, jobs
from .errors import OracleError

T = TypeVar("T")
_GRACE = 3.0  # seconds in which the other ranks may finish once one has failed


class _Reply(NamedTuple):
    outcome: Literal["done", "refused", "failed"]
    value: Any  # the job's value, or the error's text


class MegatronPool:
    """`size` processes joined by gloo. They start at the first job, and anew after one that left them in disorder."""

    def __init__(self, size: int = 4, timeout: float = 120.0):
        self.size, self.timeout = size, timeout
        self._workers: list[tuple[BaseProcess, Connection]] = []
        self._meeting_place: tempfile.TemporaryDirectory[str] | None = None

    def logits(
        self,
        root: Path,
        tokens: torch.Tensor,
        *,
        tp: int | None = None,
        pp: int | None = None,
        ep: int | None = None,
        etp: int | None = None,
        impl: str | None = None,
        by_megatron: bool = False,
        qk_norm_over_heads: bool = False,
    ) -> torch.Tensor:
        """float32 [B, S, padded vocabulary] of the checkpoint in `root` for long [B, S] tokens.

        The model is built from the checkpoint's args alone and loaded strictly. `tp`, `pp`, `ep` and `etp` are what
        the folder should hold. `impl` overrides `args.transformer_impl`, as the user's `--transformer-impl` does. `by_megatron`
        allows the enums that Megatron-LM stores in args; otherwise a file may hold Namespace and tensors alone.
        `qk_norm_over_heads` builds OLMoE's attention, which megatron-core lacks.
        Raises OracleError with every missing, unexpected or misshapen key, and every tensor whose copies in several
        ranks' files differ.
        """
        directory = checkpoint.iteration_directory(root)
        wanted = {name: size for name, size in (("tp", tp), ("pp", pp), ("ep", ep), ("etp", etp)) if size}
        return _joined(self.run(jobs.read_logits, directory, tokens, wanted, impl, by_megatron, qk_norm_over_heads))

    def run(self, job: Callable[..., T], *args: Any) -> list[T]:
        """What `job(*args)` returns on each rank; `job` is a module's function. Raises OracleError if a rank fails."""
        if not self._workers:
            self._start()
        message = pickle.dumps((job, args))
        try:
            for _, connection in self._workers:
                connection.send_bytes(message)
            replies = self._replies()
        except BaseException:  # an interrupted wait: late replies would be taken for the next job's
            self.close()
            raise
        outcomes = {reply.outcome for reply in replies.values()}
        # A refusal by every rank is an orderly end; any other failure may leave messages between the ranks.
        if len(replies) < self.size or outcomes not in ({"done"}, {"refused"}):
            self.close()
        errors = list(dict.fromkeys(reply.value for reply in replies.values() if reply.outcome != "done"))
        if len(replies) < self.size:
            errors.append(f"no answer from ranks {sorted(set(range(self.size)) - replies.keys())}")
        if errors:
            raise OracleError("\n".join(errors))
        return [replies[rank].value for rank in range(self.size)]

    def close(self) -> None:
        """End the processes."""
        for process, connection in self._workers:
            connection.close()
            process.kill()
            process.join()
        self._workers = []
        if self._meeting_place:
            self._meeting_place.cleanup()
            self._meeting_place = None

    def _start(self) -> None:
        # One server imports megatron and forks the processes from itself: the import is paid once, not `size` times.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([f"{__package__}.preload"])
        self._meeting_place = tempfile.TemporaryDirectory(prefix="megatron_pool_")
        store = Path(self._meeting_place.name) / "store"
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, self.size, store), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def _replies(self) -> dict[int, _Reply]:
        """Replies by rank, of those that answer in time; once one has failed, the others have little time left."""
        waiting = {connection: rank for rank, (_, connection) in enumerate(self._workers)}
        replies: dict[int, _Reply] = {}
        deadline = time.monotonic() + self.timeout
        while waiting and (ready := wait(list(waiting), max(0.0, deadline - time.monotonic()))):
            for connection in cast("list[Connection]", ready):
                rank, reply = waiting.pop(connection), _received(connection)
                if reply:
                    replies[rank] = reply
                if not reply or reply.outcome != "done":
                    deadline = min(deadline, time.monotonic() + _GRACE)
        return replies


def write_checkpoint(
    pool: MegatronPool, root: Path, args: Namespace, *, seed: int, tokens: torch.Tensor, iteration: int = 1
) -> torch.Tensor:
    """Write random real megatron-core modules into `root`; return their float32 [B, S, padded vocabulary] logits.

    `args` (see `megatron_args`) decide the architecture, the parallel sizes and the stored dtype (`params_dtype`).
    """
    return _joined(pool.run(jobs.write_and_run, root, args, seed, iteration, tokens))


def _joined(shards: list[jobs.Shard]) -> torch.Tensor:
    by_rank = dict(shard for shard in shards if shard is not None)
    return torch.cat([by_rank[rank] for rank in sorted(by_rank)], dim=-1)


def _received(connection: Connection) -> _Reply | None:
    """A process's reply, or None where it has died."""
    try:
        reply: _Reply = pickle.loads(connection.recv_bytes())
    except (EOFError, ConnectionResetError):
        return None
    return reply


def _serve(connection: Connection, rank: int, size: int, store: Path) -> None:
    """A process of the pool: do the jobs that arrive until the other side is gone."""
    from . import preload  # noqa: F401 - where the server could not import it, this process does

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    while True:
        try:
            job, args = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        connection.send_bytes(pickle.dumps(_outcome(job, args)))


def _outcome(job: Callable[..., Any], args: tuple[Any, ...]) -> _Reply:
    try:
        return _Reply("done", job(*args))
    except OracleError as error:
        return _Reply("refused", str(error))
    except Exception:  # noqa: BLE001 - whatever a job raises goes to the test as text
        return _Reply("failed", traceback.format_exc())
