"""What a conversion puts into each rank's file, against loops over single rows, for random sizes."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tests.conversions import different, hf_to_megatron, megatron_to_hf, reshard
from tests.helpers import hf_tensors
from tests.oracle.checkpoint import load_rank

Tensors = dict[str, torch.Tensor]


@st.composite
def models(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """A config.json and a tensor-parallel size that can cut it, more ranks than query groups included."""
    groups = draw(st.sampled_from([1, 2, 3, 4]))
    heads = groups * draw(st.integers(1, 4))
    sizes = [tp for tp in range(1, heads + 1) if heads % tp == 0 and (groups % tp == 0 or tp % groups == 0)]
    head_dim = 2 * draw(st.integers(1, 3))
    tp = draw(st.sampled_from([tp for tp in sizes if (heads + 2 * groups) * head_dim % tp == 0]))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": draw(st.integers(1, 2)),
        "hidden_size": draw(st.integers(1, 9)),
        "intermediate_size": tp * draw(st.integers(1, 4)),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": head_dim,
        "vocab_size": draw(st.integers(1, 12)),
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": draw(st.booleans()),
    }
    return config, tp


def tensors_of(config: dict[str, Any]) -> Tensors:
    """Every element of the model is a number of its own."""
    hidden, ffn, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    query, key = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name, rows, cols in [
            *(
                ("self_attn.q_proj", query, hidden),
                ("self_attn.k_proj", key, hidden),
                ("self_attn.v_proj", key, hidden),
            ),
            *(("self_attn.o_proj", hidden, query), ("mlp.gate_proj", ffn, hidden), ("mlp.up_proj", ffn, hidden)),
            ("mlp.down_proj", hidden, ffn),
        ]:
            shapes |= {f"{prefix}{name}.weight": (rows, cols), f"{prefix}{name}.bias": (rows,)}
        shapes |= {f"{prefix}{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    tensors, count = {}, 0
    for name, shape in shapes.items():
        size = torch.Size(shape).numel()
        tensors[name] = torch.arange(count, count + size, dtype=torch.float32).reshape(shape)
        count += size
    return tensors


def rank_rows(rows: list[Any], tp: int, rank: int) -> list[Any]:
    share = len(rows) // tp
    return rows[rank * share : (rank + 1) * share]


def expected_rank(hf: Tensors, config: dict[str, Any], tp: int, rank: int, divisor: int) -> dict[str, Any]:
    """A rank's tensors as nested lists, in the names of Megatron's local spec."""
    heads, groups, dim = (config[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))

    def vocabulary(name: str) -> list[Any]:
        rows = hf[name].tolist()
        while len(rows) % (divisor * tp):
            rows.append(hf[name].tolist()[-1])
        return rank_rows(rows, tp, rank)

    def qkv(prefix: str, kind: str) -> list[Any]:
        query, key, value = (hf[f"{prefix}self_attn.{part}_proj.{kind}"].tolist() for part in "qkv")
        rows = []
        for group in range(groups):
            for head in range(heads):
                if head // (heads // groups) == group:
                    rows += [query[head * dim + i] for i in range(dim)]
            rows += [key[group * dim + i] for i in range(dim)]
            rows += [value[group * dim + i] for i in range(dim)]
        return rank_rows(rows, tp, rank)

    def columns(name: str) -> list[Any]:
        return [rank_rows(row, tp, rank) for row in hf[name].tolist()]

    expected: dict[str, Any] = {"embedding.word_embeddings.weight": vocabulary("model.embed_tokens.weight")}
    for layer in range(config["num_hidden_layers"]):
        ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        for kind in ("weight", "bias"):
            expected[f"{ours}self_attention.linear_qkv.{kind}"] = qkv(theirs, kind)
            gate, up = (hf[f"{theirs}mlp.{part}_proj.{kind}"].tolist() for part in ("gate", "up"))
            expected[f"{ours}mlp.linear_fc1.{kind}"] = rank_rows(gate, tp, rank) + rank_rows(up, tp, rank)
        expected[f"{ours}self_attention.linear_proj.weight"] = columns(f"{theirs}self_attn.o_proj.weight")
        expected[f"{ours}self_attention.linear_proj.bias"] = hf[f"{theirs}self_attn.o_proj.bias"].tolist()
        expected[f"{ours}mlp.linear_fc2.weight"] = columns(f"{theirs}mlp.down_proj.weight")
        expected[f"{ours}mlp.linear_fc2.bias"] = hf[f"{theirs}mlp.down_proj.bias"].tolist()
        expected[f"{ours}input_layernorm.weight"] = hf[f"{theirs}input_layernorm.weight"].tolist()
        expected[f"{ours}pre_mlp_layernorm.weight"] = hf[f"{theirs}post_attention_layernorm.weight"].tolist()
    expected["decoder.final_layernorm.weight"] = hf["model.norm.weight"].tolist()
    if not config["tie_word_embeddings"]:
        expected["output_layer.weight"] = vocabulary("lm_head.weight")
    return expected


def write_hf(folder: Path, config: dict[str, Any], tensors: Tensors) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def rank_tensors(checkpoint: Path, tp: int) -> list[dict[str, Any]]:
    ranks = [
        load_rank(checkpoint / "iter_0000001" / f"mp_rank_{rank:02d}" / "model_optim_rng.pt") for rank in range(tp)
    ]
    return [{key: value.tolist() for key, value in rank["model"].items() if value is not None} for rank in ranks]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(model=models(), divisor=st.sampled_from([1, 3, 8]), other=st.integers(0, 10))
def test_each_rank_holds_what_loops_over_rows_say_and_the_way_back_restores_it(
    model: tuple[dict[str, Any], int], divisor: int, other: int
) -> None:
    config, tp = model
    tensors = tensors_of(config)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        hf = write_hf(root / "hf", config, tensors)
        megatron = hf_to_megatron(hf, root / "megatron", tp=tp, divisor=divisor, impl="local")
        found = rank_tensors(megatron, tp)
        assert found == [expected_rank(tensors, config, tp, rank, divisor) for rank in range(tp)]
        whole = reshard(megatron, root / "whole", tp=1, divisor=divisor, impl="local")
        assert rank_tensors(whole, 1) == [expected_rank(tensors, config, 1, 0, divisor)]
        back = megatron_to_hf(megatron, root / "back")
        assert different(hf_tensors(back), tensors) == []


def test_a_folder_that_is_replaced_is_read_anew(tmp_path: Path) -> None:
    """In one process, as a notebook does: the second conversion must not see the first one's files."""
    config = {
        **{"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1, "hidden_size": 4, "intermediate_size": 4},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 2, "vocab_size": 3},
        **{"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    }
    first = tensors_of(config)
    second = {name: -1 - tensor for name, tensor in first.items()}
    hf = write_hf(tmp_path / "hf", config, first)
    hf_to_megatron(hf, tmp_path / "megatron", impl="local")
    save_file(second, tmp_path / "new", metadata={"format": "pt"})
    (tmp_path / "new").replace(hf / "model.safetensors")
    megatron = hf_to_megatron(hf, tmp_path / "megatron", impl="local", overwrite=True)
    assert rank_tensors(megatron, 1) == [expected_rank(second, config, 1, 0, 128)]
    assert different(hf_tensors(megatron_to_hf(megatron, tmp_path / "back")), second) == []
