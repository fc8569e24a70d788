"""Helpers that run command lines as a user does, and check what they leave behind."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from megatron_converters.cli import main, mlm_to_hf, queue_convert, tensor_parallel

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
    """Exit code and output of a finished command line."""

    code: int
    out: str
    err: str


def start(script: Path, *options: Any, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> Any:
    """Start a command line in a process group of its own, with its output in pipes; returns the running process."""
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
    """Restore SIGINT, which tests in the background of a shell ignore, and so would their children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def finished(process: Any, timeout: float = _TIMEOUT) -> Run:
    """Wait for a process and for all processes that hold its output open."""
    out, err = process.communicate(timeout=timeout)
    return Run(process.returncode, out, err)


def convert(*options: Any, anew: bool = False, **more: Any) -> Run:
    """Run `convert.py …` from a folder other than the checkout: in a forked process, or in a new one if `anew` or `more` say so."""
    if anew or more:
        return finished(start(CONVERT, *options, **more))
    from tests.forked import forked

    return forked(lambda: queue_convert.main([str(option) for option in options]))


def convert_back(*options: Any, **more: Any) -> Run:
    """Run `convert_mlm_to_hf_checkpoint.py …`: in this process, unless `more` asks for a process."""
    return finished(start(BACK, *options, **more)) if more else run_here(mlm_to_hf.main, options)


def start_verb(*options: Any, **more: Any) -> Any:
    """Start `python -m megatron_converters …`; returns the running process."""
    return start(Path("-m"), "megatron_converters", *options, **{"cwd": ROOT, **more})


def verb(*options: Any, **more: Any) -> Run:
    """Run `megatron-converters …`: in this process, unless `more` asks for a process."""
    return finished(start_verb(*options, **more)) if more else run_here(main.main, options)


def tp_pp_converter(*options: Any) -> Run:
    """Run `python -m megatron_converters.tp_pp_converter …` in this process."""
    return run_here(tensor_parallel.main, options)


def run_here(command: Callable[[list[str]], None], options: tuple[Any, ...]) -> Run:
    """Run a command line in this process, which saves a start of Python."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2)]
    code: Any = 0
    with redirect_stdout(streams[0]), redirect_stderr(streams[1]):
        try:
            command([str(option) for option in options])
        except SystemExit as ended:
            code = ended.code
    out, err = (cast("io.BytesIO", stream.buffer).getvalue().decode() for stream in streams)
    return Run(code, out, err)


def succeeded(run: Run) -> Run:
    """Assert that the exit code is 0 and that there is no traceback."""
    assert run.code == 0, run
    assert "Traceback" not in run.err, run
    return run


def refused(run: Run, *words: Any, code: int = 1) -> Run:
    """Assert a proper error: the exit code, a message that contains all of `words`, and no traceback."""
    assert run.code == code, run
    assert "Traceback" not in run.err, run.err
    assert "error: " in run.err, run
    missing = [str(word) for word in words if str(word) not in run.err]
    assert not missing, (missing, run.err)
    return run


def nothing_complete(folder: Path) -> None:
    """Assert that `folder` has nothing that could pass for a model, and no incomplete files."""
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
    """Tensors of a folder, safetensors or `.bin`, read by the libraries of these formats."""
    import torch
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    for path in sorted(folder.glob("*.bin")):
        tensors |= torch.load(path, weights_only=True)
    return tensors


def same_tensors(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> None:
    """Assert that both have the same names, and for each the same dtype and values."""
    import torch

    assert sorted(ours) == sorted(theirs)
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


def config_of(folder: Path) -> dict[str, Any]:
    """What a folder's config.json says."""
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def edit_config(folder: Path, **changes: Any) -> None:
    """Change values in a folder's config.json."""
    (folder / "config.json").write_text(json.dumps({**config_of(folder), **changes}))


def file_bytes(folder: Path) -> dict[str, bytes]:
    """Bytes of every file below a folder, by its path in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def rank_content(save_dir: Path, rank: str = "mp_rank_00", iteration: str = "iter_0000001") -> dict[str, Any]:
    """Content of a rank's file, read as by Megatron-LM 0.14 and later."""
    from tests.oracle.checkpoint import load_rank

    return load_rank(save_dir / iteration / rank / RANK_FILE)


def edit_rank(save_dir: Path, rank: str, **changes: Any) -> None:
    """Replace entries of a rank's file; None removes an entry."""
    import torch

    content = rank_content(save_dir, rank)
    kept = {key: value for key, value in {**content, **changes}.items() if value is not None}
    torch.save(kept, save_dir / "iter_0000001" / rank / RANK_FILE)


def args_of(save_dir: Path, iteration: str = "iter_0000001", rank: str | None = None) -> Namespace:
    """Args of a rank, by default the first."""
    first = sorted((save_dir / iteration).glob(f"mp_rank_00*/{RANK_FILE}"))[0]
    args: Namespace = rank_content(save_dir, rank or first.parent.name, iteration)["args"]
    return args


def small_disk(tmp_path: Path, megabytes: float) -> Path | None:
    """File system of this size in MiB; None where the machine does not allow mounting one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    size = f"size={int(megabytes * 1024)}k"
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", folder], capture_output=True, check=False)
    return folder if done.returncode == 0 else None


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    """Wait until the condition holds; fails after so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.002)
