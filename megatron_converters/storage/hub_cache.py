"""Cache of huggingface_hub: snapshots of models, whether they have the files that are needed, and downloads of what is missing.

A cache holds `models--OWNER--NAME/`, with `snapshots/COMMIT/`, whose files are links into `blobs/`, and `refs/`, which names the
commits of branches and tags.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Collection, Iterable
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ..basics.errors import ConversionError, MissingPath, UsageError
from .hub_access import Model, address, in_one_sentence, library, reason

#: Missing files that a message lists at most.
_SHOWN_FILES = 5
_SNAPSHOTS, _REFS, _BLOBS, _TREES, _MODELS = "snapshots", "refs", "blobs", "trees", "models"
_MAIN = "main"
#: Between the parts of the name of a model's folder in a cache.
_SEPARATOR = "--"
#: Answers of HTTP for which there is a sentence: no valid token, and no right to read.
_UNKNOWN, _FORBIDDEN = 401, 403

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

    @property
    def top(self) -> Path:
        """The model's folder in the cache."""
        return self.cache / _SEPARATOR.join([_MODELS, *self.repo.split("/")])


def place_of(folder: str | os.PathLike[str]) -> Place | None:
    """What a folder is a snapshot of, by the names of the folders in which it lies; None for any other folder."""
    path = Path(os.path.realpath(folder))
    repo = _repo_of(path.parent.parent) if path.parent.name == _SNAPSHOTS else None
    return None if repo is None else Place(path.parent.parent.parent, repo, path.name)


def _repo_of(folder: Path) -> str | None:
    """Name of the model whose folder in a cache this is; None if it is none."""
    kind, *names = folder.name.split(_SEPARATOR)
    return "/".join(names) if kind == _MODELS and len(names) in (1, 2) and all(names) else None


class _Remote(NamedTuple):
    """Model on the Hub, and how it is reached: huggingface_hub, the model, the user's token, the folder of the cache.

    Without a token, or a cache, those of huggingface_hub are used. With `local_only`, the Hub is not asked.
    """

    hub: Any
    model: Model
    token: str | None
    cache_dir: str | None
    local_only: bool

    @property
    def cache(self) -> str:
        """Folder of the cache."""
        return self.cache_dir or str(self.hub.constants.HF_HUB_CACHE)

    def listed(self) -> list[str]:
        """Names of its files."""
        if self.local_only:
            raise self.hub.errors.OfflineModeIsEnabled("local_files_only")
        api = self.hub.HfApi(token=self.token)
        return [file.rfilename for file in api.model_info(self.model.repo, revision=self.model.revision).siblings or ()]

    def file(self, name: str) -> Path:
        """One file, downloaded where the cache lacks it."""
        return Path(self.hub.hf_hub_download(self.model.repo, name, **self._options()))

    def files(self, names: Collection[str]) -> Path:
        """Folder of its files of these names, downloaded where the cache lacks them."""
        options = {**self._options(), "allow_patterns": sorted(names)}
        return Path(self.hub.snapshot_download(self.model.repo, **options))

    def cached(self) -> Path | None:
        """Folder of the revision in the cache, complete or not; None where the cache has none. The Hub is not asked."""
        options = {**self._options(), "allow_patterns": [], "local_files_only": True}
        try:
            return Path(self.hub.snapshot_download(self.model.repo, **options))
        except self.hub.errors.LocalEntryNotFoundError:
            return None

    def other_revisions(self) -> list[str]:
        """Names of the model's revisions in the cache, or else of its commits."""
        folder = Place(Path(self.cache), self.model.repo, "").top
        refs = sorted(path.relative_to(folder / _REFS).as_posix() for path in _files(folder / _REFS))
        return refs or sorted(path.name for path in (folder / _SNAPSHOTS).glob("*"))

    def _options(self) -> dict[str, Any]:
        return {"revision": self.model.revision, "token": self.token, "cache_dir": self.cache_dir}


def download(
    name: str,
    choice: Choice,
    *,
    token: str | None = None,
    cache_dir: str | None = None,
    local_only: bool = False,
) -> Snapshot:
    """Download what the cache lacks of the model `owner/name`, or `owner/name@revision`; returns its folder in the cache.

    Without the Hub, offline or out of reach, a complete copy in the cache is used. Raises `ConversionError` with the remedy.
    """
    remote = _remote(name, token, cache_dir, local_only)
    hub, model = remote.hub, remote.model
    with in_one_sentence(hub, partial(_sentence, remote)):
        try:
            listed = remote.listed()
        except hub.errors.RevisionNotFoundError:
            raise
        except (hub.errors.HTTPError, OSError, ValueError) as error:
            folder = _complete(remote, choice)
            if folder is None:
                raise
            offline = isinstance(error, hub.errors.OfflineModeIsEnabled)
            why = f"the Hub cannot be asked for {model} ({reason(error)}); this is its copy in the cache, {folder}"
            return Snapshot(folder, [] if offline else [f"warning: {why}"])
        needed = choice.needed(listed, remote.file)
        if not needed:
            raise ConversionError(f"{model} on the Hub has {choice.lacking}; only such models are downloaded")
        absent = sorted(needed.difference(listed))
        if absent:
            raise ConversionError(f"{model} on the Hub is not complete: it lacks {_few(absent)}; name another model")
        return Snapshot(remote.files(needed | among(listed, choice.beside)), [])


