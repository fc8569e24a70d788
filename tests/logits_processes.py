"""Processes for logits that need not import torch, megatron-core and transformers anew: forked from one that has done so.

The product spawns them, as the tests do that start a script. The oracle's pool has a server of its own, since its processes have
stand-ins for Transformer Engine, which the product's must not see.
"""

from __future__ import annotations

from functools import partial
from multiprocessing import context, forkserver, popen_forkserver
from multiprocessing.process import BaseProcess
from typing import Any

import pytest

from megatron_converters.logits import hf, megatron
from megatron_converters.logits.pool import Pool

_server = forkserver.ForkServer()  # type: ignore[attr-defined]
_server.set_forkserver_preload(["tests.logits_preload"])


class _Popen(popen_forkserver.Popen):
    def _launch(self, process_obj: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(forkserver, "connect_to_new_process", _server.connect_to_new_process)
            super()._launch(process_obj)


class _Process(context.ForkServerProcess):
    @staticmethod
    def _Popen(process_obj: BaseProcess) -> Any:
        return _Popen(process_obj)


class _Context(context.ForkServerContext):
    Process = _Process


PRELOADED = _Context()


def use_preloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the product's own pools start their processes so."""
    for module in (hf, megatron):
        monkeypatch.setattr(module, "Pool", partial(Pool, context=PRELOADED))
