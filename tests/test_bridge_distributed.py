"""AutoBridge on several processes: the real megatron-core computes what transformers computes, and the export is the source."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_converters.basics.errors import ConversionError
from megatron_converters.logits.pool import Pool
from tests import bridge_jobs
from tests.bridge_jobs import Seen, Trained
from tests.conversions import different, hf_to_megatron
from tests.helpers import hf_tensors
from tests.logits_processes import PreloadedContext
from tests.oracle.hf import exact_difference, hf_logits, sample_tokens
from tests.oracle.pool import MegatronPool

TOKENS = sample_tokens(length=16)
TOLERANCE = 1e-5
VOCABULARY = 199
PROCESSES = 4
#: Families, and sizes of four processes.
CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama3.2-tied", dict(tp=2, pp=2)),
    ("llama3", dict(tp=2, pp=2, vpp=2)),
    ("llama3.2-tied", dict(tp=2, pp=2, layout="Et|t|t|tL")),
    ("gpt2", dict(tp=2, pp=2)),
    ("qwen3-moe", dict(tp=2, pp=2, ep=2, etp=1)),
    ("qwen3-moe", dict(pp=2, vpp=2, ep=2)),
    ("deepseek-v3-yarn", dict(tp=2, ep=4, etp=1)),
    ("deepseek-v3", dict(tp=2, pp=2)),
]


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(PROCESSES, bridge_jobs.join, 120.0, PreloadedContext("tests.live_preload")) as found:
        yield found


def whole(seen: list[Seen]) -> torch.Tensor:
    """Logits of the shares of all tensor-parallel ranks."""
    shares = {each.tp: each.logits for each in seen if each.logits is not None}
    return torch.cat([shares[tp] for tp in sorted(shares)], -1)[..., :VOCABULARY]


@pytest.mark.parametrize(("family", "sizes"), CASES, ids=[f"{family} {sizes}" for family, sizes in CASES])
def test_live_models_are_the_source(
    family: str, sizes: dict[str, Any], pool: Pool, hf_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = hf_model(family)
    source = hf_tensors(folder)
    seen: list[Seen] = pool.run(bridge_jobs.round_trip, folder, tmp_path, TOKENS, sizes)
    assert exact_difference(whole(seen), hf_logits(folder, TOKENS)) < TOLERANCE
    got = {manner: [each.exports[manner] for each in seen] for manner in seen[0].exports}
    for weights in [got["consolidate"][0], got["usual"][0], *got["replicate"], *got["by file"], _union(got["stage"])]:
        assert different(weights, source) == []
    assert not any([*got["consolidate"][1:], *got["usual"][1:]])
    assert sum(map(len, got["distribute"])) == len(source)
    assert all(got["distribute"])
    assert different(_union(got["distribute"]), source) == []
    assert different(hf_tensors(tmp_path / "one"), source) == []
    assert different(hf_tensors(tmp_path / "several"), source) == []
    assert len(list((tmp_path / "several").glob("*.safetensors"))) > 2
    assert exact_difference(hf_logits(tmp_path / "one", TOKENS), hf_logits(folder, TOKENS)) == 0.0


def _union(shares: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: weight for share in shares for name, weight in share.items()}


def test_a_trained_model_is_exported_as_it_is(pool: Pool, hf_model: Callable[..., Path]) -> None:
    folder = hf_model("llama3")
    found: list[Trained] = pool.run(bridge_jobs.trained, folder, TOKENS, dict(tp=2))
    shares = [each.parameters[0] for each in sorted(found[:2], key=lambda each: each.tp)]
    source = hf_tensors(folder)
    for layer in range(4):
        ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        gates, ups = zip(*(share[ours + "mlp.linear_fc1.weight"].chunk(2) for share in shares), strict=True)
        qkv = torch.cat([share[ours + "self_attention.linear_qkv.weight"] for share in shares]).reshape(4, 4, 8, 64)
        source |= {
            theirs + "mlp.gate_proj.weight": torch.cat(gates),
            theirs + "mlp.up_proj.weight": torch.cat(ups),
            theirs + "mlp.down_proj.weight": torch.cat([share[ours + "mlp.linear_fc2.weight"] for share in shares], 1),
            theirs + "self_attn.q_proj.weight": qkv[:, :2].reshape(64, 64),
            theirs + "self_attn.k_proj.weight": qkv[:, 2].reshape(32, 64),
            theirs + "self_attn.v_proj.weight": qkv[:, 3].reshape(32, 64),
            theirs + "self_attn.o_proj.weight": torch.cat(
                [share[ours + "self_attention.linear_proj.weight"] for share in shares], 1
            ),
            theirs + "input_layernorm.weight": shares[0][ours + "input_layernorm.weight"],
            theirs + "post_attention_layernorm.weight": shares[0][ours + "pre_mlp_layernorm.weight"],
        }
    rows = torch.cat([share["embedding.word_embeddings.weight"] for share in shares])
    head = torch.cat([share["output_layer.weight"] for share in shares])
    source |= {
        "model.embed_tokens.weight": rows[:VOCABULARY],
        "lm_head.weight": head[:VOCABULARY],
        "model.norm.weight": shares[0]["decoder.final_layernorm.weight"],
    }
    for each in found:
        assert different(each.exported, source) == []
    changed = [name for name, value in hf_tensors(folder).items() if not torch.equal(value, source[name])]
    assert len(changed) == len(source)  # the step has changed every tensor


def test_experts_of_a_trained_model(pool: Pool, hf_model: Callable[..., Path]) -> None:
    found: list[Trained] = pool.run(bridge_jobs.trained, hf_model("qwen3-moe"), TOKENS, dict(ep=4))
    exported = found[0].exported
    for each in found:
        assert different(each.exported, exported) == []
        for local in range(2):
            theirs = f"model.layers.3.mlp.experts.{2 * each.ep + local}."
            ours = f"decoder.layers.3.mlp.experts.local_experts.{local}."
            gate, up = each.parameters[0][ours + "linear_fc1.weight"].chunk(2)
            assert torch.equal(exported[theirs + "gate_proj.weight"], gate)
            assert torch.equal(exported[theirs + "up_proj.weight"], up)
            assert torch.equal(exported[theirs + "down_proj.weight"], each.parameters[0][ours + "linear_fc2.weight"])


@pytest.mark.parametrize("family", ["llama3.2-tied", "qwen3-moe"])
def test_megatron_core_loads_what_was_saved(
    family: str, pool: Pool, megatron_pool: MegatronPool, hf_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = hf_model(family)
    experts = dict(ep=2, etp=1) if "moe" in family else {}
    pool.run(bridge_jobs.saved, folder, tmp_path / "saved", dict(tp=2, pp=2, **experts))
    theirs = hf_logits(folder, TOKENS)
    ours = megatron_pool.distributed_logits(tmp_path / "saved", TOKENS, tp=1, pp=2, ep=1, etp=1)
    assert exact_difference(ours[..., :VOCABULARY], theirs) < TOLERANCE
    seen = pool.run(bridge_jobs.loaded, folder, tmp_path / "saved", TOKENS, dict(tp=4))
    assert exact_difference(whole(seen), theirs) < TOLERANCE


def test_a_checkpoint_of_ranks_becomes_a_live_model_of_other_sizes(
    pool: Pool, hf_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = hf_model("llama3")
    hf_to_megatron(folder, tmp_path / "ranks", tp=2, pp=2)
    seen = pool.run(bridge_jobs.loaded, folder, tmp_path / "ranks", TOKENS, dict(pp=4))
    assert exact_difference(whole(seen), hf_logits(folder, TOKENS)) < TOLERANCE


def test_sizes_that_do_not_fit_are_refused_with_those_that_do(pool: Pool, hf_model: Callable[..., Path]) -> None:
    with pytest.raises(ConversionError, match="cannot be cut over tp=3; use tp 1, 2, 4 or 8"):
        pool.run(bridge_jobs.refused, hf_model("llama3"), dict(tp=3))
    with pytest.raises(ConversionError, match="a world size of 4 cannot be divided into tp=8"):
        pool.run(bridge_jobs.refused, hf_model("llama3"), dict(tp=8))


def test_every_process_names_the_parameter_that_one_of_them_lacks(pool: Pool, hf_model: Callable[..., Path]) -> None:
    with pytest.raises(ConversionError, match=r"rank 3: decoder.layers.0.mlp.linear_fc2.weight is missing"):
        pool.run(bridge_jobs.damaged, hf_model("llama3"), dict(tp=2, pp=2), 3)


def test_a_wrong_layout_exports_another_model(pool: Pool, hf_model: Callable[..., Path]) -> None:
    folder = hf_model("llama3")
    for weights in pool.run(bridge_jobs.swapped, folder, dict(tp=2, pp=2)):
        names = {text.partition(":")[0] for text in different(weights, hf_tensors(folder))}
        assert names == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in range(4)}
