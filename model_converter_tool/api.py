"""Python API of the Model Converter Tool."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import megatron_converters.api as mc
from megatron_converters.basics.errors import (
    ConversionError,
    Interrupted,
    UnclearMultipliers,
    UnknownArchitecture,
    UsageError,
    reason_of,
)

from . import history, settings
from .conversion import OnProgress, output_of, plan, prepare, run
from .formats import HF, NOT_WRITTEN, OUTPUT_FORMATS, SHOWN, detected_format, output_format
from .model_types import model_types, unsupported
from .options import Task, unknown_keys
from .sources import on_hub, resolve
from .workspace import workspace

_LOG = logging.getLogger(__name__)
_WARNING = "warning: "


@dataclass(frozen=True)
class ConversionResult:
    """Outcome of a conversion.

    `error` says why it failed. `validation` is the plan (see `validate_conversion`), None if there was none. `extra_info` has
    `flags` of pretrain_gpt.py, `notes`, `warnings`, `manifest`, `seconds`, and of a failure `exit_code`.
    """

    success: bool
    error: str | None = None
    output_path: str | None = None
    validation: dict[str, Any] | None = None
    extra_info: dict[str, Any] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return self.success


class ModelConverterAPI:
    """Conversions and what is known of them. `workspace_path` is the folder of settings and history."""

    def __init__(self, workspace_path: str | os.PathLike[str] | None = None) -> None:
        self.workspace = workspace(workspace_path)

    def convert_model(
        self,
        model_path: str | os.PathLike[str] | None = None,
        output_format: str | None = None,
        output_path: str | os.PathLike[str] | None = None,
        *,
        progress: OnProgress | None = None,
        **options: Any,
    ) -> ConversionResult:
        """Convert a model, a folder or a name on the Hub (`model_path` or `model_name`).

        `options` are `model_type`, `dtype`, `device` and those of the command line, with underscores. An error of the conversion is
        in the result; a call with an argument that does not exist, or without a model, raises `TypeError`.
        """
        given = _arguments("convert_model", model_path, output_format, output_path, options)
        try:
            task = Task.of(given)
        except UsageError as error:
            return _failure(error, {})
        return self.run(task, progress)

    def run(self, task: Task, progress: OnProgress | None = None) -> ConversionResult:
        """Convert a task, and record it in the history."""
        begun, start = datetime.now(timezone.utc), time.monotonic()
        try:
            result = self._run(task, progress)
        except (Interrupted, KeyboardInterrupt):
            self.record(task, begun, ConversionResult(False, str(Interrupted()), task.output_path))
            raise
        result.extra_info["seconds"] = time.monotonic() - start
        fault = self.record(task, begun, result)
        if fault is not None:
            result.extra_info.setdefault("warnings", []).append(f"the history lacks this conversion: {fault}")
        return result

    def record(self, task: Task, begun: datetime, result: ConversionResult) -> str | None:
        """Append a conversion to the history; returns why that failed, or None."""
        entry = {
            "time": begun.isoformat(timespec="seconds"),
            "input": task.model,
            "output": result.output_path,
            "format": task.output_format,
            "success": result.success,
            "seconds": round(result.extra_info.get("seconds", 0.0), 3),
            "error": result.error,
        }
        return history.append(self.workspace, entry)

    def _run(self, task: Task, progress: OnProgress | None) -> ConversionResult:
        output = task.output_path
        try:
            chosen = settings.read(self.workspace)
            output = output_of(task, chosen["output_dir"])
            done = run(task, output, chosen, progress)
        except Interrupted:
            raise
        except (ConversionError, OSError, MemoryError) as error:
            _LOG.debug("the conversion failed", exc_info=True)
            return _failure(error, {"output_path": output}, task)
        lines = [line for line in done.notes if not line.startswith(_WARNING)]
        warnings = [line.removeprefix(_WARNING) for line in done.notes if line.startswith(_WARNING)]
        result = done.result
        extra = {
            "flags": list(result.flags),
            "notes": [*lines, *result.notes],
            "warnings": [*warnings, *result.warnings],
            "manifest": str(result.manifest),
        }
        return ConversionResult(True, None, output, done.validation, extra)

    def validate_conversion(
        self,
        model_path: str | os.PathLike[str] | None = None,
        output_format: str | None = None,
        output_path: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """What `convert_model` would write and need, without writing it: `valid`, `problems`, `target`, `files`, `bytes`, …

        A model of the Hub is downloaded for it.
        """
        given = _arguments("validate_conversion", model_path, output_format, output_path, options)
        try:
            return self.plan(Task.of(given))
        except (ConversionError, OSError) as error:
            return {"valid": False, "problems": [error_text(error)]}

    def plan(self, task: Task) -> dict[str, Any]:
        """Plan of a task; raises `ConversionError` where there can be none."""
        chosen = settings.read(self.workspace)
        return plan(prepare(task, chosen), output_of(task, chosen["output_dir"]))

    def detect_model(self, model_path: str | os.PathLike[str]) -> dict[str, Any]:
        """Format and family of a model; `format` is "unknown", and `error` says why, if they cannot be told.

        A model of the Hub is not downloaded for it.
        """
        name = os.fspath(model_path)
        if on_hub(name):
            return {"path": name, "format": SHOWN[HF], "family": None, "hub": True}
        found = {"path": name, "format": "unknown", "family": None, "hub": False}
        try:
            folder = resolve(name).folder
            kind = detected_format(folder)
            found["format"] = SHOWN[kind]
            return {**found, "family": mc.inspect(folder)["model"]["family"]}
        except (ConversionError, OSError) as error:
            return {**found, "error": error_text(error)}

    def inspect_model(self, model_path: str | os.PathLike[str]) -> dict[str, Any]:
        """What a model holds, from headers alone. Raises `ConversionError`."""
        folder = resolve(os.fspath(model_path)).folder
        detected_format(folder)
        try:
            return mc.inspect(folder)
        except UnclearMultipliers:  # which decide nothing of names and shapes
            return mc.inspect(folder, read=mc.ReadOptions(mup="raw"))
        except UnknownArchitecture as error:
            raise unsupported(error, folder) from error

    def check_model(self, model_path: str | os.PathLike[str], format_name: str | None = None) -> dict[str, Any]:
        """Whether a folder is a whole model of this format (any if None), and as its manifest says where it has one.

        Every tensor is matched by name and shape; with a manifest (conversion.json) every byte is read and compared.
        """
        report: dict[str, Any] = {"path": os.fspath(model_path), "success": False, "problems": [], "manifest": None}
        try:
            folder = resolve(os.fspath(model_path)).folder
            kind = detected_format(folder)
            report["format"] = SHOWN[kind]
            if format_name is not None and _format_meant(format_name) != kind:
                report["problems"] = [
                    f"Format detection failed: {model_path} is of the format {SHOWN[kind]}, not {format_name}"
                ]
                return report
            found = self.inspect_model(folder)
            report |= {
                "family": found["model"]["family"],
                "parameters": found["parameters"]["total"],
                **{name: found["weights"][name] for name in ("tensors", "bytes")},
                "files": [file["file"] for file in found["files"]],
            }
            report |= _compared_with_manifest(folder)
        except (ConversionError, OSError) as error:
            _LOG.debug("the check failed", exc_info=True)
            report["problems"] = [error_text(error)]
        return {**report, "success": not report["problems"]}

    def list_supported(self, full: bool = True) -> dict[str, Any]:
        """Formats and model types; with `full` also families, and formats that are not written with what to do instead."""
        found: dict[str, Any] = {
            "input_formats": list(SHOWN.values()),
            "output_formats": {name: entry.words for name, entry in OUTPUT_FORMATS.items()},
            "model_types": model_types(),
        }
        if full:
            found["families"] = [family._asdict() for family in mc.supported_families()]
            found["not_written"] = dict(NOT_WRITTEN)
        return found

    def get_history(self) -> list[dict[str, Any]]:
        """Conversions, the oldest first: `time`, `input`, `output`, `format`, `success`, `seconds`, `error`."""
        return history.entries(self.workspace)

    def manage_config(self, action: str = "show", key: str | None = None, value: Any = None) -> Any:
        """Show settings ("show"), get or set one ("get", "set"), or list presets ("list-presets"). Raises `UsageError`."""
        action = action.replace("_", "-")
        if action == "show":
            return settings.read(self.workspace)
        if action == "list-presets":
            return settings.PRESETS
        if action not in ("get", "set"):
            raise UsageError(f"there is no action {action!r}; known are show, get, set, list-presets")
        if key is None:
            raise UsageError(f"{action} needs the name of a setting; known are {', '.join(settings.SETTINGS)}")
        return (
            settings.value_of(self.workspace, key) if action == "get" else settings.change(self.workspace, key, value)
        )


def error_text(error: BaseException, model: object = None) -> str:
    """One sentence for an error."""
    if isinstance(error, MemoryError):
        return (
            f"Memory error: there is not enough memory to convert {model}; a conversion takes some hundred megabytes for a model "
            "of any size, so end other programs, raise the limit of the container or job, or pass fewer workers"
        )
    if isinstance(error, ConversionError):
        return f"{error}{error.hint}"
    if isinstance(error, OSError):
        return reason_of(error) if error.filename is None else f"{error.filename}: {reason_of(error)}"
    return f"{type(error).__name__}: {error}"


def _failure(error: BaseException, found: Mapping[str, Any], task: Task | None = None) -> ConversionResult:
    exit_code = error.exit_code if isinstance(error, ConversionError) else 1
    text = error_text(error, task.model if task else None)
    return ConversionResult(False, text, extra_info={"exit_code": exit_code}, **found)


def _arguments(
    function: str,
    model_path: str | os.PathLike[str] | None,
    output_format: str | None,
    output_path: str | os.PathLike[str] | None,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Keys of a task from the arguments of a call; raises `TypeError` as Python does for a call that is not right."""
    for name in unknown_keys(options):
        raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
    if model_path is None and options.get("model_name") is None:
        raise TypeError(f"{function}() missing 1 required argument: 'model_path' (or 'model_name')")
    if output_format is None:
        raise TypeError(f"{function}() missing 1 required argument: 'output_format'")
    return {"model_path": model_path, "output_format": output_format, "output_path": output_path, **options}


def _format_meant(name: str) -> str:
    """Format of the library for the name of an input or output format."""
    by_shown = {shown: kind for kind, shown in SHOWN.items()}
    return by_shown.get(name) or output_format(name).writes


def _compared_with_manifest(folder: Path) -> dict[str, Any]:
    """Problems of a folder that has a manifest, by that; a folder without one has none."""
    from megatron_converters.comparison.manifest_check import find_output
    from megatron_converters.conversion.journal import MANIFEST

    manifest = find_output(folder, None) / MANIFEST
    if not manifest.exists():
        return {}
    return {"manifest": str(manifest), "problems": list(mc.verify(folder).findings)}
