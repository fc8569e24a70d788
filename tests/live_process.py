"""Tests of live models: each runs in a process with megatron-core, which the process of the tests never imports."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

from megatron_converters.logits.pool import Pool
from tests.logits_processes import PreloadedContext
from tests.pool_jobs import nothing

_TIMEOUT = 120.0
#: Process of the tests of this session, in turn; another one is started after a failure.
_POOL = Pool(1, nothing, _TIMEOUT, PreloadedContext("tests.live_preload"))


def live(test: Callable[..., None]) -> Callable[..., None]:
    """Test whose body runs in a process with megatron-core, with the values of its fixtures, which must be plain."""

    @functools.wraps(test)
    def run(**arguments: Any) -> None:
        _POOL.run(_call, test.__module__, test.__name__, arguments)

    return run


def _call(module: str, name: str, arguments: dict[str, Any]) -> None:
    """Job of the process: the body of a test."""
    inspect.unwrap(getattr(importlib.import_module(module), name))(**arguments)
