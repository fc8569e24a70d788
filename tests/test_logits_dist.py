"""Logits of distributed checkpoints: loaded by the real megatron-core, wrong ones found, and nothing of them run."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata

from megatron_converters.basics.errors import ConversionError
from megatron_converters.formats.megatron.reading import MegatronReadOptions
from megatron_converters.logits import compare_logits
from megatron_converters.logits.megatron import MegatronModel, _concatenate, _logits, _setup
from megatron_converters.logits.pool import Pool
from megatron_converters.storage import dcp
from tests.conversions import hf_to_torch_dist
from tests.logits_processes import PRELOADED
from tests.oracle import by_hand_dist
from tests.oracle.args import megatron_args
from tests.oracle.hf import hf_logits, make_model, sample_tokens
from tests.oracle.pool import MegatronPool, write_distributed

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.usefixtures("preloaded"),
]

TOKENS = sample_tokens()
VOCABULARY = 199
CLOSE = 1e-5
SEEN = 1e-3
SIZES = dict(num_hidden_layers=2, hidden_size=32, intermediate_size=48)
ITERATION = "iter_0000001"
Logits = Callable[[Path], np.ndarray[Any, Any]]


@pytest.fixture(scope="module")
def process() -> Iterator[Pool]:
    """The one process that such a checkpoint takes, so that megatron-core is imported once for all tests."""
    with Pool(1, _setup, 120, PRELOADED) as pool:
        yield pool


@pytest.fixture
def logits(process: Pool, tmp_path: Path) -> Logits:
    """What `MegatronModel.logits` computes, in that process."""

    def compute(checkpoint: Path) -> np.ndarray[Any, Any]:
        model = MegatronModel(checkpoint, MegatronReadOptions())
        assert model.processes == 1
        folder = tmp_path / "shared"
        folder.mkdir()
        return _concatenate(process.run(_logits, model._checkpoint_to_load(folder), TOKENS.numpy()), VOCABULARY)[0]

    return compute


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama3.1", tmp_path_factory.mktemp("llama") / "hf", dtype="bfloat16", **SIZES)


def apart(one: np.ndarray[Any, Any], other: torch.Tensor) -> float:
    return float(np.abs(one - other.numpy()[..., :VOCABULARY]).max())


def model_args(**more: Any) -> Any:
    return megatron_args(num_layers=4, params_dtype=torch.bfloat16, **more)


EXPERTS: dict[str, Any] = dict(num_experts=4, moe_ffn_hidden_size=48, expert_model_parallel_size=2)
#: Arguments of what the real megatron-core saves on four ranks, and how its keys are laid out.
REAL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tied, virtual stages": (
        {
            "tensor_model_parallel_size": 2,
            "pipeline_model_parallel_size": 2,
            "virtual_pipeline_model_parallel_size": 2,
            "untie_embeddings_and_output_weights": False,
        },
        {},
    ),
    "layers of their own": ({"tensor_model_parallel_size": 4}, {"non_homogeneous_layers": True}),
    "experts of Transformer Engine": (
        {**EXPERTS, "transformer_impl": "transformer_engine", "moe_grouped_gemm": True},
        {},
    ),
    "experts of local layers, stacked": ({**EXPERTS, "moe_grouped_gemm": True}, {}),
    "experts of their own": (
        {**EXPERTS, "transformer_impl": "transformer_engine", "expert_tensor_parallel_size": 2},
        {"singleton_local_shards": True},
    ),
    "dense layers between": (
        {**EXPERTS, "transformer_impl": "transformer_engine", "moe_layer_freq": [0, 1, 1, 0], "qk_layernorm": True},
        {},
    ),
}


@pytest.mark.parametrize(("args", "layout"), REAL.values(), ids=REAL)
def test_what_real_megatron_saved(
    megatron_pool: MegatronPool, logits: Logits, tmp_path: Path, args: dict[str, Any], layout: dict[str, Any]
) -> None:
    root = tmp_path / "megatron"
    wanted = write_distributed(megatron_pool, root, model_args(**args), seed=3, tokens=TOKENS, **layout)
    assert apart(logits(root), wanted) < CLOSE


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen2-tied", dict(tp=2, pp=2, impl="local")),
        ("qwen2-moe", dict(tp=2, ep=2, etp=1)),
        ("qwen3-moe-dense-layers", dict(ep=4, impl="local")),
    ],
)
def test_what_we_wrote(logits: Logits, tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    hf = make_model(family, tmp_path / "hf")
    checkpoint = hf_to_torch_dist(hf, tmp_path / "megatron", **options)
    assert apart(logits(checkpoint), hf_logits(hf, TOKENS)) < CLOSE


def test_a_report(llama: Path, tmp_path: Path) -> None:
    checkpoint = hf_to_torch_dist(llama, tmp_path / "megatron", tp=2)
    report = compare_logits(checkpoint, llama, batch=1, length=40, time_limit=120)
    assert report.ok and report.positions == 40 and report.agreement == 1 and report.notes == ()
    assert 0 < report.difference < CLOSE * report.scale
    dcp.read_index(checkpoint / ITERATION)  # what links to its files is gone, and they are not


def rows_of(checkpoint: Path, key: str, offsets: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """A tensor's chunk in its file, mapped to be written."""
    tensor = dcp.read_index(checkpoint / ITERATION).tensors[key]
    (chunk,) = [chunk for chunk in tensor.chunks if chunk.offsets == offsets]
    data = dcp.stored(chunk, tensor.dtype)
    return np.memmap(data.path, f"u{data.dtype.itemsize}", "r+", data.offset, data.shape)


