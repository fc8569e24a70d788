"""A model of Hugging Face to a live megatron-core model and back, with a table that compares every weight.

    python examples/2_way_hf_binding.py [MODEL] [--output-dir DIR] [--tp N] [--pp N]
    torchrun --nproc-per-node 4 examples/2_way_hf_binding.py MODEL --tp 2 --pp 2

MODEL is a folder or a name on the Hub. Exits with 1 if any exported weight differs from the source's.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from safetensors import safe_open

from megatron_converters.bridge import AutoBridge

DEFAULT_MODEL = "meta-llama/Llama-3.2-1B"


def source_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Weights of a folder's safetensors, by name."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dictionary
    return found


def main() -> int:
    """Convert there and back, print the table, and save the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL)
    parser.add_argument("--output-dir", type=Path, help="save the model there as a Hugging Face folder")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    args = parser.parse_args()

    bridge = AutoBridge.from_hf_pretrained(args.model)
    provider = bridge.to_megatron_provider()
    provider.tensor_model_parallel_size = args.tp
    provider.pipeline_model_parallel_size = args.pp
    model = provider(wrap_with_ddp=False)

    first = torch.distributed.get_rank() == 0  # which alone gets the weights
    source = source_weights(bridge.hf_pretrained.location.folder(config_only=False)) if first else {}
    if first and not source:
        sys.exit(f"{args.model} has no safetensors to compare with")
    left, differing = set(source), 0
    for name, weight in bridge.export_hf_weights(model, cpu=True, show_progress=False):
        equal = name in source and torch.equal(weight, source[name])
        left.discard(name)
        differing += not equal
        print(f"{name:<60} {weight.shape!s:<28} {'equal' if equal else 'DIFFERS'}")
    if first:
        print(f"{len(source) - len(left)} of {len(source)} weights exported, {differing} differ")
        for name in sorted(left):
            print(f"{name:<60} not exported")
    if args.output_dir is not None:
        bridge.save_hf_pretrained(model, args.output_dir, show_progress=False)
    return 1 if differing or left else 0


if __name__ == "__main__":
    sys.exit(main())
