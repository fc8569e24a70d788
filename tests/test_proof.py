"""The proof: real megatron-core loads what we write and computes what transformers computes, and the way back is exact."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_converters.sharding.stages import PipelineSplit
from tests.conversions import different, hf_to_megatron, megatron_to_hf, reshard
from tests.helpers import args_of, hf_tensors
from tests.oracle.args import megatron_args
from tests.oracle.hf import KINDS_OF_TENSORS, hf_logits, make_model, sample_tokens
from tests.oracle.pool import MegatronPool, write_checkpoint
from tests.pairs import latin

TOKENS = sample_tokens()
VOCABULARY = 199
TOLERANCE = 1e-4
GRIDS = ((1, 1), (2, 2), (4, 1), (1, 4))
IMPLS = ("local", "transformer_engine")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, torch.Tensor]]:
    """Each family's tiny model and the logits that transformers computes from it."""
    root = tmp_path_factory.mktemp("models")
    families = (*KINDS_OF_TENSORS, "llama3.1")
    folders = {family: make_model(family, root / family) for family in families}
    return {family: (folder, hf_logits(folder, TOKENS)) for family, folder in folders.items()}


def check(pool: MegatronPool, checkpoint: Path, wanted: torch.Tensor, **options: Any) -> None:
    got = pool.logits(checkpoint, TOKENS, **options)[..., :VOCABULARY]
    assert float((got - wanted).abs().max()) < TOLERANCE


@pytest.mark.parametrize(("family", "grid", "impl"), latin(KINDS_OF_TENSORS, GRIDS, IMPLS), ids=str)
def test_megatron_computes_what_transformers_computes(
    megatron_pool: MegatronPool,
    models: dict[str, tuple[Path, torch.Tensor]],
    tmp_path: Path,
    family: str,
    grid: tuple[int, int],
    impl: str,
) -> None:
    """Every family has each implementation's names once where tensors are cut."""
    folder, wanted = models[family]
    tp, pp = grid
    checkpoint = hf_to_megatron(folder, tmp_path / "megatron", tp=tp, pp=pp, impl=impl)
    check(megatron_pool, checkpoint, wanted, tp=tp, pp=pp, impl=impl)
    back = megatron_to_hf(checkpoint, tmp_path / "hf")
    assert different(hf_tensors(folder), hf_tensors(back)) == []


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("impl", IMPLS)
def test_more_tensor_ranks_than_query_groups(
    megatron_pool: MegatronPool, tmp_path: Path, impl: str, groups: int
) -> None:
    folder = make_model("qwen2", tmp_path / "hf", num_key_value_heads=groups)
    checkpoint = hf_to_megatron(folder, tmp_path / "megatron", tp=4, impl=impl)
    check(megatron_pool, checkpoint, hf_logits(folder, TOKENS))
    assert different(hf_tensors(folder), hf_tensors(megatron_to_hf(checkpoint, tmp_path / "back"))) == []


POSITIONS = (0, 1, 8192, 100_000)
ROPES: dict[str, dict[str, Any]] = {
    "llama3": {},
    "llama3.1": {},
    "llama3.2-tied": {},
    "llama2": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
}


def rotary_angles(args: Namespace) -> torch.Tensor:
    """megatron-core's, float32 [positions, half a head], by the rotary embedding that its GPTModel makes of these args."""
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    rope = RotaryEmbedding(
        args.kv_channels,
        args.rotary_percent,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        rope_scaling_factor=args.rope_scaling_factor,
        seq_len_interpolation_factor=args.rotary_seq_len_interpolation_factor,
        use_cpu_initialization=True,
    )
    return torch.cat([rope.get_freqs_non_repeated(1, offset=position) for position in POSITIONS])


@pytest.mark.parametrize("family", ROPES)
def test_rotary_angles_far_into_a_text(megatron_pool: MegatronPool, tmp_path: Path, family: str) -> None:
    """Where the short texts of the other tests do not reach."""
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    folder = make_model(family, tmp_path / "hf", **ROPES[family])
    args = args_of(hf_to_megatron(folder, tmp_path / "megatron"))
    frequencies = LlamaRotaryEmbedding(AutoConfig.from_pretrained(folder)).inv_freq
    wanted = torch.tensor(POSITIONS, dtype=torch.float32)[:, None] * frequencies
    found = megatron_pool.run(rotary_angles, args)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)


UNEVEN = {
    "first": (4, 5, PipelineSplit(first=2)),
    "last": (4, 4, PipelineSplit(last=1)),
    "both": (4, 6, PipelineSplit(first=1, last=1)),
    "embedding": (2, 5, PipelineSplit(embedding=True)),
    "loss": (4, 7, PipelineSplit(loss=True)),
    "embedding and loss": (4, 6, PipelineSplit(embedding=True, loss=True)),
}


@pytest.mark.parametrize("family", ["llama3", "llama3.2-tied"])
@pytest.mark.parametrize(("pp", "layers", "split"), UNEVEN.values(), ids=UNEVEN)
def test_uneven_pipeline_stages(
    megatron_pool: MegatronPool, tmp_path: Path, pp: int, layers: int, split: PipelineSplit, family: str
) -> None:
    folder = make_model(family, tmp_path / "hf", num_hidden_layers=layers)
    checkpoint = hf_to_megatron(folder, tmp_path / "megatron", pp=pp, split=split)
    check(megatron_pool, checkpoint, hf_logits(folder, TOKENS), pp=pp)
    assert different(hf_tensors(folder), hf_tensors(megatron_to_hf(checkpoint, tmp_path / "back"))) == []


