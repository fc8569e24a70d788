"""Fixtures and hooks of pytest, imported by `tests/conftest.py`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .pool import MegatronPool


@pytest.fixture(scope="session")
def megatron_pool() -> Iterator[MegatronPool]:
    """Pool of megatron-core processes for the session; its processes start at the first job."""
    pool = MegatronPool()
    yield pool
    pool.close()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep all tests of the pool in one process: with `pytest -n N --dist loadgroup` it then starts once."""
    for item in items:
        if "megatron_pool" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("megatron"))
