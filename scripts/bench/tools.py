"""Benchmark of `modelconvert`, `tp_pp_converter` and MindSpore, run as `bench.py` runs its rows, and of a batch of small models.

    python scripts/bench/tools.py FOLDER [--rows NAME...] [--runs 9] [--touch 4] [--quick] [--models 20] [--workers 4]

A Llama of 1.1 billion parameters becomes model.pt and a folder again, as it is and cast to float32, and a checkpoint of TP 2 and
PP 2 one file of weights. The checkpoint becomes a MindSpore model in its newer layout, and that a checkpoint again, as it is and
cast to float16. Then many small models are converted by several workers.
"""

from __future__ import annotations

import json
from pathlib import Path

from inputs import HF, PROGRAMS, Disk, Model
from measuring import measure, remove, size_of
from pairs import Row, Run, parser, run_chosen
from rows import LLAMA

_SMALL = Model("llama_small", "2 512 0", "2 512 0")
_TO_PT = "modelconvert convert {hf} hf2megatron -o {output} --model-type llama"
_TO_FILE = "tp_pp_converter --model_type llama --in_dir {megatron} --save_path {output}.pt"
_TO_HF = "modelconvert convert {model_pt} hf -o {output} --model-type llama"
_FROM_MINDSPORE = "convert {mindspore} {output} --tp 2 --pp 2"

TITLES = {"tools": "Model Converter Tool, single files and MindSpore, 2.2 GB"}
ROWS = (
    Row("model.pt", "tools", LLAMA, Run("HF to model.pt", _TO_PT)),
    Row(
        "model.pt-fp32",
        "tools",
        LLAMA,
        Run("HF to model.pt, bf16 to fp32", f"{_TO_PT} --dtype fp32"),
        Run("HF to model.pt, fp32", _TO_PT.replace("{hf}", "{hf_fp32}")),
    ),
    Row("from-model.pt", "tools", LLAMA, Run("model.pt to HF", _TO_HF)),
    Row("one-file", "tools", LLAMA, Run("Megatron, TP 2, PP 2, to one file", _TO_FILE)),
    Row(
        "mindspore",
        "tools",
        LLAMA,
        Run("Megatron, TP 2, PP 2, to MindSpore", "convert {megatron} {output} --to mindspore"),
    ),
    Row("from-mindspore", "tools", LLAMA, Run("MindSpore to Megatron, TP 2, PP 2", _FROM_MINDSPORE)),
    Row(
        "from-mindspore-fp16",
        "tools",
        LLAMA,
        Run("MindSpore to Megatron, bf16 to fp16", f"{_FROM_MINDSPORE} --dtype fp16"),
        Run("MindSpore to Megatron, fp16", _FROM_MINDSPORE.replace("{mindspore}", "{mindspore_fp16}")),
    ),
)


def batch(folder: Path, models: int, workers: int) -> str:
    """Convert many small models, and return a line on it."""
    disk = Disk(folder, quick=False)
    small = disk.prepare(_SMALL, [HF], [LLAMA])[HF]
    disk.output.mkdir()
    tasks = [
        {"model_path": str(small), "output_path": str(disk.output / str(number)), "output_format": "hf2megatron"}
        for number in range(models)
    ]
    config = disk.output / "batch.json"
    config.write_text(json.dumps({"models": tasks}), encoding="utf-8")
    found = measure([*PROGRAMS["modelconvert"], "batch", str(config), "--max-workers", str(workers)])
    remove(disk.output)
    return (
        f"{models} models of {size_of(small) / 1e6:.0f} MB, {workers} workers: {found.wall:.1f} s, {found.cpu:.1f} s of CPU, "
        f"{found.anonymous:.0f} MiB anonymous in all processes"
    )


def main() -> None:
    """Run the rows that are asked for and print their tables; without a choice of rows, also the batch."""
    made = parser(__doc__, ROWS, TITLES)
    for name, default in {"models": 20, "workers": 4}.items():
        made.add_argument(f"--{name}", type=int, default=default)
    args = made.parse_args()
    run_chosen(args, ROWS, TITLES)
    if not args.rows:
        print("\n" + batch(args.folder, args.models, args.workers))


if __name__ == "__main__":
    main()
