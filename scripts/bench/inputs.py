"""What commands of benchmarks read: random models, and what is made of them. Only what a row needs is kept on the disk."""

from __future__ import annotations

import shlex
import string
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from measuring import ROOT, remove, run_unmeasured

_HERE = Path(__file__).resolve().parent
_OURS = (sys.executable, "-m", "megatron_converters")
#: Programs by the first words of commands; other first words are programs themselves.
PROGRAMS: Mapping[str, tuple[str, ...]] = {
    "python": (sys.executable,),
    "make_model": (sys.executable, str(_HERE / "make_model.py")),
    "megatron-converters": _OURS,
    "make_fp8": (sys.executable, str(_HERE / "make_fp8.py")),
    "convert": (*_OURS, "convert", "--quiet"),
    "convert-on-one-core": ("taskset", "-c", "0", *_OURS, "convert", "--quiet"),
    "convert.py": (sys.executable, str(ROOT / "convert.py"), "--quiet"),
    "convert_mlm_to_hf": (sys.executable, str(ROOT / "convert_mlm_to_hf_checkpoint.py"), "--quiet"),
    "modelconvert": (sys.executable, "-m", "model_converter_tool"),
    "tp_pp_converter": (sys.executable, "-m", "megatron_converters.tp_pp_converter", "--quiet"),
    "by_hand": (sys.executable, str(_HERE / "peer_by_hand.py")),
}
#: The random model itself.
HF = "hf"
#: How each input is made of others, which its command names in braces.
INPUTS: Mapping[str, str] = {
    "hf_fp32": "convert {hf} {output} --to hf --dtype fp32",
    "hf_fp16": "convert {hf} {output} --to hf --dtype fp16",
    "megatron": "convert {hf} {output} --tp 2 --pp 2",
    "megatron_fp32": "convert {hf} {output} --tp 2 --pp 2 --dtype fp32",
    "megatron_tp8_pp8": "convert {hf} {output} --tp 8 --pp 8",
    "megatron_tp2_ep8": "convert {hf} {output} --tp 2 --ep 8",
    "torch_dist": "convert {hf} {output} --tp 2 --pp 2 --ckpt-format torch_dist",
    "model_pt": "modelconvert convert {hf} hf2megatron -o {output} --model-type llama",
    "mindspore": "convert {megatron} {output} --to mindspore",
    "mindspore_fp16": "convert {megatron} {output} --to mindspore --dtype fp16",
}


class Model(NamedTuple):
    """Random model: the name of its folder, arguments of the program that makes it, and `quick` for a tiny one in its place."""

    name: str
    shape: str
    quick: str
    made_by: str = "make_model"


class Disk:
    """Folder of a benchmark: `MODEL/INPUT` for what is read, `output` and `beside` for what both commands of a row write.

    It also holds a log of what was measured. A folder with anything else is refused, since much in here is removed.
    """

    def __init__(self, folder: Path, quick: bool) -> None:
        self.folder = folder
        self.output, self.beside, self.log = folder / "output", folder / "beside", folder / "pairs.jsonl"
        self._quick = quick
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()) and not self.log.exists():
            sys.exit(f"{folder} has files that are not of a benchmark; name a new folder")
        self.log.touch()

    def prepare(self, model: Model, names: Iterable[str], others: Iterable[Model]) -> dict[str, Path]:
        """Make inputs that are missing, and remove all others, also those of other models; returns the paths by name."""
        paths = {name: self.folder / model.name / name for name in (HF, *INPUTS)}
        for other in others:
            if other != model:
                remove(self.folder / other.name)
        needed = set(names)
        self._keep(paths, _with_ancestors(needed, paths))
        for name in sorted(needed):
            self._make(model, name, paths)
        self._keep(paths, needed)
        return {name: paths[name] for name in needed}

    def _keep(self, paths: Mapping[str, Path], names: set[str]) -> None:
        for name, path in paths.items():
            if name not in names:
                remove(path)

    def _make(self, model: Model, name: str, paths: Mapping[str, Path]) -> None:
        if paths[name].exists():
            return
        command = INPUTS.get(name, f"{model.made_by} {{output}} {model.quick if self._quick else model.shape}")
        for source in inputs_of(command):
            self._make(model, source, paths)
        remove(self.output)  # what is not whole has no name that counts
        run_unmeasured(words(command, {**paths, "output": self.output}))
        paths[name].parent.mkdir(exist_ok=True)
        self.output.rename(paths[name])


def _with_ancestors(names: set[str], paths: Mapping[str, Path]) -> set[str]:
    """Names of inputs, with those of which the missing ones are made."""
    missing = [name for name in names if not paths[name].exists()]
    sources = {source for name in missing for source in inputs_of(INPUTS.get(name, ""))}
    return names | _with_ancestors(sources, paths) if sources else names


def inputs_of(command: str) -> list[str]:
    """Names in braces in a command, but for that of its output."""
    names = dict.fromkeys(name for _, name, _, _ in string.Formatter().parse(command) if name)
    return [name for name in names if name != "output"]


def words(command: str, paths: Mapping[str, Path]) -> list[str]:
    """Words of a command, with paths for the names in braces."""
    first, *rest = shlex.split(command)
    return [*PROGRAMS.get(first, (first,)), *(word.format_map(paths) for word in rest)]
