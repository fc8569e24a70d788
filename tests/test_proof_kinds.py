"""The proof for models that differ from Llama in kind: megatron-core computes what transformers computes, and back is exact.

The files themselves are also compared with those of a conversion by hand, which shares no code with ours.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_converters.basics.errors import ConversionError
from megatron_converters.formats.huggingface.source import HFSource
from megatron_converters.formats.huggingface.target import HFOptions, HFTarget
from megatron_converters.formats.megatron.opening import open_megatron
from megatron_converters.formats.megatron.rank_files_target import MegatronTarget
from megatron_converters.formats.megatron.reading import MegatronReadOptions
from megatron_converters.formats.megatron.writing import MegatronOptions
from tests.conversions import different, hf_to_megatron, hf_to_torch_dist, megatron_to_hf, reshard, run
from tests.helpers import hf_tensors, refused, verb
from tests.oracle import by_hand_kinds, checkpoint
from tests.oracle.errors import OracleError
from tests.oracle.families import MODELS
from tests.oracle.hf import TOKENS, difference, hf_logits
from tests.oracle.hf_kinds import KINDS
from tests.oracle.pool import MegatronPool
from tests.oracle.prediction import PREDICTING, PREDICTING_ALIKE, with_prediction

#: Largest difference, relative to the largest logit. GELU's two forms differ by 7e-5, so it must not be larger.
TOLERANCE = 1e-5
#: Families that megatron-core builds with Transformer Engine's layers alone.
WITH_ENGINE = ("qwen3-next",)
WITH_EXPERTS = tuple(name for name, model in MODELS.items() if model.has_experts)
Models = Callable[..., Path]


def cut(family: str) -> dict[str, Any]:
    """Parallel sizes above 1 of every kind that the family has."""
    experts = dict(ep=2, etp=1) if family in WITH_EXPERTS else {}
    return dict(tp=2, pp=2, impl="transformer_engine", **experts)


@pytest.mark.parametrize("family", KINDS)
def test_every_rank_s_file_is_that_of_a_conversion_by_hand(hf_model: Models, tmp_path: Path, family: str) -> None:
    layout = dict(expert_layout="sequential", divisor=16) if family in WITH_EXPERTS else dict(divisor=16)
    ours = hf_to_megatron(hf_model(family), tmp_path / "ours", **cut(family), **layout)
    experts = dict(expert_model_parallel_size=2, expert_tensor_parallel_size=1) if family in WITH_EXPERTS else {}
    sizes = dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, transformer_impl="transformer_engine")
    theirs = by_hand_kinds.convert(hf_model(family), tmp_path / "theirs", **sizes, **experts)
    assert_same_files(theirs, ours)


def assert_same_files(theirs: Path, ours: Path) -> None:
    """Every tensor by hand has the same bits in our file of the same rank; padding of the vocabulary may differ."""
    files = sorted(theirs.glob("iter_0000001/*/*.pt"))
    assert files
    for file in files:
        wanted = torch.load(file, weights_only=False)["model"]
        found = torch.load(ours / file.relative_to(theirs), weights_only=False)["model"]
        tensors = {key for key, value in wanted.items() if isinstance(value, torch.Tensor) and value.numel()}
        assert tensors == {key for key, value in found.items() if value is not None}
        for key in tensors - {"embedding.word_embeddings.weight", "output_layer.weight"}:
            assert torch.equal(found[key], wanted[key]), f"{file}: {key}"


def test_down_projections_are_cut_for_releases_that_cut_them(hf_model: Models, tmp_path: Path) -> None:
    folder = hf_model("deepseek-v3")
    options = dict(tp=2, divisor=16, expert_layout="sequential")
    ours = hf_to_megatron(folder, tmp_path / "ours", **options, megatron_version="0.13")
    sizes = dict(tensor_model_parallel_size=2, transformer_impl="transformer_engine")
    theirs = by_hand_kinds.convert(folder, tmp_path / "theirs", down_cut=True, **sizes)
    assert_same_files(theirs, ours)
    assert different(hf_tensors(folder), hf_tensors(megatron_to_hf(ours, tmp_path / "hf"))) == []
    newer = reshard(ours, tmp_path / "newer", **options)
    assert_same_files(by_hand_kinds.convert(folder, tmp_path / "whole", **sizes), newer)


def test_rotary_pairs_move_apart_for_releases_that_cannot_rotate_neighbours(
    megatron_pool: MegatronPool, hf_model: Models, logits: Any, tmp_path: Path
) -> None:
    folder = hf_model("glm")
    for name, convert in (("torch", hf_to_megatron), ("dist", hf_to_torch_dist)):
        target = convert(folder, tmp_path / name, tp=2, impl="local", megatron_version="0.13")
        read = megatron_pool.logits if name == "torch" else megatron_pool.distributed_logits
        assert difference(read(target, TOKENS), logits("glm")) < TOLERANCE
        assert different(hf_tensors(folder), hf_tensors(megatron_to_hf(target, tmp_path / name / "hf"))) == []
    args = args_of(tmp_path / "torch")
    assert (args.rotary_interleaved, args.rotary_halves) == (False, True)
    assert different(hf_tensors(folder), hf_tensors(megatron_to_hf(tmp_path / "dist", tmp_path / "again"))) == []


def args_of(root: Path) -> Any:
    """Args of a checkpoint's first rank."""
    first = next(iter(sorted(root.glob("iter_0000001/*/*.pt"))))
    return torch.load(first, weights_only=False)["args"]


