"""Location of a Megatron-LM checkpoint: the folder of one iteration, and in words what a folder is that is none.

Megatron-LM and Megatron-Bridge save into `iter_*` and name the latest in a tracker file; NeMo 2 saves into `weights`, beside
`context`; verl into `global_step_*/actor/dist_ckpt`, beside `huggingface`, with a tracker of the same name.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ...basics.errors import ConversionError, one_line, reason_of
from ...basics.quantities import few
from ...storage import marks

TRACKER = "latest_checkpointed_iteration.txt"
#: File that holds the state dict of a whole model; `metadata.json` beside it describes the model.
MODEL_FILE = "model.pt"
#: File that describes the format of a distributed checkpoint (core/dist_checkpointing/core.py).
FORMAT_FILE = "metadata.json"
#: Name of a rank's folder in the `torch` format.
RANK = re.compile(r"mp_rank_\d{2,}(_\d{3,})*$")
#: Name of a folder of one iteration.
_RELEASE = "release"
_NUMBERED = re.compile(r"iter_\d{7,18}")
_ITERATION = re.compile(rf"{_NUMBERED.pattern}|{_RELEASE}")
_TRACKED = re.compile(r"[0-9]{1,18}")
#: Folders in which NeMo 2 (nemo/lightning/ckpt_utils.py) and an unpacked archive of NeMo 1 have the checkpoint.
_NEMO_WEIGHTS = ("weights", "model_weights")
#: Files of a checkpoint: parts of a distributed one, its common state, and a rank's (training/checkpointing.py).
_CHUNKS, COMMON_FILE, RANK_FILE = "*.distcp", "common.pt", "model_optim_rng.pt"
#: Name of a model's configuration, with which a folder can be a reference.
_CONFIGURATION = "config.json"
#: Limits of a look into further folders: levels, folders that are opened, and paths that are named.
_LEVELS, _MOST_OPENED, _MOST_NAMED = 3, 300, 6


def checkpoint_directory(load_dir: Path, name: str | None) -> Path:
    """Folder of one iteration: `name` if given, else the one that the tracker file names, else `load_dir` itself.

    Raises `ConversionError` that says what the folder is instead and what lies in it.
    """
    chosen = _tracked(load_dir) if name is None else load_dir / name
    if not chosen.is_dir():
        raise ConversionError(f"{load_dir} has no folder {one_line(name)!r}; {_named(_names(load_dir))}")
    directory = _weights_of(chosen)
    if not is_checkpoint(directory):
        raise ConversionError(f"{chosen} {_state(chosen)}")
    return directory


def is_checkpoint(directory: Path) -> bool:
    """Whether a folder is that of one iteration, complete or not."""
    return has_model_file(directory) or is_distributed(directory) or bool(_ranks(directory))


def is_distributed(directory: Path) -> bool:
    """Whether an iteration's folder is a distributed checkpoint: of the `torch_dist` format, or another with an index file."""
    return any((directory / name).exists() for name in (marks.METADATA, FORMAT_FILE)) and not has_model_file(directory)


def has_model_file(directory: Path) -> bool:
    """Whether a folder holds a whole model in one file."""
    return (directory / MODEL_FILE).exists() and not (directory / marks.METADATA).exists()


def is_part(folder: Path) -> bool:
    """Whether a folder is what is left of a checkpoint, or has one at a place that its program chose.

    `checkpoint_directory` finds the one and says what is missing of the other.
    """
    names = [path.name for path in listing(folder)]
    return (
        bool(fnmatch.filter(names, _CHUNKS))
        or any(_NUMBERED.fullmatch(name) or (name == _RELEASE and is_checkpoint(folder / name)) for name in names)
        or _weights_of(folder) != folder
    )


def is_one_rank(folder: Path) -> bool:
    """Whether a folder is that of one rank, which is part of a checkpoint."""
    return RANK.match(folder.name) is not None and (folder / RANK_FILE).exists()


def refuse_without_index(directory: Path) -> None:
    """Raise if a distributed checkpoint has lost its index, whose name `cp DIR/*` passes over."""
    if not (directory / marks.METADATA).exists():
        raise ConversionError(f"{directory} {_LOST_INDEX}")


def listing(folder: Path) -> list[Path]:
    """Entries of a folder, sorted; raises `ConversionError` if it cannot be listed."""
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise ConversionError(f"cannot list {folder}: {reason_of(error)}") from error


@dataclass
class Inside:
    """What lies in the folders of a folder, some levels down: checkpoints, models of Hugging Face, configurations alone."""

    folder: Path
    checkpoints: list[Path] = field(default_factory=list)
    models: list[Path] = field(default_factory=list)
    references: list[Path] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.checkpoints or self.models)

    def add(self, path: Path) -> list[Path]:
        """Add a folder to what it is; returns the folders in it if it is nothing."""
        names = _names_in(path)
        if (path / TRACKER).is_file() or is_distributed(path) or _ranks(path):
            self.checkpoints.append(path)
        elif _CONFIGURATION in names:
            weights = any(fnmatch.filter(names, pattern) for pattern in ("*.safetensors", "*.bin"))
            (self.models if weights else self.references).append(path)
        else:
            return list(_folders(path))
        return []

    def __str__(self) -> str:
        """Clause that names them, and how to give them."""
        found = {
            "a checkpoint": self.checkpoints,
            "a Hugging Face model": self.models,
            "a configuration": self.references,
        }
        parts = [f"{words} in {self._paths(paths)}" for words, paths in found.items() if paths]
        if self.models or len(self.checkpoints) != 1:
            return f"it holds {', and '.join(parts)}; give one of these folders"
        given = str(self.checkpoints[0])
        if len(self.references) == 1:
            given += f" with --hf-config {self.references[0]}"
        return f"it holds {', and '.join(parts)}; give {given}"

    def _paths(self, paths: list[Path]) -> str:
        names = [str(path.relative_to(self.folder)) for path in paths]
        return few(names, _MOST_NAMED)


