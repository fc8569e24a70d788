"""Files of AutoBridge: saved models and weights, checkpoints of Megatron-LM, and what a failure leaves."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron_converters.api import verify
from megatron_converters.basics.errors import ConversionError
from megatron_converters.bridge import AutoBridge
from tests.conversions import different, hf_to_megatron, hf_to_torch_dist
from tests.helpers import file_bytes, hf_tensors, nothing_complete
from tests.live_process import live
from tests.oracle.hf import difference, hf_logits, make_model
from tests.oracle.pool import MegatronPool
from tests.test_bridge import TOKENS, agree, built, exported

HFModel = Callable[..., Path]
#: Files beside the weights, and their bytes; the code ends whoever runs it.
BESIDE = {
    "tokenizer_config.json": b'{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}',
    "tokenizer.json": b'{"version": "1.0", "model": {"type": "WordLevel", "vocab": {"</s>": 2}, "unk_token": "</s>"}}',
    "special_tokens_map.json": b'{"eos_token": "</s>"}',
    "modeling_own.py": b"import os\r\nos._exit(3)\n",
    "configuration_own.py": b"raise SystemExit(4)\n",
}
AUTO_MAP = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
KINDS = ("llama3.1", "gpt2", "qwen2-moe", "deepseek-v3-yarn", "glm", "mistral-window", "starcoder2")


@pytest.fixture
def llama(hf_model: HFModel) -> Path:
    return hf_model("llama3")


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A Llama of several files with a tokenizer and code of its own."""
    folder = make_model("llama3", tmp_path / "own", max_shard_size="200KB")
    for name, content in BESIDE.items():
        (folder / name).write_bytes(content)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": AUTO_MAP}))
    return folder


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, hf_model: HFModel) -> Path:
    options = dict(attn_pdrop=0.0) if request.param == "gpt2" else {}  # which the oracle's layers lack
    return hf_model(request.param, **options)


# -- Hugging Face


@live
def test_saved_models_are_the_source_with_all_that_is_beside(own: Path, tmp_path: Path) -> None:
    bridge, model = built(own)
    out = tmp_path / "out"
    bridge.save_hf_pretrained([model], out, show_progress=False, max_shard_size=200_000)
    assert len(list(out.glob("*.safetensors"))) > 1
    assert different(hf_tensors(out), hf_tensors(own)) == []
    assert {name: (out / name).read_bytes() for name in BESIDE} == BESIDE
    written, source = (json.loads((folder / "config.json").read_text()) for folder in (out, own))
    assert written == source
    comparison = verify(own, out)
    assert comparison.equal, comparison.findings
    assert verify(out).equal
    assert torch.equal(hf_logits(out, TOKENS), hf_logits(own, TOKENS))


@live
def test_the_tokenizer_may_be_another_one(own: Path, llama: Path, tmp_path: Path) -> None:
    bridge, model = built(llama)
    bridge.save_hf_pretrained(model, tmp_path / "out", False, own)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == BESIDE["tokenizer.json"]
    assert different(hf_tensors(tmp_path / "out"), hf_tensors(llama)) == []


@live
def test_weights_alone_are_saved_without_a_configuration(own: Path, tmp_path: Path) -> None:
    bridge, model = built(own)
    bridge.save_hf_weights(model, tmp_path / "out", show_progress=False)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["conversion.json", "model.safetensors"]
    assert different(hf_tensors(tmp_path / "out"), hf_tensors(own)) == []
    bridge.save_hf_weights(model, tmp_path / "half", False, True, True, True, 1, torch.bfloat16)
    cast = {name: tensor.bfloat16() for name, tensor in hf_tensors(own).items()}
    assert different(hf_tensors(tmp_path / "half"), cast) == []
    with pytest.raises(ConversionError, match="weight_dtype is int8"):
        bridge.save_hf_weights(model, tmp_path / "int", show_progress=False, weight_dtype=torch.int8)
    assert not (tmp_path / "int").exists()


@live
def test_a_trained_model_is_saved_as_it_is(llama: Path, tmp_path: Path) -> None:
    bridge, model = built(llama)
    model.train()
    positions = torch.arange(TOKENS.shape[1]).expand(TOKENS.shape[0], -1)
    model(TOKENS, positions, None, labels=TOKENS.roll(-1, 1)).mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter -= 0.1 * parameter.grad
    weights = exported(bridge, model)
    assert len(different(weights, hf_tensors(llama))) == len(weights)
    bridge.save_hf_pretrained(model, tmp_path / "out", show_progress=False)
    assert different(hf_tensors(tmp_path / "out"), weights) == []
    agree(model, tmp_path / "out")


