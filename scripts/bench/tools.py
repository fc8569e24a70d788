"""Benchmark of `modelconvert`, `tp_pp_converter` and MindSpore against `cp` of the same bytes, run alternately, with their memory.

    python scripts/bench/tools.py FOLDER [--layers 16] [--hidden 2048] [--runs 5] [--models 20] [--workers 4]

A Llama of 1.1 billion parameters becomes model.pt and a folder again, as it is and cast to float32, and a checkpoint of TP 2 and
PP 2 one file of weights. The checkpoint becomes a MindSpore model in its newer layout, and that a checkpoint again, as it is and
cast to float16. Then a batch of many small models is converted by several workers.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from bench import ROOT, Timed, copies, make_model, measure, print_table, run_in_turn

_TOOL = [sys.executable, "-m", "model_converter_tool"]
_VERB = [sys.executable, "-m", "megatron_converters", "convert", "--quiet"]
_BY_NUMBERS = [sys.executable, "-m", "megatron_converters.tp_pp_converter", "--quiet"]


def commands(folder: Path) -> dict[str, Timed]:
    """Commands to run, by name, each after copies of what it reads."""
    hf, flat, megatron = folder / "hf", folder / "model_pt", folder / "megatron"
    back, weights, wide = folder / "back", folder / "weights.pt", folder / "wide"

    def convert(source: Path, form: str, output: Path, *options: str, kept: bool = False) -> Timed:
        command = [*_TOOL, "convert", str(source), form, "-o", str(output), *options]
        return Timed(source, output, command, kept)

    to_file = [*_BY_NUMBERS, "--model_type", "llama", "--in_dir", str(megatron), "--save_path", str(weights)]
    return {
        **copies("HF", hf, folder / "cp"),
        "HF to model.pt": convert(hf, "hf2megatron", flat, "--model-type", "llama", kept=True),
        "HF to model.pt, float32": convert(hf, "hf2megatron", wide, "--model-type", "llama", "--dtype", "fp32"),
        **copies("model.pt", flat, folder / "cp"),
        "model.pt to HF": convert(flat, "hf", back, "--model-type", "llama"),
        **copies("Megatron", megatron, folder / "cp"),
        "Megatron to one file": Timed(megatron, weights, to_file),
        **mindspore(folder, megatron),
    }


def mindspore(folder: Path, megatron: Path) -> dict[str, Timed]:
    """A checkpoint to MindSpore's files and back, in TP 2 and PP 2."""
    files, back = folder / "mindspore", folder / "from_mindspore"

    def convert(source: Path, output: Path, *options: str, kept: bool = False) -> Timed:
        return Timed(source, output, [*_VERB, str(source), str(output), *options], kept)

    parallel = ("--tp", "2", "--pp", "2")
    return {
        "Megatron to MindSpore": convert(megatron, files, "--to", "mindspore", kept=True),
        **copies("MindSpore", files, folder / "cp"),
        "MindSpore to Megatron": convert(files, back, *parallel),
        "MindSpore to Megatron, float16": convert(files, back, *parallel, "--dtype", "fp16"),
    }


def batch(folder: Path, models: int, workers: int) -> str:
    """Convert many small models, and return a line on it."""
    shutil.rmtree(folder / "batch", ignore_errors=True)
    small = folder / "small"
    make_model(small, 2, 512)
    tasks = [
        {"model_path": str(small), "output_path": str(folder / "batch" / str(number)), "output_format": "hf2megatron"}
        for number in range(models)
    ]
    config = folder / "batch.json"
    config.write_text(json.dumps({"models": tasks}), encoding="utf-8")
    found = measure([*_TOOL, "batch", str(config), "--max-workers", str(workers)])
    size = sum(path.stat().st_size for path in small.iterdir())
    shutil.rmtree(folder / "batch")
    return (
        f"{models} models of {size / 1e6:.0f} MB, {workers} workers: {found.wall:.1f} s, {found.cpu:.1f} s of CPU, "
        f"{found.anonymous:.0f} MiB anonymous in all processes"
    )


def main() -> None:
    """Make the models if they are missing, run all commands in turn several times, and print tables of medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    for name, default in {"layers": 16, "hidden": 2048, "runs": 5, "models": 20, "workers": 4}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    folder = args.folder.absolute()
    make_model(folder / "hf", args.layers, args.hidden)
    if not (folder / "megatron").exists():
        command = [*_VERB, str(folder / "hf"), str(folder / "megatron"), "--tp", "2", "--pp", "2"]
        subprocess.run(command, cwd=ROOT, check=True)
    size = sum(path.stat().st_size for path in (folder / "hf").iterdir())
    print(f"{size / 1e9:.2f} GB, {args.runs} runs, median (minimum-maximum)\n")
    print_table(run_in_turn(commands(folder), args.runs))
    print("\n" + batch(folder, args.models, args.workers))


if __name__ == "__main__":
    main()
