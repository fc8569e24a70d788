"""Convert a small model with a tree's own convert.py to Megatron-LM and back, and compare every tensor.

    python scripts/check_dropin.py TREE/tools/checkpoint/convert.py LOADER SAVER LOADER_BACK

`scripts/install_dropin.sh` runs it. Stock convert.py ends with 0 whatever its saver did, so only what it leaves counts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

HIDDEN, FFN, LAYERS, HEADS, GROUPS, VOCAB = 32, 48, 2, 4, 2, 100
CONFIG = {
    **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float32", "hidden_act": "silu"},
    **{"hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS},
    **{"num_key_value_heads": GROUPS, "vocab_size": VOCAB, "max_position_embeddings": 64, "rms_norm_eps": 1e-5},
    **{"rope_theta": 10000.0, "tie_word_embeddings": False},
}


def main(convert: str, loader: str, saver: str, back: str) -> None:
    """Exit with 1, and say why, unless the model comes back as it was."""
    with tempfile.TemporaryDirectory() as folder:
        source, megatron, again = (Path(folder) / name for name in ("hf", "megatron", "again"))
        tensors = make_model(source)
        sizes = ("--target-tensor-parallel-size", "2", "--target-pipeline-parallel-size", "2")
        run(convert, "--loader", loader, "--saver", saver, "--load-dir", source, "--save-dir", megatron, *sizes)
        run(convert, "--loader", back, "--saver", "hf", "--load-dir", megatron, "--save-dir", again)
        found = {name: tensor for path in again.glob("*.safetensors") for name, tensor in load_file(path).items()}
    different = sorted(
        name
        for name in tensors.keys() | found.keys()
        if name not in tensors or name not in found or not np.array_equal(tensors[name], found[name])
    )
    if different:
        sys.exit(f"error: {convert} with {loader} and {saver} changed {', '.join(different)}")
    print(f"  checked: {len(tensors)} tensors went through convert.py to tp 2, pp 2 and came back as they were")


def make_model(folder: Path) -> dict[str, np.ndarray]:
    """Write a Llama of random numbers; returns its tensors."""
    dim = HIDDEN // HEADS
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "lm_head.weight": (VOCAB, HIDDEN),
    }
    shapes["model.norm.weight"] = (HIDDEN,)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
        shapes |= {f"{prefix}self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qo"}
        shapes |= {f"{prefix}self_attn.{name}_proj.weight": (GROUPS * dim, HIDDEN) for name in "kv"}
        shapes |= {f"{prefix}mlp.{name}_proj.weight": (FFN, HIDDEN) for name in ("gate", "up")}
        shapes[f"{prefix}mlp.down_proj.weight"] = (HIDDEN, FFN)
    random = np.random.default_rng(0)
    tensors = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    return tensors


def run(convert: str, *options: str | Path) -> None:
    """Run convert.py; what it prints is shown where it fails."""
    done = subprocess.run(
        [sys.executable, convert, "--model-type", "GPT", *map(str, options)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    target = Path(options[options.index("--save-dir") + 1])
    if done.returncode or not target.is_dir():
        sys.exit(f"{done.stdout}error: {convert} wrote no {target.name} (exit code {done.returncode})")


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit(__doc__)
    main(*sys.argv[1:])
