"""The proof of every family: megatron-core computes what transformers computes, whole and cut, and the way back is exact."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from megatron_converters.api import training_flags
from megatron_converters.basics.json_files import read_json
from megatron_converters.families import FAMILIES
from megatron_converters.families.config_json import spec_from_config
from megatron_converters.families.table import Proof
from megatron_converters.formats.megatron.arguments import inexpressible
from megatron_converters.formats.megatron.flags import least_release
from tests.conversions import different, hf_to_megatron, hf_to_torch_dist, megatron_to_hf
from tests.helpers import hf_tensors
from tests.oracle.families import MODELS
from tests.oracle.families.model import expected, publish
from tests.oracle.hf import TOKENS, difference
from tests.oracle.pool import MegatronPool

#: Largest difference, relative to the largest logit. GELU's two forms differ by 7e-5, so it must not be larger.
TOLERANCE = 1e-5
Folders = Callable[[str], Path]


@pytest.fixture(scope="session")
def published(hf_model: Folders, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Function `published(name)`: the folder of a tiny model as its family publishes it."""
    return cache(lambda name: publish(MODELS[name], hf_model(name), tmp_path_factory.mktemp("published") / name))


@pytest.mark.parametrize("name", MODELS)
def test_megatron_computes_what_transformers_computes(
    megatron_pool: MegatronPool, hf_model: Folders, published: Folders, logits: Any, tmp_path: Path, name: str
) -> None:
    model, folder = MODELS[name], published(name)
    files = hf_to_megatron(folder, tmp_path / "files", **model.whole)
    chunks = hf_to_torch_dist(folder, tmp_path / "chunks", **model.cut)
    wanted = expected(model, logits(name), hf_model(name))
    for found in (megatron_pool.logits(files, TOKENS), megatron_pool.distributed_logits(chunks, TOKENS)):
        assert difference(found, wanted) < TOLERANCE
    for source in (files, chunks):
        back = hf_tensors(megatron_to_hf(source, tmp_path / source.name / "hf"))
        assert not model.exact or different(hf_tensors(folder), back) == []


#: Families that stock megatron-core cannot compute, at least not here, whose proofs build what it lacks or do without.
ELSEWHERE = {
    "phi": ("test_phi.py", Proof.LOGITS),
    "minicpm": ("test_minicpm.py", Proof.EQUIVALENT),
    "minicpm3": ("test_minicpm.py", Proof.LOGITS),
    "deepseek_v32": ("test_sparse.py", Proof.SHAPES),
    "glm_moe_dsa": ("test_sparse.py", Proof.SHAPES),
}


def test_what_families_say_of_themselves_is_what_their_models_show(published: Folders) -> None:
    """Every family has a proof, and the release that it names is the least that a model of it needs."""
    proofs, releases = {name: {proof} for name, (_, proof) in ELSEWHERE.items()}, dict[str, set[str]]()
    for name, model in MODELS.items():
        spec = spec_from_config(read_json(published(name) / "config.json"))
        proofs.setdefault(spec.family, set()).add(Proof.LOGITS if model.publish is None else Proof.EQUIVALENT)
        if not inexpressible(spec):
            flags = training_flags(published(name)).arguments
            releases.setdefault(spec.family, set()).add(least_release(spec, flags, 1))
    families = FAMILIES.built_in
    assert proofs == {name: {family.proof} for name, family in families.items()}
    assert all((Path(__file__).parent / file).exists() for file, _ in ELSEWHERE.values())
    stated = {name: family.since for name, family in families.items() if family.since and name not in ELSEWHERE}
    assert {name: earliest(found) for name, found in releases.items()} == stated


def earliest(releases: set[str]) -> str:
    return min(releases, key=lambda release: [int(part) for part in release.split(".")])
