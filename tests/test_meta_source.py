"""Meta's own checkpoints: rotary pairs are neighbours, and model parallelism cuts the embedding differently by generation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_converters.basics.errors import ConversionError
from megatron_converters.formats.megatron.rank_files_target import MegatronTarget
from megatron_converters.formats.megatron.writing import MegatronOptions
from megatron_converters.formats.meta.params import read_params
from megatron_converters.formats.meta.source import MetaSource
from megatron_converters.model.rotary import RopeScaling
from tests.conversions import different, megatron_to_hf, run
from tests.helpers import hf_tensors
from tests.oracle.hf import make_model

HEADS, GROUPS = 8, 4
_NAMES = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm.weight": "attention_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attention.wq.weight",
    "self_attn.k_proj.weight": "attention.wk.weight",
    "self_attn.v_proj.weight": "attention.wv.weight",
    "self_attn.o_proj.weight": "attention.wo.weight",
    "mlp.gate_proj.weight": "feed_forward.w1.weight",
    "mlp.up_proj.weight": "feed_forward.w3.weight",
    "mlp.down_proj.weight": "feed_forward.w2.weight",
}


def as_meta(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    """One tensor under Meta's name: in each query and key head, rows i and i + d/2 become rows 2i and 2i + 1."""
    heads = {"q_proj": HEADS, "k_proj": GROUPS}.get(name.split(".")[-2])
    if heads:
        dim = tensor.shape[0] // heads
        order = [
            head * dim + i + half * (dim // 2) for head in range(heads) for i in range(dim // 2) for half in (0, 1)
        ]
        tensor = tensor[order]
    if name.startswith("model.layers."):
        _, _, layer, rest = name.split(".", 3)
        return f"layers.{layer}.{_NAMES[rest]}", tensor
    return _NAMES[name], tensor


def cut(name: str, tensor: torch.Tensor, ranks: int, embedding_dim: int) -> list[torch.Tensor]:
    if "norm" in name:
        return [tensor] * ranks
    dim = embedding_dim if "tok_embeddings" in name else 1 if name.split(".")[-2] in ("wo", "w2") else 0
    return [part.clone() for part in tensor.chunk(ranks, dim)]


def write(hf: Path, folder: Path, ranks: int, embedding_dim: int, **params: Any) -> Path:
    folder.mkdir()
    files: list[dict[str, torch.Tensor]] = [{} for _ in range(ranks)]
    for hf_name, hf_tensor in hf_tensors(hf).items():
        name, tensor = as_meta(hf_name, hf_tensor)
        for file, part in zip(files, cut(name, tensor, ranks, embedding_dim), strict=True):
            file[name] = part
    for rank, file in enumerate(files):
        file["rope.freqs"] = torch.zeros(4)
        torch.save(file, folder / f"consolidated.{rank:02d}.pth")
    sizes = {"dim": 64, "n_layers": 4, "n_heads": HEADS, "n_kv_heads": GROUPS, "norm_eps": 1e-5, "vocab_size": -1}
    (folder / "params.json").write_text(json.dumps(sizes | params))
    return folder


@pytest.mark.parametrize(("ranks", "embedding_dim"), [(1, 0), (2, 0), (2, 1)])
def test_meta_equals_the_same_model_from_hugging_face(tmp_path: Path, ranks: int, embedding_dim: int) -> None:
    hf = make_model("llama3", tmp_path / "hf", vocab_size=200)
    meta = write(hf, tmp_path / "meta", ranks, embedding_dim, rope_theta=500000.0)
    source = MetaSource(meta)
    names = ("rotary_base", "ffn_hidden_size", "vocab_size")
    assert [source.spec.values[name] for name in names] == [500000.0, 112, 200]
    run(source, MegatronTarget(tmp_path / "megatron", MegatronOptions(tp=2)))
    back = megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert different(hf_tensors(hf), hf_tensors(back)) == []


HIDDEN = {"hidden_dim": 112}  # a field that Mistral AI's releases have


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("released")
    return write(make_model("llama3", root / "hf", vocab_size=200), root / "meta", 1, 0)


def opened(released: Path, ignored: tuple[str, ...] = (), **params: Any) -> MetaSource:
    """The release, described otherwise."""
    path = released / "params.json"
    before = path.read_text()
    try:
        path.write_text(json.dumps(json.loads(before) | params))
        return MetaSource(released, ignored_params=ignored)
    finally:
        path.write_text(before)


def test_a_mistral_has_its_window(released: Path) -> None:
    source = opened(released, **HIDDEN, sliding_window=8, rope_theta=10000.0, max_seq_len=77)
    names = ("family", "sliding_window", "max_position_embeddings", "rotary_base")
    assert [source.spec.values[name] for name in names] == ["mistral", 8, 77, 10000.0]
    assert source.origin.notes == []


@pytest.mark.parametrize(("window", "base"), [(None, 1e6), (8, 1e4)])
def test_a_mistral_without_rotary_base_has_that_of_its_release(window: int | None, base: float, released: Path) -> None:
    source = opened(released, **HIDDEN, sliding_window=window)
    assert (source.spec.family, source.spec.values["rotary_base"]) == ("mistral", base)
    assert "32768 are assumed, as Mistral 7B has" in source.origin.notes[0]


@pytest.mark.parametrize(
    ("params", "positions", "whose"),
    [
        ({"norm_eps": 1e-6}, 2048, "Llama 1"),
        ({}, 4096, "Llama 2"),
        ({"max_seq_len": 512}, 4096, "Llama 2"),  # of a run's cache
        ({"rope_theta": 1e6}, 16384, "Code Llama"),
        ({"rope_theta": 5e5}, 8192, "Llama 3"),
        ({"rope_theta": 5e5, "use_scaled_rope": True, "rope_scaling_factor": 8}, 131072, "Llama 3.1"),
        ({"rope_theta": 5e5, "max_position_embeddings": 99}, 99, ""),
    ],
)
def test_positions_that_are_guessed_are_said(
    params: dict[str, Any], positions: int, whose: str, released: Path
) -> None:
    source = opened(released, **params)
    assert source.spec.max_position_embeddings == positions
    said = " ".join(source.origin.notes)
    assert (f"{positions} are assumed, as {whose}" in said) if whose else said == ""


@pytest.mark.parametrize(
    ("params", "family"),
    [
        (HIDDEN, "mistral"),
        ({"sliding_window": 8}, "mistral"),
        ({**HIDDEN, "use_scaled_rope": False}, "llama"),
        ({**HIDDEN, "multiple_of": 256}, "llama"),
        ({"sliding_window": None}, "llama"),
    ],
)
def test_whose_release_it_is_follows_from_its_own_fields(params: dict[str, Any], family: str, released: Path) -> None:
    assert opened(released, **params).spec.family == family


def test_a_factor_that_is_guessed_is_warned_of(released: Path) -> None:
    scaled = {"rope_theta": 5e5, "use_scaled_rope": True, "max_position_embeddings": 99}
    source = opened(released, **scaled)
    assert source.spec.values["rope_scaling"] == RopeScaling("llama3", 8.0)
    (warning,) = source.origin.notes
    assert warning.startswith("warning: params.json scales rotary embeddings")
    assert "8 is assumed" in warning
    assert source.origin.urgent == [warning]
    for more, scaling in (
        ({"rope_scaling_factor": 32}, RopeScaling("llama3", 32.0)),
        ({"rope_scaling_factor": 16, "high_freq_factor": 2}, RopeScaling("llama3", 16.0, high_freq_factor=2.0)),
    ):
        source = opened(released, **scaled, **more)
        assert (source.spec.values["rope_scaling"], source.origin.notes) == (scaling, [])


@pytest.mark.parametrize(
    ("dim", "layers", "factor"),
    [(4096, 32, 8.0), (8192, 80, 8.0), (16384, 126, 8.0), (2048, 16, 32.0), (3072, 28, 32.0)],
)
def test_released_sizes_have_the_factor_of_their_config_json(dim: int, layers: int, factor: float) -> None:
    """Llama 3.1 and 3.3, and the smaller ones of 3.2."""
    params = {"dim": dim, "n_layers": layers, "n_heads": 32, "norm_eps": 1e-5, "use_scaled_rope": True}
    properties, notes = read_params(params | {"rope_theta": 5e5, "max_position_embeddings": 131072})
    assert properties["rope_scaling"] == RopeScaling("llama3", factor)
    assert notes == [
        f"params.json scales rotary embeddings (use_scaled_rope) and does not say by what factor: {factor:g}, which Llama's "
        "release of this size has, is taken"
    ]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"moe": {"num_experts": 8}, "yarn": {"factor": 4}}, "does not know: moe, yarn; .*config-fields moe,yarn"),
        ({"llama_4_scaling": {"beta": 0.1}}, "does not know: llama_4_scaling"),
        ({"use_qk_norm": True}, "does not know: use_qk_norm"),
        ({"tied_embeddings": True}, "does not know: tied_embeddings"),
        ({"causal": False}, "does not know: causal"),
        ({"normalize_queries": False}, "does not know: normalize_queries"),
        ({"vision_num_cross_attention_layers": 8}, "does not know: vision_num"),
        ({"model_type": "mamba"}, "does not know: model_type"),
        (
            {"quantization_args": {"group_size": 32}},
            "quantised by SpinQuant or QLoRA .32 to a group., which cannot be read",
        ),
        ({"quantization": {"qformat_weight": "fp8_e4m3"}}, "quantised by Mistral AI's FP8, which cannot be read"),
        ({**HIDDEN, "sliding_window": [8, None]}, "sliding_window is .8, None."),
        ({"dim": "64"}, "dim is '64'; it must be a whole number above 0"),
        ({"n_heads": None}, "params.json has no n_heads"),
    ],
)
def test_what_params_json_says_is_judged_like_config_json(params: dict[str, Any], message: str, released: Path) -> None:
    with pytest.raises(ConversionError, match=message):
        opened(released, **params)


