"""Families from outside the package: registered ones, plug-ins of distributions, and family files."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import megatron_converters as mc
from megatron_converters.conversion.journal import MANIFEST
from megatron_converters.families import FAMILIES
from megatron_converters.families.family_file import read_family_file
from megatron_converters.families.file_rules import RULES
from megatron_converters.families.registry import GROUP
from megatron_converters.families.table import Family
from megatron_converters.model.layouts import NAMED
from megatron_converters.model.values import Affine
from tests.conversions import different
from tests.helpers import ROOT, convert, convert_back, hf_tensors, verb, wait_for
from tests.oracle.hf import make_model

NAME, ARCHITECTURE = "renamed", "RenamedForCausalLM"
#: A Llama whose tensors and one key of config.json have other names.
TEXT = """\
name: renamed
model_type: renamed
architecture: RenamedForCausalLM
base: llama
tensors:
  input_norm: model.layers.{layer}.norm_1.weight
  mlp_norm: model.layers.{layer}.norm_2.weight
  qkv: ["model.layers.{layer}.attn.q.weight", "model.layers.{layer}.attn.k.weight", "model.layers.{layer}.attn.v.weight"]
rules:
  - row: [num_layers, n_layers]
"""
RENAMED = {
    "input_layernorm": "norm_1",
    "post_attention_layernorm": "norm_2",
    "self_attn.q_proj": "attn.q",
    "self_attn.k_proj": "attn.k",
    "self_attn.v_proj": "attn.v",
}
#: The same table in Python, as a plug-in has it.
CODE = """
from dataclasses import replace
from megatron_converters.families.entries import tensor
from megatron_converters.families.llama import FAMILY as LLAMA
from megatron_converters.families.rules import Row
from megatron_converters.model.layouts import GROUPED_QKV

