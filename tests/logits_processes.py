"""Processes for logits that need not import torch, megatron-core and transformers anew: forked from one that has done so.

The product spawns them, as the tests do that start a script. The oracle's pool has a server of its own, since its processes have
stand-ins for Transformer Engine, which the product's must not see.
"""

from __future__ import annotations

from functools import cache, partial
from multiprocessing import context, forkserver, popen_forkserver
from multiprocessing.process import BaseProcess
from typing import Any

import pytest

from megatron_converters.logits import hf, megatron
from megatron_converters.logits.pool import Pool


@cache
def _server(module: str) -> forkserver.ForkServer:
    """Server that has imported a module."""
    server = forkserver.ForkServer()  # type: ignore[attr-defined]
    server.set_forkserver_preload([module])
    return server


class _Popen(popen_forkserver.Popen):
    def _launch(self, process_obj: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(forkserver, "connect_to_new_process", _server(process_obj.module).connect_to_new_process)
            super()._launch(process_obj)


class _Process(context.ForkServerProcess):
    #: What the server has imported.
    module: str

    @staticmethod
    def _Popen(process_obj: BaseProcess) -> Any:
        return _Popen(process_obj)


class PreloadedContext(context.ForkServerContext):
    """Context of processes that are forked from one that has imported a module."""

    def __init__(self, module: str) -> None:
        super().__init__()
        self._module = module

    def Process(self, *args: Any, **options: Any) -> _Process:
        """Process that is not started yet."""
        process = _Process(*args, **options)
        process.module = self._module
        return process


PRELOADED = PreloadedContext("tests.logits_preload")


def use_preloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the product's own pools start their processes so."""
    for module in (hf, megatron):
        monkeypatch.setattr(module, "Pool", partial(Pool, context=PRELOADED))
