"""pytest fixtures and hooks; `tests/conftest.py` imports them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .pool import MegatronPool


@pytest.fixture(scope="session")
def megatron_pool() -> Iterator[MegatronPool]:
    """The session's pool of megatron-core processes; it costs nothing until its first job."""
    pool = MegatronPool()
    yield pool
    pool.close()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests of one pool in one process: with `pytest -n N --dist loadgroup` it is started once."""
    for item in items:
        if "megatron_pool" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("megatron"))