@live
def test_models_are_replaced_only_when_asked(llama: Path, tmp_path: Path) -> None:
    bridge, model = built(llama)
    saves: list[tuple[str, Callable[..., None]]] = [
        ("hf", lambda out, **options: bridge.save_hf_pretrained(model, out, show_progress=False, **options)),
        ("weights", lambda out, **options: bridge.save_hf_weights(model, out, show_progress=False, **options)),
        ("megatron", lambda out, **options: bridge.save_megatron_model(model, out, show_progress=False, **options)),
    ]
    for name, save in saves:
        out = tmp_path / name
        save(out)
        before = file_bytes(out)
        with pytest.raises(ConversionError, match="overwrite"):
            save(out)
        assert file_bytes(out) == before
        save(out, overwrite=True)
        assert file_bytes(out).keys() == before.keys()


def test_imports_are_repeated_in_vain_and_replaced_only_when_asked(llama: Path, own: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    AutoBridge.import_ckpt(llama, out, show_progress=False)
    before = file_bytes(out)
    AutoBridge.import_ckpt(llama, out, show_progress=False)
    assert file_bytes(out) == before
    with pytest.raises(ConversionError, match="overwrite"):
        AutoBridge.import_ckpt(own, out, show_progress=False)
    assert file_bytes(out) == before
    AutoBridge.import_ckpt(own, out, show_progress=False, overwrite=True)
    assert verify(own, out).equal


@live
def test_failed_writes_leave_nothing_that_looks_complete(llama: Path, tmp_path: Path) -> None:
    bridge, model = built(llama)
    saves: list[Callable[[Path], None]] = [
        lambda out: bridge.save_hf_pretrained(model, out, show_progress=False),
        lambda out: bridge.save_hf_weights(model, out, show_progress=False),
        lambda out: bridge.save_megatron_model(model, out, show_progress=False),
        lambda out: AutoBridge.import_ckpt(llama, out, show_progress=False),
    ]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for number, save in enumerate(saves):
        out = tmp_path / str(number)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
        try:
            with pytest.raises((ConversionError, OSError)):
                save(out)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        nothing_complete(tmp_path / str(number))
        save(out)
    assert different(hf_tensors(tmp_path / "0"), hf_tensors(llama)) == []


@live
def test_values_beyond_float16_leave_nothing_either(llama: Path, tmp_path: Path) -> None:
    bridge, model = built(llama)
    with torch.no_grad():
        model.decoder.final_layernorm.weight[3] = 70000.0
    with pytest.raises(ConversionError, match="float16"):
        bridge.save_hf_pretrained(model, tmp_path / "out", show_progress=False, weight_dtype="float16")
    nothing_complete(tmp_path)


@live
def test_models_of_a_configuration_take_the_tokenizer_of_another(own: Path, llama: Path, tmp_path: Path) -> None:
    bridge = AutoBridge.from_hf_config(json.loads((llama / "config.json").read_text()))
    (model,) = bridge.to_megatron_model(hf_path=str(llama), wrap_with_ddp=False)
    bridge.save_hf_pretrained(model, tmp_path / "out", show_progress=False, source_path=own)
    assert different(hf_tensors(tmp_path / "out"), hf_tensors(llama)) == []
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == BESIDE["tokenizer.json"]
    assert torch.equal(hf_logits(tmp_path / "out", TOKENS), hf_logits(llama, TOKENS))


# -- Megatron-LM


def test_imported_checkpoints_load_strictly_in_megatron_core(
    megatron_pool: MegatronPool, kind: Path, tmp_path: Path
) -> None:
    AutoBridge.import_ckpt(kind, tmp_path / "out", show_progress=False)
    assert difference(megatron_pool.distributed_logits(tmp_path / "out", TOKENS), hf_logits(kind, TOKENS)) < 1e-5
    assert verify(tmp_path / "out").equal
    assert verify(kind, tmp_path / "out").equal
    assert AutoBridge.get_hf_model_id_from_checkpoint(tmp_path / "out") == str(kind)


def _object(value: Any) -> Any:
    """Object that `_target_` names, of the few modules that a configuration may name."""
    if not isinstance(value, dict):
        return value
    assert value.keys() == {"_target_", "_call_"} and value["_call_"] is False
    module, _, name = value["_target_"].rpartition(".")
    known = {"torch": torch, "torch.nn.functional": torch.nn.functional}
    return getattr(known[module], name)


@live
def test_run_config_says_the_whole_model(kind: Path, tmp_path: Path) -> None:
    """Its fields are those of our provider, whose model computes what transformers computes."""
    from megatron_converters.live.provider import ON_CPU, GPTModelProvider, MLAModelProvider, gelu_tanh

    AutoBridge.import_ckpt(kind, tmp_path / "out", show_progress=False)
    (path,) = (tmp_path / "out").rglob("run_config.yaml")
    fields = yaml.safe_load(path.read_text())["model"]
    assert fields.pop("hf_model_id") == str(kind)
    classes = {each.__name__: each for each in (GPTModelProvider, MLAModelProvider)}
    provider_class = classes[fields.pop("_target_").rpartition(".")[2]]
    spec = fields.pop("transformer_layer_spec", None)
    assert (spec is not None) == ("moe" in kind.name or "deepseek" in kind.name)
    assert spec is None or (spec["_partial_"], spec["use_transformer_engine"]) == (True, True)
    assert fields.pop("transformer_impl") == "transformer_engine"
    fused = fields.pop("bias_activation_fusion")
    settings = {**ON_CPU, "bias_activation_fusion": fused, "transformer_impl": "local", "moe_grouped_gemm": False}
    settings |= {"make_vocab_size_divisible_by": 1}
    provider = provider_class(**{**{name: _object(value) for name, value in fields.items()}, **settings})
    if fused:  # Megatron-Bridge's name of the tanh form, which our provider calls by its own
        provider.activation_func = gelu_tanh
    (model,) = provider.provide_distributed_model(wrap_with_ddp=False)
    AutoBridge.from_hf_pretrained(kind).load_hf_weights(model)
    agree(model, kind)


@pytest.mark.parametrize("family", ["llama3.2-tied", "qwen3-moe", "gpt2"])
def test_checkpoints_of_either_format_are_exported(hf_model: HFModel, tmp_path: Path, family: str) -> None:
    folder = hf_model(family)
    bridge = AutoBridge.from_hf_pretrained(folder)
    sizes = dict(tp=2, pp=2) | (dict(ep=2, etp=1) if "moe" in family else {})
    files = hf_to_megatron(folder, tmp_path / "files", impl="local", **sizes)
    chunks = hf_to_torch_dist(folder, tmp_path / "chunks", **sizes)
    for source in (files, chunks):
        out = tmp_path / f"{source.name} back"
        bridge.export_ckpt(source, out, show_progress=False)
        assert different(hf_tensors(out), hf_tensors(folder)) == []
        assert verify(folder, out).equal
    with pytest.raises(ConversionError, match="overwrite"):
        bridge.export_ckpt(files, out, False, False)
    bridge.export_ckpt(str(files), str(out), False, True, folder, overwrite=True)


@live
def test_live_models_are_saved_as_checkpoints_and_loaded_again(kind: Path, tmp_path: Path) -> None:
    bridge, model = built(kind)
    bridge.save_megatron_model([model], tmp_path / "out", show_progress=False)
    assert verify(kind, tmp_path / "out").equal
    assert AutoBridge.get_hf_model_id_from_checkpoint(tmp_path / "out") == str(kind)
    (again,) = bridge.load_megatron_model(tmp_path / "out", wrap_with_ddp=False)
    agree(again, kind)
    assert different(exported(bridge, again), hf_tensors(kind)) == []
    bridge.export_ckpt(tmp_path / "out", tmp_path / "back", show_progress=False)
    assert different(hf_tensors(tmp_path / "back"), hf_tensors(kind)) == []


@live
def test_settings_of_loaded_checkpoints(llama: Path, own: Path, tmp_path: Path) -> None:
    bridge, model = built(llama)
    bridge.save_megatron_model(model, tmp_path / "out", own, show_progress=False)
    for overrides in ({"seq_length": 33}, type("Overrides", (), {})()):
        (again,) = bridge.load_megatron_model(tmp_path / "out", mp_overrides=overrides, wrap_with_ddp=False)
        agree(again, llama)
    with pytest.raises(ConversionError, match="mp_overrides has tensor_parallel, which is no setting"):
        bridge.load_megatron_model(tmp_path / "out", mp_overrides={"tensor_parallel": 2})
    with pytest.raises(ConversionError, match="absent"):
        bridge.load_megatron_model(tmp_path / "absent")


@live
def test_bridges_of_a_checkpoint(llama: Path, own: Path, tmp_path: Path) -> None:
    AutoBridge.import_ckpt(llama, tmp_path / "megatron", show_progress=False, torch_dtype=torch.bfloat16)
    bridge = AutoBridge.from_auto_config(tmp_path / "megatron", own)
    assert bridge.transformer_config.hidden_size == 64
    models = bridge.load_megatron_model(tmp_path / "megatron", wrap_with_ddp=False)
    cast = {name: tensor.bfloat16() for name, tensor in hf_tensors(llama).items()}
    assert different(exported(bridge, models), cast) == []
    bridge.save_hf_pretrained(models, tmp_path / "out", show_progress=False)
    assert different(hf_tensors(tmp_path / "out"), cast) == []
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == BESIDE["tokenizer.json"]
    bridge.export_ckpt(tmp_path / "megatron", tmp_path / "exported", show_progress=False)
    assert different(hf_tensors(tmp_path / "exported"), cast) == []


def test_checkpoints_that_record_no_model(llama: Path, tmp_path: Path) -> None:
    root = hf_to_torch_dist(llama, tmp_path / "plain")
    assert AutoBridge.get_hf_model_id_from_checkpoint(root) is None
    AutoBridge.import_ckpt(llama, tmp_path / "ours", show_progress=False)
    shutil.rmtree(tmp_path / "ours" / "iter_0000001")
    with pytest.raises(ConversionError):
        AutoBridge.get_hf_model_id_from_checkpoint(tmp_path / "absent")
