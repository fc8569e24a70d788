"""Tokenizer and generation settings of a Hugging Face folder. Nothing is downloaded unless `fetch_tokenizer` is called."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from filecmp import cmp
from pathlib import Path
from typing import Any

from ..basics.errors import ConversionError, UsageError, one_line, reason_of
from ..basics.json_files import read_json, write_json
from ..storage import hub_cache, hub_lookup
from ..storage.hub_access import is_hub_id

#: Files of which a tokenizer may consist.
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "tokenization_*.py",
)
#: Files that name the special tokens; a later file overrides an earlier one.
_SETTINGS = ("special_tokens_map.json", "tokenizer_config.json")
#: Any of these holds a vocabulary; the other files say how to use it.
_VOCABULARIES = frozenset({"tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "tekken.json"})
#: Package to install, by the name of its module, where they differ.
_PACKAGES = {"google": "protobuf"}

#: `--source-model-type`: begin token, end token, and the end tokens of an instruct model.
_TOKEN_IDS: dict[str, tuple[int, int, int | list[int]]] = {
    "llama2": (1, 2, 2),
    "mixtral": (1, 2, 2),
    "llama3": (128000, 128001, [128001, 128009]),
    "llama3.1": (128000, 128001, [128001, 128008, 128009]),
}
_INSTRUCT_WARNING = (
    "warning: --instruct leaves this tokenizer as it is: it gives an end-of-turn token and a chat template to one alone that is "
    "made of Llama 3's tiktoken file"
)


class _NoTokenizer(Exception):
    """No tokenizer is available; the text says why."""


def token_ids(source_model_type: str | None, instruct: bool) -> dict[str, Any]:
    """`bos_token_id` and `eos_token_id` for config.json; empty for a type that has no fixed ones."""
    if source_model_type not in _TOKEN_IDS:
        return {}
    bos, eos, instruct_eos = _TOKEN_IDS[source_model_type]
    return {"bos_token_id": bos, "eos_token_id": instruct_eos if instruct else eos}


def tokenizer_token_ids(folder: Path) -> dict[str, int]:
    """The same two numbers from the tokenizer in `folder`, as far as its files have them; none if a file is broken."""
    try:
        settings = {name: value for file in _SETTINGS for name, value in _json_or_empty(folder / file).items()}
        numbers = _token_numbers(settings, _json_or_empty(folder / "tokenizer.json"))
        found = {f"{key}_id": numbers.get(_token_text(settings.get(key))) for key in ("bos_token", "eos_token")}
    except (
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
        ConversionError,
    ):  # not as transformers writes them
        return {}
    return {key: number for key, number in found.items() if isinstance(number, int)}


def _token_numbers(settings: dict[str, Any], content: dict[str, Any]) -> dict[str | None, int]:
    """Number of each token, from tokenizer.json and then from what tokenizer_config.json adds."""
    vocab = content.get("model", {}).get("vocab", {})
    numbers = dict(vocab) if isinstance(vocab, dict) else {piece[0]: number for number, piece in enumerate(vocab)}
    numbers |= {token["content"]: int(token["id"]) for token in content.get("added_tokens", ())}
    return numbers | {
        _token_text(token): int(number) for number, token in settings.get("added_tokens_decoder", {}).items()
    }


def _token_text(token: Any) -> str | None:
    """Text of a token of tokenizer_config.json, which is a string or an object with its content."""
    return token.get("content") if isinstance(token, dict) else token


def _json_or_empty(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def generation_config(source_model_type: str | None) -> dict[str, Any]:
    """generation_config.json of an instruct model, with the sampling settings that Meta publishes for Llama."""
    return {**token_ids(source_model_type, instruct=True), "do_sample": True, "temperature": 0.6, "top_p": 0.9}


def write_tokenizer(
    source: str | Path | None,
    out_dir: Path,
    *,
    vocab_size: int,
    source_model_type: str | None = None,
    instruct: bool = False,
    explicit: bool = False,
) -> list[str]:
    """Write the files of `source`'s tokenizer into `out_dir`, for a model of `vocab_size` rows; returns notes.

    `source` is a Hugging Face folder (its files are copied byte for byte), a tokenizer.json, a sentencepiece BPE model,
    a tiktoken file of Llama 3 (for "llama3" or else "llama3.1", with a chat template if `instruct`), or a name in the
    local Hugging Face cache. Without a tokenizer the note is a warning. If the user named it (`explicit`), a tokenizer that
    is broken, is missing, cannot be read here or has more tokens than the model raises `ConversionError`.
    """
    try:
        if source is None or str(source) == "":
            raise _NoTokenizer("the checkpoint names none")
        path = _locate(str(source), explicit)
        if path.is_dir():
            notes = _copy_folder(path, out_dir, vocab_size)
        else:
            notes = _write_file(path, out_dir, vocab_size, source_model_type, instruct)
        made_for_chat = not path.is_dir() and is_tiktoken_file(path)
        return notes if made_for_chat or not instruct else [*notes, _INSTRUCT_WARNING]
    except ModuleNotFoundError as error:
        module = str(error.name).partition(".")[0]
        reason = f"{source} needs a package that is missing; run pip install {_PACKAGES.get(module, module)}"
    except _NoTokenizer as error:
        reason = str(error)
    except ConversionError as error:
        if explicit:
            raise
        reason = str(error)
    if explicit:
        raise ConversionError(f"--tokenizer-model gives no tokenizer: {reason}")
    return [
        f"warning: wrote no tokenizer: {reason}. The model is complete; the same command with --tokenizer-model PATH writes one "
        "beside the weights"
    ]


def _locate(source: str, explicit: bool) -> Path:
    """Folder or file that `source` means. A file that is part of a Hugging Face folder means the folder."""
    path = Path(os.path.expanduser(source))  # Path.expanduser raises for an unknown user
    if os.path.isfile(path):  # Path.is_file raises for a name that is too long
        belongs_to_folder = path.name in _VOCABULARIES and (path.parent / "tokenizer_config.json").is_file()
        return path.parent if belongs_to_folder else path
    if os.path.isdir(path):
        path = hub_lookup.in_cache(path, _ON_HUB).folder
        configured = any((path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
        bare = path / "tokenizer.model"  # as in Meta's downloads
        return bare if bare.is_file() and not configured else path
    if _may_be_on_hub(source):
        return _cached_folder(source, explicit)
    if explicit:
        raise _missing(source)
    raise _NoTokenizer(f"{one_line(source)}, which the checkpoint names, does not exist here")


def _may_be_on_hub(source: str) -> bool:
    """Whether a tokenizer's name is no path here, and may be the name of a model on the Hub."""
    path = Path(os.path.expanduser(source))
    return is_hub_id(source) and path.suffix not in (".model", ".json") and not os.path.lexists(path)


