"""Names under what wraps a model: a uniform prefix, which is taken off and said, and adapters, which are refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_converters.formats.megatron.detecting import detect
from megatron_converters.formats.megatron.opening import open_megatron
from tests.bare import edit
from tests.conversions import different, hf_to_megatron, megatron_to_hf, refusal
from tests.helpers import hf_tensors
from tests.oracle import by_hand_dist

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

HFModel = Callable[..., Path]
EMBEDDINGS, QKV = "embedding.word_embeddings.weight", "decoder.layers.self_attention.linear_qkv.weight"


@pytest.fixture(scope="module")
def stored(hf_model: HFModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a distributed checkpoint of a dense model holds: its tensors by key, and under `common` the rest."""
    model, content = by_hand_dist.state(hf_model("llama2"), tmp_path_factory.mktemp("made"))
    return {"tensors": by_hand_dist.tensors(model, stacked=True), "common": content}


def written(stored: Mapping[str, Any], folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Path:
    """Save the tensors after a change, in the `torch_dist` format."""
    by_hand_dist.write(folder, change(dict(stored["tensors"])), stored["common"])
    return folder


def prefixed(prefix: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda tensors: {prefix + key: value for key, value in tensors.items()}


@pytest.mark.parametrize("prefix", ["module.", "module.module.", "language_model.", "_orig_mod."])
def test_a_prefix_of_all_keys(prefix: str, stored: dict[str, Any], hf_model: HFModel, tmp_path: Path) -> None:
    """NeMo's keys begin with `module.`, those of its optimizer behind `optimizer.state.exp_avg.`."""

    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        moments = {f"optimizer.state.exp_avg.{prefix}{EMBEDDINGS}": torch.ones(2)}
        return {**prefixed(prefix)(tensors), **moments}

    folder = written(stored, tmp_path / "made", change)
    assert f"all names begin with {prefix}, which is taken off" in open_megatron(folder).origin.notes
    back = megatron_to_hf(folder, tmp_path / "hf")
    assert different(hf_tensors(hf_model("llama2")), hf_tensors(back)) == []
    assert detect(folder).vocab_rows == stored["tensors"][EMBEDDINGS].shape[0]


@pytest.mark.parametrize("sizes", [{}, {"pp": 2}, {"tp": 2, "pp": 2}], ids=["one", "stages", "grid"])
def test_a_prefix_in_files_of_ranks(sizes: dict[str, int], hf_model: HFModel, tmp_path: Path) -> None:
    root = hf_to_megatron(hf_model("llama2"), tmp_path / "made", **sizes)
    folder = root / "iter_0000001"
    edit(folder, lambda content: {**content, "model": prefixed("module.")(content["model"])})
    assert "all names begin with module., which is taken off" in open_megatron(root).origin.notes
    back = megatron_to_hf(root, tmp_path / "hf")
    assert different(hf_tensors(hf_model("llama2")), hf_tensors(back)) == []
    assert detect(root).num_layers == 4


def test_a_prefix_in_a_whole_model(hf_model: HFModel, tmp_path: Path) -> None:
    folder = hf_to_megatron(hf_model("llama2"), tmp_path / "made")
    content = torch.load(folder / "iter_0000001" / "mp_rank_00" / "model_optim_rng.pt", weights_only=False)
    torch.save({**content, "model": prefixed("module.")(content["model"])}, tmp_path / "model.pt")
    back = megatron_to_hf(tmp_path, tmp_path / "hf")
    assert different(hf_tensors(hf_model("llama2")), hf_tensors(back)) == []


def test_tensors_beside_the_prefix(stored: dict[str, Any], hf_model: HFModel, tmp_path: Path) -> None:
    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        vision = {f"vision_model.layers.{name}": torch.ones(2) for name in "ab"}
        return {**prefixed("language_model.")(tensors), **vision}

    folder = written(stored, tmp_path / "made", change)
    assert refusal(folder) == (
        "X: the model's names begin with language_model., but not those of 2 tensors, such as vision_model.layers.a, "
        "vision_model.layers.b; --ignore-tensors PATTERN leaves such tensors out"
    )
    back = megatron_to_hf(folder, tmp_path / "hf", ignore_tensors=("vision_model.*",))
    assert different(hf_tensors(hf_model("llama2")), hf_tensors(back)) == []


def test_tensors_beside_the_prefix_of_ranks_files(hf_model: HFModel, tmp_path: Path) -> None:
    root = hf_to_megatron(hf_model("llama2"), tmp_path / "made", tp=2)

    def change(content: dict[str, Any]) -> dict[str, Any]:
        return {**content, "model": {**prefixed("language_model.")(content["model"]), "vision.a": torch.ones(2)}}

    edit(root / "iter_0000001", change)
    assert "but not those of 1 tensor, such as vision.a; --ignore-tensors PATTERN" in refusal(root)
    back = megatron_to_hf(root, tmp_path / "hf", ignore_tensors=("vision.*",))
    assert different(hf_tensors(hf_model("llama2")), hf_tensors(back)) == []


def test_a_prefix_of_only_some(stored: dict[str, Any], tmp_path: Path) -> None:
    """Nothing is guessed about a key without the prefix, though its name would be the model's."""

    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        return {**prefixed("module.")(tensors), QKV: tensors[QKV]}

    assert f"but not those of 1 tensor, such as {QKV}; " in refusal(written(stored, tmp_path / "made", change))


def test_a_wrong_tensor_is_named_with_its_prefix(stored: dict[str, Any], tmp_path: Path) -> None:
    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        return prefixed("module.")({**tensors, "decoder.extra": torch.ones(2)})

    assert "module.decoder.extra is not a tensor of this model" in refusal(written(stored, tmp_path / "made", change))


def test_several_models(stored: dict[str, Any], tmp_path: Path) -> None:
    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        return {**tensors, **prefixed("teacher.")(tensors)}

    message = refusal(written(stored, tmp_path / "made", change))
    assert message.startswith(f"X holds several models, with {EMBEDDINGS} and teacher.{EMBEDDINGS}; ")


def test_no_model_says_what_there_is(stored: dict[str, Any], tmp_path: Path) -> None:
    def change(_: dict[str, Any]) -> dict[str, Any]:
        return {f"model.layers.{number}.self_attn.q_proj.weight": torch.ones(2) for number in range(4)}

    message = refusal(written(stored, tmp_path / "made", change))
    assert "so this is not a checkpoint of a GPT; the names are model.layers.0.self_attn.q_proj.weight, " in message


ADAPTERS = {
    "decoder.layers.self_attention.linear_qkv.adapter.linear_in.weight": "Megatron-Bridge's examples/peft/merge_lora.py",
    "decoder.layers.0.self_attention.linear_qkv.lora_A.default.weight": "ms-swift's megatron export --merge_lora true",
}


@pytest.mark.parametrize("key", ADAPTERS)
def test_adapters_alone(key: str, stored: dict[str, Any], tmp_path: Path) -> None:
    message = refusal(written(stored, tmp_path / "made", lambda _: {key: torch.ones(2)}))
    assert message.startswith(f"X holds LoRA adapters alone, not a model (1 tensor such as {key}); merge them with ")
    assert ADAPTERS[key] in message


@pytest.mark.parametrize(("adapter", "wrapper"), list(zip(ADAPTERS, ("to_wrap", "base_layer"), strict=True)))
def test_adapters_that_are_not_merged(adapter: str, wrapper: str, stored: dict[str, Any], tmp_path: Path) -> None:
    wrapped = QKV.replace(".weight", f".{wrapper}.weight")

    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        return {**tensors, wrapped: tensors.pop(QKV), adapter: torch.ones(2)}

    message = refusal(written(stored, tmp_path / "made", change))
    assert "holds a model with LoRA adapters that are not merged into it (2 tensors such as decoder." in message
    assert ADAPTERS[adapter] in message


def test_adapters_in_files_of_ranks(hf_model: HFModel, tmp_path: Path) -> None:
    root = hf_to_megatron(hf_model("llama2"), tmp_path / "made")
    edit(root / "iter_0000001", lambda content: {**content, "model": {key: torch.ones(2) for key in ADAPTERS}})
    assert "mp_rank_00 holds LoRA adapters alone, not a model (1 tensor such as " in refusal(root)
