"""Batch files: the tasks in a YAML or JSON file, all of which must be sound before the first begins."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path
from typing import Any

from megatron_converters.basics.errors import ConversionError, UsageError, one_line
from megatron_converters.basics.json_files import read_json
from megatron_converters.basics.quantities import size
from megatron_converters.basics.yaml_files import read_yaml

from .api import ModelConverterAPI
from .conversion import output_of
from .options import Task
from .sources import on_hub

_KEYS = ("models", "tasks")


def read_tasks(path: Path, output_dir: str) -> list[Task]:
    """Tasks of a batch file, each with its output. Raises one `UsageError` with everything that is wrong."""
    try:
        content = read_json(path) if path.suffix == ".json" else read_yaml(path)
    except ConversionError as error:
        raise UsageError(str(error)) from error
    key = next((key for key in _KEYS if key in content), None)
    if key is None or len(content) > 1:
        raise UsageError(
            f"{path} has {_listed(content)} at the top; it needs one key, {' or '.join(_KEYS)}, with a list"
        )
    items = content[key]
    if not isinstance(items, list) or not items:
        raise UsageError(f"{path}: {key} is no list of conversions; begin each with '- model_path: …'")
    tasks, problems = [], []
    for number, item in enumerate(items, 1):
        try:
            tasks.append(_task(f"{key} {number}: ", item, output_dir))
        except UsageError as error:
            problems.append(str(error))
    problems += _same_outputs(tasks)
    if problems:
        raise UsageError("\n  - ".join([f"{path}:", *problems]))
    return tasks


def _task(where: str, item: Any, output_dir: str) -> Task:
    if not isinstance(item, dict):
        raise UsageError(f"{where}{one_line(repr(item))} is no mapping; write lines such as 'model_path: …'")
    task = Task.of(item, where)
    return Task.of({**item, "output_path": output_of(task, output_dir)}, where)


def _same_outputs(tasks: list[Task]) -> list[str]:
    """Outputs that several tasks would write."""
    by_place = defaultdict(list)
    for task in tasks:
        by_place[os.path.realpath(str(task.output_path))].append(task)
    return [
        f"{' and '.join(task.model for task in group)} have the same output {group[0].output_path}; give each its own output_path"
        for group in by_place.values()
        if len(group) > 1
    ]


def _listed(content: dict[str, Any]) -> str:
    return ", ".join(map(one_line, content)) or "nothing"


def check_disks(api: ModelConverterAPI, tasks: list[Task]) -> list[str]:
    """Raise unless every file system has room for what is left to write there; returns notes on tasks that are not counted.

    A task that cannot be planned will say so itself; a model that must be downloaded first has no size yet.
    """
    needed: dict[int, int] = defaultdict(int)
    free: dict[int, int] = {}
    notes = []
    for task in tasks:
        if on_hub(task.model):
            notes.append(f"the disk check leaves out {task.model}, which may have to be downloaded")
            continue
        try:
            planned = api.plan(task)
        except (ConversionError, OSError):
            continue
        device = _device(Path(str(task.output_path)))
        needed[device] += planned["bytes_left"]
        free[device] = planned["bytes_free"]
    short = [
        f"{size(needed[device])}, but {size(free[device])} are free"
        for device in needed
        if needed[device] > free[device]
    ]
    if short:
        raise ConversionError(
            f"the outputs need {'; '.join(short)}: free some space, or pass --skip-disk-check to convert as many as fit"
        )
    return notes


def _device(path: Path) -> int:
    """File system of a folder, or of its nearest existing parent."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path.stat().st_dev