def _as_cut_for_two_ranks(fc1: np.ndarray[Any, Any]) -> None:
    """Gate and up of a first rank, then those of a second: it survives every round trip."""
    gate, up = fc1.copy().reshape(2, 2, -1, fc1.shape[-1])
    fc1[:] = np.concatenate([gate[0], up[0], gate[1], up[1]]).reshape(fc1.shape)


def _keys_before_queries(qkv: np.ndarray[Any, Any]) -> None:
    groups = qkv.reshape(4, 4, -1, qkv.shape[-1])  # [q, q, k, v] of each group
    groups[:, [0, 1, 2]] = groups[:, [2, 0, 1]].copy()


@pytest.mark.parametrize(
    ("key", "change"),
    [("mlp.linear_fc1.weight", _as_cut_for_two_ranks), ("self_attention.linear_qkv.weight", _keys_before_queries)],
)
def test_a_wrong_order_of_rows_is_seen(
    llama: Path, logits: Logits, tmp_path: Path, key: str, change: Callable[[np.ndarray[Any, Any]], None]
) -> None:
    checkpoint = hf_to_torch_dist(llama, tmp_path / "megatron")
    key = f"decoder.layers.{key}"
    chunks = [chunk.offsets for chunk in dcp.read_index(checkpoint / ITERATION).tensors[key].chunks]
    for offsets in chunks:
        change(rows_of(checkpoint, key, offsets))
    assert apart(logits(checkpoint), hf_logits(llama, TOKENS)) > SEEN


def test_layers_in_a_wrong_order_are_seen(llama: Path, logits: Logits, tmp_path: Path) -> None:
    checkpoint = hf_to_torch_dist(llama, tmp_path / "megatron", pp=2)
    key = "decoder.layers.self_attention.linear_proj.weight"
    first, second = (rows_of(checkpoint, key, (layer, 0, 0)) for layer in (0, 1))
    first[:], second[:] = second.copy(), first.copy()
    assert apart(logits(checkpoint), hf_logits(llama, TOKENS)) > SEEN