VIRTUAL = {
    "two each": (2, 8, PipelineSplit(virtual=2)),
    "one layer each": (4, 8, PipelineSplit(per_virtual=1)),
    "embedding and loss": (2, 6, PipelineSplit(embedding=True, loss=True, virtual=2)),
    "uneven": (4, 10, PipelineSplit(first=4, last=2, virtual=2)),
    "layout": (2, 5, PipelineSplit(layout="Et|t*2|,t|tL")),
    "layout with a stage for the loss alone": (4, 5, PipelineSplit(layout="Et|tt|tt|L")),
}


@pytest.mark.parametrize("family", ["llama3", "llama3.2-tied"])
@pytest.mark.parametrize(("pp", "layers", "split"), VIRTUAL.values(), ids=VIRTUAL)
def test_virtual_stages_and_layouts(
    megatron_pool: MegatronPool, tmp_path: Path, pp: int, layers: int, split: PipelineSplit, family: str
) -> None:
    folder = make_model(family, tmp_path / "hf", num_hidden_layers=layers)
    impl = "transformer_engine" if pp == 2 else "local"
    checkpoint = hf_to_megatron(folder, tmp_path / "megatron", pp=pp, split=split, impl=impl)
    check(megatron_pool, checkpoint, hf_logits(folder, TOKENS), pp=pp)
    assert different(hf_tensors(folder), hf_tensors(megatron_to_hf(checkpoint, tmp_path / "back"))) == []
    plain = reshard(checkpoint, tmp_path / "plain", tp=2, pp=1, impl=impl)
    assert different(hf_tensors(folder), hf_tensors(megatron_to_hf(plain, tmp_path / "again"))) == []


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("pp", "layers", "split"), VIRTUAL.values(), ids=VIRTUAL)
def test_virtual_stages_of_real_megatron_modules(
    megatron_pool: MegatronPool, tmp_path: Path, pp: int, layers: int, split: PipelineSplit, tied: bool
) -> None:
    args = megatron_args(
        num_layers=layers,
        pipeline_model_parallel_size=pp,
        tensor_model_parallel_size=4 // pp,
        virtual_pipeline_model_parallel_size=2 if split.virtual else layers // pp if split.per_virtual else None,
        pipeline_model_parallel_layout=split.layout,
        decoder_first_pipeline_num_layers=split.first,
        decoder_last_pipeline_num_layers=split.last,
        account_for_embedding_in_pipeline_split=split.embedding,
        account_for_loss_in_pipeline_split=split.loss,
        untie_embeddings_and_output_weights=not tied,
    )
    wanted = write_checkpoint(megatron_pool, tmp_path / "megatron", args, seed=3, tokens=TOKENS)
    back = megatron_to_hf(tmp_path / "megatron", tmp_path / "hf")
    assert float((hf_logits(back, TOKENS) - wanted[..., :VOCABULARY]).abs().max()) < TOLERANCE


@pytest.mark.parametrize("family", ["llama3.1", "qwen2-tied", "qwen3"])
@pytest.mark.parametrize(("source", "target"), [((2, 2), (4, 1)), ((4, 1), (1, 4)), ((1, 4), (2, 2))])
def test_reshard_equals_direct_conversion(
    megatron_pool: MegatronPool,
    models: dict[str, tuple[Path, torch.Tensor]],
    tmp_path: Path,
    family: str,
    source: tuple[int, int],
    target: tuple[int, int],
) -> None:
    folder, wanted = models[family]
    first = hf_to_megatron(folder, tmp_path / "first", tp=source[0], pp=source[1], impl="local")
    second = reshard(first, tmp_path / "second", tp=target[0], pp=target[1], impl="transformer_engine")
    check(megatron_pool, second, wanted, tp=target[0], pp=target[1])
    direct = hf_to_megatron(folder, tmp_path / "direct", tp=target[0], pp=target[1], impl="transformer_engine")
    for file in sorted(direct.glob("iter_0000001/*/*.pt")):
        ours = torch.load(second / file.relative_to(direct), weights_only=False)["model"]
        theirs = torch.load(file, weights_only=False)["model"]
        assert list(ours) == list(theirs)
        assert all(theirs[key] is None or torch.equal(ours[key], theirs[key]) for key in theirs)


REAL: dict[str, dict[str, Any]] = {
    "llama": {"rotary_base": 500000, "use_rope_scaling": True},
    "tied llama": {"untie_embeddings_and_output_weights": False},
    "llama with biases": {"add_bias_linear": True},
    "mistral": {"window_size": (15, 0)},
    "qwen2": {"add_qkv_bias": True, "layernorm_epsilon": 1e-6, "rotary_base": 1000000},
    "qwen3": {"qk_layernorm": True, "kv_channels": 32, "untie_embeddings_and_output_weights": False},
}


@pytest.mark.parametrize(("name", "grid", "impl"), latin([*REAL], GRIDS, IMPLS), ids=str)
def test_checkpoint_of_real_megatron_modules_to_hf(
    megatron_pool: MegatronPool, tmp_path: Path, name: str, grid: tuple[int, int], impl: str
) -> None:
    tp, pp = grid
    args = megatron_args(
        tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, transformer_impl=impl, **REAL[name]
    )
    wanted = write_checkpoint(megatron_pool, tmp_path / "megatron", args, seed=3, tokens=TOKENS, iteration=4)
    back = megatron_to_hf(tmp_path / "megatron", tmp_path / "hf", directory_name="iter_0000004")
    assert float((hf_logits(back, TOKENS) - wanted[..., :VOCABULARY]).abs().max()) < TOLERANCE
