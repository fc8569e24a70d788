"""docs/bridge.md is true: blocks and commands run, with ids, paths and sizes substituted."""

from __future__ import annotations

import io
import json
import logging
import runpy
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch

import megatron_converters as mc
from megatron_converters.bridge import AutoBridge, CausalLMBridge
from tests.command_blocks import blocks, run
from tests.conversions import different, hf_to_megatron
from tests.helpers import RANK_FILE, ROOT, hf_tensors
from tests.hub_repos import WRITER
from tests.hub_server import serving, use, without_hub_variables
from tests.live_process import live
from tests.oracle.hf import make_model
from tests.test_docs import python_blocks

HFModel = Callable[..., Path]
PAGE = "docs/bridge.md"
TEXT = (ROOT / PAGE).read_text()
EXAMPLE = ROOT / "examples/2_way_hf_binding.py"
#: Script of the page, which its command starts.
SCRIPT = "# train.py\n"
BLOCKS = [block for block in python_blocks(PAGE) if not block.startswith(SCRIPT)]
COMMANDS = blocks(TEXT, "bash")
#: Families of the models that the page names on the Hub.
HUB = {
    "meta-llama/Llama-3.2-1B": "llama3.2-tied",
    "meta-llama/Llama-2-7b-hf": "llama2",
    "meta-llama/Llama-3-8B": "llama3",
    "gpt2": "gpt2",
    "microsoft/phi-2": "phi",
    "custom/model": "qwen3",
}
FIRST = "meta-llama/Llama-3.2-1B"
#: What stands for the page's sizes, which take more processes, and for its paths.
SUBSTITUTED = {
    "tensor_model_parallel_size = 8": "tensor_model_parallel_size = 1",
    "pipeline_model_parallel_size = 2": "pipeline_model_parallel_size = 1",
    "/path/to/local/model": "local",
    "any-supported-model": "local",
}


@pytest.fixture
def served(hf_model: HFModel) -> dict[str, Path]:
    """Models of the Hub, named as `serving` wants them."""
    return {name.replace("/", "__"): hf_model(family) for name, family in HUB.items()}


def saved(names: dict[str, Any], source: dict[str, torch.Tensor]) -> None:
    """A folder is complete, and has the source's weights."""
    assert mc.verify("my-fine-tuned-llama")
    assert different(hf_tensors(Path("my-fine-tuned-llama")), source) == []
    assert names["hf_model"].config.architectures == ["LlamaForCausalLM"]


def kept(names: dict[str, Any], source: dict[str, torch.Tensor]) -> None:
    assert different(hf_tensors(Path("my-fine-tuned-llama")), source) == []


def weights_alone(names: dict[str, Any], source: dict[str, torch.Tensor]) -> None:
    for folder in map(Path, ("model_weights", "weights")):
        assert different(hf_tensors(folder), source) == []
        assert not (folder / "config.json").exists()


def checkpoints(names: dict[str, Any], source: dict[str, torch.Tensor]) -> None:
    assert different(hf_tensors(Path("exports/llama32_1b")), source) == []


def loaded(names: dict[str, Any], source: dict[str, torch.Tensor]) -> None:
    weights = dict(names["bridge"].export_hf_weights(names["model"], show_progress=False))
    assert different(weights, source) == []


def received(names: dict[str, Any], source: dict[str, torch.Tensor]) -> None:
    assert different(names["tensors"], source) == []


def published(names: dict[str, Any], source: dict[str, torch.Tensor]) -> None:
    assert "/acme/my-fine-tuned-llama/commit/" in names["url"]


def refused(names: dict[str, Any], source: dict[str, torch.Tensor]) -> None:
    assert "LlamaForCausalLM" in names["supported"]


