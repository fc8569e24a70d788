"""Text parts of models of images and text: what they compute, and that all that lies beside them comes back."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_converters.basics.errors import Stopped
from megatron_converters.bridge import AutoBridge
from megatron_converters.conversion.journal import Journal
from megatron_converters.families.config_json import spec_from_config
from megatron_converters.families.text_parts import TEXT_TYPES
from megatron_converters.families.wrappers import WRAPPERS, Wrapper
from megatron_converters.formats.huggingface.source import HFSource
from tests import quantised
from tests.conversions import different, hf_to_megatron, hf_to_torch_dist, megatron_to_hf
from tests.helpers import (
    config_of,
    convert,
    edit_config,
    hf_tensors,
    nothing_complete,
    rank_content,
    refused,
    succeeded,
    verb,
)
from tests.live_process import live
from tests.oracle.hf import TOKENS, difference, hf_logits
from tests.oracle.pool import MegatronPool
from tests.oracle.wrappers import MODELS, as_older_config, as_published, loaded, make_wrapper, text_logits

TOLERANCE = 1e-5
CUT = {"tp": 2, "pp": 2}
#: Models whose logits are compared: one for each family of text parts.
COMPUTED = (
    "qwen2_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    "llava",
    "mistral3",
    "gemma3",
    "kimi_k25",
)
#: Options of models that Megatron-LM's local layers, or its arguments, cannot say.
WHOLE: dict[str, dict[str, Any]] = {"gemma3": {"impl": "transformer_engine", "allow_inexpressible": True}}
MIXTURES = (
    "qwen3_vl_moe",
    "kimi_k25",
)
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
    experts: dict[str, Any] = {"ep": 2, "etp": 1} if name in MIXTURES else {}
    whole = WHOLE.get(name, {"impl": "local"})
    files = hf_to_megatron(folder, tmp_path / "files", **whole)
    chunks = hf_to_torch_dist(folder, tmp_path / "chunks", **{**whole, "impl": "transformer_engine"}, **CUT, **experts)
    wanted = text_logits(folder, TOKENS)
    for found in (megatron_pool.logits(files, TOKENS), megatron_pool.distributed_logits(chunks, TOKENS)):
        assert difference(found, wanted) < TOLERANCE
    for source in (files, chunks):
        same_folder(folder, megatron_to_hf(source, tmp_path / source.name / "hf"))


@pytest.mark.parametrize("name", MODELS)
def test_the_whole_model_comes_back_and_loads(wrapped: Wrapped, tmp_path: Path, name: str) -> None:
    folder = wrapped(name, max_shard_size=30_000)
    assert len([*folder.glob("*.safetensors")]) > 1
    options = {**WHOLE.get(name, {}), **CUT}
    back = megatron_to_hf(hf_to_megatron(folder, tmp_path / "megatron", **options), tmp_path / "hf")
    same_folder(folder, back)
    loaded(back)


def test_every_wrapper_has_a_model_and_its_text_families_are_among_these(wrapped: Wrapped) -> None:
    assert {fields["model_type"] for fields in MODELS.values()} == {row.model_type for row in WRAPPERS}


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_names_in_memory_come_back_as_they_were(wrapped: Wrapped, tmp_path: Path, name: str) -> None:
    folder = wrapped(name, in_memory_names=True)
    assert any(part.startswith("model.language_model.") for part in hf_tensors(folder))
    same_folder(folder, megatron_to_hf(hf_to_megatron(folder, tmp_path / "megatron"), tmp_path / "hf"))


def test_both_orientations_of_experts_are_one_model(wrapped: Wrapped, tmp_path: Path) -> None:
    saved = wrapped("qwen3_vl_moe")
    published = as_published(Path(shutil.copytree(saved, tmp_path / "published")))
    name = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    assert [hf_tensors(folder)[name].shape for folder in (saved, published)] == [(4, 48, 32), (4, 32, 48)]
    experts: dict[str, Any] = {**CUT, "ep": 2, "etp": 1}
    made = [hf_to_megatron(folder, tmp_path / folder.name / "megatron", **experts) for folder in (saved, published)]
    for rank in ("mp_rank_00_000_000", "mp_rank_01_001_001"):
        one, other = (rank_content(folder, rank)["model"] for folder in made)
        assert different(tensors_in(one), tensors_in(other)) == []
    for folder, converted in zip((saved, published), made, strict=True):
        same_folder(folder, megatron_to_hf(converted, tmp_path / folder.name / "hf"))


def tensors_in(state: dict[str, Any]) -> dict[str, Any]:
    return {name: data for name, data in state.items() if isinstance(data, torch.Tensor)}


@pytest.mark.parametrize("size", [16, 32])
def test_an_orientation_that_shapes_do_not_tell_is_refused(wrapped: Wrapped, tmp_path: Path, size: int) -> None:
    """Hidden size 32: twice the experts' size, or equal to it."""
    folder = Path(shutil.copytree(wrapped("qwen3_vl_moe"), tmp_path / "hf"))
    edit_text(folder, moe_intermediate_size=size)
    tensors = hf_tensors(folder)
    for layer in range(2):
        prefix = f"model.language_model.layers.{layer}.mlp.experts."
        tensors[prefix + "gate_up_proj"] = torch.zeros(4, 2 * size, 32)
        tensors[prefix + "down_proj"] = torch.zeros(4, 32, size)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    refused(
        verb("plan", folder, tmp_path / "out"),
        "which fits both ways in which Qwen3VLMoeForConditionalGeneration is stored",
    )