LAYER = "model.layers.{layer}."
FAMILY = replace(
    LLAMA,
    name="renamed",
    model_type="renamed",
    architecture="RenamedForCausalLM",
    tensors={
        **LLAMA.tensors,
        **tensor("input_norm", LAYER + "norm_1.weight"),
        **tensor("mlp_norm", LAYER + "norm_2.weight"),
        **tensor("qkv", *(f"{LAYER}attn.{part}.weight" for part in "qkv"), layout=GROUPED_QKV),
    },
    rules=(*(rule for rule in LLAMA.rules if rule.keys != ("num_hidden_layers",)), Row("num_layers", "n_layers")),
)
"""
#: A conversion there and back by a script, in two processes each.
THERE_AND_BACK = """
if __name__ == "__main__":
    there = mc.convert({folder!r}, {out!r} + "/megatron", tp=2, pp=2, workers=2)
    mc.convert({out!r} + "/megatron", {out!r} + "/back", workers=2)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return renamed(make_model("llama3.1", tmp_path_factory.mktemp("families") / "hf", dtype="bfloat16"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "renamed.yaml"
    path.write_text(TEXT)
    return path


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Families as they are, so that what a test adds is gone after it."""
    for table in ("_registered", "_plugged"):
        monkeypatch.setattr(FAMILIES, table, dict(getattr(FAMILIES, table) or {}))
    return None


def renamed(folder: Path) -> Path:
    """The folder of a Llama, under the names of `TEXT`."""
    config = json.loads((folder / "config.json").read_text())
    config["n_layers"] = config.pop("num_hidden_layers")
    config |= {"architectures": [ARCHITECTURE], "model_type": NAME}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = hf_tensors(folder)
    for old, new in RENAMED.items():
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


def the_family() -> Family:
    namespace: dict[str, Any] = {}
    exec(CODE, namespace)
    family: Family = namespace["FAMILY"]
    return family


def same(one: Path, other: Path) -> None:
    assert different(hf_tensors(one), hf_tensors(other)) == []
    assert json.loads((other / "config.json").read_text())["architectures"] == [ARCHITECTURE]


def script(text: str, folder: Path, *paths: Path) -> subprocess.CompletedProcess[str]:
    """Run a script that lies in a folder, with further folders on Python's path."""
    (folder / "job.py").write_text(text)
    path = os.pathsep.join(map(str, (ROOT, *paths)))
    return subprocess.run(
        [sys.executable, "job.py"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )


def plug_in(root: Path, code: str, target: str = "renamed_plugin:FAMILY") -> Path:
    """A folder with the module `renamed_plugin` and its distribution, as an installer leaves them."""
    described = root / "renamed_plugin-1.5.dist-info"
    described.mkdir(parents=True)
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: renamed-plugin\nVersion: 1.5\n")
    (described / "entry_points.txt").write_text(f"[{GROUP}]\nrenamed = {target}\n")
    (root / "renamed_plugin.py").write_text(code)
    return root


# Registered families


def test_a_registered_family_converts_also_in_workers(folder: Path, tmp_path: Path) -> None:
    guarded = CODE.replace("\n", "\n    ")
    text = f"""
import megatron_converters as mc
if __name__ == "__main__":
    {guarded}
    mc.register_family(FAMILY)
    mc.register_family(FAMILY)
    assert "renamed" in [family.name for family in mc.supported_families()]
"""
    done = script(text + THERE_AND_BACK.format(folder=str(folder), out=str(tmp_path)), tmp_path)
    assert done.returncode == 0, done.stderr
    same(folder, tmp_path / "back")


def test_a_loader_may_register_a_family_for_the_savers_process(folder: Path, tmp_path: Path) -> None:
    """A plugin of convert.py that a user has written; the saver's process does not import it."""
    loader = """
import megatron_converters as mc
from megatron_converters.cli.plugins import load_hf_checkpoint as load_checkpoint
from megatron_converters.cli.plugins import add_hf_loader_arguments

def add_arguments(parser):
    add_hf_loader_arguments(parser, "renamed")

mc.register_family(FAMILY)
"""
    (tmp_path / "loader_renamed.py").write_text(CODE + loader)
    done = convert(
        *("--loader", "renamed", "--saver", "hf", "--load-dir", folder, "--save-dir", tmp_path / "out"),
        *("--start-method", "spawn"),
        env={"PYTHONPATH": str(tmp_path)},
    )
    assert done.code == 0, done.err
    same(folder, tmp_path / "out")


def test_a_family_that_cannot_be_sent_to_workers_is_refused(folder: Path, tmp_path: Path) -> None:
    text = f"""
import megatron_converters as mc
if __name__ == "__main__":
    from dataclasses import replace
    from megatron_converters.families.rules import Row
{CODE}
    unsent = replace(FAMILY, rules=(*FAMILY.rules, Row("tied", "other", lambda config: False)))
    mc.register_family(unsent)
    try:
        mc.convert({str(folder)!r}, {str(tmp_path / "out")!r}, workers=2)
    except mc.ConversionError as error:
        print(error)
"""
    text = text.replace(CODE, CODE.replace("\n", "\n    "))
    done = script(text, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "the family renamed, which register_family has added, cannot be sent to another process" in done.stdout
    assert "--family-file" in done.stdout


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "llama"}, "the family llama has the name 'llama' already"),
        ({"model_type": "qwen2"}, "the family qwen2 has the model_type 'qwen2' already"),
        ({"aliases": ("kimi_k2",)}, "the family deepseek_v3 has the model_type 'kimi_k2' already"),
        ({"architecture": "Phi3ForCausalLM"}, "the family phi3 has the architecture 'Phi3ForCausalLM' already"),
    ],
)
def test_names_that_are_taken_are_refused(registry: None, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(mc.UsageError, match=re.escape(words)):
        mc.register_family(dataclasses.replace(the_family(), **changes))
    assert NAME not in FAMILIES


def test_another_object_under_a_registered_name_is_refused(registry: None) -> None:
    first = the_family()
    mc.register_family(first)
    mc.register_family(first)
    assert FAMILIES[NAME] is first
    with pytest.raises(mc.UsageError, match="has the name 'renamed' and the model_type 'renamed' and the architecture"):
        mc.register_family(the_family())
    with pytest.raises(mc.UsageError, match="a str cannot be registered"):
        mc.register_family("renamed")  # type: ignore[arg-type]


def test_built_in_families_can_be_sent_to_other_processes() -> None:
    from multiprocessing.reduction import ForkingPickler

    for family in FAMILIES.built_in.values():
        assert ForkingPickler.loads(ForkingPickler.dumps(family)) == family


# Plug-ins


@pytest.mark.parametrize(
    ("target", "more"),
    [
        ("FAMILY", ""),
        ("make", "def make(): return FAMILY\n"),
        ("several", "def several(): return [FAMILY, FAMILY]\n"),
        ("FAMILY", "import megatron_converters\nmegatron_converters.register_family(FAMILY)\n"),
    ],
)
def test_a_plug_in_gives_its_family(folder: Path, tmp_path: Path, target: str, more: str) -> None:
    path = plug_in(tmp_path / "site", CODE + more, f"renamed_plugin:{target}")
    text = "import megatron_converters as mc\n"
    if target == "FAMILY":
        text += THERE_AND_BACK.format(folder=str(folder), out=str(tmp_path))
    text += """
import sys
from megatron_converters.families import FAMILIES
if __name__ == "__main__":
    FAMILIES["llama"]
    print(list(FAMILIES)[-1])
"""
    done = script(text, tmp_path, path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [NAME]
    if target == "FAMILY":
        same(folder, tmp_path / "back")


def test_plug_ins_work_in_the_processes_of_convert_py_and_are_not_loaded_for_help(folder: Path, tmp_path: Path) -> None:
    path = plug_in(tmp_path / "site", CODE)
    env = {"PYTHONPATH": str(path)}
    done = convert(
        *("--load-dir", folder, "--save-dir", tmp_path / "megatron", "--saver", "mcore", "--tp", 2),
        *("--start-method", "spawn"),
        env=env,
    )
    assert done.code == 0, done.err
    done = convert(
        *("--loader", "core", "--load-dir", tmp_path / "megatron", "--saver", "hf", "--save-dir", tmp_path / "back"),
        *("--start-method", "spawn"),
        env=env,
    )
    assert done.code == 0, done.err
    same(folder, tmp_path / "back")
    broken = plug_in(tmp_path / "broken", "raise RuntimeError('half\\ninstalled')")
    done = verb("convert", "--help", env={"PYTHONPATH": f"{ROOT}{os.pathsep}{broken}"})
    assert done.code == 0, done.err
    done = verb("inspect", folder, env={"PYTHONPATH": f"{ROOT}{os.pathsep}{broken}"})
    assert done.code == 1
    assert (
        "the entry point renamed (renamed_plugin:FAMILY) of renamed-plugin 1.5 does not load: RuntimeError" in done.err
    )
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("FAMILY = 3", "of renamed-plugin 1.5 does not load: TypeError"),
        ("FAMILY = ['llama']", "of renamed-plugin 1.5 gives a str, and not a"),
        ("", "of renamed-plugin 1.5 does not load: AttributeError"),
        (CODE.replace('"renamed"', '"llama"'), "has the family llama, but the family llama has the name 'llama'"),
    ],
)
def test_a_plug_in_that_is_not_sound_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, words: str
) -> None:
    monkeypatch.syspath_prepend(plug_in(tmp_path, code))
    monkeypatch.delitem(sys.modules, "renamed_plugin", raising=False)
    monkeypatch.setattr(FAMILIES, "_plugged", None)
    assert FAMILIES["llama"].name == "llama"
    for _ in range(2):
        with pytest.raises(mc.ConversionError, match=re.escape(words)):
            list(FAMILIES)
    monkeypatch.delitem(sys.modules, "renamed_plugin", raising=False)


