"""`modelconvert` as its tests run it: in this process, or as a process; and a model for it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from model_converter_tool.cli.main import main
from tests.helpers import ROOT, Run, finished, run_here, start
from tests.oracle.hf import make_model

#: What a MiniCPM's config.json has beyond a Llama's, as MiniCPM4-0.5B says it.
_MINICPM = {
    "architectures": ["MiniCPMForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_minicpm.MiniCPMForCausalLM"},
    "scale_emb": 12,
    "scale_depth": 1.4,
    "dim_model_base": 32,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "rope_type": "longrope",
        "long_factor": [1.0, 1.1, 1.5, 2.0],
        "short_factor": [1.0, 1.1, 1.5, 2.0],
        "original_max_position_embeddings": 512,
    },
}


def run(*options: Any) -> Run:
    """Run `modelconvert …` in this process."""
    return run_here(main, options)


def begin(*options: Any, cwd: Path, env: dict[str, str] | None = None) -> Any:
    """Start `python -m model_converter_tool …`; returns the running process."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return start(Path("-m"), "model_converter_tool", *options, cwd=cwd, env={"PYTHONPATH": path, **(env or {})})


def process(*options: Any, cwd: Path, env: dict[str, str] | None = None) -> Run:
    """Run `python -m model_converter_tool …` to its end."""
    return finished(begin(*options, cwd=cwd, env=env), timeout=120)


def minicpm(folder: Path) -> Path:
    """Tiny MiniCPM: a Llama's tensors under a MiniCPM's configuration, with a code file that must not run."""
    make_model("llama2", folder, dtype="bfloat16", tie_word_embeddings=True)
    config = json.loads((folder / "config.json").read_text())
    del config["model_type"], config["rope_parameters"]
    (folder / "config.json").write_text(json.dumps({**config, **_MINICPM}))
    (folder / "modeling_minicpm.py").write_text("raise SystemExit('this must not run')\n")
    return folder