def edit_text(folder: Path, **changes: Any) -> None:
    edit_config(folder, text_config={**config_of(folder)["text_config"], **changes})


def test_configurations_of_older_files_say_the_same_model(wrapped: Wrapped, tmp_path: Path) -> None:
    """Text part at the top of config.json, with M-RoPE as a kind of scaling."""
    folder = wrapped("qwen2_vl")
    older = as_older_config(Path(shutil.copytree(folder, tmp_path / "older")))
    assert spec_from_config(config_of(older)) == spec_from_config(config_of(folder))
    same_folder(older, megatron_to_hf(hf_to_megatron(older, tmp_path / "megatron", **CUT), tmp_path / "hf"))


@pytest.mark.parametrize("row", WRAPPERS, ids=lambda row: row.model_type)
def test_what_a_configuration_leaves_out_is_what_the_class_takes(row: Wrapper) -> None:
    """Whether the head is tied is for the files to say."""
    from transformers import AutoConfig

    kinds = [
        kind for kind, text in TEXT_TYPES.items() if text.family in row.text_families and not kind.endswith("_text")
    ]
    for kind in kinds if row.any_text else [row.text_type]:
        bare = {"model_type": row.model_type, "vision_config": {}, "text_config": {"model_type": kind}}
        full = json.loads(AutoConfig.for_model(row.model_type, text_config={"model_type": kind}).to_json_string())
        one, other = spec_from_config(bare), spec_from_config(full)
        assert other.replaced(tied=one.tied) == one
        assert AutoConfig.for_model(row.model_type).tie_word_embeddings == row.ties


def test_files_say_whether_the_head_is_tied(wrapped: Wrapped, tmp_path: Path) -> None:
    """Mistral-Small-3.1 has a head of its own, and a configuration that transformers 5 takes for a tied one."""
    folder = Path(shutil.copytree(wrapped("mistral3"), tmp_path / "untied"))
    config = config_of(folder)
    del config["tie_word_embeddings"], config["text_config"]["tie_word_embeddings"]
    (folder / "config.json").write_text(json.dumps(config))
    source = HFSource(folder)
    assert not source.spec.tied
    assert "transformers takes for true, but the files have a head of their own" in " ".join(source.origin.notes)
    same_folder(folder, megatron_to_hf(hf_to_megatron(folder, tmp_path / "megatron"), tmp_path / "hf"))
    tied = Path(shutil.copytree(wrapped("qwen2_vl tied"), tmp_path / "tied"))
    edit_config(tied, tie_word_embeddings=False)
    source = HFSource(tied)
    assert source.spec.tied
    assert "warning: tie_word_embeddings is false in config.json" in " ".join(source.origin.notes)


def test_plan_report_and_manifest_say_what_is_carried_and_what_images_need(wrapped: Wrapped, tmp_path: Path) -> None:
    folder, out = wrapped("qwen2_vl"), tmp_path / "out"
    beside = {name: data for name, data in hf_tensors(folder).items() if name.startswith("visual.")}
    note = f"{len(beside)} tensors (40.1 KB) beside the text part of qwen2_vl: carried as they are"
    mrope = "--position-embedding-type mrope --mrope-section 1 1 2"
    plan = succeeded(verb("plan", folder, out, "--tp", 2, "--no-measure")).out
    assert f"{len(hf_tensors(folder))} source tensors, each read once" in plan
    report = succeeded(verb("convert", folder, out, "--tp", 2)).out
    manifest = json.loads((out / "iter_0000001/conversion.json").read_text())
    for text in (plan, report, " ".join(manifest["notes"])):
        assert note in text and mrope in text
    side = manifest["files"]["hf_files/carried.safetensors"]
    assert side["tensors"].keys() == beside.keys()
    assert different(load_file(out / "iter_0000001/hf_files/carried.safetensors"), beside) == []
    assert config_of(out / "iter_0000001/hf_files") == config_of(folder)
    assert note in succeeded(verb("inspect", out)).out


