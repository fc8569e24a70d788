"""Job scripts of single models: to Megatron-LM, a stand-in for the training, and back, verified; with tiny models."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.helpers import RANK_FILE, ROOT, TRACKER, hf_tensors, same_tensors, succeeded
from tests.oracle.checkpoint import load_rank
from tests.served_python import ServedPython
from tests.test_scripts import SCONTROL, SRUN

HFModel = Callable[..., Path]
#: By script: the tiny model, and a layout that it can have.
JOBS = {
    "torchrun/llama3_8b.sh": ("llama3", "--tp 2 --pp 2"),
    "torchrun/mixtral_8x7b.sh": ("mixtral", "--tp 1 --pp 2 --ep 2"),
    "slurm/llama3_8b.sbatch": ("llama3", "--tp 2 --pp 1"),
    "slurm/mixtral_8x7b.sbatch": ("mixtral", "--tp 2 --pp 1 --ep 2 --etp 1"),
}


def train(words: list[str]) -> None:
    """In place of pretrain_gpt.py: the next checkpoint has every weight doubled, which is exact."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("--load", "--save", "--data-path", "--lr", "--tensor-model-parallel-size"):
        parser.add_argument(name, required=True)
    program = next(at for at, word in enumerate(words) if word.endswith("/pretrain_gpt.py"))
    assert "torch.distributed.run" in words[:program] and "--nproc-per-node=8" in words[:program]
    args, _ = parser.parse_known_args(words[program + 1 :])
    load, save = Path(args.load), Path(args.save)
    iteration = int((load / TRACKER).read_text())
    for path in (load / f"iter_{iteration:07d}").glob(f"*/{RANK_FILE}"):
        content = load_rank(path)
        content["model"] = {
            name: 2 * value if isinstance(value, torch.Tensor) else value for name, value in content["model"].items()
        }
        content["iteration"] = iteration + 1
        target = save / f"iter_{iteration + 1:07d}" / path.parent.name
        target.mkdir(parents=True)
        torch.save(content, target / RANK_FILE)
    (save / TRACKER).write_text(str(iteration + 1))


@pytest.mark.parametrize("script", JOBS)
def test_there_training_and_back(script: str, hf_model: HFModel, tmp_path: Path) -> None:
    family, layout = JOBS[script]
    source, work, tree = hf_model(family, dtype="bfloat16"), tmp_path / "work", tmp_path / "tree"
    tree.mkdir()
    (tree / "pretrain_gpt.py").touch()
    python = ServedPython(tmp_path / "bin", train)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    env = {
        "HF": str(source),
        "MEGATRON_LM": str(tree),
        "DATA": "data",
        "WORK": str(work),
        "LAYOUT": layout,
        "NNODES": "1",
    }
    env |= {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node[1-3]", "CALLS": str(tmp_path / "calls")}
    env |= {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "PROCS_PER_NODE": "1"}
    done = succeeded(python.run(["bash", ROOT / "scripts" / script], env))
    assert done.out.count("EQUAL") == 2 and done.out.endswith(f"trained model: {work}/hf_2\n")
    doubled = {name: 2 * tensor for name, tensor in hf_tensors(source).items()}
    same_tensors(hf_tensors(work / "hf_2"), doubled)
    (training,) = (words for words in python.asked if "torch.distributed.run" in words)
    assert f"{work}/megatron" in training and ("--num-experts" in training) == (family == "mixtral")
    if script == "torchrun/llama3_8b.sh":
        succeeded(python.run(["bash", ROOT / "scripts" / script], env))  # goes on from the last checkpoint
        same_tensors(hf_tensors(work / "hf_3"), {name: 2 * tensor for name, tensor in doubled.items()})
