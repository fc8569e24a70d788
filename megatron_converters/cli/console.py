"""What is said to the user. A log that cannot be written ends no conversion; a result that cannot must not pass for one."""

from __future__ import annotations

import argparse
import codecs
import errno
import gc
import io
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from ..basics.errors import ConversionError, Interrupted, reason_of
from ..basics.json_values import finite
from ..basics.streams import write

#: Open files that a process may want at most: one for each file that is read, and those being written.
_OPEN_FILES = 65536
#: Objects made until Python looks for cycles among them. Plans are many small objects and no cycles: at its usual 700 a third of
#: the planning time goes there.
_OBJECTS = 200_000


def prepare_process() -> None:
    """What every entry point does first: standard streams that can be used, as many open files as the system allows, and
    garbage collection that does not get in the way.

    Where the caller closed a standard stream, the next file that is opened would get its number, and what libraries say there.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, this one
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with suppress(OSError):  # whatever a caller has put there may refuse; then names are printed as before
                stream.reconfigure(errors=_ENCODED_ANYHOW)
    _allow_many_files()
    gc.set_threshold(_OBJECTS)


def _encoded_anyhow(error: UnicodeError) -> tuple[bytes, int]:
    """Characters that an encoding lacks, escaped; bytes of file names that were no characters, as they are."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    parts = (
        bytes([ord(char) - 0xDC00]) if "\udc80" <= char <= "\udcff" else char.encode("ascii", "backslashreplace")
        for char in text
    )
    return b"".join(parts), error.end


_ENCODED_ANYHOW = "megatron_converters.anyhow"
codecs.register_error(_ENCODED_ANYHOW, _encoded_anyhow)


def _allow_many_files() -> None:
    with suppress(ImportError, OSError, ValueError):  # not every system has such limits, or lets us raise them
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@contextmanager
def errors_told(who: str) -> Iterator[None]:
    """End the process with one sentence and the error's exit code, without a traceback."""
    try:
        yield
    except ConversionError as error:
        fail(who, error)
    except KeyboardInterrupt:
        fail(who, Interrupted())
    except OSError as error:
        fail(who, ConversionError(_of_system(error)))


def _of_system(error: OSError) -> str:
    if error.filename is None and error.errno == errno.ENOENT:  # os.getcwd
        return "the current folder has been removed; change to another"
    return reason_of(error) if error.filename is None else f"{error.filename}: {reason_of(error)}"


def fail(who: str, error: ConversionError) -> NoReturn:
    """Say why, without a traceback, and exit with the error's code."""
    warn(f"{who}: error: {error}{error.hint}")
    raise SystemExit(error.exit_code)


def put(text: str) -> None:
    """Print a result. A reader that has enough of it, such as `head`, ends nothing; raises if it cannot be written."""
    fault = write(sys.stdout, text)
    if fault is not None:
        raise ConversionError(f"cannot print the result: {fault}")


def put_json(value: Any) -> None:
    """Print a result as JSON that every reader takes: without NaN, and in ASCII, whatever the encoding."""
    put(json.dumps(finite(value), indent=1, allow_nan=False))


def warn(text: str) -> None:
    """Say something on standard error; lost where that cannot be written."""
    write(sys.stderr, text)


def say(args: argparse.Namespace, line: str) -> None:
    """Print a line of a result, unless --quiet; warnings are always shown, on standard error."""
    if line.startswith("warning"):
        warn(line)
    elif not getattr(args, "quiet", False):
        put(line)


def report(args: argparse.Namespace, line: str) -> None:
    """As `say`, for what a conversion tells of itself: lost where it cannot be written, since the conversion is what counts."""
    with suppress(ConversionError):
        say(args, line)
