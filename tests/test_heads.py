"""Classes besides the language model: sequence classification (reward models), and base models (embedding models)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from megatron_converters.basics.errors import ConversionError
from megatron_converters.families import FAMILIES
from megatron_converters.families.config_json import spec_from_config
from megatron_converters.families.heads import class_names
from tests.bare import edit
from tests.conversions import different, hf_to_megatron, hf_to_torch_dist, megatron_to_hf
from tests.helpers import hf_tensors, refused, succeeded, verb
from tests.oracle import hf
from tests.oracle.hf import TOKENS, difference
from tests.oracle.pool import MegatronPool

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

#: Models by name: that of a tiny language model, the class, and the number of labels.
CLASSES = {
    "reward": ("qwen2-tied", "AutoModelForSequenceClassification", 1),
    "classifier": ("llama2", "AutoModelForSequenceClassification", 3),
    "embedding": ("qwen3-tied", "AutoModel", 0),
    "untied embedding": ("llama2", "AutoModel", 0),
}
CLASSIFIERS, BASES = ("reward", "classifier"), ("embedding", "untied embedding")
#: Largest difference, relative to the largest value, as in the proof of families.
TOLERANCE = 1e-5
HEAD, EMBEDDINGS = "output_layer.weight", "embedding.word_embeddings.weight"
Made = Callable[[str], Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Function `made(name)`: the folder that transformers saves of a random model of `CLASSES`."""

    def make(name: str) -> Path:
        import transformers

        base, auto, labels = CLASSES[name]
        more = {"num_labels": labels} if labels else {}
        config = transformers.AutoConfig.for_model(**{**hf._fields(base), "dtype": "float32", **more})
        model = getattr(transformers, auto).from_config(config, dtype=torch.float32)
        hf._randomise(model, 0)
        folder = tmp_path_factory.mktemp("heads") / name
        model.save_pretrained(folder)
        return folder

    return cache(make)


