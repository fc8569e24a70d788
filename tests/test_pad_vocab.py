"""Vocabulary padded for further tensor-parallel sizes, which must divide the number that Megatron-LM takes from the args."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_converters.formats.megatron.opening import open_megatron
from tests.conversions import different, hf_to_torch_dist, megatron_to_hf, reshard
from tests.helpers import args_of, hf_tensors, refused, succeeded, verb
from tests.oracle.hf import hf_logits, sample_tokens
from tests.oracle.pool import MegatronPool

HFModel = Callable[..., Path]
TOKENS, VOCABULARY = sample_tokens(), 199
FORMAT = ("--ckpt-format", "torch_dist")


def stored_args(root: Path) -> Any:
    return torch.load(root / "iter_0000001" / "common.pt", weights_only=False)["args"]


def test_the_sizes_are_said_among_the_flags(hf_model: HFModel, tmp_path: Path) -> None:
    run = succeeded(verb("convert", hf_model("llama2"), tmp_path / "meg", *FORMAT))
    assert (
        "loads at any tensor-parallel size that divides the 256 rows of the padded vocabulary, a number that Megatron-LM takes "
        "from the args; for another, such as 3, write with --pad-vocab-for-tp 3\npretrain_gpt.py needs:"
    ) in run.out
    assert "--pad-vocab-for-tp" not in succeeded(verb("convert", hf_model("llama2"), tmp_path / "torch")).out


@pytest.mark.parametrize(
    ("options", "rows", "divisor", "other"),
    [
        (("--pad-vocab-for-tp", 3), 384, 384, 5),
        (("--pad-vocab-for-tp", 3, "--tp", 2), 768, 384, 5),
        (("--pad-vocab-for-tp", 4, "--tp", 2), 512, 256, 3),
        (("--pad-vocab-for-tp", 2, "--tp", 4), 512, 128, 3),
        (("--pad-vocab-for-tp", 3, "--make-vocab-size-divisible-by", 1), 201, 3, 4),
    ],
)
def test_rows_that_further_sizes_divide(
    options: tuple[Any, ...], rows: int, divisor: int, other: int, hf_model: HFModel, tmp_path: Path
) -> None:
    """As many as Megatron-LM would pad to at the least common multiple; the recorded divisor gives them, too."""
    run = succeeded(verb("convert", hf_model("llama2"), tmp_path / "meg", *FORMAT, *options))
    args = stored_args(tmp_path / "meg")
    assert (args.padded_vocab_size, args.make_vocab_size_divisible_by) == (rows, divisor)
    assert f"divides the {rows} rows" in run.out and f"such as {other}, write" in run.out
    source = open_megatron(tmp_path / "meg")
    assert not [note for note in source.origin.notes if note.startswith("warning:")]
    back = megatron_to_hf(tmp_path / "meg", tmp_path / "hf")
    assert different(hf_tensors(hf_model("llama2")), hf_tensors(back)) == []


def test_files_of_ranks_and_wrong_values(hf_model: HFModel, tmp_path: Path) -> None:
    succeeded(verb("convert", hf_model("llama2"), tmp_path / "meg", "--pad-vocab-for-tp", 3))
    assert args_of(tmp_path / "meg").padded_vocab_size == 384
    refused(verb("convert", hf_model("llama2"), tmp_path / "no", "--pad-vocab-for-tp", 0), "--pad-vocab-for-tp", code=2)
    refused(
        verb("convert", tmp_path / "meg", tmp_path / "hf", "--to", "hf", "--pad-vocab-for-tp", 3),
        "--pad-vocab-for-tp: only for writing a Megatron-LM checkpoint",
        code=2,
    )


def test_megatron_loads_it_at_the_further_size(megatron_pool: MegatronPool, hf_model: HFModel, tmp_path: Path) -> None:
    """199 rows of a checkpoint at tensor-parallel size 1, of which no run of 4 ranks could take a quarter."""
    folder = hf_model("llama2")
    root = hf_to_torch_dist(folder, tmp_path / "meg", divisor=1, pad_vocab_for_tp=4)
    assert stored_args(root).padded_vocab_size == 200
    got = megatron_pool.distributed_logits(root, TOKENS, tp=4, pp=1, padded=1)
    assert got.shape[-1] == 200
    assert float((got[..., :VOCABULARY] - hf_logits(folder, TOKENS)).abs().max()) < 1e-4
    again = reshard(root, tmp_path / "torch", tp=4)
    assert different(hf_tensors(folder), hf_tensors(megatron_to_hf(again, tmp_path / "hf"))) == []
