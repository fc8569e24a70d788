"""MiniCPM: megatron-core computes what transformers computes, wherever the multipliers are, and back."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from megatron_converters.basics.errors import ConversionError
from megatron_converters.formats.huggingface.source import HFSource
from tests.conversions import different, hf_to_megatron, hf_to_torch_dist, megatron_to_hf, reshard
from tests.helpers import args_of, hf_tensors, rank_content, refused, succeeded, verb
from tests.oracle.hf import difference, hf_logits, make_model, sample_tokens
from tests.oracle.minicpm import DIVISORS, LONGROPE, SCALE_DEPTH, make_minicpm
from tests.oracle.pool import MegatronPool

TOKENS = sample_tokens(length=40)
VOCABULARY = 199
TOLERANCE = 1e-5
FOLD = dict(mup="fold", megatron_version="0.16")


class Model(NamedTuple):
    """MiniCPM in `folder`, and what transformers computes of it."""

    folder: Path
    logits: torch.Tensor
    options: dict[str, Any]
    divisors: tuple[float, ...] = ()


def _dense(folder: Path, **options: Any) -> Model:
    minicpm, granite = make_minicpm(folder, **options)
    return Model(minicpm, hf_logits(granite, TOKENS), dict(impl="local"))


def _longrope(folder: Path) -> Model:
    minicpm, granite = make_minicpm(folder, rope=LONGROPE, tied=False, rms_norm_eps=1e-6)
    options = dict(impl="local", allow_inexpressible=True)
    return Model(minicpm, hf_logits(granite, TOKENS), options, tuple(DIVISORS))


def _latent(folder: Path, **options: Any) -> Model:
    made = make_model("minicpm3", folder / "minicpm3", **options)
    return Model(made, hf_logits(made, TOKENS), dict(impl="transformer_engine"))


MODELS: dict[str, Callable[[Path], Model]] = {
    "tied": _dense,
    "untied": lambda folder: _dense(folder, tied=False),
    "longrope": _longrope,
    "latent": _latent,
    "latent, untied": lambda folder: _latent(folder, tie_word_embeddings=False, q_lora_rank=None),
}
DENSE = ("tied", "untied", "longrope")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    known: dict[str, Model] = {}

    def of(name: str) -> Model:
        if name not in known:
            known[name] = MODELS[name](tmp_path_factory.mktemp("minicpm"))
        return known[name]

    return of


@pytest.mark.parametrize("sizes", [dict(), dict(tp=2, pp=2)], ids=["whole", "cut"])
@pytest.mark.parametrize("name", DENSE)
def test_flags_of_mup_change_no_weight(
    megatron_pool: MegatronPool, model: Any, tmp_path: Path, name: str, sizes: dict[str, int]
) -> None:
    """The flags are those of Megatron-LM 0.17; the test applies them to the model of an earlier megatron-core."""
    folder, wanted, options, divisors = model(name)
    files = hf_to_megatron(folder, tmp_path / "files", **options, **sizes)
    chunks = hf_to_torch_dist(folder, tmp_path / "chunks", **options, **sizes)
    assert difference(megatron_pool.logits(files, TOKENS, rotary_divisors=divisors), wanted) < TOLERANCE
    assert difference(megatron_pool.distributed_logits(chunks, TOKENS, rotary_divisors=divisors), wanted) < TOLERANCE
    for source in (files, chunks):
        back = megatron_to_hf(source, tmp_path / source.name / "hf")
        assert different(hf_tensors(folder), hf_tensors(back)) == []
        written, original = (json.loads((each / "config.json").read_text()) for each in (back, folder))
        assert {key: written.get(key) for key in original} == original
    args = args_of(files)
    assert args.mup_embedding_mult == pytest.approx(12 * 2 / 1.4)
    assert args.mup_output_mult == 16 / 64


@pytest.mark.parametrize("sizes", [dict(), dict(tp=2, pp=2)], ids=["whole", "cut"])
@pytest.mark.parametrize("name", MODELS)
def test_folded_weights_need_no_flag(
    megatron_pool: MegatronPool, model: Any, tmp_path: Path, name: str, sizes: dict[str, int]
) -> None:
    folder, wanted, options, divisors = model(name)
    files = hf_to_megatron(folder, tmp_path / "files", **options, **sizes, **FOLD)
    chunks = hf_to_torch_dist(folder, tmp_path / "chunks", **options, **sizes, **FOLD)
    assert difference(megatron_pool.logits(files, TOKENS, rotary_divisors=divisors), wanted) < TOLERANCE
    assert difference(megatron_pool.distributed_logits(chunks, TOKENS, rotary_divisors=divisors), wanted) < TOLERANCE
    for source in (files, chunks):
        back = hf_tensors(megatron_to_hf(source, tmp_path / source.name / "hf"))
        assert back.keys() == hf_tensors(folder).keys()
        assert all(torch.allclose(back[key], value, rtol=3e-7, atol=0) for key, value in hf_tensors(folder).items())
    assert (args_of(files).use_mup, args_of(files).multipliers_folded) == (False, True)


@pytest.mark.parametrize("name", [*DENSE, "latent"])
def test_raw_weights_are_those_of_the_source(model: Any, tmp_path: Path, name: str) -> None:
    folder, _, options, divisors = model(name)
    root = hf_to_megatron(folder, tmp_path / "raw", **{**options, "allow_inexpressible": False}, mup="raw")
    args = args_of(root)
    assert (args.scale_emb, args.scale_depth, args.dim_model_base, args.use_mup) == (12, 1.4, 16, False)
    state = rank_content(root)["model"]
    assert torch.equal(
        state["embedding.word_embeddings.weight"][:VOCABULARY], hf_tensors(folder)["model.embed_tokens.weight"]
    )
    flags = (root / "iter_0000001" / "pretrain_gpt_flags.txt").read_text()
    assert {"--scale-emb 12", "--scale-depth 1.4", "--dim-model-base 16"} <= {
        line.strip().removesuffix(" \\") for line in flags.splitlines()
    }
    if divisors:
        assert args.rope_scaling_type == "longrope"
        assert args.short_factor == ",".join(map(str, divisors))
    assert different(hf_tensors(folder), hf_tensors(megatron_to_hf(root, tmp_path / "hf"))) == []
    again = json.loads((tmp_path / "hf" / "config.json").read_text())
    original = json.loads((folder / "config.json").read_text())
    assert {key: again.get(key) for key in original} == original


def without_record(root: Path, *names: str) -> Path:
    """Take attributes out of the args of a checkpoint of one rank, as other programs would have saved it."""
    (file,) = root.glob("iter_0000001/*/*.pt")
    content = torch.load(file, weights_only=False)
    for name in names:
        vars(content["args"]).pop(name, None)
    torch.save(content, file)
    return root


def test_mindspeed_s_args_are_enough_to_know_the_model(model: Any, tmp_path: Path) -> None:
    folder = model("longrope").folder
    root = without_record(hf_to_megatron(folder, tmp_path / "raw", mup="raw"), "hf_config")
    config = json.loads((megatron_to_hf(root, tmp_path / "hf") / "config.json").read_text())
    assert (config["architectures"], config["scale_depth"]) == (["MiniCPMForCausalLM"], SCALE_DEPTH)
    assert config["rope_scaling"]["short_factor"] == DIVISORS
    assert different(hf_tensors(folder), hf_tensors(tmp_path / "hf")) == []


def test_a_checkpoint_that_does_not_tell_needs_mup(model: Any, tmp_path: Path) -> None:
    folder = model("tied").folder
    scales = ("scale_emb", "scale_depth", "dim_model_base")
    root = without_record(hf_to_megatron(folder, tmp_path / "raw", mup="raw"), *scales)
    refused(verb("convert", root, tmp_path / "hf"), "args do not say where they are; say it with --mup")
    assert not (tmp_path / "hf").exists()
    succeeded(verb("convert", root, tmp_path / "hf", "--mup", "raw"))
    assert different(hf_tensors(folder), hf_tensors(tmp_path / "hf")) == []
    succeeded(verb("verify", folder, root, "--mup", "raw"))
    reference = without_record(root, "hf_config")
    refused(
        verb("convert", reference, tmp_path / "b", "--mup", "raw"), "without multipliers, of the llama family", code=2
    )
    succeeded(verb("convert", reference, tmp_path / "b", "--mup", "raw", "--hf-config", folder))
    assert different(hf_tensors(folder), hf_tensors(tmp_path / "b")) == []


def test_mup_that_contradicts_the_record_is_refused(model: Any, tmp_path: Path) -> None:
    root = hf_to_megatron(model("tied").folder, tmp_path / "flags")
    refused(
        verb("convert", root, tmp_path / "hf", "--mup", "raw"), "say that it has its multipliers by 'flags'", code=2
    )
    run = succeeded(verb("convert", root, tmp_path / "raw", "--to", "megatron", "--mup", "raw"))
    assert "multipliers are left to the training program" in run.err
    assert args_of(tmp_path / "raw").scale_emb == 12


def test_flags_cannot_say_the_multipliers_of_minicpm3(model: Any, tmp_path: Path) -> None:
    folder = model("latent").folder
    with pytest.raises(ConversionError, match=r"norms of queries, keys or latents.*use --mup fold"):
        hf_to_megatron(folder, tmp_path / "a", mup="flags")
    root = hf_to_megatron(folder, tmp_path / "default")
    assert args_of(root).multipliers_folded is True
    assert args_of(root).layernorm_epsilon == 1e-6


def test_folds_are_torch_s(model: Any, tmp_path: Path) -> None:
    """By hand: the residual stream is scaled by 1 / r, where nothing else has the epsilon; in MiniCPM3 by the epsilons' root."""
    residual = 1.4 / math.sqrt(4)
    dense, tensors = (
        hf_to_megatron(model("tied").folder, tmp_path / "dense", impl="local", **FOLD),
        hf_tensors(model("tied").folder),
    )
    state = rank_content(dense)["model"]
    expected = tensors["model.embed_tokens.weight"] * (12 / residual)
    assert torch.allclose(state["embedding.word_embeddings.weight"][:VOCABULARY], expected, rtol=1e-7, atol=0)
    norm = tensors["model.norm.weight"] * (0.25 * residual / 12)
    assert torch.allclose(state["decoder.final_layernorm.weight"], norm, rtol=1e-7, atol=0)
    assert torch.equal(state["decoder.layers.1.mlp.linear_fc2.weight"], tensors["model.layers.1.mlp.down_proj.weight"])
    latent, tensors = (
        hf_to_megatron(model("latent").folder, tmp_path / "latent", **FOLD),
        hf_tensors(model("latent").folder),
    )
    state, scale = rank_content(latent)["model"], math.sqrt(1e-6 / 1e-4)
    down = tensors["model.layers.1.mlp.down_proj.weight"] * (scale * residual)
    assert torch.allclose(state["decoder.layers.1.mlp.linear_fc2.weight"], down, rtol=1e-7, atol=0)
    expected = tensors["model.embed_tokens.weight"] * (scale * 12)
    assert torch.allclose(state["embedding.word_embeddings.weight"][:VOCABULARY], expected, rtol=1e-7, atol=0)


