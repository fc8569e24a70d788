"""Upload of a model's folder to the Hugging Face Hub, in one commit: the Hub has the whole model or what it had before."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ..basics.errors import ConversionError, raise_all
from ..basics.folders import existing_folder
from ..basics.json_files import read_json
from ..conversion.journal import MANIFEST
from ..conversion.staging import unfinished_in
from ..storage.hub_access import Model, address, in_one_sentence, library, reason
from .huggingface.weight_files import ADAPTER, SINGLE_FILES, ghost_line, read_weights

#: Starts of names, of files or of folders above them, that are not uploaded: hidden ones and Python's caches.
_LEFT_OUT = (".", "__pycache__")
#: Files of an earlier model that would be read instead of, or beside, those of a new one: weights, indexes and our manifest.
_WEIGHTS = tuple(name.replace(".", "*.", 1) for name in SINGLE_FILES)
_STALE = (*_WEIGHTS, *(f"{name}.index.json" for name in SINGLE_FILES), MANIFEST)
_CONFIG = "config.json"
_MESSAGE = "Upload model with megatron-converters"
#: Answers of HTTP for which there is a sentence: no valid token, no right to write, and another commit in between.
_UNKNOWN, _FORBIDDEN, _OVERTAKEN = 401, 403, 412


class _Upload(NamedTuple):
    """Upload of a folder to a model on the Hub."""

    hub: Any
    folder: Path
    model: Model


class _NoToken(ValueError):
    """The user has no token of the Hub."""


def upload(
    folder: Path,
    repo: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str | None = None,
    revision: str | None = None,
) -> str:
    """Upload a Hugging Face folder to the model `repo`, which is created if it does not exist; returns the URL of the commit.

    The model's earlier weights are removed by the same commit; its other files, such as a model card, stay. `private` is for a new
    model, `revision` a branch that exists. Raises `ConversionError` with the remedy; the model is then as it was, or new and empty.
    """
    files = _complete_model(existing_folder(folder))
    run = _Upload(library(), folder, Model(repo, revision))
    hub = run.hub
    with in_one_sentence(hub, partial(_sentence, run)):
        hub.utils.validate_repo_id(repo)
        if hub.constants.HF_HUB_OFFLINE:
            raise hub.errors.OfflineModeIsEnabled
        token = token or hub.get_token()
        if token is None:
            raise _NoToken
        api = hub.HfApi(token=token)
        name = api.create_repo(repo, private=private, exist_ok=True).repo_id
        before = api.model_info(name, revision=revision)
        listed = [file.rfilename for file in before.siblings or ()]
        _check_replaced(name, listed, wanted_private=bool(private), is_private=bool(before.private))
        added = [hub.CommitOperationAdd(name_there, path) for name_there, path in files.items()]
        # A .gitignore of the model would have the Hub leave out files without a word.
        api.preupload_lfs_files(name, added, revision=revision, gitignore_content="", free_memory=False)
        # Not `upload_folder`, which makes several commits of a large folder.
        done = api.create_commit(
            name,
            [*(hub.CommitOperationDelete(stale, is_folder=False) for stale in _stale(listed, files)), *added],
            commit_message=commit_message or _MESSAGE,
            revision=revision,
            parent_commit=before.sha,
        )
    return str(done.commit_url)


def _complete_model(folder: Path) -> dict[str, Path]:
    """Files of a complete model to upload, by their names on the Hub. Raises `ConversionError` for a folder that is none."""
    if unfinished := unfinished_in(folder):
        raise ConversionError(f"{folder} {unfinished}")
    if not (folder / _CONFIG).is_file():
        raise ConversionError(
            f"{folder} has no {_CONFIG}, so it is no complete Hugging Face model; give the folder of one"
        )
    read_json(folder / _CONFIG)
    weights = read_weights(folder)
    raise_all(
        f"{folder} is no model that transformers reads as it is:",
        [*weights.notes, *(ghost_line(name, file) for name, file in weights.ghosts.items())],
        remedy="convert it (convert SRC DST --to hf) and upload the result",
    )
    found = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    files = {
        name.as_posix(): path
        for name, path in found.items()
        if not any(part.startswith(_LEFT_OUT) for part in name.parts)
    }
    _refuse_adapter(str(folder), files)
    return files


def _check_replaced(name: str, listed: Collection[str], *, wanted_private: bool, is_private: bool) -> None:
    """Raise `ConversionError` if weights would be public that should not be, or would not be read where they are put."""
    if wanted_private and not is_private:
        raise ConversionError(
            f"{name} on the Hub exists and is public, but a private model is asked for; make it private in its settings, or "
            "name another"
        )
    _refuse_adapter(f"{name} on the Hub", listed)


def _refuse_adapter(where: str, names: Collection[str]) -> None:
    if ADAPTER in names:
        raise ConversionError(
            f"{where} has {ADAPTER}, for which transformers would load an adapter's base model instead of these weights; remove it"
        )


def _stale(listed: Iterable[str], files: Collection[str]) -> list[str]:
    """Files on the Hub that belong to the weights of an earlier model, without those that are written anew."""
    return [
        name
        for name in listed
        if name not in files and any(fnmatchcase(name, pattern) for pattern in _STALE) and "/" not in name
    ]


def _sentence(run: _Upload, error: BaseException) -> str:
    """What an error of huggingface_hub means for an upload."""
    errors, model, where = run.hub.errors, run.model, address(run.hub)
    login = "log in with 'hf auth login', or set HF_TOKEN, with a token that may write"
    overtaken = f"{model} on {where} was changed by someone else during the upload, which is given up; run the same command again"
    by_status: dict[Any, str] = {
        _UNKNOWN: f"{where} does not know the token with which {run.folder} is uploaded to {model}; {login}",
        _FORBIDDEN: f"the token may not write to {model} on {where}; {login}, or name a model of your own",
        _OVERTAKEN: overtaken,
    }
    by_kind: list[tuple[type[BaseException], str]] = [
        (
            errors.OfflineModeIsEnabled,
            f"{run.folder} cannot be uploaded to {model}, since HF_HUB_OFFLINE forbids to use {where}; unset it",
        ),
        (_NoToken, f"{run.folder} cannot be uploaded to {model} on {where} without a token; {login}"),
        (
            errors.HFValidationError,
            f"{model.repo} is no name that the Hub allows for a model ({reason(error)}); give owner/name",
        ),
        (
            errors.RevisionNotFoundError,
            f"{model.repo} on {where} has no branch {model.revision}; create it with "
            f"'hf repos branch create {model.repo} {model.revision}'",
        ),
    ]
    otherwise = (
        f"{run.folder} cannot be uploaded to {model} on {where}: {reason(error)}; the Hub has either the whole commit or nothing "
        "of it: check the network and HF_ENDPOINT, and run the same command again, which sends only what is missing"
    )
    status = getattr(getattr(error, "response", None), "status_code", None)
    known = next((sentence for kind, sentence in by_kind if isinstance(error, kind)), None)
    return known or by_status.get(status, otherwise)