def _missing(source: str) -> UsageError:
    return UsageError(f"--tokenizer-model {source} does not exist; give a file, a folder or a Hugging Face name")


def _cached_folder(name: str, explicit: bool) -> Path:
    """Folder in the cache of a model on the Hub; raises `ConversionError` with the command that downloads its tokenizer."""
    try:
        return hub_lookup.cached(name, _ON_HUB).folder
    except ConversionError as error:
        raise ConversionError(f"--tokenizer-model {error}" if explicit else f"the tokenizer {error}") from error


def fetch_tokenizer(source: str | None, *, explicit: bool) -> list[str]:
    """Download a tokenizer that is named as on the Hub into the cache, where `write_tokenizer` finds it; returns notes.

    One that cannot be had raises `ConversionError` if the user named it, and else is a warning.
    """
    if not source or not _may_be_on_hub(source):
        return []
    try:
        return hub_lookup.download(source, _ON_HUB).notes
    except ConversionError as error:
        if explicit:
            raise
        return [f"warning: the tokenizer is not downloaded: {error}"]


def _tokenizer_alone(listed: Collection[str], index_file: hub_cache.IndexFile) -> set[str]:
    """Files of a tokenizer among those listed; none where there is no vocabulary."""
    found = hub_cache.among(listed, FILES)
    return set() if _VOCABULARIES.isdisjoint(found) else found


#: Tokenizer of a model on the Hub.
_ON_HUB = hub_cache.Choice(_tokenizer_alone, (), "no tokenizer", "tokenizer", hub_cache.WEIGHTS)


def holds_tokenizer(source: str | None) -> bool:
    """Whether what a source names as its tokenizer is a file here, or a folder with a vocabulary."""
    path = Path(os.path.expanduser(source or ""))
    if os.path.isdir(path):
        return bool(source) and not _VOCABULARIES.isdisjoint(map(str, _tokenizer_names(path)))
    return os.path.isfile(path)


def check_named(source: str | None) -> list[str]:
    """Check a tokenizer that a user names to be recorded, not read; returns notes. Raises `UsageError` if no such path can be."""
    if not source or holds_tokenizer(source):
        return []
    if os.path.exists(os.path.expanduser(source)):
        return [f"warning: {source} holds no tokenizer, and is recorded all the same"]
    if not _may_be_on_hub(source):
        raise _missing(source)
    return [f"the tokenizer {source} is recorded as a name on the Hugging Face Hub, since there is no such path here"]


