"""What is read of configurations at the command line: fields to ignore, models that Megatron-LM lacks, quantised folders, notes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_converters import ReadOptions, inspect, logits
from megatron_converters.basics.errors import ConversionError
from tests.helpers import (
    args_of,
    config_of,
    convert,
    convert_back,
    nothing_complete,
    refused,
    succeeded,
    tp_pp_converter,
    verb,
)

HEADS, GROUPS, SIZE, HEAD, ROWS, MLP = 2, 1, 8, 4, 6, 8
CONFIG: dict[str, Any] = dict(
    **dict(architectures=["Qwen2ForCausalLM"], model_type="qwen2", torch_dtype="float32", rms_norm_eps=1e-6),
    **dict(vocab_size=ROWS, hidden_size=SIZE, intermediate_size=MLP, num_hidden_layers=1, num_attention_heads=HEADS),
    **dict(num_key_value_heads=GROUPS, max_position_embeddings=64, rope_theta=10000.0, tie_word_embeddings=False),
)
LONGROPE = {"short_factor": [2.0, 2.0], "long_factor": [3.0, 3.0], "original_max_position_embeddings": 8}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


def tensors() -> dict[str, torch.Tensor]:
    """Tensors of Qwen2, whose queries, keys and values have biases."""
    layer, generator = "model.layers.0.", torch.Generator().manual_seed(0)
    shapes = {
        "model.embed_tokens.weight": (ROWS, SIZE),
        "lm_head.weight": (ROWS, SIZE),
        "model.norm.weight": (SIZE,),
        f"{layer}input_layernorm.weight": (SIZE,),
        f"{layer}post_attention_layernorm.weight": (SIZE,),
        f"{layer}self_attn.o_proj.weight": (SIZE, HEADS * HEAD),
        f"{layer}mlp.gate_proj.weight": (MLP, SIZE),
        f"{layer}mlp.up_proj.weight": (MLP, SIZE),
        f"{layer}mlp.down_proj.weight": (SIZE, MLP),
    }
    for part, heads in {"q": HEADS, "k": GROUPS, "v": GROUPS}.items():
        shapes[f"{layer}self_attn.{part}_proj.weight"] = (heads * HEAD, SIZE)
        shapes[f"{layer}self_attn.{part}_proj.bias"] = (heads * HEAD,)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def folder(path: Path, changed: dict[str, torch.Tensor] | None = None, **fields: Any) -> Path:
    path.mkdir()
    save_file({**tensors(), **(changed or {})}, path / "model.safetensors", {"format": "pt"})
    return configure(path, **fields)


def configure(path: Path, **fields: Any) -> Path:
    (path / "config.json").write_text(json.dumps({**CONFIG, **fields}))
    return path


# --- models that Megatron-LM lacks


LACKING = {
    "bidirectional": ({"is_causal": False}, "attention to later tokens (is_causal false)"),
    "yarn": ({"rope_scaling": YARN}, "YaRN by 4 outside multi-latent attention"),
    "yarn, vLLM's factor": ({"rope_scaling": {**YARN, "attn_factor": 0.5}}, "YaRN by 4 outside"),
    "longrope": ({"rope_scaling": {"type": "longrope", **LONGROPE}}, "LongRoPE: each rotary frequency"),
}


@pytest.mark.parametrize("name", LACKING)
def test_what_megatron_lacks_is_refused_in_one_place_and_comes_back_whole(name: str, tmp_path: Path) -> None:
    fields, words = LACKING[name]
    hf = folder(tmp_path / "hf", **fields)
    refused(verb("convert", hf, tmp_path / "meg"), words, "--allow-inexpressible")
    nothing_complete(tmp_path / "meg")
    run = succeeded(verb("convert", hf, tmp_path / "meg", "--allow-inexpressible"))
    assert f"warning: Megatron-LM will not compute {words}" in run.out + run.err
    refused(verb("convert", tmp_path / "meg", tmp_path / "again", "--to", "megatron"), words)
    for reference in ((), ("--hf-config", hf)):
        back = tmp_path / f"back{len(reference)}"
        succeeded(verb("convert", tmp_path / "meg", back, *reference))
        assert config_of(back) == config_of(hf)
        succeeded(verb("verify", hf, back))
        succeeded(verb("verify", hf, tmp_path / "meg", *reference))


def test_mindspore_lacks_it_too(tmp_path: Path) -> None:
    hf = folder(tmp_path / "hf", is_causal=False)
    refused(verb("convert", hf, tmp_path / "ms", "--to", "mindspore"), "attention to later tokens")
    assert not (tmp_path / "ms").exists()


def test_a_model_of_args_alone_is_not_the_bidirectional_reference(tmp_path: Path) -> None:
    hf = folder(tmp_path / "hf")
    succeeded(verb("convert", hf, tmp_path / "meg"))
    other = configure(shutil.copytree(hf, tmp_path / "other"), is_causal=False)
    run = succeeded(verb("convert", tmp_path / "meg", tmp_path / "back", "--hf-config", other))
    assert f"taken from {other}: causal: False, not True of the args" in run.out + run.err
    run = verb("verify", hf, other)
    assert (run.code, "different: causal: A has True, B has False" in run.out) == (1, True)


# --- fields that the user vouches for


UNKNOWN = {"normalize_queries": False, "rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta": 3}}
IGNORED = ("--ignore-config-fields", "normalize_queries,rope_scaling.beta")


@pytest.fixture(scope="module")
def vouched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder with unknown fields, and its checkpoint, without the configuration that a training run would drop."""
    root = tmp_path_factory.mktemp("vouched")
    hf = folder(root / "hf", **UNKNOWN)
    refused(verb("convert", hf, root / "meg"), "normalize_queries, rope_scaling.beta", " ".join(IGNORED))
    succeeded(verb("convert", hf, root / "meg", *IGNORED))
    (path,) = (root / "meg").rglob("model_optim_rng.pt")
    content = torch.load(path, weights_only=False)
    del content["args"].hf_config
    torch.save(content, path)
    return hf, root / "meg"


