"""Shard map as data: JSON alone, and an assembler written here from its description, make the source of rank files, and back."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from megatron_converters.api import MegatronOptions, PipelineSplit, convert
from megatron_converters.basics.errors import ConversionError, UsageError
from megatron_converters.bridge import AutoBridge
from tests.conversions import different
from tests.helpers import hf_tensors, rank_content
from tests.oracle.minicpm import make_minicpm

HFModel = Callable[..., Path]
Tensors = dict[str, torch.Tensor]


class Case(NamedTuple):
    """Family and the sizes by which it is cut, as the shard map and as a conversion take them."""

    family: str
    sizes: dict[str, Any]

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of `convert`."""
        own = {name: self.sizes[name] for name in ("tp", "pp", "ep", "etp") if name in self.sizes}
        split = {name: value for name, value in self.sizes.items() if name not in (*own, "vpp")}
        if "vpp" in self.sizes:
            split["virtual"] = self.sizes["vpp"]
        options = MegatronOptions(impl="local", expert_layout="sequential", split=PipelineSplit(**split))
        return {**own, "megatron": options}


CASES = {
    "whole": Case("llama3", {}),
    "tp, pp": Case("llama3.2-tied", dict(tp=2, pp=2)),
    "experts": Case("qwen3-moe", dict(tp=2, pp=2, ep=2, etp=1)),
    "transposed": Case("gpt2", dict(tp=2, pp=2)),
    "uneven": Case("llama3", dict(tp=2, pp=2, first=1)),
    "virtual": Case("qwen2", dict(pp=2, vpp=2)),
    "latent": Case("deepseek-v3", dict(tp=2, pp=2, ep=2, etp=1)),
    "fused": Case("phi3", dict(tp=2)),
    "more ranks than groups": Case("glm", dict(tp=4)),
}
#: Megatron-LM pads vocabularies further than a live model of ours.
LIKE_MEGATRON = dict(make_vocab_size_divisible_by=128)
#: Parameters that are padding alone on the ranks after the first two.
PADDED = {(0, "embedding.word_embeddings.weight"), (0, "output_layer.weight")}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def mapped(folder: Path, sizes: dict[str, Any]) -> dict[str, Any]:
    """Shard map as a consumer gets it."""
    text = json.dumps(AutoBridge.from_hf_pretrained(folder).shard_map(parallel=sizes).to_dict())
    found: dict[str, Any] = json.loads(text)
    return found


def rank_models(root: Path) -> list[list[Tensors]]:
    """Models of each file, as Megatron-LM would load them; padding included."""
    folders = sorted(path.name for path in (root / "iter_0000001").glob("mp_rank_*"))
    found = []
    for name in folders:
        content = rank_content(root, name)
        models = [content[key] for key in sorted(content) if key == "model" or key.startswith("model")]
        found.append(
            [{key: value for key, value in model.items() if isinstance(value, torch.Tensor)} for model in models]
        )
    return found