@pytest.mark.parametrize("family", ["granite", "granite-untied", "granitemoe-shared"])
def test_multipliers_are_folded_into_weights_for_releases_without_mup(
    megatron_pool: MegatronPool, hf_model: Models, logits: Any, tmp_path: Path, family: str
) -> None:
    folder = hf_model(family)
    for name, convert, read in (
        ("torch", hf_to_megatron, megatron_pool.logits),
        ("dist", hf_to_torch_dist, megatron_pool.distributed_logits),
    ):
        target = convert(folder, tmp_path / name, tp=2, pp=2, megatron_version="0.16")
        assert difference(read(target, TOKENS), logits(family)) < TOLERANCE
        back = hf_tensors(megatron_to_hf(target, tmp_path / name / "hf"))
        assert all(torch.allclose(back[key], wanted, rtol=2e-7, atol=0) for key, wanted in hf_tensors(folder).items())
    assert (args_of(tmp_path / "torch").use_mup, args_of(tmp_path / "torch").multipliers_folded) == (False, True)
    flags = hf_to_megatron(folder, tmp_path / "flags", tp=2, pp=2)
    again = reshard(tmp_path / "torch", tmp_path / "unfolded", tp=2, pp=2)
    assert args_of(flags).mup_embedding_mult == args_of(again).mup_embedding_mult == pytest.approx(12 / 0.22)
    assert difference(megatron_pool.logits(again, TOKENS), logits(family)) < TOLERANCE
    first = torch.load(flags / "iter_0000001/mp_rank_00_000/model_optim_rng.pt", weights_only=False)["model"]
    stored = first["embedding.word_embeddings.weight"]
    assert torch.equal(stored, hf_tensors(folder)["model.embed_tokens.weight"][: len(stored)])


def test_mup_is_refused_where_there_is_none(hf_model: Models, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"0\.16 has no muP; use --mup fold"):
        hf_to_megatron(hf_model("granite"), tmp_path / "a", mup="flags", megatron_version="0.16")
    with pytest.raises(ConversionError, match="--mup fold: this model has no multipliers"):
        hf_to_megatron(hf_model("qwen2"), tmp_path / "b", mup="fold")


# -- multi-token prediction


_BEYOND = "model.layers.4."


@pytest.mark.parametrize("family", PREDICTING)
def test_layers_of_multi_token_prediction_go_both_ways(
    megatron_pool: MegatronPool, hf_model: Models, logits: Any, tmp_path: Path, family: str
) -> None:
    folder = with_prediction(family, hf_model, tmp_path / "hf")
    options = cut(family) | dict(megatron_version="0.16")  # the release of the megatron-core that loads it
    files = hf_to_megatron(folder, tmp_path / "files", **options)
    chunks = hf_to_torch_dist(folder, tmp_path / "chunks", **options)
    assert (
        difference(megatron_pool.logits(files, TOKENS), logits(family)) < TOLERANCE
    )  # strict: its layer is loaded, too
    assert difference(megatron_pool.distributed_logits(chunks, TOKENS), logits(family)) < TOLERANCE
    for source in (files, chunks):
        back = megatron_to_hf(source, tmp_path / source.name / "hf")
        assert different(hf_tensors(folder), hf_tensors(back)) == []
        assert json.loads((back / "config.json").read_text())["num_nextn_predict_layers"] == 1
    newest = hf_to_megatron(folder, tmp_path / "newest", **cut(family))
    last = torch.load(sorted(newest.glob("iter_0000001/*_001*/*.pt"))[0], weights_only=False)["model"]
    assert any(key.startswith("mtp.layers.0.mtp_model_layer.self_attention.") for key in last)
    assert last["mtp.layers.0.eh_proj.weight"].shape == (32, 128)
    assert different(hf_tensors(folder), hf_tensors(megatron_to_hf(newest, tmp_path / "again"))) == []


