"""Folders of the package: who may import whom, read from the source without importing it, and how long a file may be."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "megatron_converters"
#: From top to bottom: a folder imports from those below it; beside each other, in one direction alone.
LEVELS = (
    ("cli",),
    ("tensor_parallel", "bridge"),
    ("",),  # modules at the top of the package, such as api.py
    ("inspection", "comparison", "logits"),
    ("live",),
    ("formats",),
    ("conversion",),
    ("assets",),
    ("families", "sharding"),
    ("model",),
    ("storage",),
    ("basics",),
)
_LEVEL = {folder: number for number, level in enumerate(LEVELS) for folder in level}
#: The package itself, of which everyone may take the version, and its commands, which start the highest folder.
_COMMANDS = ("__main__", "tp_pp_converter", "ckpt_to_hf_minicpm_with_tp_pp")
_APART = ("megatron_converters", *(f"megatron_converters.{name}" for name in _COMMANDS))
_MOST_AT_THE_TOP = 14
_LONGEST = 400


@cache
def modules() -> dict[str, Path]:
    """Every module and package, by its dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(name: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    """The package's modules that a module imports, anywhere in it."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            for alias in node.names:
                yield from [target for target in (f"{base}.{alias.name}", base) if target in known][:1]


@cache
def edges() -> set[tuple[str, str]]:
    """Who imports whom, by module."""
    known = modules()
    found = {(name, target) for name, path in known.items() for target in imported(name, path, known)}
    return {(name, target) for name, target in found if name not in _APART and target not in _APART}


def folder_of(name: str) -> str:
    """The folder in which a module lies, dotted, empty for the top of the package; a package lies in itself."""
    known = modules()
    inside = name if known[name].name == "__init__.py" else name.rpartition(".")[0]
    return inside.removeprefix("megatron_converters").lstrip(".")


def cycle(graph: set[tuple[str, str]]) -> list[str]:
    """One circle of a graph; empty if it has none."""
    after: dict[str, set[str]] = {}
    for name, target in graph:
        if name != target:
            after.setdefault(name, set()).add(target)
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        found = next((circle for target in sorted(after.get(name, ())) if (circle := walk(target, [*path, name]))), [])
        done.add(name)
        return found

    return next((circle for name in sorted(after) if (circle := walk(name, []))), [])


def test_modules_do_not_import_each_other_in_circles() -> None:
    assert cycle(edges()) == []


def test_folders_do_not_import_each_other_in_circles() -> None:
    assert cycle({(folder_of(name), folder_of(target)) for name, target in edges()}) == []


def test_no_folder_imports_from_one_above_it() -> None:
    def level(name: str) -> int:
        return _LEVEL[folder_of(name).partition(".")[0]]

    assert {(name, target) for name, target in edges() if level(target) < level(name)} == set()


def test_every_folder_has_a_level() -> None:
    assert {folder_of(name).partition(".")[0] for name in modules()} == _LEVEL.keys()


def test_formats_never_import_each_other() -> None:
    between = {
        (name, target)
        for name, target in edges()
        if folder_of(name).startswith("formats.") and folder_of(target).startswith("formats")
        if folder_of(name) != folder_of(target)
    }
    assert between == set()


def test_few_modules_stand_at_the_top() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= _MOST_AT_THE_TOP


def test_each_file_is_read_in_one_sitting() -> None:
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in modules().items()}
    assert {name: length for name, length in lengths.items() if length > _LONGEST} == {}
