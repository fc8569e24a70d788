"""Output to the user. A log line that cannot be written is dropped; a result that cannot be written is an error."""

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
from ..basics.exit_codes import ANY, FAILED, INTERRUPTED, USAGE, ExitCodes
from ..basics.json_values import finite
from ..basics.streams import write
from .interrupts import watched

#: Open files that a process may need at most: one for each file that is read, and those being written.
_OPEN_FILES = 65536
#: Objects created before Python searches them for cycles. Plans are many small objects without cycles: at Python's default of
#: 700, the search takes a third of the planning time.
_COLLECTION_THRESHOLD = 200_000
#: Kinds of errors in JSON, by exit code, and that of a fault of this program.
_KINDS = {FAILED: "failed", USAGE: "usage", INTERRUPTED: "interrupted"}
FAULT = "fault"


def prepare_process() -> None:
    """Prepare the process of an entry point: usable standard streams, a high limit of open files, rare garbage collection.

    A standard stream that the caller closed is opened on the null device; otherwise the next file that is opened would get its
    number, and with it the output of libraries.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, this one
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with suppress(OSError):  # a stream of the caller's may not allow it; it then keeps its error handler
                stream.reconfigure(errors=_ERROR_HANDLER)
    _raise_file_limit()
    gc.set_threshold(_COLLECTION_THRESHOLD)


def _escape_unencodable(error: UnicodeError) -> tuple[bytes, int]:
    """Error handler of encodings: characters that the encoding lacks are escaped; undecodable bytes of file names are kept."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    parts = (
        bytes([ord(char) - 0xDC00]) if "\udc80" <= char <= "\udcff" else char.encode("ascii", "backslashreplace")
        for char in text
    )
    return b"".join(parts), error.end


_ERROR_HANDLER = "megatron_converters.escape"
codecs.register_error(_ERROR_HANDLER, _escape_unencodable)


def _raise_file_limit() -> None:
    with suppress(ImportError, OSError, ValueError):  # not every system has such limits, or allows raising them
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def program(script: str, command: str) -> str:
    """Name by which the user started an entry point: that of the installed command, or else of the script in a checkout."""
    return command if os.path.splitext(os.path.basename(sys.argv[0]))[0] == command else script


@contextmanager
def exit_on_error(program: str, codes: ExitCodes = ANY, *, as_json: bool = False) -> Iterator[None]:
    """Context that ends the process on an error, or on Ctrl-C: one sentence, no traceback, the exit code that `codes` has for it.

    With `as_json` the error is an object on standard output, too, unless Ctrl-C has to end the process at once.
    """
    try:
        with watched(program):
            yield
    except ConversionError as error:
        fail(program, error, codes, as_json=as_json)
    except KeyboardInterrupt:
        fail(program, Interrupted(), codes, as_json=as_json)
    except OSError as error:
        fail(program, ConversionError(_system_error_text(error)), codes, as_json=as_json)
    except Exception as error:
        if codes.failure == FAILED and not as_json:
            raise  # Python prints it and ends with the same code
        import traceback

        warn(traceback.format_exc().rstrip())
        _exit(f"{type(error).__name__}: {error}", codes.failure, FAULT, as_json=as_json)


def _system_error_text(error: OSError) -> str:
    if error.filename is None and error.errno == errno.ENOENT:  # os.getcwd
        return "the current folder has been removed; change to another"
    return reason_of(error) if error.filename is None else f"{error.filename}: {reason_of(error)}"


def fail(program: str, error: ConversionError, codes: ExitCodes = ANY, *, as_json: bool = False) -> NoReturn:
    """Print the error without a traceback, and exit with its code."""
    message = f"{error}{error.hint}"
    warn(f"{program}: error: {message}")
    _exit(message, codes.of_error(error.exit_code), _KINDS[error.exit_code], as_json=as_json)


def _exit(message: str, code: int, kind: str, *, as_json: bool) -> NoReturn:
    if as_json:
        put_error(message, code, kind)
    raise SystemExit(code)


def put_error(message: str, code: int, kind: str) -> None:
    """Print an error as JSON; dropped if it cannot be written."""
    with suppress(ConversionError):
        put_json({"error": {"kind": kind, "message": message, "exit_code": code}})


def put(text: str) -> None:
    """Print a result. A reader that closes the pipe, such as `head`, is no error; raises `ConversionError` for other failures."""
    fault = write(sys.stdout, text)
    if fault is not None:
        raise ConversionError(f"cannot print the result: {fault}")


def put_json(value: Any) -> None:
    """Print a result as JSON that every parser accepts: without NaN, and in ASCII for any encoding."""
    put(json.dumps(finite(value), indent=1, allow_nan=False))


def warn(text: str) -> None:
    """Print a line on standard error; dropped if it cannot be written."""
    write(sys.stderr, text)


def say(args: argparse.Namespace, line: str) -> None:
    """Print a line of a result unless --quiet. A warning is always printed, on standard error, where with --json all lines go."""
    if line.startswith("warning"):
        warn(line)
    elif not getattr(args, "quiet", False):
        (warn if getattr(args, "json", False) else put)(line)


def report(args: argparse.Namespace, line: str) -> None:
    """Print a line about a conversion, as `say` does; dropped if it cannot be written, so that the conversion goes on."""
    with suppress(ConversionError):
        say(args, line)
