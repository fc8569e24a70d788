"""The one exception that a user is meant to read."""

from __future__ import annotations

import errno
from collections.abc import Iterable


class ConversionError(Exception):
    """A conversion cannot go on; the message says what is wrong, where, and what to do.

    Entry points print the message alone, without a traceback, and exit with `exit_code`.
    """

    exit_code = 1
    #: What follows the message, where more is known of how to go on.
    hint = ""


class UsageError(ConversionError):
    """The command line contradicts itself, the source or the tool (exit code 2, as argparse uses)."""

    exit_code = 2


class Unclear(ConversionError):
    """A source does not say something that a reference can say."""


class Stopped(ConversionError):
    """Something outside ended the run. What is finished is kept, since the same command can go on from there."""


class DiskError(Stopped):
    """The disk is full or fails."""


class Interrupted(Stopped):
    """The user stopped the run (exit code as shells give it for SIGINT)."""

    exit_code = 130

    def __init__(self) -> None:
        super().__init__("interrupted before the end")


#: Letters of a file's name or value in a message.
_MAX_SHOWN = 200
#: By errno: what helps.
_REMEDIES = {
    errno.ENOSPC: "free some space or choose another disk",
    errno.EDQUOT: "the quota is used up; free some space or choose another disk",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.EACCES: "the user who runs this must have the right to it",
    errno.EROFS: "choose a place that can be written",
}


def reason_of(error: OSError) -> str:
    """What the system says, and what helps against it where that is known."""
    remedy = _REMEDIES.get(error.errno or 0)
    return f"{error.strerror or error}{f'; {remedy}' if remedy else ''}"


def one_line(value: object) -> str:
    """A name or value of a file for a message, which damage may have made anything: printable, and not too long."""
    try:
        text = str(value)
    except (RecursionError, ValueError):  # endless lists; numbers of more digits than Python converts
        text = f"a {type(value).__name__}"
    shown = text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in shown)


def raise_all(what: str, problems: Iterable[str], limit: int = 50, remedy: str | None = None) -> None:
    """Raise one `ConversionError` that lists every problem (the first `limit` of them, then a count); nothing if none.

    `remedy` is a last line that says what to do.
    """
    listed = list(problems)
    if not listed:
        return
    lines = [f"  - {problem}" for problem in listed[:limit]]
    if len(listed) > limit:
        lines.append(f"  - … and {len(listed) - limit} more")
    raise ConversionError("\n".join([what, *lines, *([remedy] if remedy else [])]))
