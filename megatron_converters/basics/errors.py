"""Errors that a user is meant to read, and helpers for their messages."""

from __future__ import annotations

import errno
from collections.abc import Iterable

from .exit_codes import FAILED, INTERRUPTED, USAGE


class ConversionError(Exception):
    """A conversion cannot continue; the message says what is wrong, where, and what to do.

    Entry points print the message alone, without a traceback, and exit with `exit_code`, or what their row of `EXIT_CODES` says.
    """

    exit_code = FAILED
    #: Printed after the message: how to continue, where that is known.
    hint = ""


class UsageError(ConversionError):
    """The command line contradicts itself, the source or the tool (exit code 2, as argparse uses)."""

    exit_code = USAGE


class MissingPath(UsageError, FileNotFoundError):
    """A file or folder that a caller names is not there; `except FileNotFoundError` catches it, too."""


class InvalidConfiguration(UsageError, AssertionError):
    """Numbers of a caller contradict each other or the model; `except AssertionError` catches it, too."""


class Unclear(ConversionError):
    """The source leaves open something that a reference model can settle: `what` it is, without the remedy.

    `attributes` are those of a checkpoint's args that leave it open although they are there.
    """

    def __init__(self, what: str, remedy: str | None = None, attributes: Iterable[str] = ()) -> None:
        super().__init__(f"{what}; {remedy}" if remedy else what)
        self.what, self.attributes = what, tuple(attributes)


class UnclearMultipliers(Unclear):
    """The source leaves open where it has the model's multipliers, which `--mup` can say."""


class UnknownArchitecture(ConversionError):
    """The source is a model of a kind that no family describes."""


class Stopped(ConversionError):
    """Something outside ended the run. Finished work is kept: the same command continues from there."""


class DiskError(Stopped):
    """The disk is full or fails."""


class Interrupted(Stopped):
    """The user stopped the run (exit code as shells give it for SIGINT)."""

    exit_code = INTERRUPTED

    def __init__(self) -> None:
        super().__init__("interrupted before the end")


#: Characters of a name or value from a file that a message shows at most.
_MAX_SHOWN = 200
#: Remedies by errno.
_REMEDIES = {
    errno.ENOSPC: "free some space or choose another disk",
    errno.EDQUOT: "the quota is used up; free some space or choose another disk",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.EACCES: "give the user who runs this access to it",
    errno.EROFS: "choose a writable place",
}


def reason_of(error: OSError) -> str:
    """The system's error text, followed by a remedy where one is known."""
    remedy = _REMEDIES.get(error.errno or 0)
    return f"{error.strerror or error}{f'; {remedy}' if remedy else ''}"


def one_line(value: object) -> str:
    """A name or value from a file that may be damaged, made printable and short enough for a message."""
    try:
        text = str(value)
    except (RecursionError, ValueError):  # lists that contain themselves; integers of more digits than Python converts
        text = f"a {type(value).__name__}"
    shown = text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"
    return shown if shown.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in shown)


def raise_all(what: str, problems: Iterable[str], limit: int = 50, remedy: str | None = None) -> None:
    """Raise one `ConversionError` that lists the first `limit` problems and counts the rest; do nothing if there are none.

    `remedy` is an additional last line.
    """
    listed = list(problems)
    if not listed:
        return
    lines = [f"  - {problem}" for problem in listed[:limit]]
    if len(listed) > limit:
        lines.append(f"  - … and {len(listed) - limit} more")
    raise ConversionError("\n".join([what, *lines, *([remedy] if remedy else [])]))
