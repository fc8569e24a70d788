"""Cache of huggingface_hub: snapshots of models, whether they have the files that are needed, and the command that completes them.

A cache holds `models--OWNER--NAME/`, with `snapshots/COMMIT/`, whose files are links into `blobs/`, and `refs/`, which names the
commits of branches and tags.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Collection, Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from ..basics.errors import ConversionError, UsageError
from ..basics.quantities import few
from .hub_access import Model, library

#: Missing files that a command names at most; where there are more, it names none.
_SHOWN_FILES = 5
_SNAPSHOTS, _REFS, _BLOBS, _TREES, _MODELS = "snapshots", "refs", "blobs", "trees", "models"
_MAIN = "main"
#: Between the parts of the name of a model's folder in a cache.
_SEPARATOR = "--"

#: Path of an index of shards, by its name; None where it is not there.
IndexFile = Callable[[str], Path | None]


class Snapshot(NamedTuple):
    """Folder of a model, here or in the cache, and notes for the user."""

    folder: Path
    notes: list[str]


class Choice(NamedTuple):
    """Choice of a model's files.

    `needed` says without which of the listed files the model is of no use, or none where it is no model of the kind at all;
    `beside` are patterns of the names of further ones. `lacking` says what a model that is none lacks, and `named` names it.
    `needless` are patterns that `hf download` is told to leave out.
    """

    needed: Callable[[Collection[str], IndexFile], set[str]]
    beside: tuple[str, ...]
    lacking: str
    named: str
    needless: tuple[str, ...]


def among(listed: Iterable[str], patterns: Collection[str]) -> set[str]:
    """Those of the listed files whose names match a pattern; a star matches no slash."""
    return {
        name
        for name in listed
        if any(name.count("/") == pattern.count("/") and fnmatchcase(name, pattern) for pattern in patterns)
    }


#: Patterns of what a reference model or a tokenizer needs nothing of. Of several, an older `hf` heeds the last alone.
WEIGHTS = ("*.gguf", "*.pth", "*.bin", "original/*", "*.safetensors")


class Place(NamedTuple):
    """Place of a snapshot: the cache, the model's name on the Hub and the commit."""

    cache: Path
    repo: str
    commit: str

    def __str__(self) -> str:
        return f"{self.repo}@{self.commit}"

    def note(self, name: str | Path) -> str:
        """What a name means that a user gave."""
        return f"{name} is commit {self.commit} of {self.repo} on the Hub"

    @property
    def top(self) -> Path:
        """The model's folder in the cache."""
        return self.cache / _SEPARATOR.join([_MODELS, *self.repo.split("/")])


def place_of(folder: str | os.PathLike[str]) -> Place | None:
    """What a folder is a snapshot of, by the names of the folders in which it lies; None for any other folder."""
    return _place(Path(os.path.realpath(folder)))


def place_around(folder: str | os.PathLike[str]) -> Place | None:
    """What a folder is a snapshot of, or lies in a snapshot of, as `original/` and a checkpoint's `iter_*` do."""
    path = Path(os.path.realpath(folder))
    return next(filter(None, map(_place, (path, *path.parents))), None)


def _place(path: Path) -> Place | None:
    repo = repo_of(path.parent.parent) if path.parent.name == _SNAPSHOTS else None
    return None if repo is None else Place(path.parent.parent.parent, repo, path.name)


def revisions(top: Path) -> list[str]:
    """Names of the revisions of a model's folder in a cache, or else its commits."""
    refs = sorted(path.relative_to(top / _REFS).as_posix() for path in _files(top / _REFS))
    return refs or sorted(path.name for path in (top / _SNAPSHOTS).glob("*"))


def repo_of(folder: Path) -> str | None:
    """Name of the model whose folder in a cache this is; None if it is none."""
    kind, *names = folder.name.split(_SEPARATOR)
    return "/".join(names) if kind == _MODELS and len(names) in (1, 2) and all(names) else None


def model_folder(path: Path) -> Path | None:
    """A model's folder in a cache, if this is one or its `snapshots/`; None for any other folder."""
    if not path.is_dir():
        return None
    real = Path(os.path.realpath(path))
    top = real.parent if real.name == _SNAPSHOTS else real
    is_one = repo_of(top) is not None and any((top / name).is_dir() for name in (_SNAPSHOTS, _REFS, _BLOBS))
    return top if is_one else None