# Family files


def test_a_family_file_says_what_a_table_in_python_does(file: Path) -> None:
    read = read_family_file(file).family
    table = the_family()
    assert read.tensors == table.tensors
    assert {str(rule) for rule in read.rules} == {str(rule) for rule in table.rules}
    assert read == dataclasses.replace(table, rules=read.rules)


def test_a_family_file_converts_there_and_back_with_workers(folder: Path, file: Path, tmp_path: Path) -> None:
    megatron, back = tmp_path / "megatron", tmp_path / "back"
    options = ("--family-file", file)
    for workers in (("--workers", 2), ()):
        done = verb("convert", folder, megatron, "--tp", 2, "--pp", 2, *options, *workers)
        assert done.code == 0, done.err
    assert "is complete already" in done.out
    assert verb("plan", megatron, back, *options).code == 0
    done = verb("convert", megatron, back, *options, "--workers", 2)
    assert done.code == 0, done.err
    same(folder, back)
    assert verb("verify", folder, megatron, *options).code == 0
    assert verb("diff", folder, megatron, *options).code == 0
    assert "renamed (RenamedForCausalLM)" in verb("inspect", megatron, *options).out
    assert "--num-layers" in verb("args", folder, *options).out
    assert verb("verify", megatron).code == 0


def test_a_family_file_converts_through_the_queue(folder: Path, file: Path, tmp_path: Path) -> None:
    options = ("--family-file", file, "--start-method", "spawn")
    done = convert("--load-dir", folder, "--save-dir", tmp_path / "megatron", "--saver", "mcore", "--tp", 2, *options)
    assert done.code == 0, done.err
    places = ("--load-dir", tmp_path / "megatron", "--save-dir", tmp_path / "back")
    done = convert("--loader", "core", "--saver", "hf", *places, *options)
    assert done.code == 0, done.err
    same(folder, tmp_path / "back")
    places = ("--load-path", tmp_path / "megatron", "--save-path", tmp_path / "single")
    done = convert_back(*places, "--family-file", file)
    assert done.code == 0, done.err
    same(folder, tmp_path / "single")


