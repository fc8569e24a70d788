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
from megatron_converters.formats.meta.source import MetaSource
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