def config(folder: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return read


def changed(folder: Path, target: Path, tensors: dict[str, torch.Tensor] | None = None, **fields: Any) -> Path:
    """Copy of a folder with other fields in config.json, and other tensors."""
    shutil.copytree(folder, target)
    (target / "config.json").write_text(json.dumps({**config(target), **fields}))
    if tensors is not None:
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def output(folder: Path, name: str) -> torch.Tensor:
    """What transformers computes: logits of the last token, or the hidden state of each."""
    import transformers

    auto = getattr(transformers, CLASSES[name][1])
    model = auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        found = [model(tokens[None], use_cache=False) for tokens in TOKENS]
        return torch.cat([each.logits if name in CLASSIFIERS else each.last_hidden_state for each in found]).clone()


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_the_head_of_a_classifier_is_whole_on_each_rank(made: Made, tmp_path: Path, name: str) -> None:
    folder = made(name)
    score = hf_tensors(folder)["score.weight"]
    assert score.shape == (CLASSES[name][2], 64)
    cut = dict(tp=2, pp=2, allow_inexpressible=True)
    files = hf_to_megatron(folder, tmp_path / "files", **cut)
    for rank in ("00_000", "01_000", "00_001", "01_001"):
        model = torch.load(next(files.glob(f"iter_*/mp_rank_{rank}/*.pt")), weights_only=False)["model"]
        assert torch.equal(model[HEAD], score) if rank.endswith("1") else HEAD not in model
    chunks = hf_to_torch_dist(folder, tmp_path / "chunks", **cut)
    stored = {HEAD: torch.empty_like(score)}  # a shape other than the stored one is an error
    dcp.load(stored, checkpoint_id=chunks / "iter_0000001", no_dist=True)
    assert torch.equal(stored[HEAD], score)
    for source in (files, chunks):
        back = megatron_to_hf(source, tmp_path / source.name / "hf")
        assert different(hf_tensors(folder), hf_tensors(back)) == []
        assert {key: config(back)[key] for key in config(folder)} == config(folder)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_megatron_computes_the_logits_of_a_classifier(
    made: Made, megatron_pool: MegatronPool, tmp_path: Path, name: str
) -> None:
    """As logits of the first tokens, once the head has zeros for the others."""
    files = hf_to_megatron(made(name), tmp_path / "files", impl="local", allow_inexpressible=True)

    def widen(content: dict[str, Any]) -> dict[str, Any]:
        model, args = content["model"], content["args"]
        wide = torch.zeros_like(model[EMBEDDINGS])
        wide[: len(model[HEAD])] = model[HEAD]
        del args.num_labels
        return {**content, "model": {**model, HEAD: wide}}

    edit(files / "iter_0000001", widen)
    found = megatron_pool.logits(files, TOKENS)[:, -1, : CLASSES[name][2]]
    assert difference(found, output(made(name), name)) < TOLERANCE


@pytest.mark.parametrize("name", BASES)
def test_a_base_model_is_what_comes_before_the_embeddings(
    made: Made, megatron_pool: MegatronPool, tmp_path: Path, name: str
) -> None:
    folder = made(name)
    files = hf_to_megatron(folder, tmp_path / "files", impl="local")
    chunks = hf_to_torch_dist(folder, tmp_path / "chunks", tp=2, pp=2)
    wanted = output(folder, name) @ hf_tensors(folder)["embed_tokens.weight"].T
    for found in (megatron_pool.logits(files, TOKENS), megatron_pool.distributed_logits(chunks, TOKENS)):
        assert difference(found, wanted) < TOLERANCE
    for source in (files, chunks):
        back = megatron_to_hf(source, tmp_path / source.name / "hf")
        assert different(hf_tensors(folder), hf_tensors(back)) == []  # by their names without the prefix
        assert {key: config(back)[key] for key in config(folder)} == config(folder)


def test_files_of_a_base_model_count_whatever_class_is_named(made: Made, tmp_path: Path) -> None:
    """As Qwen3-Embedding-8B is published: ForCausalLM, not tied, without prefix and without head."""
    folder = changed(made("embedding"), tmp_path / "hf", architectures=["Qwen3ForCausalLM"], tie_word_embeddings=False)
    run = succeeded(verb("convert", folder, tmp_path / "meg"))
    assert "the names lack the prefix 'model.', and there is no lm_head.weight: the files are of Qwen3Model" in run.out
    back = megatron_to_hf(tmp_path / "meg", tmp_path / "back")
    assert different(hf_tensors(folder), hf_tensors(back)) == []
    assert config(back)["architectures"] == ["Qwen3Model"]
    prefixed = {f"model.{name}": tensor for name, tensor in hf_tensors(folder).items()}
    other = changed(folder, tmp_path / "other", prefixed)
    refused(verb("convert", other, tmp_path / "out"), "lm_head.weight", "is missing")


def test_without_a_configuration_labels_are_written(made: Made, tmp_path: Path) -> None:
    files = hf_to_megatron(made("classifier"), tmp_path / "files", allow_inexpressible=True)

    def forget(content: dict[str, Any]) -> dict[str, Any]:
        del content["args"].hf_config
        return content

    edit(files / "iter_0000001", forget)
    back = megatron_to_hf(files, tmp_path / "back")
    assert different(hf_tensors(made("classifier")), hf_tensors(back)) == []
    assert config(back)["architectures"] == ["LlamaForSequenceClassification"]
    assert config(back)["id2label"] == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}
    assert output(back, "classifier").shape == (2, 3)


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("classifier", {}, "a classifier's head of 3 rows (score)"),
        ("classifier", {"architectures": ["LlamaForTokenClassification"]}, "whose head says labels for each token"),
        ("classifier", {"architectures": ["LlamaForQuestionAnswering"]}, "whose head says where an answer begins"),
        ("classifier", {"num_labels": 2}, "num_labels=2 and 3 labels in id2label"),
        (
            "classifier",
            {"id2label": {"0": "a"}},
            "score.weight (score) has shape [3, 64]; config.json requires [1, 64]",
        ),
        ("classifier", {"id2label": "a"}, "it must be an object of labels"),
        ("embedding", {"is_causal": False}, "is_causal"),
        ("embedding", {"use_bidirectional_attention": True}, "later tokens"),
    ],
)
def test_what_is_refused(made: Made, tmp_path: Path, name: str, fields: dict[str, Any], words: str) -> None:
    folder = changed(made(name), tmp_path / "hf", **fields)
    refused(verb("convert", folder, tmp_path / "out"), words)
    assert not (tmp_path / "out").exists()


def test_multipliers_are_those_of_language_models() -> None:
    fields = {"architectures": ["GraniteModel"], "model_type": "granite", "hidden_size": 64, "intermediate_size": 112}
    fields |= {"num_hidden_layers": 2, "num_attention_heads": 8, "vocab_size": 199}
    with pytest.raises(ConversionError, match=r"names GraniteModel, .* only GraniteForCausalLM is converted"):
        spec_from_config(fields)


@pytest.mark.parametrize(
    ("name", "words"), [("reward", "without a name: score"), ("embedding", "a base model without a head")]
)
def test_mindspore_has_no_place_for_them(made: Made, tmp_path: Path, name: str, words: str) -> None:
    refused(verb("convert", made(name), tmp_path / "out", "--to", "mindspore"), words)


def test_a_bridge_is_for_language_models(made: Made) -> None:
    from megatron_converters.bridge import AutoBridge

    for name, named in (("reward", "Qwen2ForSequenceClassification"), ("embedding", "Qwen3Model")):
        with pytest.raises(ConversionError, match=f"a bridge is for language models, and this is of {named}"):
            AutoBridge.from_hf_pretrained(made(name))


def test_the_classes_are_those_of_transformers() -> None:
    from transformers.models.auto import modeling_auto as auto

    known = (auto.MODEL_MAPPING_NAMES, auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES)
    own = (family for family in FAMILIES.built_in.values() if not family.computed_by)  # by a class of another family
    for family in own:
        for name, table in zip(class_names(family)[len(family.architectures) :], known, strict=False):
            assert table.get(family.model_type, name) == name