def test_the_api_takes_a_family_file_and_forgets_it(folder: Path, file: Path, tmp_path: Path) -> None:
    read = mc.ReadOptions(family_file=file)
    there = mc.convert(folder, tmp_path / "megatron", tp=2, read=read, workers=2)
    mc.convert(tmp_path / "megatron", tmp_path / "back", read=read)
    same(folder, tmp_path / "back")
    assert mc.plan(folder, tmp_path / "other", tp=2, read=read).obstacle is None
    assert mc.verify(folder, there.path, read=read)
    assert not mc.diff(folder, there.path, read=read)
    assert mc.inspect(folder, read=read)["model"]["family"] == NAME
    assert mc.training_flags(folder, read=read).flags
    assert NAME not in FAMILIES
    with pytest.raises(mc.ConversionError, match=r"config.json names RenamedForCausalLM, .*--family-file FILE"):
        mc.inspect(folder)


def test_a_checkpoint_of_a_family_file_needs_that_file(folder: Path, file: Path, tmp_path: Path) -> None:
    read = mc.ReadOptions(family_file=file)
    out = mc.convert(folder, tmp_path / "megatron", read=read).path
    digest = read_family_file(file).digest
    assert json.loads((out / MANIFEST).read_text())["options"]["family file"] == digest
    with pytest.raises(mc.ConversionError, match=r"needs the family file of that conversion, .*--family-file FILE"):
        mc.inspect(out)
    file.write_text("# a comment changes nothing\n" + TEXT)
    assert mc.inspect(out, read=read)["model"]["family"] == NAME
    file.write_text(TEXT + "  - row: [max_position_embeddings, max_position_embeddings]\n    default: 5\n")
    with pytest.raises(mc.ConversionError, match=r"renamed\.yaml says something else"):
        mc.inspect(out, read=read)
    back = mc.convert(out, tmp_path / "reference", read=mc.ReadOptions(hf_config=folder, family_file=file)).path
    same(folder, back)