def test_fields_that_decide_nothing_are_passed_over(released: Path) -> None:
    usual = opened(released)
    harmless = {
        **{"multiple_of": 256, "ffn_dim_multiplier": 1.3, "max_batch_size": 32, "vision_chunk_size": -1, "moe": None},
        **{"model_type": "transformer", "activation": "silu", "causal": True, "use_biases": False, "lora_args": None},
    }
    assert opened(released, **harmless).spec == usual.spec
    assert opened(released, ("queries",), queries="x").spec == usual.spec


def test_faults_are_named_together(tmp_path: Path) -> None:
    hf = make_model("llama3", tmp_path / "hf", vocab_size=200)
    meta = write(hf, tmp_path / "meta", 1, 0)
    path = meta / "consolidated.00.pth"
    file = torch.load(path)
    del file["layers.1.attention.wk.weight"]
    file["layers.2.ffn_norm.weight"] = torch.zeros(3)
    file["extra.weight"] = torch.zeros(3)
    torch.save(file, path)
    with pytest.raises(ConversionError) as error:
        MetaSource(meta)
    for name in ("layers.1.attention.wk.weight", "layers.2.ffn_norm.weight", "extra.weight"):
        assert name in str(error.value)


def test_a_missing_rank_is_named(tmp_path: Path) -> None:
    hf = make_model("llama3", tmp_path / "hf", vocab_size=200)
    meta = write(hf, tmp_path / "meta", 2, 0)
    (meta / "consolidated.00.pth").unlink()
    with pytest.raises(ConversionError, match=r"it has consolidated\.01\.pth"):
        MetaSource(meta)