def cached(name: str, choice: Choice) -> Snapshot:
    """Folder of the model `owner/name`, or `owner/name@revision`, in the cache; the Hub is not asked.

    Raises `MissingPath`, or `ConversionError` where only a part of it is there, with the command that downloads the rest.
    """
    remote = _remote(name, None, None, local_only=True)
    model = remote.model
    with in_one_sentence(remote.hub, partial(_sentence, remote)):
        folder = remote.cached()
    if folder is None:
        others = remote.other_revisions()
        there = f", which has it at {_few(others)} alone" if others else ""
        raise MissingPath(
            f"{model} is neither a folder here nor in the cache {remote.cache}{there}; correct the name, or pass --download, "
            f"or {_run(_command(model, choice))}"
        )
    return _present(Place(Path(remote.cache), model.repo, folder.name), folder, choice, strict=True)


def in_cache(path: Path, choice: Choice, *, may_download: bool = False) -> Snapshot:
    """What to read for a local path: the snapshot that is meant if it is a model's folder in a cache, else itself.

    What a snapshot lacks is downloaded if that is allowed. Raises `ConversionError` where files are missing.
    """
    top = _top(path)
    folder = path if top is None else _latest(top, choice)
    place = place_of(folder) if top is not None or path.is_dir() else None
    if place is None:
        return Snapshot(path, [])
    if may_download and _missing(place, folder, choice)[0]:
        found = download(str(place), choice, cache_dir=str(place.cache))
    else:
        found = _present(place, folder, choice, strict=top is not None)
    notes = [] if top is None else [f"{path} is {place} of the Hub"]
    return Snapshot(found.folder, [*notes, *found.notes])


def _top(path: Path) -> Path | None:
    """A model's folder in a cache, if this is one or its `snapshots/`; None for any other folder."""
    if not path.is_dir():
        return None
    real = Path(os.path.realpath(path))
    top = real.parent if real.name == _SNAPSHOTS else real
    is_one = _repo_of(top) is not None and any((top / name).is_dir() for name in (_SNAPSHOTS, _REFS, _BLOBS))
    return top if is_one else None


def _latest(top: Path, choice: Choice) -> Path:
    """Snapshot of a model's folder in a cache: that of the main branch, or the only one."""
    main, snapshots = top / _REFS / _MAIN, sorted((top / _SNAPSHOTS).glob("*"))
    if main.is_file():
        return top / _SNAPSHOTS / main.read_text(encoding="utf-8").strip()
    if len(snapshots) == 1:
        return snapshots[0]
    if snapshots:
        raise UsageError(
            f"{top} has several snapshots and no main branch; give one of {', '.join(map(str, snapshots))}"
        )
    model = Model(str(_repo_of(top)), None)
    raise ConversionError(
        f"{top} has no snapshot of {model}: its download was not finished; {_run(_command(model, choice, cache=top.parent))}"
    )


def _remote(name: str, token: str | None, cache_dir: str | None, local_only: bool) -> _Remote:
    repo, _, revision = name.partition("@")
    return _Remote(library(), Model(repo, revision or None), token, cache_dir, local_only)


def _complete(remote: _Remote, choice: Choice) -> Path | None:
    """Folder of the model in the cache; None where it has none. Raises `ConversionError` if files are missing there."""
    folder = remote.cached()
    if folder is None:
        return None
    missing, _ = _missing(Place(Path(remote.cache), remote.model.repo, folder.name), folder, choice)
    if missing:
        raise ConversionError(
            f"the cache has only a part of {remote.model}, without {_few(missing)}, and the Hub cannot "
            "be asked for the rest; run the same command with HF_HUB_OFFLINE unset and the network there"
        )
    return folder


def _present(place: Place, folder: Path, choice: Choice, *, strict: bool) -> Snapshot:
    """Snapshot of which no needed file is missing; unless `strict`, one of another kind of model passes, too."""
    missing, beside = _missing(place, folder, choice)
    model = Model(place.repo, place.commit)
    other_kind = missing == [choice.named]
    if other_kind and strict and _tree(place):
        raise ConversionError(f"{place} has {choice.lacking}; only such models are read")
    if missing and (strict or not other_kind):
        exact = [] if other_kind or len(missing) > _SHOWN_FILES else missing
        broken = any((folder / name).is_symlink() for name in missing)
        cause = f" (they are links into {_BLOBS}/, which was not copied with them)" if broken else ""
        raise ConversionError(
            f"the cache has only a part of {place}, without {_few(missing)}{cause}; pass --download, or "
            f"{_run(_command(model, choice, exact, place.cache))}"
        )
    if not beside:
        return Snapshot(folder, [])
    command = _command(model, choice, beside if len(beside) <= _SHOWN_FILES else (), place.cache)
    return Snapshot(folder, [f"warning: the cache lacks {_few(beside)} of {place}; {_run(command)}"])