def place(parallel: dict[str, int], rank: int) -> int:
    """Number of a process's file, in the order of their names: by tp, pp, ep."""
    stage_size = parallel["world"] // parallel["pp"]
    within, stage = rank % stage_size, rank // stage_size
    tp, ep = within % parallel["tp"], within // parallel["etp"] % parallel["ep"]
    pairs = sorted({(r % parallel["tp"], r // parallel["etp"] % parallel["ep"]) for r in range(stage_size)})
    names = sorted((t, s, e) for t, e in pairs for s in range(parallel["pp"]))
    return names.index((tp, stage, ep))


def assemble(data: dict[str, Any], models: list[list[Tensors]], holder: int) -> Tensors:
    """Tensors of Hugging Face from the parameters of all ranks; of equal ones the holder's, the first or the last, is taken."""
    found = {}
    for name, tensor in data["tensors"].items():
        dtype = next(iter(models[0][0].values())).dtype
        result = torch.full(tensor["shape"], torch.nan, dtype=dtype)
        for part in tensor["parts"]:
            parameter = models[part["ranks"][holder]][part["model"]][part["parameter"]]
            source = parameter.reshape(parameter.shape[0], -1)
            assert parameter.shape[1:] == tuple(part["parameter_shape"][1:])
            target = result if part["entry"] is None else result[part["entry"]]
            matrix = target.T if part["transposed"] else target.reshape(target.shape[0], -1)
            first, held, count = part["column"], part["parameter_column"], part["columns"]
            for row, own, rows in data["runs"][part["runs"]]:
                assert torch.isnan(matrix[row : row + rows, first : first + count]).all()  # written once
                values = source[own : own + rows, held : held + count]
                if part["value"] is not None:
                    scale, shift = (np.float32(part["value"][key]) for key in ("scale", "shift"))
                    values = torch.from_numpy(values.float().numpy() * scale + shift).to(dtype)
                matrix[row : row + rows, first : first + count] = values
        found[name] = result
    return found


def distribute(data: dict[str, Any], tensors: Tensors, rank: int) -> dict[tuple[int, str], torch.Tensor]:
    """The way back: parameters of a rank from the tensors of Hugging Face."""
    found: dict[tuple[int, str], torch.Tensor] = {}
    for name, tensor in data["tensors"].items():
        for part in (part for part in (*tensor["parts"], *tensor["copies"]) if rank in part["ranks"]):
            key = part["model"], part["parameter"]
            own = found.setdefault(key, torch.full(part["parameter_shape"], torch.nan))
            target = tensors[name] if part["entry"] is None else tensors[name][part["entry"]]
            matrix = target.T if part["transposed"] else target.reshape(target.shape[0], -1)
            first, held, count = part["column"], part["parameter_column"], part["columns"]
            for row, start, rows in data["runs"][part["runs"]]:
                place = own.reshape(own.shape[0], -1)[start : start + rows, held : held + count]
                place.copy_(matrix[row : row + rows, first : first + count])
    return found


def test_the_map_makes_the_source_of_rank_files_and_back(hf_model: HFModel, tmp_path: Path, case: Case) -> None:
    folder = hf_model(case.family)
    data = mapped(folder, {**case.sizes, **LIKE_MEGATRON})
    convert(folder, tmp_path / "ranks", to="megatron", **case.options)
    files = rank_models(tmp_path / "ranks")
    parallel = data["parallel"]
    models = [files[place(parallel, rank)] for rank in range(parallel["world"])]
    source = hf_tensors(folder)
    for holder in (0, -1):
        assert different(assemble(data, models, holder), source) == []
    for rank, own in enumerate(models):
        found = distribute(data, source, rank)
        wanted = {(number, name): tensor for number, model in enumerate(own) for name, tensor in model.items()}
        assert found.keys() | PADDED == wanted.keys() | PADDED
        assert found.keys() >= wanted.keys() - (PADDED if rank % parallel["tp"] > 1 else set())
        for key, tensor in found.items():
            known = ~torch.isnan(tensor)  # all but the padding of the vocabulary
            assert torch.equal(torch.where(known, tensor, 0.0), torch.where(known, wanted[key], 0.0)), key
            assert known.all() or key[1] in ("embedding.word_embeddings.weight", "output_layer.weight"), key


def test_of_rank_is_the_inverse(hf_model: HFModel, case: Case) -> None:
    found = AutoBridge.from_hf_pretrained(hf_model(case.family)).shard_map(parallel=case.sizes)
    forth = {
        (rank, part.model, part.parameter, name, part)
        for name, tensor in found.tensors.items()
        for part in (*tensor.parts, *tensor.copies)
        for rank in part.ranks
    }
    back = {
        (rank, model, parameter, name, part)
        for rank in range(found.parallel["world"])
        for (model, parameter), held in found.of_rank(rank).items()
        for name, part in held
    }
    assert forth == back
    assert found.of_rank(found.parallel["world"]) == {}


@pytest.mark.parametrize("family", ["llama3", "qwen3-moe"])
def test_sizes_of_data_parallelism_only_add_holders(hf_model: HFModel, family: str) -> None:
    once, twice = (mapped(hf_model(family), dict(tp=2, pp=2, world=world)) for world in (4, 8))
    assert twice["parallel"]["world"] == 8
    for name, tensor in once["tensors"].items():
        for part, more in zip(tensor["parts"], twice["tensors"][name]["parts"], strict=True):
            assert len(more["ranks"]) == 2 * len(part["ranks"])
            assert {**more, "ranks": 0} == {**part, "ranks": 0}


def test_fused_experts_are_entries_of_one_tensor(hf_model: HFModel, tmp_path: Path) -> None:
    folder = hf_model("qwen3-moe", fused_experts=True)
    data = mapped(folder, dict(ep=2, **LIKE_MEGATRON))
    source = hf_tensors(folder)
    assert {name: tensor["shape"] for name, tensor in data["tensors"].items()} == {
        name: list(tensor.shape) for name, tensor in source.items()
    }
    convert(
        folder,
        tmp_path / "ranks",
        ep=2,
        megatron=MegatronOptions(impl="local", expert_layout="sequential"),
        to="megatron",
    )
    files = rank_models(tmp_path / "ranks")
    assert different(assemble(data, files, 0), source) == []


def test_values_are_those_of_folded_multipliers(tmp_path: Path) -> None:
    folder, _ = make_minicpm(tmp_path, tied=False)
    options = MegatronOptions(impl="local", mup="fold", megatron_version="0.16")
    convert(folder, tmp_path / "ranks", tp=2, to="megatron", megatron=options)
    found = assemble(mapped(folder, dict(tp=2, **LIKE_MEGATRON)), rank_models(tmp_path / "ranks"), 0)
    assert found.keys() == hf_tensors(folder).keys()
    for name, tensor in hf_tensors(folder).items():
        assert torch.allclose(found[name], tensor, rtol=3e-7, atol=0), name


def test_a_consumer_needs_nothing_but_the_json(hf_model: HFModel, tmp_path: Path) -> None:
    """A process with Python alone, isolated, finds which rows of which rank make up a tensor."""
    data = mapped(hf_model("llama3"), dict(tp=2))
    (tmp_path / "map.json").write_text(json.dumps(data))
    script = """
import json, sys
data = json.load(open(sys.argv[1]))
tensor = data["tensors"]["model.layers.0.self_attn.k_proj.weight"]
print([(part["ranks"], part["parameter"], data["runs"][part["runs"]]) for part in tensor["parts"]])
assert not [name for name in sys.modules if name.startswith(("numpy", "torch", "megatron"))]
"""
    done = subprocess.run(
        [sys.executable, "-I", "-c", script, tmp_path / "map.json"], capture_output=True, text=True, check=True
    )
    name = "decoder.layers.0.self_attention.linear_qkv.weight"
    # Each rank has two of four groups: two heads of queries, one of keys, one of values, of 8 channels each.
    wanted = [([rank], name, [[16 * rank, 16, 8], [16 * rank + 8, 48, 8]]) for rank in (0, 1)]
    assert done.stdout.strip() == str(wanted)
    assert data["format"] == "megatron_converters shard map, version 1"


def test_sizes_that_cannot_be_are_refused(hf_model: HFModel) -> None:
    bridge = AutoBridge.from_hf_pretrained(hf_model("llama3"))
    for sizes, text in (
        (dict(tp=3), "use tp 1, 2, 4"),
        (dict(pp=3), "4 layers"),
        (dict(ep=2), "no experts to spread"),
        (dict(tp=2, world=3), "a world size of 3"),
    ):
        with pytest.raises(ConversionError, match=text):
            bridge.shard_map(parallel=sizes)
    with pytest.raises(UsageError, match="tensor is none of"):
        bridge.shard_map(parallel={"tensor": 2})
    with pytest.raises(UsageError, match="names 'banana'"):
        bridge.shard_map(names="banana")


def test_a_live_model_pads_its_vocabulary_as_little_as_possible(hf_model: HFModel) -> None:
    bridge = AutoBridge.from_hf_pretrained(hf_model("llama3"))
    for sizes, rows in ((dict(), 199), (dict(tp=2), 100), (dict(tp=2, **LIKE_MEGATRON), 128)):
        (part, *_) = bridge.shard_map(parallel=sizes).tensors["lm_head.weight"].parts
        assert part.parameter_shape == (rows, 64)


def test_names_of_transformer_engine(hf_model: HFModel) -> None:
    found = AutoBridge.from_hf_pretrained(hf_model("qwen3-moe")).shard_map(names="transformer_engine")
    parameters = {name for _, name in found.of_rank(0)}
    assert "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight" in parameters
    assert "decoder.layers.0.mlp.experts.linear_fc1.weight3" in parameters
