"""Run the command lines as a user does, and look at what they leave behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parents[1]
CONVERT = ROOT / "convert.py"
BACK = ROOT / "convert_mlm_to_hf_checkpoint.py"
TRACKER = "latest_checkpointed_iteration.txt"
RANK_FILE = "model_optim_rng.pt"
_TIMEOUT = 60.0


@dataclass(frozen=True)
class Run:
    """A finished command line."""

    code: int
    out: str
    err: str


def start(script: Path, *options: Any, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> Any:
    """The process of a command line that goes on running, in a group of its own, its output in pipes."""
    return subprocess.Popen(
        [sys.executable, str(script), *map(str, options)],
        cwd=cwd or "/",
        env={**os.environ, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=_default_interrupt,
    )


def _default_interrupt() -> None:
    """A test run in the background of a shell ignores SIGINT, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def finished(process: Any, timeout: float = _TIMEOUT) -> Run:
    """Wait for a process, and for all that hold its output."""
    out, err = process.communicate(timeout=timeout)
    return Run(process.returncode, out, err)


def convert(*options: Any, **more: Any) -> Run:
    """`python convert.py …`, from a folder that is not the checkout."""
    return finished(start(CONVERT, *options, **more))


def convert_back(*options: Any, **more: Any) -> Run:
    """`python convert_mlm_to_hf_checkpoint.py …`, from a folder that is not the checkout."""
    return finished(start(BACK, *options, **more))


def start_verb(*options: Any, **more: Any) -> Any:
    """The process of `python -m megatron_converters …`."""
    return start(Path("-m"), "megatron_converters", *options, **{"cwd": ROOT, **more})


def verb(*options: Any, **more: Any) -> Run:
    """`python -m megatron_converters …`."""
    return finished(start_verb(*options, **more))


def succeeded(run: Run) -> Run:
    """Exit code 0 and nothing that looks like an accident."""
    assert run.code == 0, run
    assert "Traceback" not in run.err, run
    return run


def refused(run: Run, *words: Any, code: int = 1) -> Run:
    """An error by the contract: the exit code, a sentence that holds all of `words`, and no traceback."""
    assert run.code == code, run
    assert "Traceback" not in run.err, run.err
    assert "error: " in run.err, run
    missing = [str(word) for word in words if str(word) not in run.err]
    assert not missing, (missing, run.err)
    return run


def nothing_complete(folder: Path) -> None:
    """Nothing in `folder` can be taken for a model, and nothing half-written is left."""
    left = [
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.name in (TRACKER, "release", "config.json")
        or path.name.startswith("iter_")
        or ".incomplete" in path.name
        or path.name.endswith((".index.json", ".safetensors", ".bin", ".pt"))
    ]
    assert not left, left


def hf_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, safetensors or `.bin`, read by the libraries that made the formats."""
    import torch
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    for path in sorted(folder.glob("*.bin")):
        tensors |= torch.load(path, weights_only=True)
    return tensors


def same_tensors(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> None:
    """The same names, and for each the same dtype and the same bits."""
    import torch

    assert sorted(ours) == sorted(theirs)
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


def rank_content(save_dir: Path, rank: str = "mp_rank_00", iteration: str = "iter_0000001") -> dict[str, Any]:
    """A rank's file as Megatron-LM 0.14 and later reads it."""
    from tests.oracle.checkpoint import load_rank

    return load_rank(save_dir / iteration / rank / RANK_FILE)


def edit_rank(save_dir: Path, rank: str, **changes: Any) -> None:
    """Replace entries of a rank's file; None removes one."""
    import torch

    content = rank_content(save_dir, rank)
    kept = {key: value for key, value in {**content, **changes}.items() if value is not None}
    torch.save(kept, save_dir / "iter_0000001" / rank / RANK_FILE)


def args_of(save_dir: Path, iteration: str = "iter_0000001", rank: str | None = None) -> Namespace:
    """The args of a rank, by default of the first."""
    first = sorted((save_dir / iteration).glob(f"mp_rank_00*/{RANK_FILE}"))[0]
    args: Namespace = rank_content(save_dir, rank or first.parent.name, iteration)["args"]
    return args


def small_disk(tmp_path: Path, megabytes: float) -> Path | None:
    """A file system of this size, where the machine lets us mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    size = f"size={int(megabytes * 1024)}k"
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", folder], capture_output=True, check=False)
    return folder if done.returncode == 0 else None
