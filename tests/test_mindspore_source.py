"""MindSpore's weights as a source: those made by hand with torch hold the same model, and Megatron computes it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conversions import different
from tests.helpers import convert, hf_tensors, nothing_complete, refused, succeeded, verb
from tests.oracle.by_hand_mindspore import tensors_by_hand, write_by_hand, yaml_of
from tests.oracle.hf import hf_logits, sample_tokens
from tests.oracle.pool import MegatronPool

HFModel = Callable[..., Path]
TOKENS = sample_tokens(length=40)
VOCABULARY = 199
DENSE = ("llama2", "qwen2", "qwen3-tied", "llama-head_dim")
#: What nothing but the user says of a dense model.
TYPED = ("--num-attention-heads", 8, "--norm-epsilon", 1e-5, "--max-position-embeddings", 512)
ORDERS = [("interleaved", "grouped"), ("contiguous", "contiguous"), ("contiguous", "grouped")]


def typed_of(folder: Path) -> tuple[Any, ...]:
    config = json.loads((folder / "config.json").read_text())
    theta = config["rope_parameters"]["rope_theta"]
    return (
        *("--num-attention-heads", config["num_attention_heads"], "--norm-epsilon", config["rms_norm_eps"]),
        *("--max-position-embeddings", config["max_position_embeddings"], "--rotary-base", theta),
    )


@pytest.mark.parametrize(("mlp", "qkv"), ORDERS)
@pytest.mark.parametrize("family", DENSE)
def test_a_dense_model_comes_with_its_bits(
    megatron_pool: MegatronPool, hf_model: HFModel, tmp_path: Path, family: str, mlp: str, qkv: str
) -> None:
    folder = hf_model(family)
    source = write_by_hand(folder, tmp_path / "ms", parts=3, mlp=mlp, qkv=qkv)
    orders = ("--mf-mlp-layout", mlp, "--mf-qkv-layout", qkv)
    options = (*orders, *typed_of(folder))
    succeeded(verb("convert", source, tmp_path / "hf", "--to", "hf", *options))
    assert different(hf_tensors(folder), hf_tensors(tmp_path / "hf")) == []
    impl = ("--saver-transformer-impl", "local")
    succeeded(verb("convert", source, tmp_path / "meg", "--tp", 2, "--pp", 2, *impl, *options))
    got, wanted = megatron_pool.logits(tmp_path / "meg", TOKENS), hf_logits(folder, TOKENS)
    assert float((got[..., :VOCABULARY] - wanted).abs().max() / wanted.abs().max()) < 1e-5
    assert succeeded(verb("verify", tmp_path / "meg", source, *options)).code == 0


@pytest.mark.parametrize("family", ["qwen3-moe", "qwen2-moe", "glm4-moe", "deepseek-v3"])
def test_experts_and_latents_come_with_their_bits(hf_model: HFModel, tmp_path: Path, family: str) -> None:
    folder = hf_model(family)
    source = write_by_hand(folder, tmp_path / "ms")
    succeeded(verb("convert", source, tmp_path / "hf", "--to", "hf", "--hf-config", folder, "--mf-version", "1.8"))
    assert different(hf_tensors(folder), hf_tensors(tmp_path / "hf")) == []
    back = verb("verify", folder, source, "--hf-config", folder, "--mf-version", "1.8")
    assert back.code == 0, back


@pytest.mark.parametrize("family", ["qwen3-moe", "deepseek-v3"])
def test_a_yaml_describes_the_model(
    megatron_pool: MegatronPool, hf_model: HFModel, tmp_path: Path, family: str
) -> None:
    folder = hf_model(family)
    source = write_by_hand(folder, tmp_path / "ms", mlp="contiguous")
    more = dict(use_interleaved_weight_layout_mlp=False, use_contiguous_weight_layout_attention=False)
    if family == "deepseek-v3":
        more |= dict(multi_latent_attention=True, moe_router_score_function="sigmoid", qk_layernorm=True)
    (source / "train.yaml").write_text(yaml_of(folder, **more))
    sizes = ("--tp", 2, "--pp", 2, "--ep", 2, "--etp", 1)
    run = succeeded(verb("convert", source, tmp_path / "meg", *sizes))
    assert "layout" not in run.err
    got, wanted = megatron_pool.logits(tmp_path / "meg", TOKENS), hf_logits(folder, TOKENS)
    assert float((got[..., :VOCABULARY] - wanted).abs().max() / wanted.abs().max()) < 1e-5


def test_the_document_s_command_in_small(hf_model: HFModel, tmp_path: Path) -> None:
    folder = hf_model("llama2", dtype="float32")
    source = write_by_hand(folder, tmp_path / "ms", mlp="contiguous")
    command = (
        *("--megatron-path", "path_to_megatron", "--model-type", "GPT", "--loader", "core_mf", "--saver", "core"),
        *("--target-tensor-parallel-size", 2, "--target-pipeline-parallel-size", 2),
        *("--load-dir", source, "--save-dir", tmp_path / "meg"),
        *("--loader-transformer-impl", "local", "--saver-transformer-impl", "local"),
        *("--position-embedding-type", "rope", "--true-vocab-size", 199, "--padded-vocab-size", 199),
        *("--num-layers", 4, "--seq-length", 512, "--hidden-size", 64, "--ffn-hidden-size", 112),
        *(
            "--num-attention-heads",
            8,
            "--num-query-groups",
            4,
            "--normalization",
            "RMSNorm",
            "--add-bias-linear",
            "--swiglu",
        ),
    )
    run = succeeded(convert(*command))
    assert (
        run.err.count("rows of the MLP's first linear are taken for gate above up") == 2
    )  # at the start and at the end
    assert "--add-bias-linear contradicts the names of the weights, which win" in run.err
    assert "no intermediate" in run.out
    content = torch.load(tmp_path / "meg/iter_0000001/mp_rank_00_000/model_optim_rng.pt", weights_only=False)["model"]
    first = content["decoder.layers.0.mlp.linear_fc1.weight"]
    assert first.dtype == torch.bfloat16
    gate = hf_tensors(folder)["model.layers.0.mlp.gate_proj.weight"][:56].bfloat16()
    assert torch.equal(first[:56], gate)
    refused(
        convert(*[4096 if each == 64 else each for each in command], "--overwrite"),
        "--hidden-size 4096 contradicts 64 of the shapes",
        code=2,
    )


def test_an_intermediate_is_written_if_asked_for(hf_model: HFModel, tmp_path: Path) -> None:
    source = write_by_hand(hf_model("llama2"), tmp_path / "ms")
    options = ("--loader", "core_mf", "--saver", "core", "--load-dir", source, "--save-dir", tmp_path / "meg")
    succeeded(
        convert(*options, "--mf-version", "1.8", *TYPED, "--dtype", "source", "--ms2torch-ckpt-path", tmp_path / "one")
    )
    whole = torch.load(tmp_path / "one/iter_0000001/mp_rank_00/model_optim_rng.pt", weights_only=False)["model"]
    assert whole["decoder.layers.3.mlp.linear_fc1.weight"].shape == (224, 64)


def test_nothing_but_the_user_says_the_number_of_heads(hf_model: HFModel, tmp_path: Path) -> None:
    source = write_by_hand(hf_model("llama2"), tmp_path / "ms")
    refused(verb("convert", source, tmp_path / "a"), "nothing says the number of attention heads", code=2)
    refused(verb("convert", source, tmp_path / "a", "--num-attention-heads", 7), "7 attention heads of 9", code=2)
    refused(
        verb("convert", source, tmp_path / "a", "--num-attention-heads", 8, "--num-query-groups", 3),
        "--num-query-groups 3 contradicts 4 of the shapes",
        code=2,
    )
    run = succeeded(verb("plan", source, tmp_path / "a", "--num-attention-heads", 8, "--mf-version", "1.8"))
    assert "neither weights nor options say norm_epsilon; 1e-05 is assumed" in run.out


def test_experts_need_a_configuration(hf_model: HFModel, tmp_path: Path) -> None:
    source = write_by_hand(hf_model("qwen3-moe"), tmp_path / "ms")
    refused(verb("convert", source, tmp_path / "a", "--num-attention-heads", 8), "--mf-config FILE", code=2)


def test_older_names(hf_model: HFModel, tmp_path: Path) -> None:
    folder = hf_model("llama2")
    renamed = {
        "embed_tokens.weight": "tok_embeddings.embedding_weight",
        "self_attn.o_proj": "attention.wo",
        "self_attn.q_proj": "attention.wq",
        "self_attn.k_proj": "attention.wk",
        "self_attn.v_proj": "attention.wv",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "model.norm": "model.norm_out",
    }
    tensors = hf_tensors(folder)
    for old, new in renamed.items():
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "ms.safetensors", metadata={"format": "ms"})
    succeeded(verb("convert", tmp_path / "ms.safetensors", tmp_path / "hf", "--to", "hf", *TYPED))
    assert different(hf_tensors(folder), hf_tensors(tmp_path / "hf")) == []
    separate = tuple(f".{part}.weight" for part in ("wq", "wk", "wv", "w1", "w3"))
    joined = {name: tensor for name, tensor in tensors.items() if not name.endswith(separate)}
    by_hand = tensors_by_hand(folder)
    for layer in range(4):
        joined[f"model.layers.{layer}.attention.w_qkv.weight"] = by_hand[
            f"decoder.layers.{layer}.self_attention.linear_qkv.weight"
        ]
        joined[f"model.layers.{layer}.feed_forward.w_gate_hidden.weight"] = by_hand[
            f"decoder.layers.{layer}.mlp.linear_fc1.weight"
        ]
    save_file(joined, tmp_path / "joined.safetensors", metadata={"format": "ms"})
    succeeded(
        verb("convert", tmp_path / "joined.safetensors", tmp_path / "too", "--to", "hf", "--mf-version", "1.8", *TYPED)
    )
    assert different(hf_tensors(folder), hf_tensors(tmp_path / "too")) == []


def test_joined_latents(hf_model: HFModel, tmp_path: Path) -> None:
    folder = hf_model("deepseek-v3")
    source = write_by_hand(folder, tmp_path / "ms")
    tensors = load_file(source / "part0.safetensors")
    for layer in range(4):
        own = f"decoder.layers.{layer}.self_attention."
        tensors[own + "linear_qkv.weight"] = torch.cat(
            [tensors.pop(own + "linear_q_down_proj.weight"), tensors.pop(own + "linear_kv_down_proj.weight")]
        )
        for old, new in (
            ("linear_q_up_proj", "linear_qb"),
            ("linear_kv_up_proj", "linear_kvb"),
            ("kv_layernorm", "k_layernorm"),
        ):
            tensors[f"{own}{new}.weight"] = tensors.pop(f"{own}{old}.weight")
    save_file(tensors, source / "part0.safetensors", metadata={"format": "ms"})
    (source / "param_name_map.json").write_text(json.dumps(dict.fromkeys(tensors, "part0.safetensors")))
    succeeded(verb("convert", source, tmp_path / "hf", "--to", "hf", "--hf-config", folder, "--mf-version", "1.8"))
    assert different(hf_tensors(folder), hf_tensors(tmp_path / "hf")) == []


def test_pynative_experts_have_three_dimensions(hf_model: HFModel, tmp_path: Path) -> None:
    folder = hf_model("qwen3-moe")
    tensors = tensors_by_hand(folder)
    for name, tensor in tensors.items():
        if "experts.weight" in name:
            tensors[name] = tensor.view(8, -1, tensor.shape[1])
    save_file(tensors, tmp_path / "ms.safetensors", metadata={"format": "ms"})
    options = ("--to", "hf", "--hf-config", folder, "--mf-version", "2.1")
    succeeded(verb("convert", tmp_path / "ms.safetensors", tmp_path / "hf", *options))
    assert different(hf_tensors(folder), hf_tensors(tmp_path / "hf")) == []


def test_hugging_face_s_names_are_no_mindspore_model(hf_model: HFModel, tmp_path: Path) -> None:
    """Other libraries on mindspore save such files with its mark, and mindformers leaves its map beside them."""
    folder = shutil.copytree(hf_model("llama2"), tmp_path / "hf")
    tensors = hf_tensors(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "ms"})
    assert succeeded(verb("inspect", folder)).out.startswith(f"{folder}: Hugging Face, llama")
    (folder / "param_name_map.json").write_text(json.dumps(dict.fromkeys(tensors, "model.safetensors")))
    assert succeeded(verb("inspect", folder)).out.startswith(f"{folder}: Hugging Face, llama")


# -- damage and mistakes: each is refused, warned of, or visible


def shifted(tensors: dict[str, torch.Tensor]) -> None:
    name = "decoder.layers.1.mlp.linear_fc1.weight"
    tensors[name] = tensors[name].roll(1, 0)


def reordered(tensors: dict[str, torch.Tensor]) -> None:
    name = "decoder.layers.0.self_attention.linear_qkv.weight"
    tensors[name] = tensors[name].view(4, -1, 64).flip(0).flatten(0, 1).contiguous()


@pytest.mark.parametrize("change", [shifted, reordered])
def test_moved_rows_are_seen_by_verify(hf_model: HFModel, tmp_path: Path, change: Any) -> None:
    folder = hf_model("llama2")
    source = write_by_hand(folder, tmp_path / "ms")
    tensors = load_file(source / "part0.safetensors")
    change(tensors)
    save_file(tensors, source / "part0.safetensors", metadata={"format": "ms"})
    assert verb("verify", folder, source, "--mf-version", "1.8", *TYPED).code == 1


def test_the_other_order_is_another_model(hf_model: HFModel, tmp_path: Path) -> None:
    folder = hf_model("llama2")
    source = write_by_hand(folder, tmp_path / "ms", mlp="contiguous")
    assert verb("verify", folder, source, "--mf-mlp-layout", "contiguous", *TYPED).code == 0
    assert verb("verify", folder, source, "--mf-mlp-layout", "interleaved", *TYPED).code == 1


DAMAGE: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "a layer is missing": (
        lambda tensors: [tensors.pop(name) for name in list(tensors) if ".layers.1." in name],
        "none of layer 1",
    ),
    "a norm is missing": (
        lambda tensors: tensors.pop("decoder.layers.2.pre_mlp_layernorm.weight"),
        "decoder.layers.2.pre_mlp_layernorm.weight (layer 2 mlp_norm) is missing",
    ),
    "a tensor too many": (
        lambda tensors: tensors.update({"decoder.layers.0.extra": torch.zeros(1)}),
        "decoder.layers.0.extra is not a tensor of this model",
    ),
    "another shape": (
        lambda tensors: tensors.update({"decoder.layers.3.input_layernorm.weight": torch.zeros(63)}),
        "has shape [63]",
    ),
    "no embeddings": (lambda tensors: tensors.pop("embedding.word_embeddings.weight"), "no whole model"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(hf_model: HFModel, tmp_path: Path, name: str) -> None:
    change, message = DAMAGE[name]
    tensors = tensors_by_hand(hf_model("llama2"))
    change(tensors)
    save_file(tensors, tmp_path / "ms.safetensors", metadata={"format": "ms"})
    (tmp_path / "out").mkdir()
    options = ("--mf-version", "1.8", *TYPED)
    refused(verb("convert", tmp_path / "ms.safetensors", tmp_path / "out" / "hf", "--to", "hf", *options), message)
    nothing_complete(tmp_path / "out")


def test_optimizer_states_are_left_out_and_counted(hf_model: HFModel, tmp_path: Path) -> None:
    folder = hf_model("llama2")
    tensors = tensors_by_hand(folder)
    more = {f"adam_m.{name}": tensor.clone() for name, tensor in tensors.items()} | {"global_step": torch.ones(1)}
    save_file({**tensors, **more}, tmp_path / "ms.safetensors", metadata={"format": "ms"})
    run = succeeded(verb("plan", tmp_path / "ms.safetensors", tmp_path / "a", "--mf-version", "1.8", *TYPED))
    assert f"left out: {len(tensors)} tensors (optimizer)" in run.out


def test_the_document_s_sizes_are_planned_from_headers_alone(tmp_path: Path) -> None:
    """The printed command describes a model of 9 billion parameters: a sparse file with its headers is enough for `plan`."""
    import struct

    hidden, ffn, layers, vocab, kv = 4096, 16384, 32, 128000, 16 * 128
    shapes = {"embedding.word_embeddings.weight": (vocab, hidden), "decoder.final_layernorm.weight": (hidden,)}
    shapes["output_layer.weight"] = (vocab, hidden)
    for layer in range(layers):
        shapes |= {
            f"decoder.layers.{layer}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (hidden,),
                "self_attention.linear_qkv": (hidden + 2 * kv, hidden),
                "self_attention.linear_proj": (hidden, hidden),
                "pre_mlp_layernorm": (hidden,),
                "mlp.linear_fc1": (2 * ffn, hidden),
                "mlp.linear_fc2": (hidden, ffn),
            }.items()
        }
    header, offset = {"__metadata__": {"format": "ms"}}, 0
    for name, shape in shapes.items():
        size = 2 * int(torch.tensor(shape).prod())
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}  # type: ignore[dict-item]
        offset += size
    text = json.dumps(header).encode()
    path = tmp_path / "ms.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
    run = succeeded(verb("plan", path, tmp_path / "meg", "--tp", 2, "--pp", 2, "--num-attention-heads", 32))
    assert "mp_rank_00_000/model_optim_rng.pt" in run.out and "and 1 alike" in run.out
    shutil.rmtree(tmp_path / "meg", ignore_errors=True)
