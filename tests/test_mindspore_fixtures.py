"""Weights that the real mindspore wrote (tests/fixtures/mindspore), read and converted: each element has its one right value."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers import hf_tensors, succeeded, verb
from tests.oracle.mindspore_fixtures import FIXTURES, FOLDER
from tests.oracle.mindspore_models import hf_weights

COMMITTED = {name: fixture for name, fixture in FIXTURES.items() if fixture.committed}
#: What of a mixture of experts no shape tells, as a YAML of MindSpore Transformers has it.
_YAML = """
model:
  model_config:
    num_attention_heads: 4
    num_key_value_heads: 2
    num_experts: 4
    num_experts_per_tok: 2
    moe_intermediate_size: 8
    n_shared_experts: 2
    first_k_dense_replace: 1
    moe_router_score_function: sigmoid
    norm_topk_prob: True
    rms_norm_eps: 1.0e-5
    use_interleaved_weight_layout_mlp: True
    use_contiguous_weight_layout_attention: False
"""


def places() -> list[tuple[str, Path]]:
    found = []
    for name, fixture in COMMITTED.items():
        parts = ("unified", "checkpoint") if fixture.cut is not None else ("",)
        found += [(name, FOLDER / name / part) for part in parts]
    return found


@pytest.mark.parametrize(("name", "path"), places(), ids=[str(path.relative_to(FOLDER)) for _, path in places()])
def test_what_mindspore_wrote_is_read_to_the_bit(name: str, path: Path, tmp_path: Path) -> None:
    fixture = COMMITTED[name]
    options = ["--mf-mlp-layout", fixture.layout.mlp, "--mf-qkv-layout", fixture.layout.qkv]
    if fixture.model.experts:
        (tmp_path / "train.yaml").write_text(_YAML)
        options += ["--mf-config", str(tmp_path / "train.yaml")]
    else:
        options += ["--num-attention-heads", str(fixture.model.heads)]
    succeeded(verb("convert", path, tmp_path / "hf", "--to", "hf", *options))
    found = hf_tensors(tmp_path / "hf")
    wanted = {key: torch.from_numpy(values) for key, values in hf_weights(fixture.model).items()}
    assert found.keys() == wanted.keys()
    for key, values in wanted.items():
        dtype = torch.float32 if key.endswith("e_score_correction_bias") else getattr(torch, fixture.dtype)
        assert torch.equal(found[key], values.to(dtype)), key


def test_states_of_the_optimizer_are_counted() -> None:
    for name in ("qwen3-float32", "llama-ckpt"):
        shown = succeeded(verb("inspect", FOLDER / name, "--num-attention-heads", 4)).out
        assert "tensors (optimizer)" in shown
