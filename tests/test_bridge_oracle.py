"""The proof of `AutoBridge` with the oracle's processes: local layers and Transformer Engine's, half precision, after training,
and of models that are not the bridge's."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import bridge_oracle_jobs as jobs
from tests.bridge_oracle_jobs import EXPORTS, Digest, Found, digest
from tests.helpers import hf_tensors
from tests.oracle.errors import OracleError
from tests.oracle.hf import TOKENS, difference, hf_logits
from tests.oracle.pool import MegatronPool, _concatenate

VOCABULARY = 199
#: Largest difference, relative to the largest logit.
TOLERANCE = 1e-5
Models = Callable[..., Path]

ENGINE = dict(transformer_impl="transformer_engine", moe_grouped_gemm=True)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3.1, TP2 PP2": ("llama3.1", dict(tp=2, pp=2)),
    "Qwen3-MoE, TP2 PP2": ("qwen3-moe", dict(tp=2, pp=2)),
    "Qwen3-MoE, TP2 EP2 ETP1, twice": ("qwen3-moe", dict(tp=2, ep=2, etp=1)),
    "Qwen3-MoE of Transformer Engine, TP2 EP2": ("qwen3-moe", dict(tp=2, ep=2, etp=1, **ENGINE)),
    "DeepSeek-V3, TP2 PP2 EP2 ETP1, VPP2": ("deepseek-v3-yarn", dict(tp=2, pp=2, ep=2, etp=1, vpp=2)),
    "GPT-OSS of Transformer Engine, TP2 PP2 EP2": ("gpt-oss-yarn", dict(tp=2, pp=2, ep=2, etp=1, **ENGINE)),
    "DeepSeek-V3 of Transformer Engine, TP2 EP2": ("deepseek-v3-yarn", dict(tp=2, ep=2, etp=1, **ENGINE)),
}


def digests(folder: Path) -> dict[str, Digest]:
    return {name: digest(tensor) for name, tensor in hf_tensors(folder).items()}


@pytest.mark.parametrize("case", CASES)
def test_models_compute_the_same_and_come_back_bit_by_bit(
    megatron_pool: MegatronPool, hf_model: Models, logits: Any, tmp_path: Path, case: str
) -> None:
    family, sizes = CASES[case]
    found = megatron_pool.run(jobs.export_and_save, hf_model(family), sizes, tmp_path, TOKENS)
    assert difference(_concatenate([each.logits for each in found]), logits(family)) < TOLERANCE
    wanted = digests(hf_model(family))
    check_exports(found, wanted)
    for folder in (tmp_path / "by one", tmp_path / "by two"):
        assert digests(folder) == wanted
        assert torch.equal(hf_logits(folder, TOKENS), logits(family))
    assert len(list((tmp_path / "by one").glob("*.safetensors"))) == 1
    assert len(list((tmp_path / "by two").glob("*.safetensors"))) > 2


def check_exports(found: list[Found], wanted: dict[str, Digest]) -> None:
    """Each mode gives its processes the weights, and no others."""
    by_mode = {how: [each.exports[how] for each in found] for how in EXPORTS}
    nothing: dict[str, Digest] = {}
    assert by_mode["consolidate"] == [wanted, nothing, nothing, nothing]
    assert by_mode["replicate"] == by_mode["replicate files"] == [wanted] * 4
    for how in ("distribute", "distribute files"):
        assert sum(len(own) for own in by_mode[how]) == len(wanted)
        assert {name: value for own in by_mode[how] for name, value in own.items()} == wanted
    assert all(by_mode["distribute"])
    stages = {each.stage: own for each, own in zip(found, by_mode["stage"], strict=True)}
    assert [stages[each.stage] for each in found] == by_mode["stage"]
    assert sum(len(own) for own in stages.values()) == len(wanted)
    assert {name: value for own in stages.values() for name, value in own.items()} == wanted


def test_a_wrong_cut_is_seen(megatron_pool: MegatronPool, hf_model: Models) -> None:
    """The comparison above fails where two ranks' shares are taken for each other's."""
    found = megatron_pool.run(jobs.swapped, hf_model("llama3.1"))[0]
    wanted = digests(hf_model("llama3.1"))
    assert found.keys() == wanted.keys()
    same = {name for name in wanted if found[name] == wanted[name]}
    assert same == {name for name in wanted if name.endswith("norm.weight")}  # which are not cut


@pytest.mark.parametrize(("dtype", "sizes"), [("bfloat16", dict(tp=2, pp=2, ep=2, etp=1)), ("float16", dict(tp=4))])
def test_half_precision_comes_back_bit_by_bit(
    megatron_pool: MegatronPool, hf_model: Models, tmp_path: Path, dtype: str, sizes: dict[str, Any]
) -> None:
    """Biases of routers are float32 in megatron-core, as in the published files; transformers has rounded those of this model."""
    folder = hf_model("deepseek-v3-yarn", dtype=dtype)
    tensors = hf_tensors(folder)
    wanted = {
        name: digest(tensor.float() if name.endswith("correction_bias") else tensor) for name, tensor in tensors.items()
    }
    assert megatron_pool.run(jobs.export_all, folder, sizes) == [wanted] * 4


@pytest.mark.parametrize("family", ["llama3.1", "qwen3-moe"])
def test_export_after_a_training_step(
    megatron_pool: MegatronPool, hf_model: Models, tmp_path: Path, family: str
) -> None:
    out = tmp_path / "hf"
    found = megatron_pool.run(jobs.train, hf_model(family), dict(tp=2), out, TOKENS)
    unchanged = {name for each in found for name in each["unchanged"]}
    assert all(".local_experts." in name for name in unchanged)  # that no token has come to
    states = {each["rank"]: each["state"] for each in found}
    wanted = merged_by_hand(states[0], states[1], hf_tensors(hf_model(family)).keys())
    exported = found[0]["exported"]
    assert exported.keys() == wanted.keys()
    assert {name for name in wanted if not torch.equal(exported[name], wanted[name])} == set()
    assert all("already" in each["refused"] or "overwrite" in each["refused"] for each in found)
    assert digests(out) == {name: digest(tensor) for name, tensor in wanted.items()}


def merged_by_hand(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor], names: Any) -> dict[str, torch.Tensor]:
    """Tensors of Hugging Face from the states of two tensor-parallel ranks. Both models here have 4 query groups of 2 heads."""

    def rows(name: str) -> torch.Tensor:
        return torch.cat([one[name], two[name]])

    def columns(name: str) -> torch.Tensor:
        return torch.cat([one[name], two[name]], dim=1)

    def same(name: str) -> torch.Tensor:
        assert torch.equal(one[name], two[name]), name
        return one[name]

    def gated(name: str, second: int) -> torch.Tensor:
        return torch.cat([state[name].chunk(2)[second] for state in (one, two)])

    def attention(name: str, part: slice) -> torch.Tensor:
        whole = rows(name)
        grouped = whole.view(4, 4, -1, whole.shape[1])  # group, its heads, channels, hidden size
        own: torch.Tensor = grouped[:, part].reshape(-1, whole.shape[1])
        return own

    heads = {"q": slice(0, 2), "k": slice(2, 3), "v": slice(3, 4)}
    wanted = {}
    for name in names:
        parts = name.removeprefix("model.").split(".")
        layer = f"decoder.layers.{parts[1]}." if parts[0] == "layers" else ""
        expert = f"mlp.experts.local_experts.{parts[4]}." if "experts" in parts else "mlp."
        match parts[-2]:
            case "embed_tokens":
                wanted[name] = rows("embedding.word_embeddings.weight")[:VOCABULARY]
            case "lm_head":
                wanted[name] = rows("output_layer.weight")[:VOCABULARY]
            case "norm":
                wanted[name] = same("decoder.final_layernorm.weight")
            case "input_layernorm":
                wanted[name] = same(f"{layer}input_layernorm.weight")
            case "post_attention_layernorm":
                wanted[name] = same(f"{layer}pre_mlp_layernorm.weight")
            case "q_norm" | "k_norm" as norm:
                wanted[name] = same(f"{layer}self_attention.{norm[0]}_layernorm.weight")
            case "q_proj" | "k_proj" | "v_proj" as projection:
                wanted[name] = attention(f"{layer}self_attention.linear_qkv.weight", heads[projection[0]])
            case "o_proj":
                wanted[name] = columns(f"{layer}self_attention.linear_proj.weight")
            case "gate":
                wanted[name] = same(f"{layer}mlp.router.weight")
            case "gate_proj" | "up_proj" as projection:
                wanted[name] = gated(f"{layer}{expert}linear_fc1.weight", projection == "up_proj")
            case "down_proj":
                wanted[name] = columns(f"{layer}{expert}linear_fc2.weight")
            case other:
                raise AssertionError(other)
    return wanted


@pytest.mark.parametrize("damage", ["renamed", "cut"])
def test_a_parameter_that_one_process_alone_has_otherwise(
    megatron_pool: MegatronPool, hf_model: Models, damage: str
) -> None:
    name = "decoder.layers.1.mlp.linear_fc2.weight"
    texts = {
        "renamed": ["missing", "decoder.layers.1.mlp.linear_fc2.other is no tensor"],
        "cut": [r"has shape \[63, 56\], not \[64, 56\]"],
    }
    found = megatron_pool.run(jobs.refusal, jobs.export_damaged, hf_model("llama3.1"), name, damage)
    assert len(set(found)) == 1  # all processes say the same
    for text in texts[damage]:
        assert re.search(text, found[0]), found[0]
    assert f"rank 3: {name}" in found[0]


def test_bridge_of_another_model(megatron_pool: MegatronPool, hf_model: Models) -> None:
    for other, text in (
        ("qwen3", "q_layernorm"),
        ("llama3.2-tied", "share_embeddings_and_output_weights=False, not"),
        ("qwen3-moe", "router"),
    ):
        with pytest.raises(OracleError, match=text):
            megatron_pool.run(jobs.export_by_other, hf_model("llama3.1"), hf_model(other))
