"""OLMoE: norms over all heads, which Megatron-LM's arguments cannot express, carried exactly all the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_converters.basics.errors import ConversionError
from megatron_converters.formats.megatron.rank_files_source import MegatronSource
from tests.conversions import different, hf_to_megatron, megatron_to_hf, reshard
from tests.helpers import (
    args_of,
    convert,
    convert_back,
    edit_rank,
    hf_tensors,
    rank_content,
    refused,
    same_tensors,
    succeeded,
)
from tests.oracle.errors import OracleError
from tests.oracle.hf import hf_logits, sample_tokens
from tests.oracle.pool import MegatronPool

HFModel = Callable[..., Path]
TOKENS = sample_tokens()
VOCABULARY = 199
TOLERANCE = 1e-4
#: Tensor-, pipeline-, expert- and expert-tensor-parallel sizes.
GRIDS = ((1, 1, 1, 1), (2, 2, 1, 2), (4, 1, 2, 2), (1, 2, 2, 1))
NORMS = {"q_norm": ("q_layernorm", 64), "k_norm": ("k_layernorm", 32)}


def forth(source: Path, target: Path, **options: Any) -> Path:
    return hf_to_megatron(source, target, allow_inexpressible=True, **options)


@pytest.fixture(scope="module")
def olmoe(hf_model: HFModel) -> tuple[Path, torch.Tensor]:
    """A model of 8 heads of 8 in 4 groups, and the logits that transformers computes."""
    folder = hf_model("olmoe")
    return folder, hf_logits(folder, TOKENS)


@pytest.mark.parametrize("impl", ["local", "transformer_engine"])
@pytest.mark.parametrize(("tp", "pp", "ep", "etp"), GRIDS)
def test_megatron_with_such_norms_computes_what_transformers_computes(
    megatron_pool: MegatronPool,
    olmoe: tuple[Path, torch.Tensor],
    tmp_path: Path,
    tp: int,
    pp: int,
    ep: int,
    etp: int,
    impl: str,
) -> None:
    folder, wanted = olmoe
    sizes = {"tp": tp, "pp": pp, "ep": ep, "etp": etp}
    checkpoint = forth(folder, tmp_path / "megatron", **sizes, impl=impl)
    got = megatron_pool.logits(checkpoint, TOKENS, qk_norm_over_heads=True, **sizes)[..., :VOCABULARY]
    assert float((got - wanted).abs().max()) < TOLERANCE
    assert different(hf_tensors(folder), hf_tensors(megatron_to_hf(checkpoint, tmp_path / "hf"))) == []


@pytest.mark.parametrize("family", [{"norm_topk_prob": True}, {"attention_bias": True}], ids=str)
def test_other_olmoes_come_back_exactly_beside_their_configuration(
    family: dict[str, bool], hf_model: HFModel, tmp_path: Path
) -> None:
    folder = hf_model("olmoe", **family)
    checkpoint = forth(folder, tmp_path / "megatron", tp=2, pp=2)
    same_tensors(hf_tensors(megatron_to_hf(checkpoint, tmp_path / "hf", hf_config=folder)), hf_tensors(folder))


def test_stock_megatron_refuses_the_norms(
    megatron_pool: MegatronPool, olmoe: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    """The weights cannot be taken for norms of each head: their sizes differ."""
    checkpoint = forth(olmoe[0], tmp_path / "megatron")
    with pytest.raises(OracleError, match=r"size mismatch for decoder\.layers\.0\.self_attention\.q_layernorm\.weight"):
        megatron_pool.logits(checkpoint, TOKENS)


def test_every_tensor_parallel_rank_holds_the_whole_norms(olmoe: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    folder, _ = olmoe
    checkpoint, tensors = forth(folder, tmp_path / "megatron", tp=2), hf_tensors(folder)
    for rank in ("mp_rank_00", "mp_rank_01"):
        model = rank_content(checkpoint, rank)["model"]
        for theirs, (name, size) in NORMS.items():
            found = model[f"decoder.layers.3.self_attention.{name}.weight"]
            assert found.shape == (size,)
            assert torch.equal(found, tensors[f"model.layers.3.self_attn.{theirs}.weight"])


def test_norms_that_differ_between_ranks_are_refused(olmoe: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    checkpoint = forth(olmoe[0], tmp_path / "megatron", tp=2)
    model = rank_content(checkpoint, "mp_rank_01")["model"]
    model["decoder.layers.2.self_attention.k_layernorm.weight"][5] += 1
    edit_rank(checkpoint, "mp_rank_01", model=model)
    with pytest.raises(ConversionError, match=r"layer 2 k_norm: .* differs"):
        megatron_to_hf(checkpoint, tmp_path / "hf")


@pytest.mark.parametrize("recorded", [True, False], ids=["configuration recorded", "args alone"])
def test_args_say_what_the_norms_are(recorded: bool, olmoe: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    folder, _ = olmoe
    checkpoint = forth(folder, tmp_path / "megatron")
    args = args_of(checkpoint)
    assert (args.qk_layernorm, args.qk_layernorm_over_heads) == (True, True)
    if not recorded:
        del args.hf_config
        edit_rank(checkpoint, "mp_rank_00", args=args)
    assert MegatronSource(checkpoint).spec.family == "olmoe"
    same_tensors(hf_tensors(megatron_to_hf(checkpoint, tmp_path / "hf")), hf_tensors(folder))
    if recorded:
        return
    del args.qk_layernorm_over_heads
    edit_rank(checkpoint, "mp_rank_00", args=args)
    with pytest.raises(ConversionError, match=r"q_layernorm\.weight .*has shape \[64\]|cannot express"):
        megatron_to_hf(checkpoint, tmp_path / "no")
    by_reference = megatron_to_hf(checkpoint, tmp_path / "reference", hf_config=folder)
    same_tensors(hf_tensors(by_reference), hf_tensors(folder))


def test_it_needs_leave_and_warns(olmoe: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    folder, _ = olmoe
    with pytest.raises(ConversionError, match=r"--allow-inexpressible.*\n  - query and key norms over all heads"):
        hf_to_megatron(folder, tmp_path / "refused")
    with pytest.raises(ConversionError, match="query and key norms over all heads"):
        reshard(forth(folder, tmp_path / "first"), tmp_path / "second", tp=2)


def test_the_command_lines_bit_by_bit(olmoe: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    folder, meg = olmoe[0], tmp_path / "meg"
    options = ("--loader", "hf", "--load-dir", folder, "--save-dir", meg, "--target-tensor-parallel-size", 2)
    refused(convert(*options), "--allow-inexpressible", "norms over all heads together")
    run = succeeded(convert(*options, "--allow-inexpressible"))
    assert "warning: Megatron-LM will not compute query and key norms over all heads together" in run.err
    succeeded(convert_back("--load-path", meg, "--save-path", tmp_path / "hf"))
    same_tensors(hf_tensors(tmp_path / "hf"), hf_tensors(folder))