def latest(top: Path) -> Path | None:
    """Snapshot of a model's folder in a cache: that of the main branch, or the only one; None where it has none."""
    main, snapshots = top / _REFS / _MAIN, sorted((top / _SNAPSHOTS).glob("*"))
    if main.is_file():
        return top / _SNAPSHOTS / main.read_text(encoding="utf-8").strip()
    if len(snapshots) > 1:
        raise UsageError(
            f"{top} has several snapshots and no main branch; give one of {', '.join(map(str, snapshots))}"
        )
    return snapshots[0] if snapshots else None


def present(place: Place, folder: Path, choice: Choice, *, strict: bool) -> Snapshot:
    """Snapshot of which no needed file is missing; unless `strict`, one of another kind of model passes, too."""
    missing, beside, is_model = state_of(place, folder, choice)
    model = Model(place.repo, place.commit)
    if not is_model and strict and _tree(place):
        raise ConversionError(f"{place} has {choice.lacking}; only such models are read")
    if missing and (strict or is_model):
        exact = missing if is_model and len(missing) <= _SHOWN_FILES else []
        broken = any((folder / name).is_symlink() for name in missing)
        cause = f" (they are links into {_BLOBS}/, which was not copied with them)" if broken else ""
        raise ConversionError(
            f"the cache has only a part of {place}, without {few(missing)}{cause}; pass --download, or "
            f"{run_advice(command_line(model, choice, exact, place.cache))}"
        )
    if not beside:
        return Snapshot(folder, [])
    command = command_line(model, choice, beside if len(beside) <= _SHOWN_FILES else (), place.cache)
    return Snapshot(folder, [f"warning: the cache lacks {few(beside)} of {place}; {run_advice(command)}"])


class State(NamedTuple):
    """Needed files that a snapshot lacks, those beside them that the model has on the Hub, and whether it is a model at all."""

    missing: list[str]
    beside: list[str]
    is_model: bool


def state_of(place: Place, folder: Path, choice: Choice) -> State:
    """State of a snapshot, as far as the cache tells."""
    found = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
    there = {name for name, path in found.items() if path.is_file()}
    tree = _tree(place)
    listed = found.keys() | tree
    needed = choice.needed(listed, lambda index: folder / index if index in there else None)
    # What an index names and the Hub does not have is a fault of the model, and the source's to judge.
    missing = sorted(name for name in needed - there if not tree or name in tree) if needed else [choice.named]
    return State(missing, sorted(among(listed, choice.beside) - there - needed), bool(needed))


def _files(folder: Path) -> list[Path]:
    """Files below a folder, links that lead nowhere among them."""
    return [path for path in folder.rglob("*") if not path.is_dir()]


def _tree(place: Place) -> set[str]:
    """Names of all files of a commit, where huggingface_hub (2.0 on) has kept a list of them; else none."""
    if not (place.top / _TREES / f"{place.commit}.json").is_file():
        return set()
    hub = library()
    read = getattr(hub, "get_cached_repo_tree", None)
    if read is None:
        return set()
    try:
        found = read(place.repo, revision=place.commit, cache_dir=str(place.cache))
    except (ValueError, hub.errors.CachedRepoTreeNotFoundError):  # a list of another release, or a damaged one
        return set()
    return {file.path for file in found}


def command_line(model: Model, choice: Choice, files: Collection[str] = (), cache: Path | None = None) -> str:
    """The line of `hf download` that gets these files, or all that the choice may need."""
    words = ["hf", "download", model.repo, *files]
    if model.revision is not None:
        words += ["--revision", model.revision]
    if not files:
        words += [word for pattern in choice.needless for word in ("--exclude", pattern)]
    if cache is not None and os.path.realpath(cache) != os.path.realpath(_setting("HF_HUB_CACHE") or ""):
        words += ["--cache-dir", str(cache)]
    return shlex.join(words)


def run_advice(command: str) -> str:
    """The advice to run a command that needs the Hub."""
    return f"{'unset HF_HUB_OFFLINE and ' if _setting('HF_HUB_OFFLINE') else ''}run: {command}"


def _setting(name: str) -> Any:
    """A constant of huggingface_hub; None where that is not installed, which local folders do not need."""
    try:
        return getattr(library().constants, name)
    except ConversionError:
        return None