@pytest.mark.parametrize("family", PREDICTING_ALIKE)
def test_layers_of_multi_token_prediction_of_others_go_both_ways(
    megatron_pool: MegatronPool, hf_model: Models, logits: Any, tmp_path: Path, family: str
) -> None:
    folder = with_prediction(family, hf_model, tmp_path / "hf")
    files = hf_to_megatron(folder, tmp_path / "files", **cut(family), megatron_version="0.16")
    found = megatron_pool.logits(files, TOKENS)  # strict: its layer is loaded, too
    assert difference(found, logits(family)) < TOLERANCE
    state = torch.load(sorted(files.glob("iter_0000001/*_001*/*.pt"))[0], weights_only=False)["model"]
    tensors = hf_tensors(folder)
    for ours, theirs in zip(("enorm", "hnorm", "final_layernorm"), ("enorm", "hnorm", _LAST[family]), strict=True):
        assert torch.equal(state[f"mtp.layers.0.{ours}.weight"], tensors[f"{_BEYOND}{theirs}.weight"])
    assert torch.equal(state["mtp.layers.0.eh_proj.weight"], tensors[f"{_BEYOND}eh_proj.weight"][:32])
    assert different(tensors, hf_tensors(megatron_to_hf(files, tmp_path / "back"))) == []


#: Names of the last norm.
_LAST = {family: names[-1] for family, (_, names, _) in PREDICTING_ALIKE.items()}


