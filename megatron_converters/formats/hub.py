"""Download of models from the Hugging Face Hub: only the files that a conversion reads, into the cache of huggingface_hub.

HF_ENDPOINT, HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE and HF_TOKEN are heeded by huggingface_hub, which is imported when it is used.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from fnmatch import filter as matching
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from ..assets.tokenizer import FILES as TOKENIZER_FILES
from ..basics.errors import ConversionError, one_line
from .huggingface.source import ADAPTER, SINGLE_FILES, weight_map

_NAME = r"[A-Za-z0-9][\w.-]*"
_HUB_ID = re.compile(rf"({_NAME}/)?{_NAME}(@[\w./-]+)?", re.ASCII)
#: Files beside the weights and the tokenizer. The code of a model is carried along, and never run.
_BESIDE = ("generation_config.json", ADAPTER, "*.py")
#: Files without which weights are no model, of Hugging Face's format and of Meta's, and the names of Meta's weights.
_CONFIG, _PARAMS, _CONSOLIDATED = "config.json", "params.json", "consolidated.*.pth"
#: Missing files that a message lists at most.
_SHOWN_FILES = 5


class Snapshot(NamedTuple):
    """Folder of a model in the cache, and notes for the user."""

    folder: Path
    notes: list[str]


class _Model(NamedTuple):
    """Model on the Hub; `revision` is a branch, tag or commit, None for the main branch."""

    repo: str
    revision: str | None

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"


def is_hub_id(text: str) -> bool:
    """Whether a text can name a model on the Hub: `owner/name`, also `owner/name@revision`, or the `name` of an old model."""
    return _HUB_ID.fullmatch(text) is not None


def download(name: str) -> Snapshot:
    """Download what the cache lacks of the model `owner/name`, or `owner/name@revision`; returns its folder in the cache.

    Without the Hub, offline or out of reach, a complete copy in the cache is used. Raises `ConversionError` with the remedy.
    """
    hub = _library()
    repo, _, revision = name.partition("@")
    model = _Model(repo, revision or None)
    with _in_one_sentence(hub, model):
        try:
            listed = [file.rfilename for file in hub.HfApi().model_info(repo, revision=model.revision).siblings or ()]
        except hub.errors.RevisionNotFoundError:
            raise
        except (hub.errors.HTTPError, OSError, ValueError) as error:
            folder = _cached(hub, model)
            if folder is None:
                raise
            offline = isinstance(error, hub.errors.OfflineModeIsEnabled)
            reason = f"the Hub cannot be asked for {model} ({_reason(error)}); this is its copy in the cache, {folder}"
            return Snapshot(folder, [] if offline else [f"warning: {reason}"])
        wanted = _wanted(listed, lambda index: Path(hub.hf_hub_download(repo, index, revision=model.revision)))
        if not wanted:
            raise ConversionError(
                f"{model} on the Hub has neither {_CONFIG} with {' or '.join(SINGLE_FILES)} or an index of their shards, nor "
                f"{_PARAMS} with {_CONSOLIDATED}; only such models are downloaded"
            )
        return Snapshot(Path(hub.snapshot_download(repo, revision=model.revision, allow_patterns=sorted(wanted))), [])


def _library() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError as error:
        raise ConversionError(
            f"models of the Hub need the package {error.name}; run pip install huggingface_hub, or give a local folder"
        ) from error
    return huggingface_hub


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


def _cached(hub: Any, model: _Model) -> Path | None:
    """Folder of the model in the cache; None where it has none. Raises `ConversionError` if weights are missing there."""
    try:
        folder = Path(
            hub.snapshot_download(
                model.repo, revision=model.revision, allow_patterns=[_CONFIG, _PARAMS], local_files_only=True
            )
        )
    except hub.errors.LocalEntryNotFoundError:
        return None
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    wanted = _wanted(there, lambda index: folder / index)
    missing = sorted(wanted - there) if wanted else ["weights"]
    if missing:
        more = f" and {len(missing) - _SHOWN_FILES} more" if len(missing) > _SHOWN_FILES else ""
        raise ConversionError(
            f"the cache has only a part of {model}, without {', '.join(missing[:_SHOWN_FILES])}{more}, and the Hub cannot be asked "
            "for the rest; run the same command with HF_HUB_OFFLINE unset and the network there"
        )
    return folder


@contextmanager
def _in_one_sentence(hub: Any, model: _Model) -> Iterator[None]:
    """Turn errors of huggingface_hub into `ConversionError`."""
    errors, constants = hub.errors, hub.constants
    where = f"the Hub at {constants.ENDPOINT}"
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
            f"{model} is neither a folder here nor in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE forbids to download "
            "it; correct the name, or unset HF_HUB_OFFLINE",
        ),
        (errors.HFValidationError, f"{model} is neither a folder here nor a name that the Hub allows; correct it"),
    ]
    try:
        yield
    except (errors.HTTPError, OSError, ValueError) as error:
        for kind, sentence in sentences:
            if isinstance(error, kind):
                raise ConversionError(sentence) from error
        raise ConversionError(
            f"{model} is no folder here, and cannot be downloaded from {where}: {_reason(error)}; check the network and "
            "HF_ENDPOINT, and run the same command again, which goes on with the files that are there"
        ) from error


def _reason(error: BaseException) -> str:
    return one_line(" ".join(f"{type(error).__name__}: {error}".split()))