def test_longrope_is_said_to_be_inexpressible(model: Any, tmp_path: Path) -> None:
    folder = model("longrope").folder
    refused(verb("convert", folder, tmp_path / "a"), "LongRoPE", "--allow-inexpressible")
    run = succeeded(verb("convert", folder, tmp_path / "a", "--allow-inexpressible"))
    assert "warning: Megatron-LM will not compute LongRoPE" in run.err
    shown = succeeded(verb("plan", folder, tmp_path / "b", "--allow-inexpressible"))
    assert "warning: Megatron-LM will not compute LongRoPE" in shown.out
    assert "flags of muP (--mup flags): no weight is changed" in shown.out


def test_sparse_attention_is_kept_and_said(tmp_path: Path) -> None:
    folder, _ = make_minicpm(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    sparse = {"kernel_size": 32, "topk": 64, "dense_len": 8192}
    (folder / "config.json").write_text(json.dumps({**config, "sparse_config": sparse, "mup_denominator": 32}))
    assert any("sparse attention" in note for note in HFSource(folder).origin.notes)
    back = megatron_to_hf(hf_to_megatron(folder, tmp_path / "megatron"), tmp_path / "back")
    assert json.loads((back / "config.json").read_text())["sparse_config"] == sparse


def test_dynamic_scaling_is_said_to_be_the_same_up_to_the_model_s_positions(tmp_path: Path) -> None:
    folder, _ = make_minicpm(tmp_path, rope=dict(rope_type="dynamic", factor=4.0), tied=False)
    run = succeeded(verb("convert", folder, tmp_path / "megatron"))
    assert "dynamic RoPE scaling: Megatron-LM has none; it computes the same up to the model's 512 positions" in run.err


@pytest.mark.parametrize("mup", ["flags", "fold"])
def test_experts_have_minicpm_s_names(megatron_pool: MegatronPool, tmp_path: Path, mup: str) -> None:
    """The experts of MiniCPM-MoE are Mixtral's under other names. Mixtral with unit constants is the reference."""
    from safetensors.torch import save_file

    mixtral = make_model("mixtral", tmp_path / "mixtral", tie_word_embeddings=False)
    config = json.loads((mixtral / "config.json").read_text())
    names = {name: name.replace("block_sparse_moe.", "mlp.") for name in hf_tensors(mixtral)}
    folder = tmp_path / "minicpm"
    folder.mkdir()
    # Embeddings are divided and logits multiplied by the constants, so that both models compute the same.
    tensors = {names[name]: value for name, value in hf_tensors(mixtral).items()}
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"] / 8
    tensors["lm_head.weight"] = tensors["lm_head.weight"] * 4
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    kept = {key: config[key] for key in config if key not in ("architectures", "model_type", "num_local_experts")}
    kept = {key: value for key, value in kept.items() if "router" not in key and key != "sliding_window"}
    scales = dict(scale_emb=8, scale_depth=2, dim_model_base=16, num_experts=8, num_experts_per_tok=2)
    (folder / "config.json").write_text(json.dumps({**kept, **scales, "architectures": ["MiniCPMForCausalLM"]}))
    root = hf_to_megatron(folder, tmp_path / "megatron", tp=2, pp=2, ep=2, etp=1, mup=mup)
    assert difference(megatron_pool.logits(root, TOKENS), hf_logits(mixtral, TOKENS)) < TOLERANCE
    back = hf_tensors(megatron_to_hf(root, tmp_path / "back"))
    assert different(tensors, back) == []  # powers of 2 are lossless
    assert "model.layers.0.mlp.experts.3.w2.weight" in back


def test_block_experts_are_renamed(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder, _ = make_minicpm(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config |= dict(num_experts=6, expert_size=8, dense_layer_ids=[0])
    tensors = {name: value for name, value in hf_tensors(folder).items() if ".mlp." not in name or ".0." in name}
    generator = torch.Generator().manual_seed(0)
    shapes = {"moe_router": (6, 64), "router_norm": (6,), "moe_w_in": (6, 8, 64), "moe_w_out": (6, 64, 8)}
    for layer in (1, 2, 3):
        for name, shape in shapes.items():
            tensors[f"model.layers.{layer}.mlp.{name}.weight"] = torch.randn(shape, generator=generator)
    made = tmp_path / "block"
    made.mkdir()
    save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
    (made / "config.json").write_text(json.dumps(config))
    root = tmp_path / "megatron"
    refused(verb("convert", made, root), "block experts (BlockFFN)", "--allow-inexpressible")
    refused(verb("convert", made, root, "--allow-inexpressible", "--tp", 2), "6 block experts of 8, which stay whole")
    succeeded(verb("convert", made, root, "--allow-inexpressible", "--pp", 2))
    state = rank_content(root, "mp_rank_00_001")["model"]
    assert torch.equal(state["decoder.layers.1.mlp.moe_w_out.weight"], tensors["model.layers.3.mlp.moe_w_out.weight"])
    for options in ((), ("--ckpt-format", "torch_dist")):
        target = tmp_path / f"again {len(options)}"
        succeeded(verb("convert", root, target, "--to", "megatron", "--pp", 1, "--allow-inexpressible", *options))
        succeeded(verb("convert", target, target / "hf"))
        assert different(tensors, hf_tensors(target / "hf")) == []


def test_a_hybrid_of_lightning_attention_is_refused_with_the_reason(tmp_path: Path) -> None:
    folder, _ = make_minicpm(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    names = {"architectures": ["MiniCPMSALAForCausalLM"], "model_type": "minicpm_sala"}
    (folder / "config.json").write_text(json.dumps(config | names))
    refused(verb("convert", folder, tmp_path / "a"), "MiniCPMSALAForCausalLM", "lightning attention")


def test_the_way_between_conventions(megatron_pool: MegatronPool, model: Any, tmp_path: Path) -> None:
    folder, wanted, options, _ = model("tied")
    raw = hf_to_megatron(folder, tmp_path / "raw", **options, mup="raw")
    folded = reshard(raw, tmp_path / "folded", tp=2, pp=2, **options, **FOLD)
    assert difference(megatron_pool.logits(folded, TOKENS), wanted) < TOLERANCE
    flags = reshard(raw, tmp_path / "flags", tp=2, **options)
    assert difference(megatron_pool.logits(flags, TOKENS), wanted) < TOLERANCE


# -- negative controls


@pytest.mark.parametrize("name", ["tied", "latent"])
def test_forgotten_multipliers_show(megatron_pool: MegatronPool, model: Any, tmp_path: Path, name: str) -> None:
    folder, wanted, options, _ = model(name)
    root = hf_to_megatron(folder, tmp_path / "raw", **options, mup="raw")
    assert difference(megatron_pool.logits(root, TOKENS), wanted) > 0.1


def test_halves_that_are_not_made_neighbours_show(megatron_pool: MegatronPool, model: Any, tmp_path: Path) -> None:
    folder, wanted, options, _ = model("latent")
    root = hf_to_megatron(folder, tmp_path / "folded", **options, **FOLD)
    (file,) = root.glob("iter_0000001/*/*.pt")
    content = torch.load(file, weights_only=False)
    key = "decoder.layers.0.self_attention.linear_kv_down_proj.weight"
    content["model"][key][24:] = content["model"][key][24:].reshape(4, 2, 64).transpose(0, 1).reshape(8, 64).clone()
    torch.save(content, file)
    assert difference(megatron_pool.logits(root, TOKENS), wanted) > 1e-4


def test_inspect_and_args_say_where_multipliers_are(model: Any, tmp_path: Path) -> None:
    folder = model("tied").folder
    words = {"flags": "in flags of muP", "fold": "folded into weights", "raw": "in arguments of MindSpeed-LLM"}
    flags = {"flags": "--mup-output-mult 0.25", "fold": "--norm-epsilon 0.00204", "raw": "--dim-model-base 16"}
    for mup, said in words.items():
        root = hf_to_megatron(folder, tmp_path / mup, mup=mup)
        assert said in succeeded(verb("inspect", root)).out
        assert json.loads(succeeded(verb("inspect", root, "--json")).out)["mup"] == mup
        assert flags[mup] in succeeded(verb("args", root)).out


def test_logits_that_megatron_would_not_compute_are_refused(model: Any, tmp_path: Path) -> None:
    folder = model("longrope").folder
    root = hf_to_megatron(folder, tmp_path / "longrope", impl="local", allow_inexpressible=True)
    refused(verb("verify", root, root, "--logits"), "would compute another model than this", "LongRoPE", code=2)
    raw = hf_to_megatron(model("tied").folder, tmp_path / "raw", impl="local", mup="raw")
    run = verb("verify", raw, raw, "--logits")
    refused(run, "leaves its multipliers to MindSpeed-LLM's arguments", "--mup fold", code=2)


# -- as a Llama


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("through", ["folder", "flags", "fold"])
def test_minicpm_is_exported_as_a_llama(model: Any, tmp_path: Path, name: str, through: str) -> None:
    folder, wanted, options, _ = model(name)
    source = folder if through == "folder" else hf_to_megatron(folder, tmp_path / through, tp=2, mup=through, **options)
    run = succeeded(verb("convert", source, tmp_path / "llama", "--to", "hf", "--as", "llama"))
    assert "written as a llama model, not minicpm; multipliers are folded into weights, which rounds them" in run.out
    config = json.loads((tmp_path / "llama" / "config.json").read_text())
    assert (config["architectures"], config["model_type"]) == (["LlamaForCausalLM"], "llama")
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    assert config["tie_word_embeddings"] is (name == "tied")
    found = hf_logits(tmp_path / "llama", TOKENS)
    assert difference(found, wanted) < TOLERANCE


def test_minicpm3_is_no_llama(model: Any, tmp_path: Path) -> None:
    folder = model("latent").folder
    refused(
        verb("convert", folder, tmp_path / "a", "--to", "hf", "--as", "llama"), "--as llama: the minicpm3 model", code=2
    )
    refused(verb("convert", folder, tmp_path / "a", "--to", "hf", "--as", "lama"), "there is no such family", code=2)
    assert not (tmp_path / "a").exists()
