"""Types that a process gets when it unpickles this package's objects from the queue: ours, or torch's.

A stock Megatron-LM saver needs torch tensors and torch dtypes. Our own saver calls `receive_own_types` first and gets our
objects instead, so that no tensor data is sent and torch need not be imported.
"""

from __future__ import annotations

_own_types = False


def receive_own_types(enabled: bool = True) -> None:
    """Make unpickling in this process give our own types, or torch's again if not `enabled`."""
    global _own_types
    _own_types = enabled


def receives_own_types() -> bool:
    """Whether unpickling in this process gives our own types."""
    return _own_types
