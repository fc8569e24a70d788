"""Folders that are no checkpoint: what each is, what lies in it, and what to do."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_converters.formats.detect import MEGATRON, format_of
from tests.bare import tree
from tests.conversions import different
from tests.helpers import hf_tensors, refused, succeeded, verb
from tests.oracle import by_hand_dist

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

HFModel = Callable[..., Path]
TRACKER = "latest_checkpointed_iteration.txt"
DIST = (".metadata", "metadata.json", "common.pt", "__0_0.distcp")


def folders(root: Path, **files: tuple[str, ...]) -> Path:
    """Make empty files in folders of `root`; `__` in the name of a folder stands for a further level."""
    for folder, names in files.items():
        place = root.joinpath(*folder.split("__"))
        place.mkdir(parents=True, exist_ok=True)
        for name in names:
            path = place / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("")
    return root


def looked_at(root: Path, *words: object, code: int = 1) -> str:
    """Assert that the folder is refused with these words; returns the message, without the folder."""
    message = refused(verb("inspect", root), *words, code=code).err
    return message.replace(str(root), "X").removeprefix("megatron-converters: error: ").strip()


@pytest.mark.parametrize("names", [("__0_0.distcp",), ("__0_0.distcp", "common.pt", "metadata.json")])
def test_an_index_that_was_not_copied(names: tuple[str, ...], tmp_path: Path) -> None:
    """`cp DIR/*` leaves `.metadata` out."""
    root = folders(tmp_path, iter_0000008=names)
    if "metadata.json" in names:
        (root / "iter_0000008" / "metadata.json").write_text(
            '{"sharded_backend": "torch_dist", "sharded_backend_version": 1}'
        )
    for folder in (root / "iter_0000008", root):
        (root / TRACKER).write_text("8")
        looked_at(folder, "has no .metadata, the index", "`cp DIR/*` leaves it out")


def test_no_tracker(tmp_path: Path) -> None:
    root = folders(tmp_path, iter_0000008=DIST, iter_0000010=DIST, iter_0000012=("__0_0.distcp",), iter_0000014=())
    assert format_of(root) == MEGATRON
    assert looked_at(root) == (
        f"X has no {TRACKER}, which names the latest iteration once it is saved; it has iter_0000008, iter_0000010, "
        "iter_0000012 (without .metadata or mp_rank_* folders), iter_0000014 (empty); choose with --ckpt-dir-name iter_0000010"
    )


def test_iterations_that_cannot_be_read(tmp_path: Path) -> None:
    root = folders(tmp_path, iter_0000012=("__0_0.distcp",), iter_0000014=())
    looked_at(root, f"has no {TRACKER}", "iter_0000014 (empty); none of them can be read")


@pytest.mark.parametrize(
    ("tracked", "words"),
    [
        (
            "100",
            "names iter_0000100, which is not there; it has iter_0000008; choose with --ckpt-dir-name iter_0000008",
        ),
        ("release", "names release, which is not there; it has iter_0000008; choose"),
        ("", "holds ''; it must hold an iteration number or 'release'; it has iter_0000008; choose"),
    ],
)
def test_a_tracker_that_names_what_is_not_there(tracked: str, words: str, tmp_path: Path) -> None:
    root = folders(tmp_path, iter_0000008=("mp_rank_00/model_optim_rng.pt",))
    (root / TRACKER).write_text(tracked)
    looked_at(root, words)


def test_a_tracker_alone(tmp_path: Path) -> None:
    (tmp_path / TRACKER).write_text("8")
    looked_at(tmp_path, "names iter_0000008, which is not there; it has none; copy the checkpoint again")


def test_what_was_chosen_is_not_there(tmp_path: Path) -> None:
    root = folders(tmp_path, iter_0000008=DIST)
    refused(
        verb("inspect", root, "--ckpt-dir-name", "iter_0000009"), "has no folder 'iter_0000009'; it has iter_0000008"
    )


def test_a_folder_of_verl(tmp_path: Path) -> None:
    """The root has a tracker of Megatron-LM's name that counts steps; checkpoint and reference are some levels down."""
    actor = "global_step_20__actor"
    root = folders(
        tmp_path, **{f"{actor}__dist_ckpt": DIST, f"{actor}__huggingface": ("config.json", "tokenizer.json")}
    )
    given = "give X/actor/dist_ckpt with --hf-config X/actor/huggingface"
    found = "it holds a checkpoint in actor/dist_ckpt, and a configuration in actor/huggingface; "
    message = looked_at(root / "global_step_20", code=2)
    assert message == f"X is no model itself; {found}{given}"
    (root / TRACKER).write_text("20")
    looked_at(
        root, "names iter_0000020, which is not there", "give ", "global_step_20/actor/dist_ckpt with --hf-config "
    )


def test_several_models_are_named(tmp_path: Path) -> None:
    root = folders(tmp_path, a=("config.json", "model.safetensors"), b__c=DIST, b__d=(TRACKER,), e__f__g__h=DIST)
    looked_at(
        root, "it holds a checkpoint in b/c, b/d, and a Hugging Face model in a; give one of these folders", code=2
    )


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("mp_rank_00_model_states.pt", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"), "a checkpoint of DeepSpeed"),
        (("zero_to_fp32.py", "latest"), "a checkpoint of DeepSpeed"),
        (("model_world_size_8_rank_0.pt", "fsdp_config.json"), "a checkpoint of verl with FSDP"),
        (("llama.nemo",), "an archive of NeMo 1"),
        (("model-q4.gguf",), "a model of llama.cpp"),
    ],
)
def test_formats_that_no_source_reads(names: tuple[str, ...], words: str, tmp_path: Path) -> None:
    root = folders(tmp_path / "x", **{"global_step20": names}) / "global_step20"
    code = 1 if names[0].startswith("mp_rank") else 2
    looked_at(root, f"is {words}; ", code=code)


@pytest.mark.parametrize("name", ["weights", "model_weights"])
def test_the_weights_of_nemo(name: str, hf_model: HFModel, tmp_path: Path) -> None:
    """NeMo 2 saves into `weights`, beside `context`."""
    checkpoint = by_hand_dist.convert(hf_model("llama2"), tmp_path / "made")
    nemo = tmp_path / "step=8-last"
    nemo.mkdir()
    (nemo / "context").mkdir()
    shutil.move(checkpoint / "iter_0000001", nemo / name)
    succeeded(verb("convert", nemo, tmp_path / "back"))
    assert different(hf_tensors(hf_model("llama2")), hf_tensors(tmp_path / "back")) == []


def test_a_rank_file_that_is_missing_or_elsewhere(hf_model: HFModel, tmp_path: Path) -> None:
    folder = tree(hf_model("llama2"), tmp_path / "made", args=True)
    file = folder / "mp_rank_00" / "model_optim_rng.pt"
    file.rename(file.with_name("model.pt"))
    looked_at(folder, "model_optim_rng.pt is missing", "the folder has model.pt")


def test_the_folder_of_one_rank(tmp_path: Path) -> None:
    folders(tmp_path, iter_0000001=("mp_rank_00/model_optim_rng.pt",))
    rank = tmp_path / "iter_0000001" / "mp_rank_00"
    looked_at(rank, f"is the folder of one rank; give that of the checkpoint, {rank.parent}\n", code=2)