def recorded_name(source: str | None) -> str | None:
    """Tokenizer as a checkpoint records it: an existing path made absolute, so that any folder finds it; else unchanged."""
    return os.path.abspath(source) if source and os.path.exists(source) else source


def tokenizer_files(folder: Path) -> list[Path]:
    """Files of a folder that belong to its tokenizer."""
    return [path for pattern in FILES for path in sorted(folder.glob(pattern)) if path.is_file()]


def _tokenizer_names(folder: Path) -> list[Path]:
    return [path.relative_to(folder) for path in tokenizer_files(folder)]


def refuse_other_tokenizer(new_folder: Path, save_dir: Path, *, ours: Collection[str] = ()) -> None:
    """Raise if `save_dir` has tokenizer files that differ from those of `new_folder` and may be the user's, being not `ours`."""
    new = {path.relative_to(new_folder): path for path in tokenizer_files(new_folder)}
    old = {path.relative_to(save_dir): path for path in tokenizer_files(save_dir)}
    differing = [
        str(name)
        for name, path in old.items()
        if name.as_posix() not in ours and (name not in new or not cmp(path, new[name], shallow=False))
    ]
    if new and differing:
        raise ConversionError(
            f"{save_dir} already holds another tokenizer ({', '.join(differing)}); save elsewhere or pass --overwrite"
        )


def _copy_folder(folder: Path, out_dir: Path, vocab_size: int) -> list[str]:
    names = _tokenizer_names(folder)
    if _VOCABULARIES.isdisjoint(map(str, names)):
        raise _NoTokenizer(f"{folder} holds none")
    if Path("tokenizer.json") in names:
        _check_size(folder, _vocabulary_size(folder / "tokenizer.json"), vocab_size)
    for name in names:
        (out_dir / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, out_dir / name)
    return [f"copied the tokenizer of {folder} ({', '.join(map(str, names))})"]


def _write_file(path: Path, out_dir: Path, vocab_size: int, model_type: str | None, instruct: bool) -> list[str]:
    first_bytes = _first_bytes(path)
    if first_bytes.lstrip().startswith(b"{"):
        size = _vocabulary_size(path)
        _check_size(path, size, vocab_size)
        shutil.copyfile(path, out_dir / "tokenizer.json")
        write_json(out_dir / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
        return [f"copied the tokenizer {path} ({size} tokens); it names no begin and end tokens"]
    from . import tokenizer_rebuild

    if tokenizer_rebuild.is_tiktoken(first_bytes):
        rebuilt = tokenizer_rebuild.from_tiktoken(path, model_type, instruct)
    else:
        rebuilt = tokenizer_rebuild.from_sentencepiece(path)
    size = rebuilt.tokenizer.get_vocab_size(with_added_tokens=True)
    _check_size(path, size, vocab_size)
    rebuilt.tokenizer.save(str(out_dir / "tokenizer.json"))
    write_json(out_dir / "tokenizer_config.json", rebuilt.config)
    return [f"made the tokenizer of {path}, {rebuilt.description} ({size} tokens)"]


def is_tiktoken_file(path: Path) -> bool:
    """Whether a file holds tiktoken's ranks, as Llama 3's tokenizer.model does; `ConversionError` if it cannot be read."""
    from . import tokenizer_rebuild

    return tokenizer_rebuild.is_tiktoken(_first_bytes(path))


def _first_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(4096)
    except OSError as error:
        raise ConversionError(f"cannot read the tokenizer {path}: {reason_of(error)}") from error


def _check_size(path: Path, size: int, vocab_size: int) -> None:
    if size > vocab_size:
        raise ConversionError(
            f"the tokenizer {path} has {size} tokens, but the model has {vocab_size} rows of embeddings; "
            "name the tokenizer that this model was trained with"
        )


def _vocabulary_size(path: Path) -> int:
    """One more than the largest token number in a tokenizer.json."""
    content = read_json(path)
    try:
        vocab = content["model"]["vocab"]
        indices = vocab.values() if isinstance(vocab, dict) else range(len(vocab))
        added = [token["id"] for token in content.get("added_tokens", ())]
        return int(max([*indices, *added])) + 1
    except (KeyError, TypeError, ValueError):
        raise ConversionError(f"{path} is not a tokenizer.json: it has no model with a vocabulary") from None
