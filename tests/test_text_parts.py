"""Text parts of models of images and text: what they compute, and that all that lies beside them comes back."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from megatron_converters.families.wrappers import WRAPPERS
from tests.conversions import different, hf_to_megatron, hf_to_torch_dist, megatron_to_hf
from tests.helpers import config_of, hf_tensors
from tests.oracle.hf import TOKENS, difference
from tests.oracle.pool import MegatronPool
from tests.oracle.wrappers import MODELS, loaded, make_wrapper, text_logits

TOLERANCE = 1e-5
CUT = {"tp": 2, "pp": 2}
#: Models whose logits are compared: one for each family of text parts.
COMPUTED = ("qwen2_vl", "qwen3_vl", "qwen3_vl_moe", "llava", "mistral3")
Wrapped = Callable[..., Path]


@pytest.fixture(scope="session")
def wrapped(tmp_path_factory: pytest.TempPathFactory) -> Wrapped:
    """Function `wrapped(name, **options of make_wrapper)`: a read-only folder, made at the first call."""
    return cache(lambda name, **options: make_wrapper(name, tmp_path_factory.mktemp("vl") / name, **options))


def same_folder(one: Path, other: Path) -> None:
    """Assert that a folder has come back: every tensor bit for bit, its configuration and its small files."""
    assert different(hf_tensors(one), hf_tensors(other)) == []
    assert config_of(one) == config_of(other)
    assert (one / "preprocessor_config.json").read_bytes() == (other / "preprocessor_config.json").read_bytes()


@pytest.mark.parametrize("name", COMPUTED)
def test_megatron_computes_of_text_what_the_wrapper_computes(
    megatron_pool: MegatronPool, wrapped: Wrapped, tmp_path: Path, name: str
) -> None:
    folder = wrapped(name)
    experts: dict[str, Any] = {"ep": 2, "etp": 1} if name.endswith("moe") else {}
    files = hf_to_megatron(folder, tmp_path / "files", impl="local")
    chunks = hf_to_torch_dist(folder, tmp_path / "chunks", **CUT, **experts)
    wanted = text_logits(folder, TOKENS)
    for found in (megatron_pool.logits(files, TOKENS), megatron_pool.distributed_logits(chunks, TOKENS)):
        assert difference(found, wanted) < TOLERANCE
    for source in (files, chunks):
        same_folder(folder, megatron_to_hf(source, tmp_path / source.name / "hf"))


@pytest.mark.parametrize("name", MODELS)
def test_the_whole_model_comes_back_and_loads(wrapped: Wrapped, tmp_path: Path, name: str) -> None:
    folder = wrapped(name, max_shard_size=30_000)
    assert len([*folder.glob("*.safetensors")]) > 1
    back = megatron_to_hf(hf_to_megatron(folder, tmp_path / "megatron", **CUT), tmp_path / "hf")
    same_folder(folder, back)
    loaded(back)


def test_every_wrapper_has_a_model_and_its_text_families_are_among_these(wrapped: Wrapped) -> None:
    assert {fields["model_type"] for fields in MODELS.values()} == {row.model_type for row in WRAPPERS}
