"""Fixtures for all tests: those of the oracle, and tiny models that are made once in a session."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: tests and the processes that they start run in parallel

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.helpers import convert, succeeded
from tests.oracle.fixtures import megatron_pool, pytest_collection_modifyitems  # noqa: F401 - pytest looks for them here
from tests.oracle.mindspore import pytest_runtest_setup  # noqa: F401

if TYPE_CHECKING:
    import torch


@pytest.fixture(scope="session")
def hf_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Function `hf_model(family, **options of make_model)`: a read-only folder, made at the first call."""
    from tests.oracle.hf import make_model

    @cache
    def make(family: str, **options: Any) -> Path:
        return make_model(family, tmp_path_factory.mktemp("hf") / family, **options)

    return make


@pytest.fixture(scope="session")
def logits(hf_model: Callable[..., Path]) -> Callable[[str], torch.Tensor]:
    """Function `logits(family)`: what transformers computes of `hf_model(family)` for `TOKENS`; computed once."""
    from tests.oracle.hf import TOKENS, hf_logits

    return cache(lambda family: hf_logits(hf_model(family), TOKENS))


@pytest.fixture(scope="session")
def megatron_model(
    hf_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Path, Path]]:
    """Function `megatron_model(family, tp, pp)`: a model's folder and its checkpoint by our converter, both read-only."""

    @cache
    def make(family: str, tp: int = 2, pp: int = 2, **options: Any) -> tuple[Path, Path]:
        source, target = hf_model(family, **options), tmp_path_factory.mktemp("megatron") / family
        sizes = ("--target-tensor-parallel-size", tp, "--target-pipeline-parallel-size", pp)
        succeeded(convert("--load-dir", source, "--save-dir", target, *sizes))
        return source, target

    return make


@pytest.fixture
def preloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes that compute logits are forked from one that has imported all that they need."""
    from tests.logits_processes import use_preloaded

    use_preloaded(monkeypatch)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what was not run for want of something that only some machines have, by reason."""
    left: dict[str, list[str]] = {}
    for report in terminalreporter.stats.get("skipped", []):
        _, found, reason = str(report.longrepr[2]).partition("not run: ")
        if found:
            left.setdefault(reason, []).append(report.nodeid.rpartition("::")[2])
    for reason, names in left.items():
        terminalreporter.write_line(f"not run, since {reason}: {', '.join(names)}")
