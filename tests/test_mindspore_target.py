"""Weights of MindSpore Transformers as they are written: every tensor against one made by hand, maps, configuration, refusals."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open

import megatron_converters as mc
from megatron_converters.cli import main
from megatron_converters.families.config_json import differences
from megatron_converters.formats.mindspore import row, yaml_rows
from megatron_converters.formats.reading import open_source
from megatron_converters.model.spec import ModelSpec
from tests.bare import left_in
from tests.forked import forked
from tests.helpers import file_bytes, hf_tensors, refused, same_tensors, succeeded, verb
from tests.oracle.by_hand_mindspore import converted
from tests.test_resume import KILLER

HFModel = Callable[..., Path]
MAP = "param_name_map.json"
MLP, QKV = ("interleaved", "contiguous"), ("grouped", "contiguous")


def write(source: Path, folder: Path, **options: Any) -> mc.Result:
    """Convert; options are those of `MindSporeOptions`, or `dtype` and `overwrite`."""
    more = {name: options.pop(name) for name in ("dtype", "overwrite") if name in options}
    return mc.convert(source, folder, to="mindspore", mindspore=mc.MindSporeOptions(**options), **more)


def config_of(folder: Path) -> dict[str, Any]:
    """What the YAML says of the model."""
    content = yaml.safe_load((folder / "model_config.yaml").read_text())
    assert content["use_legacy"] is False
    config: dict[str, Any] = content["model"]["model_config"]
    return config


# -- tensors


@pytest.mark.parametrize("mlp", MLP)
@pytest.mark.parametrize("qkv", QKV)
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama-bias"])
def test_dense_models_in_every_layout(family: str, mlp: str, qkv: str, hf_model: HFModel, tmp_path: Path) -> None:
    """Eight heads in four groups; biases of queries, keys and values go as the weights do."""
    model = hf_model(family)
    write(model, tmp_path / "ms", mlp_layout=mlp, qkv_layout=qkv)
    dim = 16 if family == "qwen3" else 8
    same_tensors(hf_tensors(tmp_path / "ms"), converted(hf_tensors(model), 4, dim, mlp=mlp, qkv=qkv))
    config = config_of(tmp_path / "ms")
    assert config["use_interleaved_weight_layout_mlp"] is (mlp == "interleaved")
    assert config["use_contiguous_weight_layout_attention"] is (qkv == "contiguous")


def test_rows_as_the_training_graphs_take_them(hf_model: HFModel, tmp_path: Path) -> None:
    """Shown without the helper: gate and up are every other row, a group is two query heads, a key, a value."""
    write(hf_model("qwen2"), tmp_path / "ms")
    ours, hf = hf_tensors(tmp_path / "ms"), hf_tensors(hf_model("qwen2"))
    fc1 = ours["decoder.layers.1.mlp.linear_fc1.weight"]
    assert torch.equal(fc1[0::2], hf["model.layers.1.mlp.gate_proj.weight"])
    assert torch.equal(fc1[1::2], hf["model.layers.1.mlp.up_proj.weight"])
    groups = ours["decoder.layers.1.self_attention.linear_qkv.weight"].reshape(4, 4, 8, 64)
    query, key, value = (hf[f"model.layers.1.self_attn.{part}_proj.weight"] for part in "qkv")
    assert torch.equal(groups[:, :2].reshape(64, 64), query)
    assert torch.equal(groups[:, 2].reshape(32, 64), key)
    assert torch.equal(groups[:, 3].reshape(32, 64), value)


@pytest.mark.parametrize("mlp", MLP)
@pytest.mark.parametrize("family", ["qwen2-moe", "qwen3-moe-dense-layers", "glm4-moe"])
def test_mixtures_of_experts(family: str, mlp: str, hf_model: HFModel, tmp_path: Path) -> None:
    """Experts lie gate before up in every layout; shared experts and dense layers follow it."""
    model = hf_model(family)
    write(model, tmp_path / "ms", mlp_layout=mlp)
    dim = 8 if family == "qwen2-moe" else 16
    ours, hf = hf_tensors(tmp_path / "ms"), hf_tensors(model)
    same_tensors(ours, converted(hf, 4, dim, mlp=mlp, qkv="grouped"))
    experts = ours["decoder.layers.1.mlp.experts.weight1"].reshape(8, 64, 2 * 48)
    assert torch.equal(experts[5, :, :48].T, hf["model.layers.1.mlp.experts.5.gate_proj.weight"])
    assert torch.equal(experts[5, :, 48:].T, hf["model.layers.1.mlp.experts.5.up_proj.weight"])
    second = ours["decoder.layers.1.mlp.experts.weight2"].reshape(8, 48, 64)
    assert torch.equal(second[5].T, hf["model.layers.1.mlp.experts.5.down_proj.weight"])


def test_latent_attention_and_its_names(hf_model: HFModel, tmp_path: Path) -> None:
    write(hf_model("deepseek-v3"), tmp_path / "ms")
    hf, ours = hf_tensors(hf_model("deepseek-v3")), hf_tensors(tmp_path / "ms")
    same_tensors(ours, converted(hf, 0, 0, mlp="interleaved", qkv="grouped"))
    assert ours["decoder.layers.2.self_attention.linear_kv_down_proj.weight"].shape == (24 + 8, 64)
    assert config_of(tmp_path / "ms")["mla_qkv_concat"] is False


def test_queries_without_latents(hf_model: HFModel, tmp_path: Path) -> None:
    write(hf_model("deepseek-v2-lite"), tmp_path / "ms")
    hf, ours = hf_tensors(hf_model("deepseek-v2-lite")), hf_tensors(tmp_path / "ms")
    name = "decoder.layers.0.self_attention.linear_q_proj.weight"
    # transformers' rows are those of the training graphs: neighbours are a rotary pair.
    assert torch.equal(ours[name], hf["model.layers.0.self_attn.q_proj.weight"])
    assert "decoder.layers.0.self_attention.q_layernorm.weight" not in ours


def test_layer_norms_have_gamma_and_beta(hf_model: HFModel, tmp_path: Path) -> None:
    """Without a gate there is nothing to interleave; the head is tied."""
    write(hf_model("starcoder2"), tmp_path / "ms")
    hf = hf_tensors(hf_model("starcoder2"))
    named = converted(hf, 4, 16, mlp="interleaved", qkv="grouped")
    expected = {
        name.replace("norm.weight", "norm.gamma").replace("norm.bias", "norm.beta"): tensor
        for name, tensor in named.items()
    }
    same_tensors(hf_tensors(tmp_path / "ms"), expected)
    assert "decoder.layers.0.input_layernorm.beta" in expected and "output_layer.weight" not in expected
    config = config_of(tmp_path / "ms")
    assert (config["normalization"], config["hidden_act"], config["gated_linear_unit"]) == ("LayerNorm", "gelu", False)
    assert config["window_size"] == [6, 0]


def test_learned_positions(hf_model: HFModel, tmp_path: Path) -> None:
    """GPT-2 stores transposed linears."""
    write(hf_model("gpt2"), tmp_path / "ms")
    hf, ours = hf_tensors(hf_model("gpt2")), hf_tensors(tmp_path / "ms")
    assert torch.equal(ours["embedding.position_embeddings.weight"], hf["transformer.wpe.weight"])
    assert torch.equal(ours["decoder.layers.0.mlp.linear_fc1.weight"], hf["transformer.h.0.mlp.c_fc.weight"].T)
    assert torch.equal(ours["decoder.final_layernorm.beta"], hf["transformer.ln_f.bias"])
    assert config_of(tmp_path / "ms")["position_embedding_type"] == "learned_absolute"


def test_multi_token_prediction(hf_model: HFModel, tmp_path: Path) -> None:
    from tests.oracle.prediction import with_prediction

    model = with_prediction("deepseek-v3", hf_model, tmp_path / "hf")
    write(model, tmp_path / "ms")
    hf, ours = hf_tensors(model), hf_tensors(tmp_path / "ms")
    for name in ("enorm", "hnorm", "eh_proj"):
        assert torch.equal(ours[f"mtp.layers.0.{name}.weight"], hf[f"model.layers.4.{name}.weight"])
    assert torch.equal(ours["mtp.layers.0.final_layernorm.weight"], hf["model.layers.4.shared_head.norm.weight"])
    experts = ours["mtp.layers.0.transformer_layer.mlp.experts.weight1"].reshape(8, 64, 96)
    assert torch.equal(experts[7, :, 48:].T, hf["model.layers.4.mlp.experts.7.up_proj.weight"])
    inside = "self_attention.linear_kv_up_proj.weight"
    assert torch.equal(
        ours[f"mtp.layers.0.transformer_layer.{inside}"], hf["model.layers.4.self_attn.kv_b_proj.weight"]
    )
    assert not any(name.startswith("decoder.layers.4.") or "embed_tokens" in name for name in ours)
    assert config_of(tmp_path / "ms")["mtp_num_layers"] == 1


def test_tied_models_have_no_head(hf_model: HFModel, tmp_path: Path) -> None:
    write(hf_model("qwen3-tied"), tmp_path / "ms")
    ours = hf_tensors(tmp_path / "ms")
    assert "output_layer.weight" not in ours and ours["embedding.word_embeddings.weight"].shape == (199, 64)
    assert config_of(tmp_path / "ms")["tie_word_embeddings"] is True


def test_bfloat16(hf_model: HFModel, tmp_path: Path) -> None:
    """The bias of the choice of experts is float32, whatever the model is."""
    write(hf_model("deepseek-v3"), tmp_path / "ms", dtype="bf16")
    ours, hf = hf_tensors(tmp_path / "ms"), hf_tensors(hf_model("deepseek-v3"))
    bias = "decoder.layers.1.mlp.router.expert_bias"
    assert ours[bias].dtype == torch.float32
    expected = converted(hf, 0, 0, mlp="interleaved", qkv="grouped")
    for name, tensor in ours.items():
        if name.endswith("expert_bias"):
            assert torch.equal(tensor, expected[name])
        else:
            assert torch.equal(tensor, expected[name].bfloat16()), name
    assert config_of(tmp_path / "ms")["params_dtype"] == "bfloat16"


def test_multipliers_are_folded_where_that_is_asked_for(hf_model: HFModel, tmp_path: Path) -> None:
    model = hf_model("granite-untied")
    with pytest.raises(mc.ConversionError, match=r"multiplies activations by constants.*--mf-fold"):
        write(model, tmp_path / "ms")
    assert not (tmp_path / "ms").exists()
    result = write(model, tmp_path / "ms", fold=True)
    hf, ours = hf_tensors(model), hf_tensors(tmp_path / "ms")
    residual = 0.22
    embedding = hf["model.embed_tokens.weight"].double() * (12.0 / residual)
    assert torch.allclose(ours["embedding.word_embeddings.weight"].double(), embedding, rtol=1e-6)
    norm = hf["model.norm.weight"].double() / 8.0
    assert torch.allclose(ours["decoder.final_layernorm.weight"].double(), norm, rtol=1e-6)
    query, rows = hf["model.layers.0.self_attn.q_proj.weight"], 16 * 2
    grouped = ours["decoder.layers.0.self_attention.linear_qkv.weight"].reshape(4, 4 * 16, 64)
    expected = query.double().reshape(4, rows, 64) * (0.1 * 16**0.5)
    assert torch.allclose(grouped[:, :rows].double(), expected, rtol=1e-6)
    key = hf["model.layers.0.self_attn.k_proj.weight"]
    assert torch.equal(grouped[:, rows : rows + 16].reshape(64, 64), key)
    assert config_of(tmp_path / "ms")["layernorm_epsilon"] == pytest.approx(1e-3 / residual**2)
    assert not (tmp_path / "ms" / "hf_config.json").exists()
    assert any("folded into weights" in note for note in result.notes)


# -- files


def test_parts_and_their_map(hf_model: HFModel, tmp_path: Path) -> None:
    model = hf_model("qwen3-moe")
    result = write(model, tmp_path / "ms", max_shard_size=200_000)
    content = json.loads((tmp_path / "ms" / MAP).read_text())
    files = sorted((tmp_path / "ms").glob("*.safetensors"), key=lambda path: int(path.stem.removeprefix("part")))
    assert [path.name for path in files] == [f"part{number}.safetensors" for number in range(len(files))]
    assert len(files) > 3
    held = {}
    for path in files:
        with safe_open(path, "pt") as opened:
            assert opened.metadata() == {"format": "ms"}
            held |= dict.fromkeys(opened.keys(), path.name)
    assert content["weight_map"] == held
    ours = hf_tensors(tmp_path / "ms")
    assert content["metadata"]["total_size"] == sum(tensor.nbytes for tensor in ours.values())
    same_tensors(ours, converted(hf_tensors(model), 4, 16, mlp="interleaved", qkv="grouped"))
    assert (result.path, result.manifest) == (tmp_path / "ms", tmp_path / "ms" / "conversion.json")
    assert mc.verify(tmp_path / "ms")


def test_what_travels_beside_the_weights(hf_model: HFModel, tmp_path: Path) -> None:
    source = shutil.copytree(hf_model("llama2"), tmp_path / "hf")
    (source / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}))
    write(source, tmp_path / "ms")
    names = ("conversion.json", "hf_config.json", "hf_generation_config.json", "model_config.yaml", MAP)
    assert left_in(tmp_path / "ms") == sorted([*names, "part0.safetensors", "tokenizer.json"])
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "ms" / f"hf_{name}").read_text()) == json.loads((source / name).read_text())


def test_a_checkpoint_gives_the_same_weights(megatron_model: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    """Padding of the vocabulary stays behind, and shards come together."""
    folder, checkpoint = megatron_model("qwen3")
    options = ("--mf-mlp-layout", "contiguous", "--mf-qkv-layout", "contiguous", "--max-shard-size", "500KB")
    run = succeeded(verb("convert", checkpoint, tmp_path / "ms", "--to", "mindspore", *options))
    assert "use_interleaved_weight_layout_mlp: false" in run.out
    same_tensors(hf_tensors(tmp_path / "ms"), converted(hf_tensors(folder), 4, 16, mlp="contiguous", qkv="contiguous"))
    assert json.loads((tmp_path / "ms" / "hf_config.json").read_text()) == json.loads(
        (folder / "config.json").read_text()
    )


def test_the_saver(megatron_model: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    from tests.helpers import convert

    folder, checkpoint = megatron_model("qwen2")
    options = ("--loader", "core", "--saver", "mf", "--mf-qkv-layout", "contiguous")
    succeeded(convert(*options, "--load-dir", checkpoint, "--save-dir", tmp_path / "ms"))
    same_tensors(hf_tensors(tmp_path / "ms"), converted(hf_tensors(folder), 4, 8, mlp="interleaved", qkv="contiguous"))


def test_damage_is_named(hf_model: HFModel, tmp_path: Path) -> None:
    write(hf_model("qwen3-moe"), tmp_path / "ms")
    path = tmp_path / "ms" / "part0.safetensors"
    with open(path, "r+b") as file:
        file.seek(-3, 2)
        file.write(b"xyz")
    run = verb("verify", tmp_path / "ms")
    assert run.code == 1 and "part0.safetensors" in run.out, run


def test_a_killed_run_goes_on(hf_model: HFModel, tmp_path: Path) -> None:
    """No reader finds a model before the map is there; the same command ends with the same bytes."""
    options = ("--to", "mindspore", "--max-shard-size", "150KB", "--quiet")
    source = hf_model("qwen3-moe")
    out, kept = tmp_path / "out", tmp_path / "whole"

    def attempt(**env: Any) -> int:
        def call() -> None:
            exec(compile(KILLER, "killer", "exec"), {})
            main.main(["convert", str(source), str(out), *options])

        return forked(call, env={name: str(value) for name, value in env.items()}).code

    assert attempt(KILL_AT=0, CALLS=tmp_path / "calls") == 0
    out.rename(kept)
    total = int((tmp_path / "calls").read_text())
    for moment in (total // 3, total // 2, total - 14, total - 9, total - 6, total - 3):
        assert attempt(KILL_AT=moment) == -signal.SIGKILL
        assert not (out / MAP).exists() or file_bytes(kept).keys() <= file_bytes(out).keys()
        assert attempt(KILL_AT=0) == 0
        assert file_bytes(out) == file_bytes(kept), moment
        shutil.rmtree(out)


# -- the configuration


def test_the_configuration_of_a_mixture_with_latents(hf_model: HFModel, tmp_path: Path) -> None:
    write(hf_model("deepseek-v3-yarn"), tmp_path / "ms")
    config = config_of(tmp_path / "ms")
    scaling = config.pop("rope_scaling")
    assert (scaling["type"], scaling["factor"], scaling["original_max_position_embeddings"]) == ("yarn", 40.0, 4096)
    assert config == dict(
        model_type="deepseek_v3",
        architectures=["DeepseekV3ForCausalLM"],
        num_layers=4,
        hidden_size=64,
        num_attention_heads=4,
        ffn_hidden_size=112,
        vocab_size=199,
        max_position_embeddings=4096 * 40,
        normalization="RMSNorm",
        layernorm_epsilon=1e-6,
        add_bias_linear=False,
        add_qkv_bias=False,
        qk_layernorm=True,
        gated_linear_unit=True,
        hidden_act="silu",
        tie_word_embeddings=False,
        position_embedding_type="yarn",
        rotary_base=50000.0,
        rotary_percent=1.0,
        rotary_interleaved=config["rotary_interleaved"],
        multi_latent_attention=True,
        q_lora_rank=40,
        kv_lora_rank=24,
        qk_head_dim=16,
        qk_pos_emb_head_dim=8,
        v_head_dim=12,
        num_moe_experts=8,
        moe_ffn_hidden_size=48,
        first_k_dense_replace=1,
        moe_router_topk=2,
        moe_router_score_function="sigmoid",
        norm_topk_prob=True,
        moe_router_enable_expert_bias=True,
        moe_router_topk_scaling_factor=2.5,
        moe_router_num_groups=2,
        moe_router_group_topk=1,
        moe_aux_loss_coeff=config["moe_aux_loss_coeff"],
        shared_expert_num=1,
        moe_shared_expert_intermediate_size=48,
        use_shared_expert_gating=False,
        moe_grouped_gemm=True,
        mtp_num_layers=0,
        init_method_std=0.02,
        attention_dropout=0.0,
        params_dtype="float32",
        use_interleaved_weight_layout_mlp=True,
        use_contiguous_weight_layout_attention=False,
        mla_qkv_concat=False,
    )


FAMILIES = (
    *("llama2", "llama3.1", "llama-bias", "mistral-window", "qwen2-tied", "qwen3-window", "gpt2", "starcoder2", "glm"),
    *("phi3-partial", "mixtral", "qwen2-moe", "qwen3-moe-dense-layers", "qwen3-moe-sparse-step", "glm4-moe"),
    *("deepseek-v2-lite", "deepseek-v3", "deepseek-v3-yarn"),
)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_read_what_they_write(family: str, hf_model: HFModel, tmp_path: Path) -> None:
    write(hf_model(family), tmp_path / "ms")
    spec = open_source(hf_model(family)).source.spec
    read = row.properties(yaml_rows.ROWS, row.canonical(yaml_rows.ROWS, config_of(tmp_path / "ms"), "model_config"))
    assert differences(spec, ModelSpec.of(family=spec.family, dtype=spec.dtype, **read)) == []


def test_synonyms_and_defaults() -> None:
    config = row.canonical(yaml_rows.ROWS, dict(num_hidden_layers=2, n_head=4, hidden_size=8, rms_norm_eps=1e-6), "x")
    read = row.properties(yaml_rows.ROWS, config)
    assert (read["num_layers"], read["num_attention_heads"], read["norm_epsilon"]) == (2, 4, 1e-6)
    assert (read["num_query_groups"], read["kv_channels"], read["ffn_hidden_size"]) == (4, 2, 32)
    assert (read["normalization"], read["mlp_bias"], read["gated"]) == ("LayerNorm", True, False)
    with pytest.raises(mc.ConversionError, match=r"x has different values .* num_layers 2, n_layer 3"):
        row.canonical(yaml_rows.ROWS, dict(num_layers=2, n_layer=3), "x")


def test_layouts_are_read_where_they_are_said() -> None:
    def read(**config: Any) -> dict[str, Any]:
        return row.properties(yaml_rows.LAYOUTS, row.canonical(yaml_rows.LAYOUTS, config, "x"))

    assert read() == {}
    assert read(use_contiguous_weight_layout=True) == {"qkv_layout": "contiguous"}
    both = dict(use_contiguous_weight_layout_attention=False, use_interleaved_weight_layout_mlp=False)
    assert read(**both) == {"qkv_layout": "grouped", "mlp_layout": "contiguous"}


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("llama3.1", "llama3 scaling of rotary embeddings"),
        ("glm", "rotary embeddings on 0.5 of each head"),
    ],
)
def test_what_is_not_computed_is_a_warning(family: str, words: str, hf_model: HFModel, tmp_path: Path) -> None:
    planned = mc.plan(hf_model(family), tmp_path / "ms", to="mindspore")
    assert any(words in note for note in planned.notes)
    result = write(hf_model(family), tmp_path / "ms")
    assert any(f"will not compute {words}" in warning for warning in result.warnings)


# -- refusals

NO_PLACE = [
    ("qwen3-next", ("gated DeltaNet: delta_in", "stored minus 1", "gates of attention")),
    ("olmoe", ("over all heads together",)),
]


@pytest.mark.parametrize(("family", "words"), NO_PLACE)
def test_what_has_no_place_is_refused(family: str, words: tuple[str, ...], hf_model: HFModel, tmp_path: Path) -> None:
    for command in ("convert", "plan"):
        run = verb(command, hf_model(family), tmp_path / "ms", "--to", "mindspore")
        refused(run, "MindSpore Transformers has no place for these", *words)
    assert not (tmp_path / "ms").exists()


UNHEEDED = [
    (("--to", "mindspore", "--tp", "2"), "--target-tensor-parallel-size: only for writing a Megatron-LM checkpoint"),
    (("--to", "mindspore", "--instruct"), "--instruct: only for writing a Hugging Face folder"),
    (("--to", "hf", "--mf-qkv-layout", "grouped"), "--mf-qkv-layout: only for writing weights of MindSpore"),
    (("--mf-fold",), "pass --to mindspore"),
    (
        ("--to", "mindspore", "--expert-layout", "fused"),
        "--expert-layout fused: weights of MindSpore Transformers have one",
    ),
]


@pytest.mark.parametrize(("options", "words"), UNHEEDED)
def test_options_of_other_formats_are_refused(
    options: tuple[str, ...], words: str, hf_model: HFModel, tmp_path: Path
) -> None:
    refused(verb("convert", hf_model("llama2"), tmp_path / "out", *options), words, code=2)
    assert not (tmp_path / "out").exists()


def test_options_in_python(hf_model: HFModel, tmp_path: Path) -> None:
    options = mc.MindSporeOptions()
    with pytest.raises(mc.UsageError, match="options for writing weights of MindSpore Transformers are given"):
        mc.convert(hf_model("llama2"), tmp_path / "out", mindspore=options)
    with pytest.raises(mc.UsageError, match="options for writing a Hugging Face folder are given"):
        mc.convert(hf_model("llama2"), tmp_path / "out", to="mindspore", hf=mc.HFOptions())
    with pytest.raises(mc.UsageError, match="mlp_layout 'alternating' is not one of interleaved, contiguous"):
        write(hf_model("llama2"), tmp_path / "out", mlp_layout="alternating")
    assert not (tmp_path / "out").exists()


def test_models_that_are_there_stay(hf_model: HFModel, tmp_path: Path) -> None:
    source = hf_model("llama2")
    write(source, tmp_path / "ms", max_shard_size=100_000)
    assert "is complete already" in write(source, tmp_path / "ms", max_shard_size=100_000).notes[0]
    with pytest.raises(mc.ConversionError, match=rf"already holds files of a model \({MAP}"):
        write(hf_model("qwen2"), tmp_path / "ms")
    write(hf_model("qwen2"), tmp_path / "ms", overwrite=True)
    assert [path.name for path in (tmp_path / "ms").glob("part*")] == ["part0.safetensors"]
    assert mc.verify(tmp_path / "ms")
    other = shutil.copytree(source, tmp_path / "hf")
    for overwrite in (False, True):
        with pytest.raises(mc.ConversionError, match="holds a model of another format"):
            write(hf_model("qwen2"), other, overwrite=overwrite)
    same_tensors(hf_tensors(other), hf_tensors(source))


@pytest.mark.parametrize("to", ["hf", "megatron"])
def test_no_other_format_is_written_beside_them(to: str, hf_model: HFModel, tmp_path: Path) -> None:
    """The map would make readers take the older model."""
    write(hf_model("llama2"), tmp_path / "ms")
    before = left_in(tmp_path / "ms")
    run = verb("convert", hf_model("qwen2"), tmp_path / "ms", "--to", to, "--overwrite")
    refused(run, f"holds a model of another format ({MAP})", "save elsewhere")
    assert left_in(tmp_path / "ms") == before