def test_a_side_file_that_is_altered_or_missing_is_found(wrapped: Wrapped, tmp_path: Path) -> None:
    folder, out = wrapped("llava"), tmp_path / "out"
    hf_to_megatron(folder, out)
    side = out / "iter_0000001/hf_files/carried.safetensors"
    assert "EQUAL: 15 tensors and 27 beside the text part" in succeeded(verb("verify", folder, out)).out
    whole = side.read_bytes()
    side.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    name = [*load_file(side)][-1]
    for command, *words in (("verify", "elements differ"), ("diff", "beside the text part: ")):
        run = verb(command, folder, out)
        assert run.code == 1 and all(word in run.out for word in words), run
    assert verb("verify", out).out.count("has changed since it was written") == 1, name
    side.unlink()
    assert "only A has 27 tensors" in verb("verify", folder, out).out
    assert "hf_files/carried.safetensors is missing" in verb("verify", out).out
    assert "without hf_files/carried.safetensors" in succeeded(verb("inspect", out)).out
    for options in ((), ("--tp", 2)):
        refused(
            verb("convert", out, tmp_path / "back", *options), "there is no hf_files/carried.safetensors", "--text-only"
        )
    nothing_complete(tmp_path / "back")
    succeeded(verb("convert", out, tmp_path / "back", "--hf-config", folder))
    same_folder(folder, tmp_path / "back")


def test_the_text_part_alone_is_a_model_of_its_family(wrapped: Wrapped, tmp_path: Path) -> None:
    folder, out = wrapped("qwen3_vl"), tmp_path / "out"
    run = succeeded(verb("convert", folder, out, "--text-only"))
    assert "27 tensors (64.6 KB) beside the text part of qwen3_vl: left out, as --text-only says" in run.out
    assert not (out / "iter_0000001/hf_files").exists()
    assert json.loads((out / "iter_0000001/conversion.json").read_text())["ignored"] == [
        "model.visual.* (27 tensors, --text-only)"
    ]
    whole = hf_to_megatron(folder, tmp_path / "whole")
    for number, source in enumerate((out, whole)):
        back = tmp_path / f"back{number}"
        succeeded(verb("convert", source, back, *(("--text-only",) if source == whole else ())))
        assert config_of(back)["architectures"] == ["Qwen3ForCausalLM"]
        assert difference(hf_logits(back, TOKENS), text_logits(folder, TOKENS)) == 0
    assert "EQUAL" in succeeded(verb("verify", folder, out, "--text-only")).out


