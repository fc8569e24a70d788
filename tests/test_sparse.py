"""Sparse attention (DSA): DeepSeek-V3.2 and GLM-5. Files against arrays by hand, and all but the indexer by logits.

megatron-core computes such models from 0.19 on; `test_releases.py` compares logits there, where it finds that release. Where an
indexer has to choose as many positions as there are, the model is one of plain multi-latent attention, which 0.16.1 computes, too.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_converters.basics.errors import ConversionError
from megatron_converters.families.config_json import config_from_spec, spec_from_config
from megatron_converters.formats.megatron.arguments import inexpressible
from megatron_converters.model.spec import PerLayer
from tests.bare import edit
from tests.conversions import different, hf_to_megatron, hf_to_torch_dist, megatron_to_hf, refusal
from tests.helpers import args_of, config_of, edit_config, hf_tensors, nothing_complete, refused, succeeded, verb
from tests.oracle import by_hand_kinds, sparse
from tests.oracle.families.sparse import SPARSE
from tests.oracle.hf import TOKENS, difference
from tests.oracle.pool import MegatronPool
from tests.test_fp8 import QUANTISATION, decoded, quantised
from tests.test_hf_config import facts, ours, theirs
from tests.test_proof_kinds import TOLERANCE, assert_same_files

Models = Callable[..., Path]
CUT: dict[str, Any] = dict(tp=2, pp=2, ep=2, etp=1, impl="transformer_engine", divisor=16)
SIZES = dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, expert_model_parallel_size=2)
INDEXER = "self_attention.core_attention.indexer."
OWN = ("linear_wq_b.weight", "linear_wk.weight", "k_norm.weight", "k_norm.bias", "linear_weights_proj.weight")


# -- files


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
@pytest.mark.parametrize("family", ["deepseek-v3.2", "glm-5.2"])
def test_every_rank_s_file_is_that_of_a_conversion_by_hand(
    hf_model: Models, tmp_path: Path, family: str, cut: bool
) -> None:
    sizes = {**SIZES, "expert_tensor_parallel_size": 1} if cut else {}
    theirs = by_hand_kinds.convert(
        hf_model(family), tmp_path / "by-hand", transformer_impl="transformer_engine", **sizes
    )
    layout = dict(expert_layout="sequential", impl="transformer_engine", divisor=16)
    assert_same_files(theirs, hf_to_megatron(hf_model(family), tmp_path / "ours", **{**layout, **(CUT if cut else {})}))


def state_of(root: Path, rank: str) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(root / f"iter_0000001/mp_rank_{rank}/model_optim_rng.pt", weights_only=False)[
        "model"
    ]
    return state


def test_the_indexer_has_the_tensors_of_megatron_s_own(
    megatron_pool: MegatronPool, hf_model: Models, tmp_path: Path
) -> None:
    """Names, shapes and states of modules on every rank, by megatron-core; a layer that shares one has none of them."""
    fields = SPARSE["glm-5.2"]
    names = {"q_lora_rank", "kv_lora_rank", "v_head_dim", "hidden_size"}
    sizes = {name: fields[name] for name in names} | dict(
        qk_head_dim=fields["qk_nope_head_dim"],
        qk_pos_emb_head_dim=fields["qk_rope_head_dim"],
        dsa_indexer_n_heads=fields["index_n_heads"],
        dsa_indexer_head_dim=fields["index_head_dim"],
        dsa_indexer_topk=fields["index_topk"],
    )
    (wanted,) = {tuple(sorted(shapes.items())) for shapes in megatron_pool.run(sparse.indexer_shapes, 2, sizes)}
    root = hf_to_megatron(hf_model("glm-5.2"), tmp_path / "files", **CUT)
    for rank in ("00_000_000", "01_001_001"):
        state = state_of(root, rank)
        own = f"decoder.layers.0.{INDEXER}"
        found = {name.removeprefix(own): value for name, value in state.items() if name.startswith(own)}
        weights = {name: tuple(value.shape) for name, value in found.items() if value is not None}
        assert weights == {name: shape for name, shape in wanted if not name.endswith("_extra_state")}
        assert found.keys() == {name for name, _ in wanted}
        assert not any(name.startswith(f"decoder.layers.1.{INDEXER}") for name in state)
        # Norms of latents are modules of their own in all layers, and attention itself has no state.
        for layer in (0, 1):
            attention = f"decoder.layers.{layer}.self_attention."
            assert {
                f"{attention}{each}_layernorm.{end}" for each in ("q", "kv") for end in ("weight", "_extra_state")
            } <= {*state}
            assert not any("layer_norm_weight" in name for name in state if name.startswith(attention))
            assert f"{attention}core_attention._extra_state" not in state


@pytest.mark.parametrize(("dense", "layers"), [(0, ""), (1, "0.")], ids=["all alike", "dense first"])
def test_distributed_keys_are_stacked_where_layers_are_alike(
    hf_model: Models, tmp_path: Path, dense: int, layers: str
) -> None:
    """`TransformerBlock.sharded_state_dict` of 0.19 stacks layers unless args list which have experts."""
    root = hf_to_torch_dist(hf_model("deepseek-v3.2", first_k_dense_replace=dense), tmp_path / "chunks", **CUT)
    stored = FileSystemReader(root / "iter_0000001").read_metadata().state_dict_metadata
    found = {key: (*value.size,) for key, value in stored.items() if isinstance(value, TensorStorageMetadata)}
    stack = () if layers else (4,)
    own = f"decoder.layers.{layers}{INDEXER}"
    shapes = ((30, 40), (10, 64), (10,), (10,), (3, 64))
    assert {name: found[own + name] for name in OWN} == {
        name: (*stack, *shape) for name, shape in zip(OWN, shapes, strict=True)
    }
    assert found[f"decoder.layers.{layers}self_attention.kv_layernorm.weight"] == (*stack, 24)


# -- all but the indexer, by logits


def without_indexers(root: Path) -> Path:
    """Checkpoint as of a model of plain multi-latent attention with the same other weights, whose norms are part of linears."""
    moved = {"q_layernorm.": "linear_q_up_proj.layer_norm_", "kv_layernorm.": "linear_kv_up_proj.layer_norm_"}

    def named(state: dict[str, Any]) -> Iterator[tuple[str, Any]]:
        for name, value in state.items():
            if name.endswith("self_attention.linear_proj.weight"):
                yield name.replace("linear_proj.weight", "core_attention._extra_state"), None
            if INDEXER in name or name.endswith("_layernorm._extra_state"):
                continue
            for old, new in moved.items():
                name = name.replace(f"self_attention.{old}", f"self_attention.{new}")
            yield name, value

    def change(content: dict[str, Any]) -> dict[str, Any]:
        args = {name: value for name, value in vars(content["args"]).items() if not name.startswith("dsa_")}
        args["experimental_attention_variant"] = None
        return {**content, "args": Namespace(**args), "model": dict(named(content["model"]))}

    edit(root / "iter_0000001", change)
    return root


@pytest.mark.parametrize("family", SPARSE)
def test_all_but_the_indexer_computes_what_transformers_computes(
    megatron_pool: MegatronPool, hf_model: Models, logits: Any, tmp_path: Path, family: str
) -> None:
    files = without_indexers(hf_to_megatron(hf_model(family), tmp_path / "files", **CUT))
    assert difference(megatron_pool.logits(files, TOKENS), logits(family)) < TOLERANCE


# -- both ways


def predicting(plain: Path, folder: Path) -> Path:
    """Model with a layer of multi-token prediction, which has an indexer although the last layer may share one."""
    tensors = load_file(plain / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    donors = {2: "self_attn.indexer.", 3: ""}  # the third layer has an indexer in every model
    new = {
        name.replace(f"layers.{layer}.", "layers.4."): torch.randn(value.shape, generator=generator)
        for layer, part in donors.items()
        for name, value in tensors.items()
        if name.startswith(f"model.layers.{layer}.{part}")
    }
    norm = tensors["model.norm.weight"]
    for name in ("enorm", "hnorm", "shared_head.norm"):
        new[f"model.layers.4.{name}.weight"] = torch.randn(norm.shape, generator=generator)
    new["model.layers.4.eh_proj.weight"] = torch.randn(len(norm), 2 * len(norm), generator=generator)
    new["model.layers.4.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    new["model.layers.4.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    folder.mkdir()
    save_file({**tensors, **new}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**config_of(plain), "num_nextn_predict_layers": 1}))
    return folder


@pytest.mark.parametrize("convert", [hf_to_megatron, hf_to_torch_dist])
@pytest.mark.parametrize("family", ["deepseek-v3.2", "glm-5.2"])
def test_the_way_back_is_exact_with_multi_token_prediction(
    hf_model: Models, tmp_path: Path, family: str, convert: Callable[..., Path]
) -> None:
    folder = predicting(hf_model(family), tmp_path / "hf")
    root = convert(folder, tmp_path / "megatron", **CUT)
    back = megatron_to_hf(root, tmp_path / "back")
    assert different(hf_tensors(folder), hf_tensors(back)) == []
    kept = ("index_topk", "index_n_heads", "index_head_dim", "indexer_types", "num_nextn_predict_layers")
    assert {key: config_of(back).get(key) for key in kept} == {key: config_of(folder).get(key) for key in kept}
    if convert is hf_to_megatron:
        tensors, state = hf_tensors(folder), state_of(root, "01_001_001")
        prefix = f"mtp.layers.0.mtp_model_layer.{INDEXER}"
        assert {name.removeprefix(prefix) for name in state if name.startswith(prefix) and "_extra" not in name} == {
            *OWN
        }
        bias = tensors["model.layers.4.self_attn.indexer.k_norm.bias"]
        assert torch.equal(state[f"{prefix}k_norm.bias"], bias)
        assert torch.equal(
            state["mtp.layers.0.mtp_model_layer.self_attention.q_layernorm.weight"],
            tensors["model.layers.4.self_attn.q_a_layernorm.weight"],
        )


def test_args_alone_tell_the_two_families_apart(hf_model: Models, tmp_path: Path) -> None:
    for family in SPARSE:
        root = hf_to_megatron(hf_model(family), tmp_path / family, tp=2)

        def forget(content: dict[str, Any]) -> dict[str, Any]:
            del content["args"].hf_config
            return content

        edit(root / "iter_0000001", forget)
        back = megatron_to_hf(root, tmp_path / f"{family}-back")
        assert config_of(back)["model_type"] == SPARSE[family]["model_type"]
        assert config_of(back).get("indexer_types") == config_of(hf_model(family)).get("indexer_types")
        assert different(hf_tensors(hf_model(family)), hf_tensors(back)) == []


def test_checkpoints_of_0_18_are_refused(hf_model: Models, tmp_path: Path) -> None:
    root = hf_to_megatron(hf_model("glm-5"), tmp_path / "files")

    def older(content: dict[str, Any]) -> dict[str, Any]:
        del content["args"].dsa_indexer_rope_interleaved
        return content

    edit(root / "iter_0000001", older)
    assert "as before Megatron-LM 0.19: its indexers read latents before their norm" in refusal(root)


def test_fp8_as_published(hf_model: Models, tmp_path: Path) -> None:
    """Linears of the indexer are in FP8 blocks but for the weights of heads, which are in float32, as is the norm of its key."""
    plain = predicting(
        hf_model("deepseek-v3.2", dtype="bfloat16", index_head_dim=72, hidden_size=192, q_lora_rank=136),
        tmp_path / "plain",
    )
    stored, true = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    for name, value in load_file(plain / "model.safetensors").items():
        exact = value.float() if ".weights_proj." in name or ".k_norm." in name else value.bfloat16()
        if (
            exact.dtype == torch.bfloat16
            and name.endswith(("_proj.weight", "_mqa.weight", ".wq_b.weight", ".wk.weight"))
            and "eh_proj" not in name
        ):
            codes, scales = quantised(exact)
            stored |= {name: codes, f"{name}_scale_inv": scales}
            true[name] = decoded(codes, scales)
        else:
            stored[name] = true[name] = exact
    assert stored["model.layers.4.self_attn.indexer.wq_b.weight_scale_inv"].shape == (2, 2)
    folder = tmp_path / "fp8"
    folder.mkdir()
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text((plain / "config.json").read_text())
    edit_config(folder, quantization_config=QUANTISATION)
    for convert in (hf_to_megatron, hf_to_torch_dist):
        back = megatron_to_hf(
            convert(folder, tmp_path / convert.__name__, **CUT), tmp_path / f"{convert.__name__}-back"
        )
        biases = {name: value.float() for name, value in true.items() if name.endswith("correction_bias")}
        assert different({**true, **biases}, hf_tensors(back)) == []
    run = succeeded(verb("convert", folder, tmp_path / "bf16", "--to", "hf", "--dtype", "bfloat16"))
    wide = {name for name, value in hf_tensors(tmp_path / "bf16").items() if value.dtype == torch.float32}
    assert {name.split(".")[-2] for name in wide} == {"weights_proj"}, run.out  # never below the stored precision


# -- what a user sees


def test_flags_and_releases(hf_model: Models, tmp_path: Path) -> None:
    folder = hf_model("glm-5.2")
    run = succeeded(verb("convert", folder, tmp_path / "out", "--tp", "2", "--pp", "2"))
    for words in (
        *("needs Megatron-LM 0.19 or later", "--experimental-attention-variant dsa", "--dsa-indexer-n-heads 3"),
        *("--dsa-indexer-topk-freq 2", "--dsa-indexer-skip-topk-offset 1", "--dsa-indexer-k-norm-epsilon 1e-06"),
        *("--dsa-indexer-head-dim 10", "--dsa-indexer-topk 40", "--dsa-indexer-rope-interleaved", "--no-rope-fusion"),
        "--experimental-attention-variant dsa: Megatron-LM computes this model from 0.19 on",
    ):
        assert words in run.out, words
    assert "pipeline stages" not in run.err
    other = succeeded(verb("args", hf_model("deepseek-v3.2"))).out
    assert "--dsa-indexer-topk 40" in other
    assert not any(flag in other for flag in ("rope-interleaved", "topk-freq", "topk-offset"))
    assert args_of(tmp_path / "out").apply_rope_fusion is False
    shown = succeeded(verb("inspect", folder)).out
    assert "to 40 positions of an indexer of 3 heads of 10" in shown
    assert "to 40 positions of an earlier layer's indexer" in shown


def test_older_releases_are_refused_in_one_sentence(hf_model: Models, tmp_path: Path) -> None:
    run = verb("convert", hf_model("deepseek-v3.2"), tmp_path / "out", "--megatron-version", "0.18")
    refused(
        run,
        "Megatron-LM 0.18, as --megatron-version says, does not know or heed",
        "--experimental-attention-variant dsa, --dsa-indexer-k-norm-epsilon 1e-06, which exist and have an effect from 0.19 on",
    )
    nothing_complete(tmp_path)


def test_logits_are_refused(hf_model: Models, tmp_path: Path) -> None:
    root = hf_to_megatron(hf_model("glm-5"), tmp_path / "files")
    refused(
        verb("verify", "--logits", hf_model("glm-5"), root),
        "experimental_attention_variant='dsa'",
        "need a GPU",
        code=2,
    )


def test_stages_that_begin_with_a_shared_indexer_are_warned_of(hf_model: Models, tmp_path: Path) -> None:
    folder = hf_model("glm-5", index_topk_pattern="FFSS")
    run = succeeded(verb("convert", folder, tmp_path / "out", "--pp", "2"))
    assert (
        "warning: the first layers of pipeline stages (2) share the indexer of a layer before them: Megatron-LM builds no such "
        "stage; let stages begin with some of the layers 0, 1" in run.err
    )


# -- configurations

_COMMON: dict[str, Any] = {
    **{
        "attention_bias": False,
        "attention_dropout": 0.0,
        "ep_size": 1,
        "first_k_dense_replace": 3,
        "hidden_act": "silu",
    },
    **{"index_head_dim": 128, "index_topk": 2048, "initializer_range": 0.02, "kv_lora_rank": 512, "moe_layer_freq": 1},
    **{"n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True, "num_experts_per_tok": 8},
    **{"num_nextn_predict_layers": 1, "qk_rope_head_dim": 64, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid"},
    **{"tie_word_embeddings": False, "topk_method": "noaux_tc", "use_cache": True, "moe_intermediate_size": 2048},
}
_SHARED = ["shared" if max(layer - 2, 0) % 4 else "full" for layer in range(78)]
_GLM: dict[str, Any] = {
    **{**_COMMON, "architectures": ["GlmMoeDsaForCausalLM"], "model_type": "glm_moe_dsa", "dtype": "bfloat16"},
    **{"hidden_size": 6144, "index_n_heads": 32, "indexer_rope_interleave": True, "intermediate_size": 12288},
    **{
        "mlp_layer_types": ["dense"] * 3 + ["sparse"] * 75,
        "moe_router_dtype": "float32",
        "n_group": 1,
        "topk_group": 1,
    },
    **{"num_attention_heads": 64, "num_hidden_layers": 78, "num_key_value_heads": 64, "pretraining_tp": 1},
    **{"q_lora_rank": 2048, "qk_head_dim": 256, "qk_nope_head_dim": 192, "rms_norm_eps": 1e-05, "v_head_dim": 256},
    **{"vocab_size": 154880, "rope_interleave": True, "pad_token_id": 154820, "max_position_embeddings": 202752},
    **{"head_dim": 64, "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"}},
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "DeepSeek-V3.2": {
        **{**_COMMON, "architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32", "hidden_size": 7168},
        **{"index_n_heads": 64, "intermediate_size": 18432, "max_position_embeddings": 163840, "n_group": 8},
        **{"num_attention_heads": 128, "num_hidden_layers": 61, "num_key_value_heads": 128, "q_lora_rank": 1536},
        **{"qk_nope_head_dim": 128, "rms_norm_eps": 1e-06, "rope_theta": 10000, "topk_group": 4, "v_head_dim": 128},
        **{
            "vocab_size": 129280,
            "torch_dtype": "bfloat16",
            "quantization_config": {**QUANTISATION, "scale_fmt": "ue8m0"},
        },
        "rope_scaling": {
            **{"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0, "type": "yarn"},
            "original_max_position_embeddings": 4096,
        },
    },
    "GLM-5": _GLM,
    "GLM-5.2": {
        **{**_GLM, "head_dim": 192, "max_position_embeddings": 1048576, "indexer_types": _SHARED},
        **{"index_share_for_mtp_iteration": True, "index_skip_topk_offset": 3, "index_topk_freq": 4},
        **{"index_topk_pattern": None, "rope_parameters": {"rope_theta": 8000000, "rope_type": "default"}},
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_configuration_is_what_it_is_to_transformers(name: str) -> None:
    spec = spec_from_config(PUBLISHED[name])
    assert ours(spec) == facts(theirs(PUBLISHED[name]))
    written = config_from_spec(spec)
    assert spec_from_config(written) == spec
    assert ours(spec) == facts(theirs(written))
    assert inexpressible(spec) == []
    assert len(spec.mtp) == 1
    assert not getattr(spec.kinds[spec.mtp[0]].mixer, "shared_indexer", True)  # its layer has an indexer in any case


@pytest.mark.parametrize(
    ("fields", "own"),
    [
        ({}, range(78)),
        ({"index_topk_freq": 4}, (0, 1, *range(5, 78, 4))),
        ({"index_topk_freq": 4, "index_skip_topk_offset": 3}, (0, 1, *range(2, 78, 4))),
        ({"index_topk_pattern": "FSSFSS" * 13}, range(0, 78, 3)),
        ({"index_topk_pattern": ["full", "shared"] * 39, "index_topk_freq": 4}, range(0, 78, 2)),
        ({"indexer_types": ["full", *["shared"] * 77], "index_topk_pattern": "F" * 78}, (0,)),
    ],
)
def test_layers_that_share_an_indexer_are_those_of_transformers(fields: dict[str, Any], own: Any) -> None:
    values = {**_GLM, **fields}
    spec = spec_from_config(values)
    assert ours(spec) == facts(theirs(values))
    shared = [layer not in {*own} for layer in range(78)]
    assert spec.values["shared_indexer"] == (PerLayer(shared) if any(shared) else False)


def test_a_rhythm_that_megatron_lacks_is_named(hf_model: Models, tmp_path: Path) -> None:
    assert inexpressible(spec_from_config({**_GLM, "index_topk_pattern": "FFSSF" + 73 * "S"})) != []
    assert inexpressible(spec_from_config({**_GLM, "index_topk_pattern": "FFSS" + 74 * "S"})) == []
    folder = hf_model("glm-5", index_topk_pattern="FSFF")
    run = verb("convert", folder, tmp_path / "out")
    refused(run, "indexers in layers 0, 2, 3 alone: in Megatron-LM, after the first ones, every N-th layer has one")
    root = hf_to_megatron(folder, tmp_path / "anyway", allow_inexpressible=True)
    back = megatron_to_hf(root, tmp_path / "back")
    assert config_of(back)["indexer_types"] == ["full", "shared", "full", "full"]
    assert different(hf_tensors(folder), hf_tensors(back)) == []


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("DeepSeek-V3.2", {"indexer_types": ["full", *["shared"] * 60]}, "share an indexer .* its class does not know"),
        ("DeepSeek-V3.2", {"attention_bias": True}, "attention_bias=True"),
        ("DeepSeek-V3.2", {"mlp_bias": True}, "mlp_bias=True"),
        ("DeepSeek-V3.2", {"rope_interleave": False}, "rope_interleave=False"),
        ("DeepSeek-V3.2", {"num_experts": 128}, r"num_local_experts, but they differ: \[256, 128\]"),
        ("GLM-5", {"indexer_types": ["shared"] * 78}, "the first has none before it"),
        ("GLM-5", {"indexer_types": ["full"] * 77}, "for each of 78 layers"),
        ("GLM-5", {"index_topk_pattern": "FX" * 39}, "must name full or shared"),
        ("GLM-5", {"index_topk_freq": "4"}, "index_topk_freq='4'"),
        ("GLM-5", {"indexer_rope_interleave": False}, "indexer_rope_interleave=False"),
        ("GLM-5", {"layer_types": ["sliding_attention"] * 78}, "only indexed_attention can be converted"),
        ("GLM-5", {"index_topk": 0}, "dsa_indexer_topk is 0"),
        ("GLM-5", {"index_head_dim": 32}, "dsa_indexer_head_dim is 32, fewer than the 64 rows that rotate"),
    ],
)
def test_what_cannot_be_converted_is_refused(name: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        spec_from_config({**PUBLISHED[name], **fields})
