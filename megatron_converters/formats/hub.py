"""Models as users name them: a local folder, or one on the Hugging Face Hub, of which only what is needed is downloaded.

They go into the cache of huggingface_hub (`storage/hub_lookup.py`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from fnmatch import filter as matching

from ..assets.tokenizer import FILES as TOKENIZER_FILES
from ..basics.errors import MissingPath, UsageError
from ..basics.folders import existing_path
from ..conversion.journal import MANIFEST
from ..storage import hub_cache, hub_lookup
from ..storage.hub_access import is_hub_id
from ..storage.hub_cache import Choice, IndexFile, Snapshot
from .huggingface.weight_files import ADAPTER, SINGLE_FILES, weight_map

#: Files beside the weights and the tokenizer. The code of a model is carried along, and never run.
_BESIDE = ("generation_config.json", "*processor_config.json", "*.py")
#: Files without which weights are no model, of Hugging Face's format and of Meta's, and the names of Meta's weights.
_CONFIG, _PARAMS, _CONSOLIDATED = "config.json", "params.json", "consolidated.*.pth"
#: Weights of an adapter, and shards whose index may be missing.
_ADAPTER_WEIGHTS, _SHARDS = "adapter_model.*", "model-*-of-*.safetensors"
#: Address of a model as a browser shows it, or as huggingface_hub writes it.
_ADDRESS = re.compile(
    r"(?:https?://[^/]+/|hf://(?:models/)?)(?P<repo>[^/]+/[^/@]+)(?:/(?:tree|blob)/(?P<revision>[^/]+))?.*"
)


def on_hub(name: str) -> bool:
    """Whether this names a model on the Hub, since nothing here has the name."""
    return is_hub_id(name) and not os.path.lexists(name)


def located(name: str | os.PathLike[str], *, config_only: bool = False, download: bool = False) -> Snapshot:
    """Folder, or file, of a source as a user names it.

    That is a path, whose name goes before one of the Hub; a model's folder in a cache of huggingface_hub, or a snapshot in it; or
    the name of a model on the Hub, from the cache. Only with `download` is the Hub asked for the newest commit, and what the cache
    lacks is fetched. `config_only` is for a reference model, of which weights are not needed. Raises `MissingPath` for what is
    none of these, and `ConversionError` where files are missing, with the command that downloads them.
    """
    text, choice = os.fspath(name), _REFERENCE if config_only else _MODEL
    if on_hub(text):
        found = hub_lookup.download(text, choice) if download else hub_lookup.cached(text, choice)
        place = hub_cache.place_of(found.folder)
        return Snapshot(found.folder, [*([] if place is None else [place.note(text)]), *found.notes])
    if address := _ADDRESS.fullmatch(text):
        revision = f"@{address['revision']}" if address["revision"] else ""
        raise UsageError(f"{text} is an address; name the model as {address['repo']}{revision}")
    return hub_lookup.in_cache(existing_path(name), choice, may_download=download)


def resolve(
    path_or_id: str | os.PathLike[str],
    *,
    config_only: bool = False,
    token: str | None = None,
    cache_dir: str | None = None,
    local_files_only: bool = False,
) -> Snapshot:
    """Folder of a model: a local one, even if its name could be one of the Hub, else downloaded from the Hub unless forbidden.

    `config_only` downloads config.json alone. Raises `MissingPath` for what is neither, and `ConversionError` as `download` does.
    """
    name, choice = os.fspath(path_or_id), _CONFIG_ALONE if config_only else _MODEL
    if os.path.isdir(name):
        return hub_lookup.in_cache(existing_path(name), choice, may_download=not local_files_only)
    if not on_hub(name):
        raise MissingPath(f"{name} is no folder here, and no name of a model on the Hub (owner/name); correct it")
    return hub_lookup.download(name, choice, token=token, cache_dir=cache_dir, local_only=local_files_only)


def download(name: str, *, token: str | None = None, cache_dir: str | None = None) -> Snapshot:
    """Download what the cache lacks of the model `owner/name`, or `owner/name@revision`; returns its folder in the cache.

    Without the Hub, offline or out of reach, a complete copy in the cache is used. Raises `ConversionError` with the remedy.
    """
    return hub_lookup.download(name, _MODEL, token=token, cache_dir=cache_dir)


def _model_files(listed: Collection[str], index_file: IndexFile) -> set[str]:
    """Configuration and weights: the first kind of weights that is there, as a folder is read; none where there are none."""
    consolidated = matching(listed, _CONSOLIDATED)
    if _CONFIG not in listed and consolidated:
        return {_PARAMS, *consolidated}
    for single in SINGLE_FILES:
        index = f"{single}.index.json"
        if single in listed:
            return {_CONFIG, single}
        if index in listed:
            path = index_file(index)
            return {_CONFIG, index, *(weight_map(path).values() if path is not None else ())}
    if matching(listed, _SHARDS):
        return {_CONFIG, f"{SINGLE_FILES[0]}.index.json"}
    if consolidated:
        return {_PARAMS, *consolidated}
    # What an adapter is, and that it cannot be converted, is the source's to say.
    return {ADAPTER, *matching(listed, _ADAPTER_WEIGHTS)} if ADAPTER in listed else set()


def _config_alone(listed: Collection[str], index_file: IndexFile) -> set[str]:
    """The name of config.json, if it is listed."""
    return {_CONFIG}.intersection(listed)


_NO_CONFIG = f"no {_CONFIG}"
_MODEL = Choice(
    _model_files,
    (*_BESIDE, *TOKENIZER_FILES, ADAPTER, MANIFEST),
    f"neither {_CONFIG} with {' or '.join(SINGLE_FILES)} or an index of their shards, nor {_PARAMS} with {_CONSOLIDATED}",
    "weights",
    ("*.gguf", "original/*"),
)
_REFERENCE = Choice(_config_alone, (*_BESIDE, *TOKENIZER_FILES), _NO_CONFIG, _CONFIG, hub_cache.WEIGHTS)
_CONFIG_ALONE = Choice(_config_alone, (), _NO_CONFIG, _CONFIG, hub_cache.WEIGHTS)