def look_inside(folder: Path, levels: int = _LEVELS) -> Inside:
    """Look for checkpoints and models up to `levels` levels down; folders of a checkpoint or model are not entered."""
    found = Inside(folder)
    pending = [(path, 1) for path in _folders(folder)]
    opened = 0
    while pending and opened < _MOST_OPENED:
        path, level = pending.pop(0)
        opened += 1
        try:
            further = found.add(path)
        except ConversionError:  # not allowed to list it
            continue
        if level < levels:
            pending += [(entry, level + 1) for entry in further]
    return found


def reference_near(directory: Path) -> Path | None:
    """Folder with the only configuration beside a checkpoint's, as verl saves it; None if there is none, or several."""
    beside = look_inside(directory.parent, levels=1)
    found = [*beside.references, *beside.models]
    return found[0] if len(found) == 1 else None


def _tracked(load_dir: Path) -> Path:
    """Folder that the tracker file names, `load_dir` itself if there is none."""
    tracker = load_dir / TRACKER
    if not tracker.is_file():
        return load_dir
    text = tracker.read_text(encoding="utf-8", errors="replace").strip()
    if text != _RELEASE and not _TRACKED.fullmatch(text):
        raise ConversionError(
            f"{tracker} holds {text[:80]!r}; it must hold an iteration number or '{_RELEASE}'; {_choice(load_dir)}"
        )
    directory = load_dir / (text if text == _RELEASE else f"iter_{int(text):07d}")
    if not directory.is_dir():
        raise ConversionError(f"{tracker} names {directory.name}, which is not there; {_choice(load_dir)}")
    return directory


def _state(folder: Path) -> str:
    """Predicate on a folder that is no checkpoint: what it is, and the remedy."""
    names = _names_in(folder)
    if fnmatch.filter(names, _CHUNKS):
        return _LOST_INDEX
    if any(map(_ITERATION.fullmatch, names)):
        return f"has no {TRACKER}, which names the latest iteration once it is saved; {_choice(folder)}"
    foreign = marks.foreign(names)
    if foreign:
        return f"is {foreign}"
    if not names:
        return "is empty; copy the checkpoint again"
    inside = look_inside(folder)
    what = (
        f"is not a Megatron-LM checkpoint: it has neither {TRACKER} nor mp_rank_* folders nor a {marks.METADATA} or {MODEL_FILE} "
        "file"
    )
    return f"{what}; {inside}" if inside else what


_LOST_INDEX = (
    f"has no {marks.METADATA}, the index without which its {_CHUNKS} files cannot be read: copy that file, too (`cp DIR/*` leaves "
    "it out, since its name begins with a dot); if it is not where the checkpoint was saved either, the saving was cut off"
)


def _choice(folder: Path) -> str:
    """Clause on the iterations that a folder has and how to choose one; without any, on what else lies in it."""
    there = [name for name in _names(folder) if _ITERATION.fullmatch(name)]
    if there:
        faults = {name: _fault(folder / name) for name in there}
        shown = [f"{name} ({fault})" if (fault := faults[name]) else name for name in there[-_MOST_NAMED:]]
        whole = [name for name in there if not faults[name]]
        chosen = f"choose with --ckpt-dir-name {whole[-1]}" if whole else "none of them can be read"
        return f"{_named(shown)}; {chosen}"
    inside = look_inside(folder)
    return str(inside) if inside else f"{_named(_names(folder))}; copy the checkpoint again"


def _fault(directory: Path) -> str:
    """Fault of an iteration's folder that its names tell; no text if there is none."""
    directory = _weights_of(directory)
    if is_checkpoint(directory) and (not is_distributed(directory) or (directory / marks.METADATA).exists()):
        return ""
    return "empty" if not _names_in(directory) else f"without {marks.METADATA} or mp_rank_* folders"


def _named(names: Collection[str]) -> str:
    return f"it has {', '.join(map(one_line, names)) or 'none'}"


def _weights_of(folder: Path) -> Path:
    """Folder of the weights in one of NeMo; any other is itself."""
    inner = (folder / name for name in _NEMO_WEIGHTS)
    found = next((path for path in inner if path.is_dir() and is_distributed(path)), folder)
    return folder if is_checkpoint(folder) else found


def _ranks(folder: Path) -> list[Path]:
    return [path for path in listing(folder) if RANK.match(path.name)]


def _folders(folder: Path) -> Iterator[Path]:
    """Folders in a folder, without hidden ones and links."""
    for name in _names(folder):
        if not name.startswith(".") and not (folder / name).is_symlink():
            yield folder / name


def _names(folder: Path) -> list[str]:
    """Names of the folders in a folder."""
    return [path.name for path in listing(folder) if path.is_dir()]


def _names_in(folder: Path) -> list[str]:
    return [path.name for path in listing(folder)]
