"""`modelconvert convert INPUT FORMAT`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from megatron_converters.basics.errors import ConversionError, UsageError
from megatron_converters.cli.console import put, warn

from ..formats import NOT_WRITTEN, OUTPUT_FORMATS
from ..model_types import AUTO
from ..options import ALIASES, DEVICES, OPTIONS, REFUSED, Task, checked


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("model_path", metavar="INPUT", help="Folder, or owner/name[@revision] on the Hugging Face Hub.")
    formats = "; ".join(f"{name}: {entry.words}" for name, entry in OUTPUT_FORMATS.items())
    parser.add_argument("output_format", metavar="FORMAT", help=f"{formats}. Not written: {', '.join(NOT_WRITTEN)}.")
    parser.add_argument(
        "-o", "--output-path", metavar="DIR", default=None, help="Folder to write; ./outputs/NAME_FORMAT by default."
    )
    parser.add_argument(
        "--model-type",
        metavar="NAME",
        default=AUTO,
        help="Model that is expected: minicpm, llama, mistral, or a family's name; auto, the default, takes any.",
    )
    parser.add_argument("--device", choices=DEVICES, default=DEVICES[0], help="Accepted; conversions run on the CPU.")
    flags = {name: alias for alias, name in ALIASES.items()}
    for name, option in OPTIONS.items():
        flag = f"--{flags.get(name, name).replace('_', '-')}"
        more: dict[str, Any] = {"metavar": option.metavar, "type": _checked(flag, option.kind)}
        if not option.metavar:
            more = {"action": "store_true"}
        parser.add_argument(flag, dest=name, default=None, help=option.words, **more)
    for name, refused in REFUSED.items():
        more = {"metavar": "X"} if refused.has_value else {"action": "store_true"}
        parser.add_argument(refused.flag, dest=name, default=None, help=argparse.SUPPRESS, **more)


def _checked(flag: str, kind: Callable[[Any], Any]) -> Callable[[str], Any]:
    return lambda text: checked(flag, kind, text)


def run(args: argparse.Namespace) -> int:
    """Convert; 0 if the output is complete."""
    given = {name: value for name, value in vars(args).items() if name not in ("command", "workspace")}
    try:
        task = Task.of(given)
    except UsageError as error:
        warn(f"Conversion failed: {error}")
        return error.exit_code
    return _converted(task, args.workspace)


def _converted(task: Task, workspace: str | None) -> int:
    from .. import settings
    from ..api import ModelConverterAPI
    from ..conversion import output_of

    api = ModelConverterAPI(workspace)
    output = output_of(task, settings.read(api.workspace)["output_dir"])
    _tell(f"[Output directory used]: {output}")
    result = api.run(task, _shown_progress())
    for line in result.extra_info.get("warnings", ()):
        warn(f"warning: {line}")
    if not result.success:
        warn(f"Conversion failed: {result.error}")
        return int(result.extra_info["exit_code"])
    for line in result.extra_info["notes"]:
        _tell(line)
    if result.extra_info["flags"]:
        _tell("pretrain_gpt.py needs:\n" + " \\\n".join(f"  {flag}" for flag in result.extra_info["flags"]))
    _tell(f"Conversion succeeded! Output: {result.output_path}")
    return 0


def _tell(line: str) -> None:
    """Print a line about the conversion, which does not fail because nobody reads it."""
    with suppress(ConversionError):
        put(line)


def _shown_progress() -> Callable[[int, int], None]:
    """Progress on standard error, as the library's own command shows it."""
    from megatron_converters.conversion.progress import make_progress

    display = make_progress(quiet=False)
    shown = 0

    def show(done: int, total: int) -> None:
        nonlocal shown
        if done == 0:
            display.start(total)
        display(done - shown)
        shown = done
        if done == total:
            display.stop()

    return show