@pytest.mark.parametrize("dist", [False, True])
def test_the_option_reaches_the_reference_of_a_checkpoint(
    dist: bool, vouched: tuple[Path, Path], tmp_path: Path
) -> None:
    hf, meg = vouched
    if dist:
        succeeded(verb("convert", meg, tmp_path / "dist", "--ckpt-format", "torch_dist", "--to", "megatron"))
        meg = tmp_path / "dist"
    reference = ("--hf-config", hf)
    refused(verb("convert", meg, tmp_path / "back", *reference), "normalize_queries", " ".join(IGNORED))
    succeeded(verb("convert", meg, tmp_path / "back", *reference, *IGNORED))
    assert config_of(tmp_path / "back") == config_of(hf)
    succeeded(verb("verify", hf, meg, *reference, *IGNORED))
    succeeded(verb("plan", meg, tmp_path / "planned", *reference, *IGNORED))
    succeeded(verb("inspect", meg, *reference, *IGNORED))


def test_the_scripts_have_it_where_they_have_a_reference(vouched: tuple[Path, Path], tmp_path: Path) -> None:
    hf, meg = vouched
    there, back = ("--load-path", meg, "--save-path"), ("--hf-config", hf)
    refused(convert_back(*there, tmp_path / "a", *back), "normalize_queries", " ".join(IGNORED))
    succeeded(convert_back(*there, tmp_path / "a", *back, *IGNORED))
    refused(convert_back(*there, tmp_path / "b", *IGNORED), "has none without --hf-config", code=2)
    underlined = ("--hf_config", hf, "--ignore_config_fields", IGNORED[1])
    succeeded(tp_pp_converter("--in_dir", meg, "--save_path", tmp_path / "c.pt", "--model_type", "llama", *underlined))
    assert inspect(meg, read=ReadOptions(hf_config=hf, ignore_config_fields=tuple(IGNORED[1].split(","))))


def test_convert_py_has_it_for_the_reference_of_its_loader(vouched: tuple[Path, Path], tmp_path: Path) -> None:
    hf, meg = vouched
    plugins = ("--loader", "core", "--saver", "hf", "--load-dir", meg, "--save-dir", tmp_path / "out")
    succeeded(convert(*plugins, "--hf-config", hf, *IGNORED))
    assert config_of(tmp_path / "out") == config_of(hf)