def test_another_family_file_does_not_go_on_where_one_has_stopped(folder: Path, file: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done > total / 2:
            wait_for(lambda: any(out.glob(".*.incomplete/state/finished/*.json")))
            raise KeyboardInterrupt

    read, out = mc.ReadOptions(family_file=file), tmp_path / "out"
    with pytest.raises(mc.ConversionError, match="interrupted"):
        mc.convert(folder, out, tp=4, pp=4, read=read, progress=stop)
    file.write_text(TEXT + "  - row: [max_position_embeddings, max_position_embeddings]\n    default: 5\n")
    with pytest.raises(mc.ConversionError, match=r"another run, which differs in:\n  - options family file: "):
        mc.convert(folder, out, tp=4, pp=4, read=read)
    file.write_text(TEXT)
    assert any("went on from" in note for note in mc.convert(folder, out, tp=4, pp=4, read=read).notes)


def test_a_family_file_may_take_the_place_of_a_built_in_family(tmp_path: Path) -> None:
    """The file's family has the names of Llama itself; norms are stored twice as large, and the query and key as one tensor."""
    folder = make_model("llama2", tmp_path / "hf")
    tensors = hf_tensors(folder)
    qkv = "model.layers.{}.self_attn.{}.weight"
    for layer in range(json.loads((folder / "config.json").read_text())["num_hidden_layers"]):
        parts = [tensors.pop(qkv.format(layer, f"{part}_proj")) for part in "qkv"]
        tensors[qkv.format(layer, "qkv")] = torch.cat(parts).T.contiguous()
    tensors["model.norm.weight"] *= 2
    save_file(tensors, folder / "model.safetensors")
    file = tmp_path / "llama.yaml"
    file.write_text(
        """
name: llama
model_type: llama
architecture: LlamaForCausalLM
base: llama
replaces: llama
tensors:
  qkv:
    names: model.layers.{layer}.self_attn.qkv.weight
    layout: joined_grouped_qkv
    transposed: true
  final_norm: {scale: 0.5}
  qkv_bias: null
"""
    )
    family = read_family_file(file).family
    assert family.tensors["final_norm"].value == Affine(0.5)
    assert "qkv_bias" not in family.tensors
    read = mc.ReadOptions(family_file=file)
    out = mc.convert(folder, tmp_path / "megatron", tp=2, read=read).path
    back = mc.convert(out, tmp_path / "back", read=read).path
    assert different(hf_tensors(folder), hf_tensors(back)) == []
    with pytest.raises(mc.ConversionError, match="needs the family file"):
        mc.inspect(out)
    with pytest.raises(mc.ConversionError, match="the tensors do not match"):
        mc.inspect(folder)


def test_a_family_file_says_that_experts_are_stacked(tmp_path: Path) -> None:
    """Granite's experts, in a file on a Mixtral: each tensor has a layer's."""
    module = "model.layers.{layer}.block_sparse_moe."
    lines = [
        f"  {slot}: {{names: '{module}{name}.weight', layout: same, stacked: true, fused: '{module}experts.{fused}'}}"
        for slot, name, fused in (
            ("expert_fc1", "input_linear", "gate_up_proj"),
            ("expert_fc2", "output_linear", "down_proj"),
        )
    ]
    own = "name: stacked\nmodel_type: stacked\narchitecture: StackedForCausalLM\nbase: mixtral\ntensors:\n"
    (tmp_path / "family.yaml").write_text(own + "\n".join(lines) + "\n")
    found = read_family_file(tmp_path / "family.yaml").family.tensors
    assert [found[slot] for slot in ("expert_fc1", "expert_fc2")] == [
        FAMILIES["granitemoe"].tensors[slot] for slot in ("expert_fc1", "expert_fc2")
    ]


def test_a_family_file_that_is_not_used_is_said(file: Path, tmp_path: Path) -> None:
    folder = make_model("llama2", tmp_path / "hf")
    notes = mc.inspect(folder, read=mc.ReadOptions(family_file=file))["notes"]
    assert any("describes the family renamed, but this is a llama model" in note for note in notes)


def test_gpt2_as_a_family_file_is_the_built_in_table(tmp_path: Path) -> None:
    """Every kind of entry and of default that GPT-2's table has can be written in a file."""
    file = tmp_path / "gpt2.yaml"
    file.write_text(GPT2)
    read, table = read_family_file(file).family, FAMILIES["gpt2"]
    assert read.tensors == table.tensors
    assert read == dataclasses.replace(table, rules=read.rules)
    assert {str(rule) for rule in read.rules} == {str(rule) for rule in table.rules}


def _gpt2(slot: str, module: str, more: str = "") -> str:
    return f"  {slot}: {{names: 'transformer.h.{{layer}}.{module}'{more}}}\n"


GPT2 = (
    """
name: gpt2
model_type: gpt2
architecture: GPT2LMHeadModel
replaces: gpt2
optional_prefix: transformer.
ignored_suffixes: [.attn.bias, .attn.masked_bias]
tensors:
  word_embeddings: transformer.wte.weight
  position_embeddings: transformer.wpe.weight
  final_norm: transformer.ln_f.weight
  final_norm_bias: transformer.ln_f.bias
  output_layer: lm_head.weight
"""
    + "".join(
        _gpt2(slot, f"{module}.weight", more)
        + _gpt2(f"{slot}_bias", f"{module}.bias", more.replace(", transposed: true", ""))
        for slot, module, more in (
            ("input_norm", "ln_1", ""),
            ("qkv", "attn.c_attn", ", layout: joined_grouped_qkv, transposed: true"),
            ("proj", "attn.c_proj", ", transposed: true"),
            ("mlp_norm", "ln_2", ""),
            ("fc1", "mlp.c_fc", ", transposed: true"),
            ("fc2", "mlp.c_proj", ", transposed: true"),
        )
    )
    + """
rules:
  - row: [num_layers, n_layer]
  - row: [hidden_size, n_embd]
  - row: [num_attention_heads, n_head]
  - {row: [ffn_hidden_size, n_inner], default: {product: [4, n_embd]}}
  - row: [vocab_size, vocab_size]
  - {row: [max_position_embeddings, n_positions], default: 1024}
  - {row: [norm_epsilon, layer_norm_epsilon], default: 1e-5}
  - {row: [initializer_range, initializer_range], default: 0.02}
  - {row: [attention_dropout, attn_pdrop], default: 0.1}
  - {row: [tied, tie_word_embeddings], default: true}
  - named: [activation, activation_function]
    names: {gelu_new: gelu_tanh, gelu_pytorch_tanh: gelu_tanh, gelu_fast: gelu_tanh, gelu: gelu}
    default: gelu_new
  - implied: [num_query_groups, {key: n_head}]
  - implied: [kv_channels, {quotient: [n_embd, n_head]}]
  - implied: [learned_positions, true]
  - implied: [rope, false]
  - implied: [normalization, LayerNorm]
  - implied: [gated, false]
  - implied: [qkv_bias, true]
  - implied: [proj_bias, true]
  - implied: [mlp_bias, true]
  - fixed: [scale_attn_weights, true]
  - fixed: [scale_attn_by_inverse_layer_idx, false]
  - passed: [resid_pdrop, embd_pdrop, n_ctx, reorder_and_upcast_attn, summary_activation]
  - passed: [summary_first_dropout, summary_proj_to_labels, summary_type, summary_use_proj]
  - passed: [n_special, predict_special_tokens]
"""
)


def test_every_rule_class_of_the_package_has_a_name_in_files() -> None:
    """The rules of all built-in families, by what makes them."""
    made = {type(rule) for family in FAMILIES.built_in.values() for rule in family.rules}
    values: dict[str, Any] = {"field": "tied", "key": "a", "keys": ("a",), "names": {}, "value": 1, "default": 1}
    values |= {"interval": 1, "size": 1, "topk": 1, "fields": ("tied",), "spellings": (("a",),)}
    values |= {
        "may_share": True,
        "theta": 1e4,
        "factor": 2,
        "normed_head": True,
        "window": 1,
        "pattern": 1,
        "heads": "b",
        "other": "b",
    }
    given = {type(form.make(**{name: values[name] for name in form.required})): name for name, form in RULES.items()}
    assert made <= given.keys()


def test_every_layout_of_the_package_has_a_name_in_files() -> None:
    named = {id(known.layout) for known in NAMED.values()}
    for family in FAMILIES.built_in.values():
        for slot, entry in family.tensors.items():
            assert id(entry.layout) in named, (family.name, slot)
            if entry.constant is not None:
                continue
            parts = next(known.parts for known in NAMED.values() if known.layout is entry.layout)
            assert parts[slot] == len(entry.names), (family.name, slot)


HEAD = "name: renamed\nmodel_type: renamed\narchitecture: RenamedForCausalLM\n"
BASED = HEAD + "base: llama\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ": f.yaml holds nothing; write lines such as"),
        ("- a", "f.yaml holds no mapping"),
        ("name: [", "f.yaml, line 1: "),
        (
            BASED + "tensors:\n  qkv: [a.{layer}.q]\n",
            "f.yaml, line 6: expected ',' or ']', but got '{'; a name with { } in",
        ),
        ("name: a\nname: b\n", "f.yaml, line 2: the key 'name' is there twice"),
        ("name: &a b\nmodel_type: *a\n", "f.yaml, line 2: it has the alias *a; write the value out"),
        ("name: !!python/object/apply:os.getcwd []\n", "f.yaml, line 1: could not determine a constructor"),
        ("name: .inf\n", "holds values other than text"),
        ("name: a\n", "f.yaml: the key 'model_type' is missing; add it"),
        (HEAD, "f.yaml: the key 'tensors' is missing"),
        (HEAD + "base: lama\n", "f.yaml, base: there is no family 'lama'; known are llama, mistral"),
        (BASED + "tensor: {}\n", "f.yaml: there is no key 'tensor' here; known are name, "),
        (BASED + "tensors: []\n", "f.yaml, tensors: [] is no mapping"),
        (BASED + "tensors: {qvk: a}\n", "f.yaml, tensors: there is no slot 'qvk'; known are word_embeddings, "),
        (
            BASED + "tensors: {final_norm: {name: a}}\n",
            "tensors: final_norm: there is no key 'name' here; known are names",
        ),
        (BASED + "tensors: {final_norm: 3}\n", "tensors: final_norm: names: 3 is no text"),
        (BASED + "tensors: {final_norm: 'a{layer}'}\n", "the names of final_norm and its scope disagree about {layer}"),
        (
            BASED + "tensors: {input_norm: 'a{lair}'}\n",
            "a{lair} has {lair} in it; names may have {layer}, {expert}, {beyond}",
        ),
        (BASED + "tensors: {input_norm: 'a{layer'}\n", "the braces of a{layer do not match"),
        (
            BASED + "tensors: {qkv: 'a{layer}'}\n",
            "tensors: qkv: there are 1 names, and the layout grouped_qkv has 3 parts; give as many names, or one of the layouts "
            "same, joined_grouped_qkv",
        ),
        (
            BASED + "tensors: {qkv: {layout: qkv}}\n",
            "tensors: qkv: layout: there is no layout 'qkv'; known are same, gated",
        ),
        (
            BASED + "tensors: {fc1: {layout: grouped_qkv}}\n",
            "tensors: fc1: the layout grouped_qkv is not for this slot, which can have same, gated, joined_gated, alternating",
        ),
        (BASED + "tensors: {proj: {scale: 0}}\n", "tensors: proj: a tensor cannot be multiplied by 0"),
        (BASED + "tensors: {proj: {transposed: 1}}\n", "tensors: proj: transposed: 1 is neither true nor false"),
        (
            BASED + "tensors: {proj: {stacked: true}}\n",
            "proj is no slot of experts, so that its parts cannot stack theirs",
        ),
        (BASED + "rules: {row: [a, b]}\n", "rules: {'row': ['a', 'b']} is no list"),
        (BASED + "rules: [{rwo: [a, b]}]\n", "rules: 1: there is no rule 'rwo'; known are row, named"),
        (BASED + "rules: [row]\n", "rules: 1: 'row' is no mapping"),
        (
            BASED + "rules: [{row: [num_lairs, b]}]\n",
            "rules: 1: row: field: there is no property 'num_lairs'; known are",
        ),
        (BASED + "rules: [{row: num_layers}]\n", "rules: 1: row: key is missing; give field, key, default, in a list"),
        (
            BASED + "rules: [{row: [tied, b, 1, 2]}]\n",
            "rules: 1: row: there are 4 values; it takes field, key, default",
        ),
        (
            BASED + "rules: [{row: [tied, b], defualt: 1}]\n",
            "rules: 1: row: there is no key 'defualt' here; known are field",
        ),
        (
            BASED + "rules: [{row: [tied, b], default: {sum: [1]}}]\n",
            "row: default: there is no function 'sum'; known are key",
        ),
        (BASED + "rules: [{rope: {theta: high}}]\n", "rules: 1: rope: theta: 'high' is no number"),
        (BASED + "rules: [{rope: {scalings: [ntk]}}]\n", "rules: 1: rope: scalings: there is no scaling 'ntk'"),
        (BASED + "rules: [{expert_groups: [1]}]\n", "rules: 1: expert_groups: default: there are 1 numbers; write two"),
        (BASED + "rules: [{no_window: 1}]\n", "rules: 1: no_window: there are 1 values; it takes no value (null)"),
        (HEAD + "tensors: {}\nrules: []\n", "rules: no rule decides num_layers, hidden_size, vocab_size, max_position"),
        (
            BASED.replace("model_type: renamed", "model_type: llama"),
            "the family llama has the model_type 'llama' already; choose other names, or add 'replaces: llama'",
        ),
    ],
)
def test_a_mistake_in_a_family_file_is_named(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "f.yaml"
    path.write_text(text)
    with pytest.raises(mc.ConversionError) as caught:
        read_family_file(path)
    message = f": {caught.value}"
    assert words in message.replace(f"{tmp_path}{os.sep}", "")
    assert "\n" not in message


def test_a_family_file_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(mc.ConversionError, match="is missing; name a file that is there"):
        read_family_file(tmp_path / "none.yaml")
    with pytest.raises(mc.ConversionError, match="is not a file"):
        read_family_file(tmp_path)
    done = verb("inspect", tmp_path, "--family-file", tmp_path / "none.yaml")
    assert (done.code, "Traceback" in done.err) == (1, False)


def test_names_and_layout_that_do_not_fit_the_model_are_refused(tmp_path: Path) -> None:
    """Whether an MLP has a gate is known only with config.json."""
    folder = make_model("llama2", tmp_path / "hf")
    file = tmp_path / "f.yaml"
    text = "name: llama\nmodel_type: llama\narchitecture: LlamaForCausalLM\nbase: llama\nreplaces: llama\n"
    file.write_text(text + "rules: [{implied: [gated, false]}]\n")
    with pytest.raises(mc.ConversionError, match="has 2 names for layer 0 fc1, whose layout gated has 1 parts"):
        mc.inspect(folder, read=mc.ReadOptions(family_file=file))
