"""Settings of a user, which stand where a command or call does not say otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from megatron_converters.basics.errors import UsageError, one_line
from megatron_converters.basics.json_files import read_json
from megatron_converters.cli.options.values import DTYPES

from . import kinds
from .model_types import AUTO, check_name
from .options import checked

FILE = "config.json"
#: Value of the setting `dtype` that stands for the source's.
SOURCE = "source"
#: Pseudo-setting: `set preset NAME` sets all values of a preset.
PRESET = "preset"


class Setting(NamedTuple):
    """Setting: value where none is set, how one is checked, and what it is for."""

    default: Any
    kind: kinds.Kind
    words: str


def _model_type(value: Any) -> str:
    name = kinds.text(value)
    check_name(name)
    return name


SETTINGS = {
    "output_dir": Setting("./outputs", kinds.text, "folder of outputs whose path is not given"),
    "dtype": Setting(SOURCE, kinds.choice(SOURCE, *DTYPES), "type to write"),
    "model_type": Setting(AUTO, _model_type, "model type that is expected"),
    "max_workers": Setting(1, kinds.at_least(1), "conversions of a batch at once"),
    "max_retries": Setting(1, kinds.at_least(0), "further attempts of a batch at a conversion that failed"),
}
PRESETS: dict[str, dict[str, Any]] = {
    "default": {name: setting.default for name, setting in SETTINGS.items()},
    "training": {"dtype": "bf16"},
    "parallel": {"max_workers": 4, "max_retries": 2},
}


def read(workspace: Path) -> dict[str, Any]:
    """Value of every setting."""
    path = workspace / FILE
    stored = read_json(path) if path.exists() else {}
    for name, value in stored.items():
        _setting(name, f"{path}: ")
        checked(f"{path}: {name}", SETTINGS[name].kind, value)
    return {name: stored.get(name, setting.default) for name, setting in SETTINGS.items()}


def change(workspace: Path, name: str, value: Any) -> dict[str, Any]:
    """Set a value, or those of a preset; returns all."""
    from megatron_converters.conversion.staging import write_text

    if name == PRESET:
        if value not in PRESETS:
            raise UsageError(f"there is no preset {one_line(repr(value))}; known are {', '.join(PRESETS)}")
        new = PRESETS[value]
    else:
        new = {name: checked(name, _setting(name).kind, value)}
    values = {**read(workspace), **new}
    workspace.mkdir(parents=True, exist_ok=True)
    write_text(workspace / FILE, json.dumps(values, indent=2) + "\n")
    return values


def value_of(workspace: Path, name: str) -> Any:
    """Value of one setting."""
    _setting(name)
    return read(workspace)[name]


def _setting(name: str, where: str = "") -> Setting:
    if name not in SETTINGS:
        raise UsageError(f"{where}there is no setting {one_line(repr(name))}; known are {', '.join(SETTINGS)}")
    return SETTINGS[name]
