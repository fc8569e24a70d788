"""OLMoE: norms over all heads, which Megatron-LM has in a layer of `megatron_layers` alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_converters.basics.errors import ConversionError
from megatron_converters.formats.megatron.rank_files_source import MegatronSource
from tests.conversions import different, hf_to_megatron, megatron_to_hf
from tests.helpers import (
    args_of,
    convert,
    convert_back,
    edit_rank,
    hf_tensors,
    rank_content,
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
    checkpoint = hf_to_megatron(folder, tmp_path / "megatron", **sizes, impl=impl)
    got = megatron_pool.logits(checkpoint, TOKENS, **sizes)[..., :VOCABULARY]
    assert float((got - wanted).abs().max()) < TOLERANCE
    assert different(hf_tensors(folder), hf_tensors(megatron_to_hf(checkpoint, tmp_path / "hf"))) == []


@pytest.mark.parametrize("family", [{"norm_topk_prob": True}, {"attention_bias": True}], ids=str)
def test_other_olmoes_come_back_exactly_beside_their_configuration(
    family: dict[str, bool], hf_model: HFModel, tmp_path: Path
) -> None:
    folder = hf_model("olmoe", **family)
    # With biases of attention alone, as no published model has them, it cannot be expressed.
    allowed = "attention_bias" in family
    checkpoint = hf_to_megatron(folder, tmp_path / "megatron", tp=2, pp=2, allow_inexpressible=allowed)
    same_tensors(hf_tensors(megatron_to_hf(checkpoint, tmp_path / "hf", hf_config=folder)), hf_tensors(folder))


def test_stock_megatron_refuses_the_norms(
    megatron_pool: MegatronPool, olmoe: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    """The weights cannot be taken for norms of each head: their sizes differ."""
    checkpoint = hf_to_megatron(olmoe[0], tmp_path / "megatron")
    args = args_of(checkpoint)
    del args.spec
    edit_rank(checkpoint, "mp_rank_00", args=args)
    with pytest.raises(OracleError, match=r"size mismatch for decoder\.layers\.0\.self_attention\.q_layernorm\.weight"):
        megatron_pool.logits(checkpoint, TOKENS)


def test_every_tensor_parallel_rank_holds_the_whole_norms(olmoe: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    folder, _ = olmoe
    checkpoint, tensors = hf_to_megatron(folder, tmp_path / "megatron", tp=2), hf_tensors(folder)
    for rank in ("mp_rank_00", "mp_rank_01"):
        model = rank_content(checkpoint, rank)["model"]
        for theirs, (name, size) in NORMS.items():
            found = model[f"decoder.layers.3.self_attention.{name}.weight"]
            assert found.shape == (size,)
            assert torch.equal(found, tensors[f"model.layers.3.self_attn.{theirs}.weight"])


def test_norms_that_differ_between_ranks_are_refused(olmoe: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    checkpoint = hf_to_megatron(olmoe[0], tmp_path / "megatron", tp=2)
    model = rank_content(checkpoint, "mp_rank_01")["model"]
    model["decoder.layers.2.self_attention.k_layernorm.weight"][5] += 1
    edit_rank(checkpoint, "mp_rank_01", model=model)
    with pytest.raises(ConversionError, match=r"layer 2 k_norm: .* differs"):
        megatron_to_hf(checkpoint, tmp_path / "hf")


@pytest.mark.parametrize("recorded", [True, False], ids=["configuration recorded", "args alone"])
def test_args_say_what_the_norms_are(recorded: bool, olmoe: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    folder, _ = olmoe
    checkpoint = hf_to_megatron(folder, tmp_path / "megatron")
    args = args_of(checkpoint)
    assert (args.qk_layernorm, args.spec) == (True, ["megatron_layers.norms_over_heads", "spec"])
    if not recorded:
        del args.hf_config
        edit_rank(checkpoint, "mp_rank_00", args=args)
    assert MegatronSource(checkpoint).spec.family == "olmoe"
    same_tensors(hf_tensors(megatron_to_hf(checkpoint, tmp_path / "hf")), hf_tensors(folder))
    if recorded:
        return
    del args.spec
    args.qk_layernorm_over_heads = True  # as earlier versions recorded it
    edit_rank(checkpoint, "mp_rank_00", args=args)
    same_tensors(hf_tensors(megatron_to_hf(checkpoint, tmp_path / "earlier")), hf_tensors(folder))
    del args.qk_layernorm_over_heads
    edit_rank(checkpoint, "mp_rank_00", args=args)
    with pytest.raises(ConversionError, match=r"q_layernorm\.weight .*has shape \[64\]|cannot express"):
        megatron_to_hf(checkpoint, tmp_path / "no")
    by_reference = megatron_to_hf(checkpoint, tmp_path / "reference", hf_config=folder)
    same_tensors(hf_tensors(by_reference), hf_tensors(folder))


def test_the_command_lines_bit_by_bit(olmoe: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    folder, meg = olmoe[0], tmp_path / "meg"
    options = ("--loader", "hf", "--load-dir", folder, "--save-dir", meg, "--target-tensor-parallel-size", 2)
    run = succeeded(convert(*options))
    assert "--spec megatron_layers.norms_over_heads spec names a layer of this project's package" in run.out
    assert "--spec exists from Megatron-LM 0.16 on" in run.out
    succeeded(convert_back("--load-path", meg, "--save-path", tmp_path / "hf"))
    same_tensors(hf_tensors(tmp_path / "hf"), hf_tensors(folder))
