"""MiMo's layer of multi-token prediction, whose first projection reads hidden state and embedding the other way round."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_converters.bridge import AutoBridge
from megatron_converters.families import FAMILIES
from megatron_converters.families.config_json import config_from_spec
from megatron_converters.formats.huggingface.parts import HFNames
from megatron_converters.formats.huggingface.source import HFSource
from megatron_converters.formats.huggingface.target import HFOptions, HFTarget
from megatron_converters.model.slots import refs
from tests.conversions import different, hf_to_megatron, hf_to_torch_dist, megatron_to_hf, reshard, run
from tests.helpers import hf_tensors, rank_content, succeeded, verb
from tests.live_process import live
from tests.tiny import tiny_spec

LAYER = "model.mtp_layers.0."
SIZE = 8
NAMES = {"token_layernorm": "enorm", "hidden_layernorm": "hnorm", "final_layernorm": "final_layernorm"}


@pytest.fixture(scope="module")
def mimo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder as it is published, with two layers and one of multi-token prediction."""
    folder = tmp_path_factory.mktemp("mimo")
    spec = tiny_spec(family="mimo", hidden_size=SIZE, vocab_size=128, qkv_bias=True, mtp_num_layers=1)
    names, generator = HFNames(FAMILIES["mimo"], spec), torch.Generator().manual_seed(0)
    parts = [part for ref in refs(spec) for part in names.parts(ref, fused=False)]
    tensors = {part.name: torch.randn(part.stored_shape, generator=generator) for part in parts}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config_from_spec(spec)))
    return folder


def test_embedding_comes_first_in_megatron(mimo: Path, tmp_path: Path) -> None:
    own = load_file(mimo / "model.safetensors")
    hidden, embedding = own[f"{LAYER}input_proj.weight"].split(SIZE, dim=1)
    rows = torch.cat([embedding, hidden], dim=1).chunk(2)
    hf_to_megatron(mimo, tmp_path / "files", tp=2)
    for rank in (0, 1):
        model = rank_content(tmp_path / "files", f"mp_rank_0{rank}")["model"]
        assert torch.equal(model["mtp.layers.0.eh_proj.weight"], rows[rank])
        for name, theirs in NAMES.items():
            assert torch.equal(model[f"mtp.layers.0.{theirs}.weight"], own[f"{LAYER}{name}.weight"])
    succeeded(verb("verify", mimo, tmp_path / "files"))
    assert different(hf_tensors(megatron_to_hf(tmp_path / "files", tmp_path / "back")), own) == []
    run(HFSource(mimo), HFTarget(tmp_path / "again", HFOptions()))
    assert different(hf_tensors(tmp_path / "again"), own) == []


def test_so_it_does_in_a_distributed_checkpoint(mimo: Path, tmp_path: Path) -> None:
    hf_to_torch_dist(mimo, tmp_path / "chunks", tp=2)
    own = hf_tensors(mimo)
    hidden, embedding = own[f"{LAYER}input_proj.weight"].split(SIZE, dim=1)
    model = rank_content(reshard(tmp_path / "chunks", tmp_path / "files", tp=1))["model"]
    assert torch.equal(model["mtp.layers.0.eh_proj.weight"], torch.cat([embedding, hidden], dim=1))
    assert different(hf_tensors(megatron_to_hf(tmp_path / "chunks", tmp_path / "back")), own) == []


@live
def test_so_it_does_in_a_live_model(mimo: Path) -> None:
    bridge = AutoBridge.from_hf_pretrained(mimo)
    provider = bridge.to_megatron_provider()
    (model,) = provider.provide_distributed_model(wrap_with_ddp=False)
    own = hf_tensors(mimo)
    hidden, embedding = own[f"{LAYER}input_proj.weight"].split(SIZE, dim=1)
    held = dict(model.named_parameters())["mtp.layers.0.eh_proj.weight"]
    assert torch.equal(held, torch.cat([embedding, hidden], dim=1))
    assert different(own, dict(bridge.export_hf_weights([model], show_progress=False))) == []


def test_the_layer_can_be_left_out(mimo: Path, tmp_path: Path) -> None:
    succeeded(verb("convert", mimo, tmp_path / "files", "--tp", 1, "--without-mtp"))
    assert not [name for name in rank_content(tmp_path / "files")["model"] if name.startswith("mtp.")]