#: By a call of a block, what is to be seen after it, given its names and the weights of the model on the Hub.
CHECKS: dict[str, Callable[[dict[str, Any], dict[str, torch.Tensor]], None]] = {
    'my-fine-tuned-llama")\n\n# tr': saved,
    '(model, "./my-fine-tuned-llama"': kept,
    "save_hf_weights(": weights_alone,
    "import_ckpt(": checkpoints,
    "load_megatron_model(": loaded,
    "get_model(": loaded,
    "load_hf_weights(": loaded,
    "def assembled(": received,
    "push_to_hub(": published,
    "except ValueError": refused,
}
#: By a call of a block, words that it prints or that a logger says.
SHOWN = {
    "list_supported_models()\n\nprint": ["supported models:", "PhiForCausalLM"],
    "load_in_8bit": ["device_map: not heeded", "attn_implementation, load_in_8bit: not heeded"],
    "can_handle": ["✅ Model is supported!"],
    "get_supported_bridges": ["Available bridges: ['ArceeForCausalLM", "'DeepseekV3ForCausalLM'"],
    "Exporting": ["Exporting model.embed_tokens.weight: torch.Size([199, 64])", "Exported model.norm.weight"],
    "with_megatron_names": [
        "model.layers.0.mlp.up_proj.weight ('decoder.layers.0.mlp.linear_fc1.weight',)",
        "model.layers.0.mlp.down_proj.weight torch.bfloat16",
    ],
    "AutoConfig": ["Hidden size: 64"],
    "except ValueError": ["Model not supported: unsupported/model is neither a folder here nor a model on the Hub"],
    "get_all_mappings": ["GPTModelProvider(", "decoder.layers.*.self_attention.linear_qkv.weight"],
    "get_hf_model_id_from_checkpoint": [FIRST],
    "print(part": ["[0] decoder.layers.0.self_attention.linear_qkv.weight [["],
}


def test_what_is_checked_is_on_the_page() -> None:
    for words in (*CHECKS, *SHOWN, *SUBSTITUTED):
        assert any(words in block for block in BLOCKS), words
    assert TEXT.count("\n```python\n") == len(python_blocks(PAGE))
    for name in HUB:
        assert f'"{name}"' in TEXT


@live
@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_blocks(number: int, served: dict[str, Path], tmp_path: Path) -> None:
    """Each block goes on from the first one, and from the imports of the others."""
    block = BLOCKS[number]
    with serving(**served) as hub, pytest.MonkeyPatch.context() as patch:
        use(hub, tmp_path / "home", patch, token=WRITER)
        patch.chdir(tmp_path)
        Path("local").symlink_to(served["custom__model"])
        bridge = AutoBridge.from_hf_pretrained(FIRST)
        model = bridge.to_megatron_model(wrap_with_ddp=False)
        names = dict(
            AutoBridge=AutoBridge,
            CausalLMBridge=CausalLMBridge,
            torch=torch,
            bridge=bridge,
            megatron_model=model,
            model=model,
            process_weight=lambda name, weight: None,
        )
        if "push_to_hub" in block or "load_megatron_model" in block:
            bridge.save_hf_pretrained(model, "my-fine-tuned-llama", show_progress=False)
        for theirs, ours in SUBSTITUTED.items():
            block = block.replace(theirs, ours)
        with redirect_stdout(io.StringIO()) as shown:
            patch.setattr(logging.getLogger("megatron_converters.bridge"), "handlers", [logging.StreamHandler(shown)])
            exec(compile(block, f"{PAGE}, block {number}", "exec"), names)
        source = hf_tensors(served[FIRST.replace("/", "__")])
        for words, check in CHECKS.items():
            if words in block:
                check(names, source)
        for words, expected in SHOWN.items():
            if words in block:
                assert all(text in shown.getvalue() for text in expected), shown.getvalue()
        if "push_to_hub" in block:
            assert different(hf_tensors(hub.models["acme/my-fine-tuned-llama"]), source) == []
            assert hub.repositories.by_name["acme/my-fine-tuned-llama"].private


def ranks(folder: Path, out: Path, **sizes: int) -> dict[tuple[int, int, str], torch.Tensor]:
    """Parameters of each process of a model, by the file that a training run of these sizes would load."""
    hf_to_megatron(folder, out, **sizes, impl="local", divisor=1, allow_inexpressible=True)
    files = sorted((out / "iter_0000001").glob(f"mp_rank_*/{RANK_FILE}"), key=lambda path: _place(path.parent.name))
    found = {}
    for rank, path in enumerate(files):
        for name, value in torch.load(path, weights_only=False)["model"].items():
            if isinstance(value, torch.Tensor):
                found[rank, 0, name] = value
    return found