def _missing(place: Place, folder: Path, choice: Choice) -> tuple[list[str], list[str]]:
    """Needed files that a snapshot lacks, and those beside them that the model has on the Hub, as far as the cache tells."""
    found = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
    there = {name for name, path in found.items() if path.is_file()}
    listed = found.keys() | _tree(place)
    needed = choice.needed(listed, lambda index: folder / index if index in there else None)
    missing = sorted(needed - there) if needed else [choice.named]
    return missing, sorted(among(listed, choice.beside) - there - needed)


def _files(folder: Path) -> list[Path]:
    """Files below a folder, links that lead nowhere among them."""
    return [path for path in folder.rglob("*") if not path.is_dir()]


def _tree(place: Place) -> set[str]:
    """Names of all files of a commit, where huggingface_hub (2.0 on) has kept a list of them; else none."""
    if not (place.top / _TREES / f"{place.commit}.json").is_file():
        return set()
    hub = library()
    try:
        found = hub.get_cached_repo_tree(place.repo, revision=place.commit, cache_dir=str(place.cache))
    except (
        AttributeError,
        ValueError,
        hub.errors.CachedRepoTreeNotFoundError,
    ):  # another release's list, or a damaged one
        return set()
    return {file.path for file in found}


def _command(model: Model, choice: Choice, files: Collection[str] = (), cache: Path | None = None) -> str:
    """The line of `hf download` that gets these files, or all that the choice may need."""
    words = ["hf", "download", model.repo, *files]
    if model.revision is not None:
        words += ["--revision", model.revision]
    if not files:
        words += [word for pattern in choice.needless for word in ("--exclude", pattern)]
    if cache is not None and os.path.realpath(cache) != os.path.realpath(_setting("HF_HUB_CACHE") or ""):
        words += ["--cache-dir", str(cache)]
    return shlex.join(words)


def _run(command: str) -> str:
    """The advice to run a command that needs the Hub."""
    return f"{'unset HF_HUB_OFFLINE and ' if _setting('HF_HUB_OFFLINE') else ''}run: {command}"


def _setting(name: str) -> Any:
    """A constant of huggingface_hub; None where that is not installed, which local folders do not need."""
    try:
        return getattr(library().constants, name)
    except ConversionError:
        return None


def _few(names: Collection[str]) -> str:
    """Names for a message, the first few of many."""
    listed = list(names)
    more = f" and {len(listed) - _SHOWN_FILES} more" if len(listed) > _SHOWN_FILES else ""
    return f"{', '.join(listed[:_SHOWN_FILES])}{more}"


def _sentence(remote: _Remote, error: BaseException) -> str:
    """What an error of huggingface_hub means for a download."""
    hub, model = remote.hub, remote.model
    errors, where = hub.errors, address(hub)
    login = "log in with 'hf auth login' or HF_TOKEN"
    by_status: dict[Any, str] = {
        _UNKNOWN: f"{where} does not know the token with which it is asked for {model}; {login}",
        _FORBIDDEN: f"the token may not read {model} on {where}; accept its terms there, or {login} that may read it",
    }
    sentences: list[tuple[Any, str]] = [
        (errors.GatedRepoError, f"{model} is gated on {where}: accept its terms there, then {login}"),
        (
            errors.RepositoryNotFoundError,
            f"{model} is neither a folder here nor a model on {where}, unless it is private; correct the name, or {login}",
        ),
        (errors.RevisionNotFoundError, f"{model.repo} on {where} has no revision {model.revision}; name another"),
        (
            errors.OfflineModeIsEnabled,
            f"{model} is neither a folder here nor in the cache {remote.cache}, and HF_HUB_OFFLINE or local_files_only "
            "forbids to download it; correct the name, or leave that out",
        ),
        (errors.HFValidationError, f"{model} is neither a folder here nor a name that the Hub allows; correct it"),
    ]
    otherwise = (
        f"{model} is no folder here, and cannot be downloaded from {where}: {reason(error)}; check the network and HF_ENDPOINT, "
        "and run the same command again, which goes on with the files that are there"
    )
    status = getattr(getattr(error, "response", None), "status_code", None)
    known = next((sentence for kind, sentence in sentences if isinstance(error, kind)), None)
    return known or by_status.get(status, otherwise)
