"""Pool of processes with the real megatron-core, so that it starts once in a test session."""

from __future__ import annotations

import multiprocessing
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from megatron_converters.basics.errors import ConversionError
from megatron_converters.logits import cpu
from megatron_converters.logits.pool import Pool

from . import checkpoint, jobs
from .errors import OracleError

T = TypeVar("T")


class MegatronPool:
    """Pool of `size` processes joined by gloo. They start at the first job, and again after one that failed."""

    def __init__(self, size: int = 4, timeout: float = 120.0):
        # One server imports megatron and forks the processes, so that it is imported once, not `size` times.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([f"{__package__}.preload"])
        self._pool = Pool(size, _setup, timeout, context)

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
        rotary_divisors: Sequence[float] = (),
    ) -> torch.Tensor:
        """Logits, float32 [B, S, padded vocabulary], of the checkpoint in `root` for int64 tokens [B, S].

        The model is built from the checkpoint's args alone and loaded strictly. `tp`, `pp`, `ep` and `etp` are the sizes that
        the folder should have. `impl` overrides `args.transformer_impl`, as the user's `--transformer-impl` does. `by_megatron`
        allows the enums that Megatron-LM stores in args; otherwise a file may hold only Namespace and tensors.
        `rotary_divisors` divide the frequencies of rotary embeddings, as LongRoPE does.
        Raises `OracleError` with every missing, unexpected or misshapen key, and every tensor whose copies in the files
        of several ranks differ.
        """
        directory = checkpoint.iteration_directory(root)
        wanted = {name: size for name, size in (("tp", tp), ("pp", pp), ("ep", ep), ("etp", etp)) if size}
        return _concatenate(self.run(jobs.read_logits, directory, tokens, wanted, impl, by_megatron, rotary_divisors))

    def distributed_logits(
        self,
        root: Path,
        tokens: torch.Tensor,
        *,
        impl: str | None = None,
        rotary_divisors: Sequence[float] = (),
        **sizes: int,
    ) -> torch.Tensor:
        """Logits, as in `logits`, of a `torch_dist` checkpoint loaded at sizes `tp`, `pp`, `ep`, `etp`, by default its args'."""
        directory = checkpoint.iteration_directory(root)
        return _concatenate(self.run(jobs.read_distributed, directory, tokens, sizes, impl, rotary_divisors))

    def run(self, job: Callable[..., T], *args: Any) -> list[T]:
        """Results of `job(*args)` on each rank; `job` is a module-level function. Raises `OracleError` if a rank fails."""
        try:
            return self._pool.run(job, *args)
        except ConversionError as error:
            raise OracleError(str(error)) from error

    def close(self) -> None:
        """End the processes."""
        self._pool.close()


def write_checkpoint(
    pool: MegatronPool, root: Path, args: Namespace, *, seed: int, tokens: torch.Tensor, iteration: int = 1
) -> torch.Tensor:
    """Save a random model of the real megatron-core in `root`; returns its logits, float32 [B, S, padded vocabulary].

    `args` (see `megatron_args`) determine the architecture, the parallel sizes and the stored dtype (`params_dtype`).
    """
    return _concatenate(pool.run(jobs.write_and_run, root, args, seed, iteration, tokens))


def write_distributed(
    pool: MegatronPool,
    root: Path,
    args: Namespace,
    *,
    seed: int,
    tokens: torch.Tensor,
    iteration: int = 1,
    **metadata: Any,
) -> torch.Tensor:
    """Save and run as `write_checkpoint`, but as `torch_dist`; `metadata` is added to Megatron-LM's for `sharded_state_dict`."""
    options = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True, **metadata}
    return _concatenate(pool.run(jobs.write_distributed, root, args, seed, iteration, tokens, options))


def _concatenate(shards: list[jobs.Shard]) -> torch.Tensor:
    by_rank = dict(shard for shard in shards if shard is not None)
    return torch.cat([by_rank[rank] for rank in sorted(by_rank)], dim=-1)


def _setup(rank: int, size: int, folder: Path) -> None:
    from . import preload  # noqa: F401 - imported here if the server could not

    cpu.init_gloo(rank, size, folder)
