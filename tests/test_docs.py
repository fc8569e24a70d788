"""The documentation is true: its commands run, its example table works, its links lead somewhere."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_converters.cli import main
from megatron_converters.families import FAMILIES
from tests.command_blocks import blocks, command, lines_of, run, run_block
from tests.conversions import different, hf_to_megatron, megatron_to_hf
from tests.helpers import ROOT, hf_tensors
from tests.oracle.by_hand_mindspore import write_by_hand
from tests.oracle.hf import make_model
from tests.oracle.minicpm import make_minicpm

#: Pages whose blocks have a test of their own.
OTHERS = ("docs/bridge.md", "docs/model-converter-tool.md", "docs/tensor-parallel.md")
#: Pages whose blocks run here, each with the same variables and an `OUT` of its own.
PAGES = (
    *("README.md", "CONTRIBUTING.md", "scripts/bench/README.md"),
    *(name for name in sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")) if name not in OTHERS),
)
#: Pages with blocks of Python that run here.
WITH_PYTHON = {"docs/adding-a-family.md", "docs/megatron-to-hf.md", "docs/python-api.md"}
_LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)")
_HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
#: A tokenizer that knows two tokens, by file.
TOKENIZER = {
    "tokenizer_config.json": b'{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}',
    "tokenizer.json": b'{"added_tokens": [], "model": {"type": "WordLevel", "vocab": {"<s>": 1, "</s>": 2}, "unk_token": "<s>"}}',
}
#: Commands that cannot run inside the test suite that they start, or have a test of their own.
_ELSEWHERE = ("scripts/test.sh", "scripts/quickstart.sh")


def commands() -> list[str]:
    """Blocks of commands, each once."""
    found = [block for name in PAGES for block in blocks((ROOT / name).read_text(), "bash")]
    return [block for block in dict.fromkeys(found) if not any(name in block for name in _ELSEWHERE)]


def python_blocks(name: str) -> list[str]:
    return blocks((ROOT / name).read_text(), "python")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the documents' commands call the models and files that they need."""
    root = tmp_path_factory.mktemp("docs")
    folder, example = make_model("llama3.1", root / "hf", dtype="bfloat16"), make_model("qwen2", root / "example")
    for name, content in TOKENIZER.items():
        (folder / name).write_bytes(content)
    as_example(example)
    (family,) = blocks((ROOT / "docs/adding-a-family.md").read_text(), "yaml")
    (root / "example.yaml").write_text(family)
    named = {"HF": folder, "MEG": hf_to_megatron(folder, root / "megatron", tp=2, pp=2)}
    named |= {"MINICPM": make_minicpm(root)[0]}
    named |= {"MS": write_by_hand(make_model("llama2", root / "plain"), root / "ms", mlp="contiguous")}
    named |= {"MOE": make_model("mixtral", root / "moe"), "EXAMPLE": example, "FAMILY": root / "example.yaml"}
    return {name: str(path) for name, path in named.items()}


@pytest.mark.parametrize("block", commands(), ids=lambda block: " ".join(block.split())[:60])
def test_commands_run_as_written(block: str, model: dict[str, str], tmp_path: Path) -> None:
    run_block(block, {**model, "OUT": str(tmp_path / "out")}, tmp_path / "bin")
    assert any((tmp_path / "out").iterdir())