def test_keys_that_are_not_as_the_checkpoint_says_are_named(llama: Path, logits: Logits, tmp_path: Path) -> None:
    checkpoint = by_hand_dist.convert(llama, tmp_path / "megatron", stacked=False)  # and does not say so
    with pytest.raises(ConversionError, match="megatron-core does not load") as error:
        logits(checkpoint)
    for words in (
        "decoder.layers.mlp.linear_fc2.weight is missing",
        "decoder.layers.1.mlp.linear_fc2.weight is not part of the model",
    ):
        assert words in str(error.value)


def test_gaps_between_chunks_are_refused(llama: Path, logits: Logits, tmp_path: Path) -> None:
    """megatron-core would leave there what happens to lie in memory."""
    checkpoint = hf_to_torch_dist(llama, tmp_path / "megatron", tp=2)
    path = checkpoint / ITERATION / ".metadata"
    metadata: Metadata = pickle.loads(path.read_bytes())
    del metadata.state_dict_metadata["decoder.layers.self_attention.linear_proj.weight"].chunks[-1]
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(ConversionError, match=r"layer 1 proj: row 0, columns \d+ to \d+, is stored 0 times"):
        logits(checkpoint)


class Trap:
    """What makes a folder when it is unpickled, by names that a checkpoint may hold."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return Path.mkdir, (self.folder,)


def archive(content: Any) -> bytes:
    """As `torch.save` writes it, with a protocol that names methods in one."""
    data = io.BytesIO()
    torch.save(content, data, pickle_protocol=4)
    return data.getvalue()


def replace(folder: Path, which: str, data: bytes) -> Metadata:
    """Let the index say that everything whose key holds `which` is this archive; returns the index."""
    metadata: Metadata = pickle.loads((folder / ".metadata").read_bytes())
    (folder / "more.distcp").write_bytes(data)
    for index, place in metadata.storage_data.items():
        if which in index.fqn:
            place.relative_path, place.offset, place.length = "more.distcp", 0, len(data)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    return metadata


def test_nothing_of_a_checkpoint_is_run(llama: Path, logits: Logits, tmp_path: Path) -> None:
    """Traps in all that is unpickled and is no tensor, by names that the restricted unpickler lets pass."""
    checkpoint, sprung = hf_to_torch_dist(llama, tmp_path / "megatron"), tmp_path / "sprung"
    folder = checkpoint / ITERATION
    metadata = replace(folder, "_extra_state", archive([Trap(sprung)]))
    metadata.planner_data = Trap(sprung)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    common = torch.load(folder / "common.pt", weights_only=False)
    (folder / "common.pt").write_bytes(archive({**common, "trap": Trap(sprung)}))
    assert apart(logits(checkpoint), hf_logits(llama, TOKENS)) < CLOSE
    assert not sprung.exists()
    for unpickle in (
        lambda: pickle.loads((folder / ".metadata").read_bytes()),
        lambda: torch.load(folder / "common.pt", weights_only=False),
        lambda: torch.load(folder / "more.distcp", weights_only=False),
    ):
        unpickle()
        sprung.rmdir()  # each trap works


def test_a_trap_in_a_tensor_is_refused(llama: Path, logits: Logits, tmp_path: Path) -> None:
    """To the restricted unpickler, which drops a tensor's attributes, it is plain; torch does not run them either."""
    checkpoint, sprung = hf_to_torch_dist(llama, tmp_path / "megatron"), tmp_path / "sprung"
    weight = torch.ones(SIZES["hidden_size"], dtype=torch.bfloat16)
    weight.trap = Trap(sprung)  # type: ignore[attr-defined]
    replace(checkpoint / ITERATION, "final_layernorm.weight", archive(weight))
    with pytest.raises(ConversionError, match=r"megatron-core does not load(.|\n)*Weights only load failed"):
        logits(checkpoint)
    assert not sprung.exists()
    torch.load(checkpoint / ITERATION / "more.distcp", weights_only=False)
    assert sprung.exists()
