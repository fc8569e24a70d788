"""Layers of `megatron_layers`: what they compute, what they refuse, and what `--spec` in args means."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_converters.basics.errors import ConversionError
from megatron_converters.families.config_json import config_from_spec, spec_from_config
from megatron_converters.formats.megatron.arguments import inexpressible
from megatron_converters.formats.megatron.rank_files_source import MegatronSource
from tests.conversions import different, hf_to_megatron, megatron_to_hf
from tests.helpers import ROOT, args_of, edit_rank, hf_tensors, nothing_complete, refused, verb
from tests.oracle.checkpoint import iteration_directory
from tests.oracle.errors import OracleError
from tests.oracle.hf import TOKENS, difference, hf_logits, make_model
from tests.oracle.jobs import gradients
from tests.oracle.layer_jobs import refusal, with_norms_after_blocks
from tests.oracle.pool import MegatronPool
from tests.test_hf_config import facts, ours, theirs

HFModel = Callable[..., Path]
Logits = Callable[[str], torch.Tensor]
TOLERANCE = 1e-5
VOCABULARY = 199


def with_spec(root: Path, value: Any, **more: Any) -> Path:
    """Checkpoint of one rank whose args name other layers, and no configuration of Hugging Face."""
    args = args_of(root)
    args.spec = value
    vars(args).pop("hf_config", None)
    vars(args).update(more)
    edit_rank(root, "mp_rank_00", args=args)
    return root


# -- what they compute


@pytest.mark.parametrize("bias", [False, True], ids=["no biases", "biases"])
@pytest.mark.parametrize(("name", "before"), [("sandwich_norms", True), ("post_norms", False)])
def test_norms_after_blocks_norm_what_is_added(
    megatron_pool: MegatronPool, name: str, before: bool, bias: bool
) -> None:
    found, expected, names = megatron_pool.run(with_norms_after_blocks, name, bias)[0]
    assert difference(found, expected) < TOLERANCE
    assert ("input_layernorm.weight" in names, "pre_mlp_layernorm.weight" in names) == (before, before)


def test_norms_over_heads_on_more_ranks_than_query_groups(megatron_pool: MegatronPool, tmp_path: Path) -> None:
    folder = make_model("olmo2", tmp_path / "hf", num_key_value_heads=2)
    root = hf_to_megatron(folder, tmp_path / "megatron", tp=4, impl="local")
    assert difference(megatron_pool.logits(root, TOKENS, tp=4), hf_logits(folder, TOKENS)) < TOLERANCE


def test_gradients_of_norms_over_heads_are_those_of_transformers(
    megatron_pool: MegatronPool, hf_model: HFModel, tmp_path: Path
) -> None:
    """Each rank has those of its heads, which megatron-core adds up; what comes before them has all on each rank."""
    from transformers import AutoModelForCausalLM

    layer = "decoder.layers.{}.self_attention."
    summed = {
        f"{layer.format(2)}{part}_layernorm.weight": f"model.layers.2.self_attn.{part}_norm.weight" for part in "qk"
    }
    alike = {f"{layer.format(0)}linear_proj.post_layernorm.weight": "model.layers.0.post_attention_layernorm.weight"}
    folder = hf_model("olmo2")
    root = hf_to_megatron(folder, tmp_path / "megatron", tp=2, impl="local")
    names = [*summed, *alike]
    first, second = megatron_pool.run(gradients, iteration_directory(root), TOKENS, VOCABULARY, names)[:2]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    model(TOKENS, use_cache=False).logits.square().sum().backward()
    held = dict(model.named_parameters())
    for name, reference in (summed | alike).items():
        expected = held[reference].grad
        found = first[name] + second[name] if name in summed else second[name]
        assert expected is not None and difference(found, expected) < 1e-4, name


# -- that a wrong one shows


@pytest.mark.parametrize(
    ("family", "name", "words"),
    [
        ("gpt_neox-parallel", None, ""),  # the same tensors, one block after the other
        ("olmo2", "post_norms", "size mismatch for .*q_layernorm"),
        ("exaone4", "sandwich_norms", r'Missing key.*"decoder\.layers\.0\.input_layernorm\.weight"'),
        ("exaone4", None, "post_layernorm"),
        ("olmoe", None, "size mismatch for .*q_layernorm"),
        ("phi", "parallel", "pre_mlp_layernorm"),
    ],
)
def test_another_layer_shows(
    megatron_pool: MegatronPool,
    hf_model: HFModel,
    logits: Logits,
    tmp_path: Path,
    family: str,
    name: str | None,
    words: str,
) -> None:
    root = hf_to_megatron(hf_model(family), tmp_path / "megatron", impl="local", allow_inexpressible=family == "phi")
    args = args_of(root)
    args.spec = None if name is None else [f"megatron_layers.{name}", "spec"]
    edit_rank(root, "mp_rank_00", args=args)
    if words:
        with pytest.raises(OracleError, match=words):
            megatron_pool.logits(root, TOKENS)
    else:
        assert difference(megatron_pool.logits(root, TOKENS), logits(family)) > 0.01


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("post_norms", dict(num_moe_experts=4), "num_moe_experts: this layer of megatron_layers has an MLP"),
        ("norms_over_heads", dict(num_moe_experts=4, moe_layer_freq=2), "moe_layer_freq=2: layers .* all of one kind"),
        ("norms_over_heads", dict(normalization="RMSNorm"), "qk_layernorm=False.*need --qk-layernorm"),
        ("post_norms_over_heads", dict(qk_layernorm=True), "normalization='LayerNorm'"),
        ("parallel", dict(cuda_graph_impl="local", cuda_graph_scope="full"), "cuda_graph_impl='local'"),
    ],
)
def test_what_a_layer_has_not_is_refused(
    megatron_pool: MegatronPool, name: str, options: dict[str, Any], words: str
) -> None:
    assert re.search(words, megatron_pool.run(refusal, name, options)[0])


# -- args


@pytest.mark.parametrize("family", ["olmo2", "exaone4", "gpt_neox-parallel"])
def test_args_alone_say_the_layer(hf_model: HFModel, tmp_path: Path, family: str) -> None:
    """As a checkpoint has them that Megatron-LM saved in training."""
    root = hf_to_megatron(hf_model(family), tmp_path / "megatron")
    with_spec(root, args_of(root).spec)
    assert MegatronSource(root).spec.family == family.partition("-")[0]
    assert different(hf_tensors(hf_model(family)), hf_tensors(megatron_to_hf(root, tmp_path / "hf"))) == []


def test_what_earlier_versions_recorded_is_read(hf_model: HFModel, tmp_path: Path) -> None:
    root = hf_to_megatron(hf_model("gpt_neox-parallel"), tmp_path / "megatron")
    with_spec(root, None, parallel_block=True, parallel_norms=True)
    values = MegatronSource(root).spec.values
    assert (values["parallel_block"], values["parallel_norms"]) == (True, True)


def test_layers_of_other_modules_are_refused(hf_model: HFModel, tmp_path: Path) -> None:
    folder = hf_model("llama3")
    root = with_spec(hf_to_megatron(folder, tmp_path / "megatron"), ["someone.layers", "spec"])
    words = "spec=['someone.layers', 'spec'], layers of a module that is not known here", "--hf-config"
    refused(verb("convert", root, tmp_path / "hf"), *words)
    nothing_complete(tmp_path / "hf")
    assert verb("convert", root, tmp_path / "hf", "--hf-config", folder).code == 0
    assert MegatronSource(with_spec(root, ["local"])).spec.family == "llama"


@pytest.mark.parametrize(
    ("family", "release", "since"), [("olmo2", "0.11", "0.12"), ("olmo3", "0.14", "0.15"), ("olmoe", "0.15", "0.16")]
)
def test_releases_that_lack_it_are_refused(
    hf_model: HFModel, tmp_path: Path, family: str, release: str, since: str
) -> None:
    run = verb("convert", hf_model(family), tmp_path / "out", "--to", "megatron", "--megatron-version", release)
    refused(run, f"effect from {since} on")
    nothing_complete(tmp_path / "out")


def test_importing_the_package_imports_nothing_else() -> None:
    code = (
        "import sys, megatron_layers; print([name for name in ('torch', 'megatron', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# -- configurations


def olmo3(**fields: Any) -> dict[str, Any]:
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, vocab_size=32)
    return dict(model_type="olmo3", architectures=["Olmo3ForCausalLM"], **sizes, **fields)


YARN = dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=8192)
PLAIN = dict(rope_type="default", rope_theta=5e5)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(rope_theta=500000, rope_scaling=YARN), "other rotary embeddings for layers of full attention"),
        (dict(rope_parameters=dict(full_attention={**YARN, **PLAIN, **YARN}, sliding_attention=PLAIN)), "other rotary"),
        (dict(rope_theta=10000), "other rotary embeddings"),  # transformers takes it for full attention alone
        (dict(rope_parameters=PLAIN), "must have an object for each of full_attention and sliding_attention"),
        (dict(sliding_window=None), "sliding_attention in layer_types, but its sliding_window is null"),
    ],
)
def test_rotary_embeddings_that_differ_between_layers_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConversionError, match=words):
        spec_from_config(olmo3(**fields))


_PLAIN: dict[str, Any] = dict(
    **dict(attention_dropout=0.0, hidden_act="silu", initializer_range=0.02, torch_dtype="bfloat16", use_cache=True),
    **dict(bos_token_id=1, pad_token_id=0, transformers_version="4.54.0"),
)
_LLAMA3 = dict(
    factor=16.0, high_freq_factor=4.0, low_freq_factor=1.0, original_max_position_embeddings=8192, rope_type="llama3"
)
_EXAONE4 = {
    **{**_PLAIN, "model_type": "exaone4", "architectures": ["Exaone4ForCausalLM"], "rope_scaling": _LLAMA3},
    **dict(num_key_value_heads=8, rms_norm_eps=1e-05, rope_theta=1000000, vocab_size=102400),
}
#: Configurations as they are published, as far as they decide anything.
PUBLISHED: dict[str, dict[str, Any]] = {
    "OLMo-2-1124-13B": {
        **{**_PLAIN, "model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"], "rope_scaling": None},
        **dict(attention_bias=False, hidden_size=5120, intermediate_size=13824, max_position_embeddings=4096),
        **dict(num_attention_heads=40, num_hidden_layers=40, num_key_value_heads=40, rms_norm_eps=1e-06),
        **dict(rope_theta=500000, tie_word_embeddings=False, vocab_size=100352),
    },
    "EXAONE-4.0-1.2B": {
        **{**_EXAONE4, "layer_types": ["full_attention"] * 30, "sliding_window": None, "sliding_window_pattern": None},
        **dict(head_dim=64, hidden_size=2048, intermediate_size=4096, max_position_embeddings=65536),
        **dict(num_attention_heads=32, num_hidden_layers=30, tie_word_embeddings=True),
    },
    "EXAONE-4.0-32B": {
        **{**_EXAONE4, "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 16, "sliding_window": 4096},
        **dict(sliding_window_pattern="LLLG", head_dim=128, hidden_size=5120, intermediate_size=27392),
        **dict(max_position_embeddings=131072, num_attention_heads=40, num_hidden_layers=64, tie_word_embeddings=False),
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_read_as_transformers_reads_them(name: str) -> None:
    spec = spec_from_config(PUBLISHED[name])
    assert ours(spec) == facts(theirs(PUBLISHED[name]))
    assert spec_from_config(config_from_spec(spec)) == spec
    assert inexpressible(spec) == []
