"""What the process at the other end of the queue gets when it unpickles our objects.

A stock Megatron-LM saver must find torch tensors and torch dtypes. Our own saver calls `receive_ours` first and gets our
objects instead: then no tensor travels, and torch need not be imported.
"""

from __future__ import annotations

_receives_ours = False


def receive_ours(wanted: bool = True) -> None:
    """From now on, unpickling in this process gives our own objects (or no longer does)."""
    global _receives_ours
    _receives_ours = wanted


def receives_ours() -> bool:
    """Whether unpickling gives our own objects."""
    return _receives_ours