def test_a_comparison_of_logits_heeds_it(vouched: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    hf, meg = vouched
    seen: list[Any] = []

    def compare(*_: Any, options: Any, **__: Any) -> None:
        seen.append(options.ignored_config)
        raise ConversionError("enough")

    monkeypatch.setattr(logits, "compare_logits", compare)
    run = verb("verify", "--logits", hf, meg, "--hf-config", hf, *IGNORED)
    refused(run, "enough", code=run.code)
    assert seen == [tuple(IGNORED[1].split(","))]


def test_it_is_refused_where_nothing_reads_a_configuration(vouched: tuple[Path, Path], tmp_path: Path) -> None:
    _, meg = vouched
    refused(verb("inspect", meg, *IGNORED), "--ignore-config-fields", "has none without --hf-config", code=2)


def test_a_reference_beside_mindspore_s_weights_has_it(vouched: tuple[Path, Path], tmp_path: Path) -> None:
    hf, _ = vouched
    plain = configure(shutil.copytree(hf, tmp_path / "plain"))
    succeeded(verb("convert", plain, tmp_path / "ms", "--to", "mindspore"))
    layouts = ("--mf-mlp-layout", "interleaved", "--mf-qkv-layout", "grouped")
    odd = configure(shutil.copytree(plain, tmp_path / "odd"), normalize_queries=False)
    refused(verb("inspect", tmp_path / "ms", "--hf-config", odd, *layouts), "normalize_queries")
    named = ("--ignore-config-fields", "normalize_queries")
    succeeded(verb("inspect", tmp_path / "ms", "--hf-config", odd, *layouts, *named))


# --- quantised folders


QUANTISED: dict[str, tuple[dict[str, Any], dict[str, torch.Tensor], str]] = {
    "mlx": (
        {"quantization": {"group_size": 64, "bits": 4}, "quantization_config": {"group_size": 64, "bits": 4}},
        {"model.layers.0.mlp.up_proj.weight": torch.zeros(MLP, 1, dtype=torch.uint32)},
        "quantised by MLX (4 bits, 64 to a group), which cannot be read; convert the unquantised model, or what mlx_lm",
    ),
    "mlx, the older key alone": ({"quantization": {"group_size": 32, "bits": 8}}, {}, "quantised by MLX (8 bits, 32"),
    "mlx, the newer key alone": (
        {"quantization_config": {"group_size": 32, "bits": 8, "mode": "affine"}},
        *({}, "quantised by MLX (8 bits, 32"),
    ),
    "gptq": (
        {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}},
        *(
            {},
            "quantised by GPTQ (4 bits, 128 to a group), which cannot be read; convert the unquantised model instead",
        ),
    ),
    "compressed-tensors, its first key": (
        {"compression_config": {"format": "int"}},
        {},
        "quantised by compressed-tensors",
    ),
    "unheard of": ({"quantization_config": {"quant_method": "xyz"}}, {}, "quantised by 'xyz', which cannot be read"),
    "gptq that config.json does not say": (
        *({}, {"model.layers.0.mlp.up_proj.qweight": torch.zeros(1, MLP, dtype=torch.int32)}),
        "the tensor model.layers.0.mlp.up_proj.qweight says that the weights are quantised by GPTQ or AWQ, which",
    ),
}


@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_weights_are_named_in_one_sentence(name: str, tmp_path: Path) -> None:
    fields, changed, words = QUANTISED[name]
    run = refused(verb("convert", folder(tmp_path / "hf", changed, **fields), tmp_path / "meg"), words)
    assert len(run.err.strip().splitlines()) == 1
    assert "ignore-config-fields" not in run.err
    nothing_complete(tmp_path / "meg")


def test_the_program_is_named_by_its_file(tmp_path: Path) -> None:
    packed = {"model.layers.0.mlp.up_proj.qweight": torch.zeros(1, MLP, dtype=torch.int32)}
    hf = folder(tmp_path / "hf", packed)
    (hf / "quantize_config.json").write_text('{"bits": 4}')
    refused(verb("inspect", hf), "quantised by GPTQ, which")


@pytest.mark.parametrize("empty", [None, {}, {"quant_method": None}])
def test_an_empty_quantisation_is_none(empty: Any, tmp_path: Path) -> None:
    succeeded(verb("inspect", folder(tmp_path / "hf", quantization_config=empty)))


# --- notes


def test_notes_on_a_configuration_are_said(tmp_path: Path) -> None:
    code = {"AutoModelForCausalLM": "modeling_own.Own"}
    hf = folder(tmp_path / "hf", auto_map=code, dual_chunk_attention_config={"chunk_size": 9})
    run = succeeded(verb("convert", hf, tmp_path / "meg"))
    assert "(modeling_own.Own), which was not looked at" in run.out
    assert "warning: config.json has dual_chunk_attention_config={'chunk_size': 9}" in run.out + run.err
    assert args_of(tmp_path / "meg").hf_config["dual_chunk_attention_config"] == {"chunk_size": 9}
    back = succeeded(verb("convert", tmp_path / "meg", tmp_path / "back", "--hf-config", hf))
    assert "warning: config.json has dual_chunk" in back.out + back.err