def test_layers_that_megatron_cannot_hold_are_refused_or_left_out(hf_model: Models, tmp_path: Path) -> None:
    """In EXAONE-MoE the layer of multi-token prediction has an MLP, and not experts as the model's last layer."""
    plain, folder = hf_model("exaone-moe"), tmp_path / "hf"
    tensors = hf_tensors(plain)
    folder.mkdir()
    more = {f"mtp.{name}.weight": torch.ones(64, 64) for name in ("fc", "norm", "layers.0.mlp.up_proj")}
    save_file({**tensors, **more}, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    refused(verb("plan", folder, tmp_path / "out"), r"3 tensors of multi-token prediction (mtp.*)", "--without-mtp")
    source = HFSource(folder, without_mtp=True)
    assert "multi-token prediction: left out, 3 tensors, as --without-mtp says" in source.origin.notes
    run(source, HFTarget(tmp_path / "back", HFOptions()))
    assert different(tensors, hf_tensors(tmp_path / "back")) == []


@pytest.mark.parametrize("family", ["deepseek-v3", "qwen3-next"])
def test_layers_of_multi_token_prediction_can_be_left_out(hf_model: Models, tmp_path: Path, family: str) -> None:
    folder = with_prediction(family, hf_model, tmp_path / "hf")
    source = HFSource(folder, without_mtp=True)
    assert any("layer of multi-token prediction" in note for note in source.origin.notes)
    run(source, MegatronTarget(tmp_path / "without", MegatronOptions(**cut(family))))
    plain = hf_to_megatron(hf_model(family), tmp_path / "plain", **cut(family))
    for file in plain.glob("iter_0000001/*/*.pt"):
        ours = torch.load(tmp_path / "without" / file.relative_to(plain), weights_only=False)["model"]
        wanted = torch.load(file, weights_only=False)["model"]
        assert ours.keys() == wanted.keys()
        assert all(value is None or torch.equal(ours[key], value) for key, value in wanted.items())
    whole = hf_to_megatron(folder, tmp_path / "whole", **cut(family))
    opened = open_megatron(whole, MegatronReadOptions(without_mtp=True))
    run(opened, HFTarget(tmp_path / "back", HFOptions()))
    assert different(hf_tensors(hf_model(family)), hf_tensors(tmp_path / "back")) == []
    assert json.loads((tmp_path / "back" / "config.json").read_text())["num_nextn_predict_layers"] == 0


def test_a_promise_of_config_json_is_not_kept_for_the_files(hf_model: Models, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    plain = hf_model("glm4-moe")
    (folder / "model.safetensors").symlink_to(plain / "model.safetensors")
    config = json.loads((plain / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    source = HFSource(folder)
    assert source.spec.mtp == ()
    assert any("since the files have none of them" in note for note in source.origin.notes)
    partial = load_file(plain / "model.safetensors")
    partial["model.layers.4.enorm.weight"] = partial["model.norm.weight"].clone()
    (folder / "model.safetensors").unlink()
    save_file(partial, folder / "model.safetensors")
    with pytest.raises(
        ConversionError, match=r"model\.layers\.4\.hnorm\.weight \(mtp layer 0 mtp_hidden_norm\) is missing"
    ):
        HFSource(folder)


def test_the_exact_gelu_is_told_from_its_tanh_form(
    megatron_pool: MegatronPool, hf_model: Models, logits: Any, tmp_path: Path
) -> None:
    folder = hf_model("gpt2", activation_function="gelu")
    root = hf_to_megatron(folder, tmp_path / "megatron", impl="local")
    assert "--no-bias-gelu-fusion" in (root / "iter_0000001" / "pretrain_gpt_flags.txt").read_text()
    wanted = hf_logits(folder, TOKENS)
    assert difference(megatron_pool.logits(root, TOKENS), wanted) < TOLERANCE
    assert difference(logits("gpt2"), wanted) > 5 * TOLERANCE  # the same weights in the other form
    back = megatron_to_hf(root, tmp_path / "back")
    assert json.loads((back / "config.json").read_text())["activation_function"] == "gelu"


def test_gpt2_as_published_has_no_prefix_and_no_head(hf_model: Models, tmp_path: Path) -> None:
    plain = hf_model("gpt2")
    folder = tmp_path / "hf"
    folder.mkdir()
    tensors = {name.removeprefix("transformer."): value for name, value in hf_tensors(plain).items()}
    tensors.pop("lm_head.weight", None)
    tensors |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 96, 96).tril() for layer in range(4)}  # a mask, no weight
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").symlink_to(plain / "config.json")
    back = megatron_to_hf(hf_to_megatron(folder, tmp_path / "megatron", tp=2), tmp_path / "back")
    assert different(hf_tensors(plain), hf_tensors(back)) == []


# -- negative controls: what a wrong conversion would look like


@pytest.mark.parametrize(
    ("family", "key", "change"),
    [
        ("gpt2", "decoder.layers.0.mlp.linear_fc1.weight", lambda weight: weight.roll(1, 0)),
        ("starcoder2", "decoder.layers.1.pre_mlp_layernorm.bias", torch.zeros_like),
        ("phi3-partial", "decoder.layers.2.self_attention.linear_qkv.weight", lambda weight: weight.roll(1, 0)),
        ("glm4-moe", "decoder.layers.2.mlp.router.expert_bias", torch.zeros_like),
        ("qwen3-next", "decoder.layers.0.self_attention.out_norm.weight", lambda weight: weight + 1),
        ("deepseek-v3", "decoder.layers.1.self_attention.linear_kv_down_proj.weight", lambda weight: weight.roll(8, 0)),
    ],
)
def test_a_wrong_tensor_shows(
    megatron_pool: MegatronPool, hf_model: Models, logits: Any, tmp_path: Path, family: str, key: str, change: Any
) -> None:
    impl = "transformer_engine" if family in WITH_ENGINE else "local"
    root = hf_to_megatron(hf_model(family), tmp_path / "megatron", impl=impl)
    (file,) = root.glob("iter_0000001/*/*.pt")
    content = torch.load(file, weights_only=False)
    content["model"][key] = change(content["model"][key])
    torch.save(content, file)
    assert difference(megatron_pool.logits(root, TOKENS), logits(family)) > 1e-3


def test_expert_bias_is_float32_in_a_model_of_bfloat16(hf_model: Models, tmp_path: Path) -> None:
    folder = hf_model("glm4-moe", dtype="bfloat16")
    root = hf_to_megatron(folder, tmp_path / "megatron", tp=2)
    state = checkpoint.load_rank(root / "iter_0000001" / "mp_rank_00" / "model_optim_rng.pt")["model"]
    assert state["decoder.layers.1.mlp.router.expert_bias"].dtype == torch.float32
    assert state["decoder.layers.1.mlp.router.weight"].dtype == torch.bfloat16


def test_a_checkpoint_for_another_release_does_not_load(
    megatron_pool: MegatronPool, hf_model: Models, tmp_path: Path
) -> None:
    root = hf_to_megatron(hf_model("deepseek-v3"), tmp_path / "megatron", tp=2, megatron_version="0.13")
    with pytest.raises(OracleError, match=r"size mismatch for .*linear_kv_down_proj.weight"):
        megatron_pool.logits(root, TOKENS)
