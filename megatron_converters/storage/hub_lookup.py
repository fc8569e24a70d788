"""Look-up of models that are named as on the Hub: in the cache of huggingface_hub, and on the Hub where that is allowed."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ..basics.errors import ConversionError, MissingPath
from ..basics.quantities import few
from .hub_access import Model, address, in_one_sentence, library, reason
from .hub_cache import (
    Choice,
    Place,
    Snapshot,
    among,
    command_line,
    latest,
    model_folder,
    place_of,
    present,
    repo_of,
    revisions,
    run_advice,
    state_of,
)

#: Answers of HTTP for which there is a sentence: no valid token, and no right to read.
_UNKNOWN, _FORBIDDEN = 401, 403


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
            raise ConversionError(f"{model} on the Hub is not complete: it lacks {few(absent)}; name another model")
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
        others = revisions(Place(Path(remote.cache), model.repo, "").top)
        there = f", which has it at {few(others)} alone" if others else ""
        raise MissingPath(
            f"{model} is neither a folder here nor in the cache {remote.cache}{there}; correct the name, or pass --download, "
            f"or {run_advice(command_line(model, choice))}"
        )
    return present(Place(Path(remote.cache), model.repo, folder.name), folder, choice, strict=True)


def in_cache(path: Path, choice: Choice, *, may_download: bool = False) -> Snapshot:
    """What to read for a local path: the snapshot that is meant if it is a model's folder in a cache, else itself.

    What a snapshot lacks is downloaded if that is allowed. Raises `ConversionError` where files are missing.
    """
    top = model_folder(path)
    if top is not None:
        return _in_top(path, top, choice, may_download)
    place = place_of(path) if path.is_dir() else None
    if place is None:
        return Snapshot(path, [])
    state = state_of(place, path, choice)
    if may_download and state.missing and state.is_model:
        return download(str(place), choice, cache_dir=str(place.cache))
    return present(place, path, choice, strict=False)


def _in_top(path: Path, top: Path, choice: Choice, may_download: bool) -> Snapshot:
    """Snapshot of a model's folder in a cache, which `path` names."""
    model, folder = Model(str(repo_of(top)), None), latest(top)
    if folder is None and not may_download:
        command = command_line(model, choice, cache=top.parent)
        raise ConversionError(f"{top} has no snapshot of {model}: its download was not finished; {run_advice(command)}")
    place = None if folder is None else Place(top.parent, model.repo, folder.name)
    if place is None or folder is None or (may_download and state_of(place, folder, choice).missing):
        found = download(str(place or model), choice, cache_dir=str(top.parent))
    else:
        found = present(place, folder, choice, strict=True)
    place = place_of(found.folder)
    return Snapshot(found.folder, [*([] if place is None else [place.note(path)]), *found.notes])


def _remote(name: str, token: str | None, cache_dir: str | None, local_only: bool) -> _Remote:
    repo, _, revision = name.partition("@")
    try:
        hub = library()
    except ConversionError as error:
        raise MissingPath(f"{name} is no folder here, and {error}") from error
    return _Remote(hub, Model(repo, revision or None), token, cache_dir, local_only)


def _complete(remote: _Remote, choice: Choice) -> Path | None:
    """Folder of the model in the cache; None where it has none. Raises `ConversionError` if files are missing there."""
    folder = remote.cached()
    if folder is None:
        return None
    missing = state_of(Place(Path(remote.cache), remote.model.repo, folder.name), folder, choice).missing
    if missing:
        raise ConversionError(
            f"the cache has only a part of {remote.model}, without {few(missing)}, and the Hub cannot "
            "be asked for the rest; run the same command with HF_HUB_OFFLINE unset and the network there"
        )
    return folder


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