def _place(folder: str) -> tuple[int, ...]:
    """Stage, then the other numbers, of a rank's folder `mp_rank_TP_PP_EP`: so processes are counted."""
    tp, pp, *others = map(int, folder.removeprefix("mp_rank_").split("_"))
    return (pp, *others, tp)


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("llama3.2-tied", dict(tp=2, pp=2)),
        ("qwen2", dict(tp=4, pp=2)),
        ("gpt2", dict(tp=2, pp=2)),
        ("qwen3-moe", dict(tp=1, pp=2, ep=2)),
        ("deepseek-v3", dict(tp=2, pp=2)),
    ],
)
def test_the_page_s_receiver_assembles_what_processes_hold(
    family: str, sizes: dict[str, int], hf_model: HFModel, tmp_path: Path
) -> None:
    (block,) = [block for block in BLOCKS if "def assembled(" in block]
    names: dict[str, Any] = {"torch": torch}
    exec(compile(block.partition("\n\n\n")[0], PAGE, "exec"), names)
    folder = hf_model(family)
    data = json.loads(json.dumps(AutoBridge.from_hf_pretrained(folder).shard_map(sizes).to_dict()))
    parameters = ranks(folder, tmp_path / "ranks", **sizes)
    assert len({rank for rank, _, _ in parameters}) == data["parallel"]["world"]
    assert (
        different({name: names["assembled"](data, name, parameters) for name in data["tensors"]}, hf_tensors(folder))
        == []
    )


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command.split())[:50])
def test_commands(command: str, served: dict[str, Path], tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, module in (("python", ""), ("torchrun", "-m torch.distributed.run")):
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" -W ignore {module} "$@"\n')
        (programs / name).chmod(0o755)
    (script,) = [block for block in python_blocks(PAGE) if block.startswith(SCRIPT)]
    (tmp_path / "train.py").write_text(script)
    (tmp_path / "examples").symlink_to(EXAMPLE.parent)
    source = hf_tensors(served[FIRST.replace("/", "__")])
    with serving(**served) as hub:
        settings = hub.environment(tmp_path / "home") | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        shown = run(f"PATH={programs}:$PATH; cd {tmp_path}\n{command}", {**without_hub_variables(), **settings})
    if "2_way" in command:
        count = f"{len(source)} of {len(source)} weights exported, 0 differ"
        assert shown.count(count) == 2 and "DIFFERS" not in shown
        assert different(hf_tensors(tmp_path / "back"), source) == []
    else:
        assert shown.count("process 0 has ") == len(source) and "process 1 has" not in shown
        assert different(hf_tensors(tmp_path / "trained"), source) == []
        assert mc.verify(tmp_path / "trained")


@live
def test_the_example_fails_where_a_weight_differs(tmp_path: Path) -> None:
    folder = make_model("llama2", tmp_path / "hf", num_hidden_layers=1)
    export = AutoBridge.export_hf_weights

    def changed(*args: Any, **options: Any) -> Any:
        for name, weight in export(*args, **options):
            if name == "model.layers.0.mlp.up_proj.weight":
                weight[3, 5] += 1
            if name != "model.norm.weight":
                yield name, weight

    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as shown:
        patch.setattr(AutoBridge, "export_hf_weights", changed)
        patch.setattr(sys, "argv", [str(EXAMPLE), str(folder)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert ended.value.code == 1
    lines = [" ".join(line.split()) for line in shown.getvalue().splitlines()]
    differing = [line for line in lines if line.endswith("DIFFERS")]
    assert differing == ["model.layers.0.mlp.up_proj.weight torch.Size([112, 64]) DIFFERS"]
    assert lines[-1] == "model.norm.weight not exported"


@live
def test_the_example_needs_safetensors(tmp_path: Path) -> None:
    folder = make_model("llama2", tmp_path / "hf", num_hidden_layers=1, weights="bin")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(EXAMPLE), str(folder)])
        with pytest.raises(SystemExit, match="has no safetensors"):
            runpy.run_path(str(EXAMPLE), run_name="__main__")