def test_what_has_no_place_for_the_rest_refuses_it(wrapped: Wrapped, tmp_path: Path) -> None:
    folder = wrapped("llava")
    out = tmp_path / "out"
    refused(verb("convert", folder, out, "--to", "mindspore"), "27 tensors", "has no place", "--text-only")
    refused(convert("--load-dir", folder, "--save-dir", out), "27 tensors", "--text-only", code=1)
    refused(
        verb("convert", folder, out, "--to", "hf", "--as", "mistral"),
        "for which a model of the mistral family has no place",
    )
    nothing_complete(tmp_path)
    succeeded(convert("--load-dir", folder, "--save-dir", out, "--text-only"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"unheard_of": 1}, "config.json has fields that the llava family does not know: unheard_of"),
        ({"vocab_size": 7}, "config.json has fields that the llava family does not know: vocab_size"),
        ({"text_config": 3}, "its text_config is 3; it must be an object"),
        (
            {"text_config": {"model_type": "unheard_of"}},
            "with a text part of model_type unheard_of, which is not supported",
        ),
        ({"text_config": {"model_type": "gpt2"}}, "whose names in such a model are not known"),
        ({"model_type": "mllama", "architectures": ["MllamaForConditionalGeneration"]}, "attend to images alone"),
    ],
)
def test_configurations_that_are_refused(wrapped: Wrapped, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    folder = Path(shutil.copytree(wrapped("llava"), tmp_path / "hf"))
    edit_config(folder, **changes)
    refused(verb("plan", folder, tmp_path / "out"), words)


@pytest.mark.parametrize(
    ("renamed", "words"),
    [
        (
            {"multi_modal_projector.linear_1.bias": "projector.bias"},
            "neither of the text part (language_model.model.*) nor",
        ),
        ({"language_model.model.embed_tokens.weight": "embed.weight"}, "of which none is there"),
        ({"language_model.model.norm.weight": "language_model.model.norm.bias"}, "norm.weight (final_norm) is missing"),
    ],
)
def test_names_that_are_refused(wrapped: Wrapped, tmp_path: Path, renamed: dict[str, str], words: str) -> None:
    folder = Path(shutil.copytree(wrapped("llava"), tmp_path / "hf"))
    tensors = {renamed.get(name, name): data for name, data in hf_tensors(folder).items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    refused(verb("plan", folder, tmp_path / "out"), words)


def test_quantised_tensors_beside_the_text_part_are_refused(wrapped: Wrapped, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(wrapped("llava"), tmp_path / "hf"))
    tensors = hf_tensors(folder)
    name = "multi_modal_projector.linear_1.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    refused(verb("plan", folder, tmp_path / "out"), "tensors beside the text part are quantised", name)


@pytest.mark.parametrize("finished", [1, 3])
def test_an_interrupted_run_goes_on(
    wrapped: Wrapped, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: int
) -> None:
    """Of the four files of ranks and the side file some are finished; both ways."""
    folder = wrapped("llava", max_shard_size=30_000)
    whole = hf_to_megatron(folder, tmp_path / "whole", **CUT)
    for source, target, options in (
        (folder, tmp_path / "megatron", ("--tp", 2, "--pp", 2)),
        (whole, tmp_path / "hf", ("--max-shard-size", "30KB")),
    ):
        count = itertools.count()
        finish = Journal.finish

        def stop(self: Journal, *args: Any, finish: Any = finish, count: Any = count) -> None:
            if next(count) >= finished:
                raise Stopped("as a test says")
            finish(self, *args)

        monkeypatch.setattr(Journal, "finish", stop)
        refused(verb("convert", source, target, *options), "as a test says")
        monkeypatch.undo()
        assert "went on from an interrupted run" in succeeded(verb("convert", source, target, *options)).out
    assert different(ranks(whole), ranks(tmp_path / "megatron")) == []
    same_folder(folder, tmp_path / "hf")


def ranks(folder: Path) -> dict[str, Any]:
    """Tensors of the first rank, and of the side file."""
    return {
        **tensors_in(rank_content(folder, "mp_rank_00_000")["model"]),
        **load_file(folder / "iter_0000001/hf_files/carried.safetensors"),
    }


@live
def test_a_bridge_is_of_the_text_part_and_saves_the_whole(wrapped_qwen: Path, tmp_path: Path) -> None:
    bridge = AutoBridge.from_hf_pretrained(wrapped_qwen)
    (model,) = bridge.to_megatron_model(wrap_with_ddp=False)
    found = {each.param_name: each.weight for each in bridge.export_hf_weights(model, show_progress=False)}
    text = {name: data for name, data in hf_tensors(wrapped_qwen).items() if not name.startswith("visual.")}
    assert different(found, text) == []
    bridge.save_hf_pretrained(model, tmp_path / "saved", show_progress=False)
    same_folder(wrapped_qwen, tmp_path / "saved")
    assert "Qwen2VLForConditionalGeneration" in AutoBridge.list_supported_models()


@pytest.fixture
def wrapped_qwen(wrapped: Wrapped) -> Path:
    return wrapped("qwen2_vl")


@pytest.mark.parametrize(("scheme", "place"), [("blocks", "top"), ("int4, groups", "text_config")])
def test_a_quantised_text_part_is_decoded_and_the_rest_carried(tmp_path: Path, scheme: str, place: str) -> None:
    """Where Qwen3-VL's FP8 files and Kimi-K2.5's of INT4 say it."""
    meaning = quantised.write(tmp_path / "llama", quantised.SCHEMES[scheme])
    folder, text = tmp_path / "llava", config_of(tmp_path / "llama")
    described = {"quantization_config": text.pop("quantization_config")}
    beside = {"vision_tower.a": torch.arange(5.0), "image_newline": torch.ones(3, dtype=torch.bfloat16)}
    named = {f"language_model.{name}": data for name, data in hf_tensors(tmp_path / "llama").items()}
    folder.mkdir()
    save_file({**named, **beside}, folder / "model.safetensors", {"format": "pt"})
    config = {"model_type": "llava_next", "architectures": ["LlavaNextForConditionalGeneration"], "vision_config": {}}
    config |= described if place == "top" else {}
    config["text_config"] = text | (described if place == "text_config" else {})
    (folder / "config.json").write_text(json.dumps(config))
    back = megatron_to_hf(hf_to_megatron(folder, tmp_path / "megatron", tp=2), tmp_path / "hf")
    wanted = {**{f"language_model.{name}": data for name, data in meaning.items()}, **beside}
    assert different(hf_tensors(back), wanted) == []
    written = config_of(back)
    assert "quantization_config" not in {**written, **written["text_config"]}
