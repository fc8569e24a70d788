"""Models as users name them: a local folder, or one on the Hugging Face Hub, of which only what is needed is downloaded.

They go into the cache of huggingface_hub.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from fnmatch import filter as matching
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ..assets.tokenizer import FILES as TOKENIZER_FILES
from ..basics.errors import ConversionError, MissingPath
from .hub_access import Model, address, in_one_sentence, is_hub_id, library, reason
from .huggingface.source import ADAPTER
from .huggingface.weight_files import SINGLE_FILES, weight_map

#: Files beside the weights and the tokenizer. The code of a model is carried along, and never run.
_BESIDE = ("generation_config.json", ADAPTER, "*.py")
#: Files without which weights are no model, of Hugging Face's format and of Meta's, and the names of Meta's weights.
_CONFIG, _PARAMS, _CONSOLIDATED = "config.json", "params.json", "consolidated.*.pth"
#: Missing files that a message lists at most.
_SHOWN_FILES = 5


class Snapshot(NamedTuple):
    """Folder of a model, here or in the cache, and notes for the user."""

    folder: Path
    notes: list[str]


class _Choice(NamedTuple):
    """Choice of a model's files: those wanted, of the files listed and given a function that gets an index of shards.

    None are wanted where the needed ones are missing; `lacking` says then what the model is without, and `named` names them.
    """

    wanted: Callable[[Collection[str], Callable[[str], Path]], set[str]]
    lacking: str
    named: str


class _Remote(NamedTuple):
    """Model on the Hub, and how it is reached: huggingface_hub, the model, the user's token, the folder of the cache.

    Without a token, or a cache, those of huggingface_hub are used. With `local_only`, the Hub is not asked.
    """

    hub: Any
    model: Model
    token: str | None
    cache_dir: str | None
    local_only: bool

    def listed(self) -> list[str]:
        """Names of its files."""
        if self.local_only:
            raise self.hub.errors.OfflineModeIsEnabled("local_files_only")
        api = self.hub.HfApi(token=self.token)
        return [file.rfilename for file in api.model_info(self.model.repo, revision=self.model.revision).siblings or ()]

    def file(self, name: str) -> Path:
        """One file, downloaded where the cache lacks it."""
        return Path(self.hub.hf_hub_download(self.model.repo, name, **self._options()))

    def files(self, patterns: Collection[str], *, cached: bool = False) -> Path:
        """Folder of its files of these names, downloaded where the cache lacks them, unless only `cached` ones may be used."""
        options = {**self._options(), "allow_patterns": sorted(patterns), "local_files_only": cached}
        return Path(self.hub.snapshot_download(self.model.repo, **options))

    def _options(self) -> dict[str, Any]:
        return {"revision": self.model.revision, "token": self.token, "cache_dir": self.cache_dir}


def on_hub(name: str) -> bool:
    """Whether this names a model on the Hub, since nothing here has the name."""
    return is_hub_id(name) and not os.path.lexists(name)


def resolve(
    path_or_id: str | os.PathLike[str],
    *,
    config_only: bool = False,
    token: str | None = None,
    cache_dir: str | None = None,
    local_files_only: bool = False,
) -> Snapshot:
    """Folder of a model: a local one as it is, even if its name could be one of the Hub, else downloaded from the Hub.

    `config_only` downloads config.json alone. Raises `MissingPath` for what is neither, and `ConversionError` as `download` does.
    """
    name = os.fspath(path_or_id)
    if os.path.isdir(name):
        return Snapshot(Path(name), [])
    if not on_hub(name):
        raise MissingPath(f"{name} is no folder here, and no name of a model on the Hub (owner/name); correct it")
    return _download(name, _CONFIG_ALONE if config_only else _MODEL, token, cache_dir, local_files_only)


def download(name: str, *, token: str | None = None, cache_dir: str | None = None) -> Snapshot:
    """Download what the cache lacks of the model `owner/name`, or `owner/name@revision`; returns its folder in the cache.

    Without the Hub, offline or out of reach, a complete copy in the cache is used. Raises `ConversionError` with the remedy.
    """
    return _download(name, _MODEL, token, cache_dir)


def _download(
    name: str, choice: _Choice, token: str | None, cache_dir: str | None, local_only: bool = False
) -> Snapshot:
    hub = library()
    repo, _, revision = name.partition("@")
    remote = _Remote(hub, Model(repo, revision or None), token, cache_dir, local_only)
    model = remote.model
    with in_one_sentence(hub, partial(_sentence, remote)):
        try:
            listed = remote.listed()
        except hub.errors.RevisionNotFoundError:
            raise
        except (hub.errors.HTTPError, OSError, ValueError) as error:
            folder = _cached(remote, choice)
            if folder is None:
                raise
            offline = isinstance(error, hub.errors.OfflineModeIsEnabled)
            why = f"the Hub cannot be asked for {model} ({reason(error)}); this is its copy in the cache, {folder}"
            return Snapshot(folder, [] if offline else [f"warning: {why}"])
        wanted = choice.wanted(listed, remote.file)
        if not wanted:
            raise ConversionError(f"{model} on the Hub has {choice.lacking}; only such models are downloaded")
        return Snapshot(remote.files(wanted), [])


def _wanted(listed: Collection[str], index_file: Callable[[str], Path]) -> set[str]:
    """Files, of those listed, that a conversion reads; none where they are no model. `index_file` gets an index of shards."""
    model = _model_files(listed, index_file)
    patterns = (*_BESIDE, *TOKENIZER_FILES)
    beside = {
        name
        for name in listed
        if any(name.count("/") == pattern.count("/") and fnmatchcase(name, pattern) for pattern in patterns)
    }
    return model | beside if model else model


def _model_files(listed: Collection[str], index_file: Callable[[str], Path]) -> set[str]:
    """Configuration and weights: the first kind of weights that is there, as a folder is read."""
    if _CONFIG in listed:
        for single in SINGLE_FILES:
            index = f"{single}.index.json"
            if single in listed:
                return {_CONFIG, single}
            if index in listed:
                return {_CONFIG, index, *weight_map(index_file(index)).values()}
    consolidated = matching(listed, _CONSOLIDATED)
    return {_PARAMS, *consolidated} if _PARAMS in listed and consolidated else set()


def _config_alone(listed: Collection[str], index_file: Callable[[str], Path]) -> set[str]:
    """The name of config.json, if it is listed."""
    return {_CONFIG}.intersection(listed)


_MODEL = _Choice(
    _wanted,
    f"neither {_CONFIG} with {' or '.join(SINGLE_FILES)} or an index of their shards, nor {_PARAMS} with {_CONSOLIDATED}",
    "weights",
)
_CONFIG_ALONE = _Choice(_config_alone, f"no {_CONFIG}", _CONFIG)


def _cached(remote: _Remote, choice: _Choice) -> Path | None:
    """Folder of the model in the cache; None where it has none. Raises `ConversionError` if files are missing there."""
    folder = next(filter(None, (_snapshot(remote, name) for name in (_CONFIG, _PARAMS))), None)
    if folder is None:
        return None
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    wanted = choice.wanted(there, lambda index: folder / index)
    missing = sorted(wanted - there) if wanted else [choice.named]
    if missing:
        more = f" and {len(missing) - _SHOWN_FILES} more" if len(missing) > _SHOWN_FILES else ""
        raise ConversionError(
            f"the cache has only a part of {remote.model}, without {', '.join(missing[:_SHOWN_FILES])}{more}, and the Hub cannot "
            "be asked for the rest; run the same command with HF_HUB_OFFLINE unset and the network there"
        )
    return folder


def _snapshot(remote: _Remote, name: str) -> Path | None:
    """Folder of the model in the cache; None where it has none, or lacks this file although the model has it."""
    try:
        return remote.files([name], cached=True)
    except remote.hub.errors.LocalEntryNotFoundError:
        return None


def _sentence(remote: _Remote, error: BaseException) -> str:
    """What an error of huggingface_hub means for a download."""
    hub, model = remote.hub, remote.model
    errors, where = hub.errors, address(hub)
    cache = remote.cache_dir or hub.constants.HF_HUB_CACHE
    sentences: list[tuple[Any, str]] = [
        (
            errors.GatedRepoError,
            f"{model} is gated on {where}: accept its terms there, then log in with 'hf auth login' or HF_TOKEN",
        ),
        (
            errors.RepositoryNotFoundError,
            f"{model} is neither a folder here nor a model on {where}, unless it is private; correct the name, or log in with "
            "'hf auth login' or HF_TOKEN",
        ),
        (errors.RevisionNotFoundError, f"{model.repo} on {where} has no revision {model.revision}; name another"),
        (
            errors.OfflineModeIsEnabled,
            f"{model} is neither a folder here nor in the cache {cache}, and HF_HUB_OFFLINE or local_files_only "
            "forbids to download it; correct the name, or leave that out",
        ),
        (errors.HFValidationError, f"{model} is neither a folder here nor a name that the Hub allows; correct it"),
    ]
    otherwise = (
        f"{model} is no folder here, and cannot be downloaded from {where}: {reason(error)}; check the network and HF_ENDPOINT, "
        "and run the same command again, which goes on with the files that are there"
    )
    return next((sentence for kind, sentence in sentences if isinstance(error, kind)), otherwise)
