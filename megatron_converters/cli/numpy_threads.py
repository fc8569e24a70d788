"""numpy without the idle threads of its linear algebra, of which conversions use nothing."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

#: Variable that OpenBLAS heeds as it is loaded, before OMP_NUM_THREADS.
_VARIABLE = "OPENBLAS_NUM_THREADS"


def import_numpy() -> None:
    """Import numpy for a command line, which is a process of ours. A caller's choice of threads stands."""
    if "numpy" not in sys.modules:
        with single_threaded_blas():
            import numpy  # noqa: F401


@contextmanager
def single_threaded_blas() -> Iterator[None]:
    """Context in which an OpenBLAS that is loaded starts no threads, here or in a process that is started.

    OpenBLAS otherwise starts one for each core, which takes longer than the rest of numpy's import. What is started afterwards,
    such as a process with torch, inherits nothing of it.
    """
    if _VARIABLE in os.environ:
        yield
        return
    os.environ[_VARIABLE] = "1"
    try:
        yield
    finally:
        os.environ.pop(_VARIABLE, None)
