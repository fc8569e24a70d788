"""Releases of Megatron-LM that this project knows, as text such as "0.16"."""

from __future__ import annotations

import re

from ...basics.errors import UsageError

#: Oldest and newest release whose arguments and checkpoints are known here.
OLDEST, NEWEST = "0.8", "0.19"
_TEXT = re.compile(r"(?:core_)?(?:[vr])?0\.(\d{1,3})(?:\.\w+)*$")


def parse(text: str) -> str:
    """Release in the form "0.16", from text such as "0.16", "0.16.1", "core_v0.16.1" or "core_r0.16.0"."""
    found = _TEXT.match(text.strip())
    if found is None or not _number(OLDEST) <= int(found[1]) <= _number(NEWEST):
        raise UsageError(
            f"{text!r} is no release of Megatron-LM that is known here; name one from {OLDEST} to {NEWEST}, such as {NEWEST}"
        )
    return f"0.{int(found[1])}"


def _number(release: str) -> int:
    return int(release.partition(".")[2])


def before(release: str, since: str) -> bool:
    """Whether `release` is older than `since`; no release is older than an empty `since`."""
    return bool(since) and _number(release) < _number(since)


def latest(*found: str) -> str:
    """The newest of these releases; empty ones do not count."""
    return max(filter(None, found), key=_number, default="")


def previous(release: str) -> str:
    """Release before this one."""
    return f"0.{_number(release) - 1}"
