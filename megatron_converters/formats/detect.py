"""Format of a folder, recognised by its files, or of a file."""

from __future__ import annotations

import fnmatch
import zipfile
from pathlib import Path

from ..basics.errors import UsageError
from ..conversion.staging import unfinished_in
from ..storage import marks
from .kinds import HF, MEGATRON, META, MINDSPORE, WEIGHTS
from .megatron.locating import is_one_rank, is_part, listing, look_inside
from .mindspore.recognising import is_mindspore

#: Name patterns by format; one match marks a folder as of that format.
_PATTERNS = {
    HF: ("config.json", "*.safetensors", "pytorch_model*.bin"),
    META: ("consolidated.*.pth",),
    MEGATRON: (*marks.RANKS, *marks.MODEL_PT),
}
#: The same of the format that a look into files tells, for messages.
_MARKS = {MINDSPORE: (*marks.MINDSPORE, "rank_*", "*.ckpt")}
#: Weights of a whole model as Mistral's own programs have them. Its repositories hold them beside those of transformers.
_CONSOLIDATED = "consolidated*.safetensors"


#: Files that say nothing without the others of their folder, and how many levels above them that is.
_PARTS = {
    "*.json": 0,
    "*[0-9]-of-*[0-9].*": 0,
    "consolidated.*.pth": 0,
    "tokenizer.*": 0,
    "latest_checkpointed_iteration.txt": 0,
    ".metadata": 0,
    "common.pt": 0,
    "*.distcp": 0,
    "model_optim_rng.pt": 1,
    "distrib_optim.pt": 1,
}
_ONLY_SHARD = "*-00001-of-00001.*"
#: How files of weights end; one that ends otherwise must be an archive, as `torch.save` writes it.
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


def format_of(path: Path) -> str:
    """Detect the format of a folder or a file; raises `UsageError` if it fits none or several."""
    if is_mindspore(path):
        return MINDSPORE
    if path.is_file():
        if fnmatch.fnmatch(path.name, _CONSOLIDATED):
            raise UsageError(
                f"{path} is of Mistral's own format, which needs params.json, too; give its folder {path.parent}"
            )
        return WEIGHTS
    names = [entry.name for entry in listing(path)]
    found = [
        name for name, patterns in _PATTERNS.items() if any(fnmatch.filter(names, pattern) for pattern in patterns)
    ]
    if found == [HF] and _is_consolidated(names):
        return META
    if len(found) == 1:
        return found[0]
    if found:
        raise UsageError(f"{path} could be {' or '.join(found)}; say which with --from")
    unfinished = unfinished_in(path)
    if unfinished is not None:
        raise UsageError(f"{path} {unfinished}")
    if is_one_rank(path):
        raise UsageError(f"{path} is the folder of one rank; give that of the checkpoint, {path.absolute().parent}")
    if is_part(path):
        return MEGATRON
    foreign = marks.foreign(names)
    if foreign:
        raise UsageError(f"{path} is {foreign}")
    inside = look_inside(path)
    if inside:
        raise UsageError(f"{path} is no model itself; {inside}")
    expected = "; ".join(f"{name}: {', '.join(patterns)}" for name, patterns in {**_PATTERNS, **_MARKS}.items())
    raise UsageError(f"{path} is of no known format; a folder needs one of {expected}")


def _is_consolidated(names: list[str]) -> bool:
    """Whether a folder has Mistral's own weights alone, which params.json describes."""
    weights = [name for pattern in ("*.safetensors", "pytorch_model*.bin") for name in fnmatch.filter(names, pattern)]
    own = bool(weights) and all(fnmatch.fnmatch(name, _CONSOLIDATED) for name in weights)
    return own and ("params.json" in names or "config.json" not in names)


def refuse_part(path: Path) -> None:
    """Raise `UsageError` for a file that is no model by itself: one of those that a folder consists of, or none of weights."""
    levels = next((levels for pattern, levels in _PARTS.items() if fnmatch.fnmatch(path.name, pattern)), None)
    if levels is not None and not fnmatch.fnmatch(path.name, _ONLY_SHARD):
        folder = path.absolute().parents[levels]
        raise UsageError(f"{path} is one of the files of a model; give the folder that has them all, {folder}")
    if path.suffix not in _WEIGHT_SUFFIXES and not zipfile.is_zipfile(path):
        known = ", ".join(_WEIGHT_SUFFIXES)
        raise UsageError(f"{path} is no file of weights that can be read ({known}); give one, or the folder of a model")