def test_the_blocks_of_the_python_api_run_one_after_the_other(
    model: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {**model, "OUT": str(tmp_path)}
    for block in python_blocks("docs/python-api.md"):
        exec(compile(block, "docs/python-api.md", "exec"), names)
    shown = capsys.readouterr().out
    for words in (f"{tmp_path}/megatron/iter_0000001", "--use-checkpoint-args", "LlamaForCausalLM", "; use tp 1"):
        assert words in shown


def test_what_is_written_for_transformers_and_vllm_loads(
    model: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The block of docs/megatron-to-hf.md, and what vLLM needs, which cannot run here."""
    folder = megatron_to_hf(Path(model["MEG"]), tmp_path / "hf")
    (block,) = python_blocks("docs/megatron-to-hf.md")
    names: dict[str, Any] = {"OUT": str(tmp_path)}
    exec(compile(block, "docs/megatron-to-hf.md", "exec"), names)
    assert capsys.readouterr().out.strip()
    state = {name: tensor.to(torch.bfloat16) for name, tensor in names["model"].state_dict().items()}
    assert different(state, hf_tensors(Path(model["HF"]))) == []
    wanted = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert wanted <= {path.name for path in folder.iterdir()}
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_what_cannot_run_here_names_what_there_is(model: dict[str, str]) -> None:
    """Blocks that are marked as text: scripts are there, and this project's commands know the options."""
    variables = {**model, "OUT": "out"}
    for name in PAGES:
        for line in (line for block in blocks((ROOT / name).read_text(), "text") for line in lines_of(block)):
            for script in re.findall(r"(?:^|\s)((?:scripts|examples)/\S+)", line):
                assert (ROOT / script).is_file(), line
            inner = re.search(r"python -m megatron_converters [^)]*", line.partition(" #")[0])
            if inner is not None:
                read = command(inner[0], variables)
                assert read is not None and read.program is main.main, line
                main.parser_of(read.arguments[:1]).parse_args(read.arguments)


def script(name: str) -> ModuleType:
    """Module of a file in scripts/."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"scripts/{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_options_is_made_of_the_parsers() -> None:
    made = script("make_cli_docs").page()
    assert (ROOT / "docs/cli.md").read_text(encoding="utf-8") == made, "run scripts/make_cli_docs.py"


def test_the_table_of_models_is_made_of_the_tables_of_families() -> None:
    written = (ROOT / "docs/models.md").read_text(encoding="utf-8")
    assert script("make_model_docs").page(written) == written, "run scripts/make_model_docs.py"


def test_the_page_of_json_is_made_of_the_schema() -> None:
    assert (ROOT / "docs/json.md").read_text(encoding="utf-8").endswith("\n" + script("make_json_docs").tables())


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("", "see this, that and [here](b.md#c)"),
        (
            "https://host/p/",
            "see [this](https://host/p/blob/main/LICENSE#x), [that](https://host/p/tree/main/scripts) and [here](b.md#c)",
        ),
    ],
)
def test_what_the_site_reads_otherwise(url: str, expected: str) -> None:
    page = "see [this](../LICENSE#x), [that](../scripts) and [here](b.md#c)\n| `a\\|b` | c\\|d |"
    made = script("docs_hook").on_page_markdown(page, config=SimpleNamespace(repo_url=url), page=None)
    assert made == f"{expected}\n| `a|b` | c\\|d |"


def test_the_site_has_every_page() -> None:
    """What the strict build of scripts/build_docs.sh would say, which takes mkdocs."""
    nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    assert sorted(re.findall(r"[\w-]+\.md", nav)) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))


def test_no_page_is_left_out() -> None:
    assert {name for name in PAGES if python_blocks(name)} == WITH_PYTHON
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


@pytest.mark.slow
def test_quickstart(tmp_path: Path) -> None:
    shown = run(f"bash scripts/quickstart.sh {tmp_path / 'demo'}", {"PYTHON": sys.executable})
    assert shown.rstrip().endswith("EQUAL")
    assert (tmp_path / "demo/megatron/iter_0000001/mp_rank_01_001/model_optim_rng.pt").exists()


@pytest.mark.parametrize("name", (*PAGES, *OTHERS))
def test_links_lead_somewhere(name: str) -> None:
    for target, part in _LINK.findall((ROOT / name).read_text()):
        path = (ROOT / name).parent / target if target else ROOT / name
        assert path.exists(), target
        assert not part or part in map(anchor, _HEADING.findall(path.read_text())), f"{target}#{part}"


def anchor(heading: str) -> str:
    """What GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_the_example_family_converts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of docs/adding-a-family.md, on a Qwen2 (a Llama with a QKV bias) under the example's names."""
    monkeypatch.setattr(FAMILIES, "_registered", {})
    namespace: dict[str, Any] = {}
    for code in python_blocks("docs/adding-a-family.md"):
        exec(code, namespace)
    folder = make_model("qwen2", tmp_path / "hf")
    as_example(folder)
    checkpoint = hf_to_megatron(folder, tmp_path / "megatron", tp=2, pp=2)
    back = megatron_to_hf(checkpoint, tmp_path / "back")
    assert different(hf_tensors(folder), hf_tensors(back)) == []
    assert "model.layers.3.norm_2.weight" in hf_tensors(back)


def as_example(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["n_layers"] = config.pop("num_hidden_layers")
    for key in ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types"):
        config.pop(key, None)
    config |= {"architectures": ["ExampleForCausalLM"], "model_type": "example"}
    (folder / "config.json").write_text(json.dumps(config))
    renamed = {
        name.replace("input_layernorm", "norm_1").replace("post_attention_layernorm", "norm_2"): tensor
        for name, tensor in hf_tensors(folder).items()
    }
    save_file(renamed, folder / "model.safetensors")


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_project_speaks_of_itself_alone() -> None:
    """No tracked file names places or tools outside the project."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    forbidden = re.compile(
        "|".join(("/".join(("", "work", "")), "".join(("..", "/sha", "red")), "/".join(("", "opt", "dev"))))
    )
    for name in listed.stdout.split():
        path = ROOT / name
        if path.is_file():
            assert not forbidden.search(path.read_text(encoding="utf-8", errors="ignore")), name
