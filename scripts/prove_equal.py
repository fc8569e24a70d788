"""Prove that two Hugging Face folders hold the same model, without using megatron_converters.

    python scripts/prove_equal.py BEFORE AFTER

Compares every tensor bit for bit with the safetensors library, then loads both with transformers and compares the logits and
the tokens of a few texts. Prints the results; exits with 1 if anything differs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

TEXTS = ["The quick brown fox.", " two  spaces\n\tand a tab", "It's 12345, isn't it?", "über naïve 你好 🙂", ""]


def tensors(folder: Path, stack: ExitStack) -> dict[str, object]:
    """Tensors in the folder's safetensors files: name to open file."""
    files = [stack.enter_context(safe_open(path, "pt")) for path in sorted(folder.glob("*.safetensors"))]
    return {name: file for file in files for name in file.keys()}  # noqa: SIM118


def tensor_faults(before: Path, after: Path) -> Iterator[str]:
    """Lines for each tensor that is missing, extra or different."""
    with ExitStack() as stack:
        old, new = tensors(before, stack), tensors(after, stack)
        size = 0
        for name in sorted(old.keys() | new.keys()):
            if name not in old or name not in new:
                yield f"{name} is only in {before if name in old else after}"
                continue
            one, other = old[name].get_tensor(name), new[name].get_tensor(name)
            size += one.nbytes
            if (one.dtype, one.shape) != (other.dtype, other.shape):
                yield f"{name} was {one.dtype} {list(one.shape)} and is {other.dtype} {list(other.shape)}"
            elif not torch.equal(one.view(torch.uint8), other.view(torch.uint8)):
                yield f"{name} has other values"
        print(f"tensors:   {len(old)} compared bit for bit, {size / 1e6:.1f} MB")


def logits(folder: Path, tokens: torch.Tensor) -> tuple[torch.Tensor, list[str]]:
    """Logits by transformers, float32 [1, sequence, vocabulary], and the missing, unexpected and mismatched keys."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    keys = [str(key) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in info[kind]]
    with torch.no_grad():
        return model(tokens).logits, keys


def model_faults(before: Path, after: Path) -> Iterator[str]:
    """Lines for each key that transformers reports, and one if the logits differ."""
    vocab_size = AutoConfig.from_pretrained(before).vocab_size
    tokens = torch.randint(vocab_size, (1, 64), generator=torch.Generator().manual_seed(0))
    expected, _ = logits(before, tokens)
    found, keys = logits(after, tokens)
    yield from (f"transformers finds {key} missing, unexpected or misshapen" for key in keys)
    difference = float("inf") if expected.shape != found.shape else (expected - found).abs().max().item()
    print(f"model:     transformers loads it, {len(keys)} missing or unexpected keys")
    print(
        f"logits:    {tokens.numel()} tokens, largest difference {difference:g} (of {expected.abs().max().item():.1f})"
    )
    if difference:
        yield f"logits differ by up to {difference:g}"


def tokenizer_faults(before: Path, after: Path) -> Iterator[str]:
    """Lines for each text that the two tokenizers encode differently."""
    old, new = AutoTokenizer.from_pretrained(before), AutoTokenizer.from_pretrained(after)
    for text in TEXTS:
        if old(text).input_ids != new(text).input_ids:
            yield f"the tokenizers encode {text!r} differently"
    print(f"tokenizer: {len(TEXTS)} texts encoded, {len(new)} tokens in all")


def main() -> None:
    """Compare the two folders that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    args = parser.parse_args()
    checks = (tensor_faults, model_faults, tokenizer_faults)
    faults = [fault for check in checks for fault in check(args.before, args.after)]
    for fault in faults:
        print(f"DIFFERENT: {fault}")
    if faults:
        sys.exit(1)
    print("EQUAL")


if __name__ == "__main__":
    main()
