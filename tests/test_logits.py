"""Logits computed by transformers and megatron-core agree for right checkpoints, tell wrong ones, and errors are sentences."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_converters.basics.errors import ConversionError, UsageError
from megatron_converters.basics.json_files import read_json
from megatron_converters.families import FAMILIES
from megatron_converters.families.config_json import spec_from_config
from megatron_converters.formats.megatron.argument import Context, Group
from megatron_converters.formats.megatron.arguments import model_args, written_args
from megatron_converters.formats.megatron.reading import MegatronReadOptions
from megatron_converters.live.buildable_args import check
from megatron_converters.logits import compare_logits, logits_of, memory
from megatron_converters.logits.compare import _common_vocabulary, _open, _window_notes
from megatron_converters.logits.megatron import MegatronModel, _logits, _parameters, _setup
from megatron_converters.logits.pool import Pool
from megatron_converters.sharding.ranks import parallel_for
from tests import pool_jobs
from tests.conversions import hf_to_megatron
from tests.helpers import ROOT, edit_rank, finished, rank_content, start
from tests.logits_processes import PRELOADED
from tests.oracle import by_hand
from tests.oracle.args import megatron_args
from tests.oracle.hf import FAMILIES as CONFIGS
from tests.oracle.hf import MOE_FAMILIES, hf_logits, make_model, sample_tokens
from tests.oracle.pool import MegatronPool, write_checkpoint
from tests.tiny import tiny_spec

pytestmark = pytest.mark.usefixtures("preloaded")

TOKENS = sample_tokens()
VOCABULARY = 199
CLOSE = 1e-5
SEEN = 1e-3
SIZES = dict(num_hidden_layers=2, hidden_size=32, intermediate_size=48)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama3.1", tmp_path_factory.mktemp("llama") / "hf", dtype="bfloat16", **SIZES)


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("qwen2-moe", tmp_path_factory.mktemp("moe") / "hf", **SIZES)


def apart(checkpoint: Path, wanted: torch.Tensor, **options: Any) -> float:
    """How far the checkpoint's logits are from those that transformers computes."""
    got = logits_of(checkpoint, TOKENS.numpy(), time_limit=120, **options)
    assert got.dtype == np.float32 and got.shape == tuple(wanted.shape)
    return float(np.abs(got - wanted.numpy()).max())


def edit(checkpoint: Path, rank: str, change: Callable[[dict[str, Any]], object]) -> None:
    """Apply `change` to the tensors of one rank."""
    path = checkpoint / "iter_0000001" / rank / "model_optim_rng.pt"
    content = torch.load(path, weights_only=False)
    change(content["model"])
    torch.save(content, path)


SCRIPT = """
import sys
from pathlib import Path
from megatron_converters.logits import compare_logits

if __name__ == "__main__":
    print(compare_logits(Path(sys.argv[1]), Path(sys.argv[2]), seed=3))
    assert "torch" not in sys.modules
"""


def script(tmp_path: Path, text: str, *arguments: Any) -> Any:
    path = tmp_path / "script.py"
    path.write_text(text)
    (tmp_path / "temporary").mkdir()
    return start(path, *arguments, env={"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path / "temporary")})


def test_a_script_compares_and_prints_nothing_else(llama: Path, tmp_path: Path) -> None:
    checkpoint = hf_to_megatron(llama, tmp_path / "megatron", tp=2, impl="transformer_engine")
    run = finished(script(tmp_path, SCRIPT, llama, checkpoint))
    assert run.code == 0 and run.err == "", run
    first, _, last = run.out.splitlines()
    assert first.startswith("logits agree: by up to ")
    assert last == "same most likely token at 100.00% of 256 positions"


def test_checkpoints_of_other_sizes_and_names_agree(llama: Path, tmp_path: Path) -> None:
    one = hf_to_megatron(llama, tmp_path / "one", tp=2, impl="local")
    other = hf_to_megatron(llama, tmp_path / "other", pp=2, impl="transformer_engine")
    report = compare_logits(one, other, batch=1, length=40, time_limit=120)
    assert report.ok and report.positions == 40 and report.agreement == 1 and report.notes == ()
    assert 0 < report.difference < CLOSE * report.scale


@pytest.mark.parametrize(
    ("layout", "impl", "etp"),
    [("sequential", "transformer_engine", 1), ("grouped", "transformer_engine", 2), ("dynamic", "local", 1)],
)
def test_experts_in_each_layout(moe: Path, tmp_path: Path, layout: str, impl: str, etp: int) -> None:
    checkpoint = hf_to_megatron(moe, tmp_path, tp=2, ep=2, etp=etp, impl=impl, expert_layout=layout)
    assert apart(checkpoint, hf_logits(moe, TOKENS)) < CLOSE


def test_stacked_experts_that_real_modules_write(megatron_pool: MegatronPool, tmp_path: Path) -> None:
    sizes = dict(tensor_model_parallel_size=2, expert_model_parallel_size=2, expert_tensor_parallel_size=1)
    experts = dict(num_experts=4, moe_ffn_hidden_size=48, moe_grouped_gemm=True, transformer_impl="local")
    args = megatron_args(num_layers=2, **sizes, **experts)
    wanted = write_checkpoint(megatron_pool, tmp_path, args, seed=3, tokens=TOKENS)
    assert apart(tmp_path, wanted[..., :VOCABULARY]) < CLOSE


def test_a_window_is_computed_and_a_longer_one_is_noted(tmp_path: Path) -> None:
    hf = make_model("mistral-window", tmp_path / "hf", **SIZES)
    checkpoint = hf_to_megatron(hf, tmp_path / "megatron")
    assert apart(checkpoint, hf_logits(hf, TOKENS)) < CLOSE
    models = _open(hf, MegatronReadOptions()), _open(checkpoint, MegatronReadOptions())
    assert _window_notes(models, 7) == ["sequences of 7 tokens do not test the sliding window of 7; use longer ones"]
    assert _window_notes(models, 8) == []


def _swap_query_and_key(model: dict[str, Any]) -> None:
    rows = model["decoder.layers.1.self_attention.linear_qkv.weight"].view(2, 4, 32, 32)  # groups of [q, q, k, v]
    rows[:, [1, 2]] = rows[:, [2, 1]]


def test_query_and_key_exchanged_on_one_rank_are_seen(llama: Path, tmp_path: Path) -> None:
    checkpoint = hf_to_megatron(llama, tmp_path, tp=2, impl="local")
    edit(checkpoint, "mp_rank_01", _swap_query_and_key)
    assert apart(checkpoint, hf_logits(llama, TOKENS)) > SEEN


def test_gate_and_up_cut_as_one_block_are_seen(llama: Path, tmp_path: Path) -> None:
    """All of gate on one rank, all of up on the other: it survives every round trip."""
    checkpoint = hf_to_megatron(llama, tmp_path, tp=2, impl="local")
    key = "decoder.layers.0.mlp.linear_fc1.weight"
    halves: list[torch.Tensor] = []
    for rank in ("mp_rank_00", "mp_rank_01"):
        edit(checkpoint, rank, lambda model: halves.extend(model[key].chunk(2)))
    edit(checkpoint, "mp_rank_00", lambda model: model.update({key: torch.cat(halves[0::2])}))
    edit(checkpoint, "mp_rank_01", lambda model: model.update({key: torch.cat(halves[1::2])}))
    assert apart(checkpoint, hf_logits(llama, TOKENS)) > SEEN


def test_copies_on_expert_parallel_ranks_that_differ_are_seen(moe: Path, tmp_path: Path) -> None:
    checkpoint = hf_to_megatron(moe, tmp_path, ep=2, impl="local", expert_layout="sequential")
    edit(checkpoint, "mp_rank_00_001", lambda model: model["decoder.layers.1.input_layernorm.weight"].mul_(1.5))
    with pytest.raises(ConversionError, match="but copy 1 computes logits that differ from the first's"):
        logits_of(checkpoint, TOKENS.numpy())


def test_what_megatron_does_not_load_is_named_by_rank_and_key(llama: Path, tmp_path: Path) -> None:
    checkpoint = hf_to_megatron(llama, tmp_path, tp=2)
    told = MegatronModel(checkpoint, MegatronReadOptions())._checkpoint
    told = dataclasses.replace(told, args={**told.args, "add_qkv_bias": True, "ffn_hidden_size": 64})
    with (
        Pool(2, _setup, 120, PRELOADED) as pool,
        pytest.raises(ConversionError, match="megatron-core does not load") as error,
    ):
        pool.run(_logits, told, TOKENS.numpy())
    for words in ("mp_rank_00", "mp_rank_01", "Missing key", "linear_qkv.bias", "size mismatch", "linear_fc1.weight"):
        assert words in str(error.value)


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    hf = make_model("llama2", tmp_path / "hf", **SIZES)
    checkpoint = hf_to_megatron(hf, tmp_path / "megatron")
    edit(checkpoint, "mp_rank_00", lambda model: model["decoder.final_layernorm.weight"].fill_(float("nan")))
    with pytest.raises(ConversionError, match="logits that are infinite or NaN; its weights are damaged"):
        logits_of(checkpoint, TOKENS.numpy())


def test_a_folder_that_transformers_does_not_load_is_refused(llama: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(llama, tmp_path / "hf")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ConversionError, match=r"transformers does not load(.|\n)*missing keys: model\.layers\.2\."):
        logits_of(broken, TOKENS.numpy())


def test_tensors_that_are_left_out_are_not_asked_of_either_side(llama: Path, tmp_path: Path) -> None:
    """A value head, which neither transformers' class nor megatron-core's has."""
    source = shutil.copytree(llama, tmp_path / "hf")
    head = {"v_head.weight": torch.zeros(1, 32)}
    meg = hf_to_megatron(source, tmp_path / "meg")
    save_file({**load_file(source / "model.safetensors"), **head}, source / "model.safetensors", {"format": "pt"})
    edit_rank(meg, "mp_rank_00", model={**rank_content(meg)["model"], **head})
    with pytest.raises(ConversionError, match=r"v_head\.weight"):
        compare_logits(source, meg, length=8, batch=1)
    ignored = MegatronReadOptions(ignore_tensors=("v_head.*",))
    assert compare_logits(source, meg, length=8, batch=1, options=ignored).ok


def test_packages_that_are_missing_are_named(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = hf_to_megatron(llama, tmp_path)
    find = importlib.util.find_spec
    for module, package, path in (
        ("transformers", "transformers", llama),
        ("megatron.core", "megatron-core", checkpoint),
        ("torch", "torch", checkpoint),
    ):
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, absent=module: find(name) if name != absent else None
        )
        with pytest.raises(
            ConversionError, match=f"needs {package}, which is not installed; run: pip install {package}"
        ):
            logits_of(path, TOKENS.numpy())


def test_a_model_that_does_not_fit_is_refused(
    llama: Path, moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = hf_to_megatron(moe, tmp_path, tp=2, pp=2, ep=2)
    monkeypatch.setattr(memory, "available", lambda: 1024000)
    for path, processes in ((llama, "1 process"), (checkpoint, "8 processes")):
        with pytest.raises(
            ConversionError, match=rf"logits in float32 in {processes}\), but 0\.0 GB are free here; use fewer"
        ):
            logits_of(path, TOKENS.numpy())


def test_no_tokens_are_refused(llama: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot compare 0 sequences of 5 tokens"):
        compare_logits(llama, llama, batch=0, length=5)


def test_parameters_are_counted_as_often_as_they_are_held(moe: Path, tmp_path: Path) -> None:
    sizes = dict(tp=2, ep=2, etp=1)
    checkpoint = hf_to_megatron(moe, tmp_path, impl="local", expert_layout="sequential", divisor=1, **sizes)
    spec = spec_from_config(read_json(moe / "config.json"))
    padding = 2 * (200 - VOCABULARY) * spec.hidden_size
    assert _parameters(spec, parallel_for(spec, pp=1, **sizes)) == _held(checkpoint) - padding


def test_tied_embeddings_are_counted_on_both_ends(tmp_path: Path) -> None:
    hf = make_model("qwen2-tied", tmp_path / "hf", **SIZES)
    checkpoint = hf_to_megatron(hf, tmp_path / "megatron", pp=2, divisor=1)
    spec = spec_from_config(read_json(hf / "config.json"))
    assert _parameters(spec, parallel_for(spec, 1, 2)) == _held(checkpoint)


def _held(checkpoint: Path) -> int:
    """Elements of all tensors of all ranks."""
    held = 0
    for file in checkpoint.glob("*/*/*.pt"):
        model = torch.load(file, weights_only=False)["model"]
        held += sum(value.numel() for value in model.values() if isinstance(value, torch.Tensor))
    return held


def test_too_many_ranks_are_refused(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = hf_to_megatron(llama, tmp_path, tp=4, pp=2)
    monkeypatch.setattr("megatron_converters.logits.megatron._MAX_PROCESSES", 4)
    with pytest.raises(ConversionError, match=r"cut over 8 ranks(.|\n)*at most 4 are started. Reshard a copy to fewer"):
        logits_of(checkpoint, TOKENS.numpy())


def test_models_of_other_vocabularies_are_refused(llama: Path, tmp_path: Path) -> None:
    other = make_model("llama2", tmp_path / "other", vocab_size=256, **SIZES)
    with pytest.raises(ConversionError, match=r"vocabulary of 199 and .* of 256; they are not the same model"):
        compare_logits(llama, other)


def test_padding_that_a_checkpoint_does_not_tell_is_noted(llama: Path, tmp_path: Path) -> None:
    root = by_hand.convert(llama, tmp_path)
    path = root / "iter_0000001" / "mp_rank_00" / "model_optim_rng.pt"
    content = torch.load(path, weights_only=False)
    del content["args"].vocab_size
    torch.save(content, path)
    vocabulary, notes = _common_vocabulary(*(_open(folder, MegatronReadOptions()) for folder in (llama, root)))
    assert vocabulary == VOCABULARY
    assert notes == [f"9 further rows of {root}'s vocabulary, taken for padding, are not compared"]


def test_a_folder_of_another_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"of no known format; a folder needs one of hf: config\.json"):
        logits_of(tmp_path, TOKENS.numpy())
    (tmp_path / "consolidated.00.pth").touch()
    with pytest.raises(ConversionError, match=r"has a format \(meta\) that cannot be run here; convert it"):
        logits_of(tmp_path, TOKENS.numpy())


@pytest.mark.parametrize("tokens", [np.array([[VOCABULARY]]), np.array([[-1]]), np.array([1]), np.zeros((0, 3), int)])
def test_tokens_outside_the_vocabulary_are_refused(llama: Path, tokens: Any) -> None:
    with pytest.raises(ConversionError, match=r"tokens must be .* from 0 to 198, the vocabulary of"):
        logits_of(llama, tokens)


BUILT = [name for name, fields in {**CONFIGS, **MOE_FAMILIES}.items() if fields["model_type"] in FAMILIES]


@pytest.mark.parametrize("name", BUILT)
def test_every_argument_of_every_family_is_built_or_known_to_say_nothing(name: str) -> None:
    from transformers import AutoConfig

    values = AutoConfig.for_model(**{**CONFIGS, **MOE_FAMILIES}[name]).to_dict()
    spec = spec_from_config({**values, "architectures": [FAMILIES[values["model_type"]].architecture]})
    groups = (Group.MODEL, Group.EXPERTS, Group.EXPERT_LAYOUT)
    args = written_args(Context(spec, parallel_for(spec, 1, 1)), groups)
    check(args, "it")


def test_an_argument_that_would_not_be_built_is_refused() -> None:
    args = model_args(tiny_spec())
    refusals = {
        "apply_layernorm_1p": "it: megatron-core builds a model with apply_layernorm_1p=1 from Transformer Engine",
        "made_up": "it: megatron-core's model cannot be built here with\n  - made_up=1",
    }
    for name, refusal in refusals.items():
        with pytest.raises(ConversionError, match=refusal):
            check({**args, name: 1}, "it")


def children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]


DEATH = r"by signal 9 \(most likely .* memory\); its last output:\nits last line$"


@pytest.mark.parametrize(("refuses", "words"), [(False, DEATH), (True, r"^not I$")])
def test_one_process_that_dies_or_refuses_ends_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuses: bool, words: str
) -> None:
    monkeypatch.setattr("megatron_converters.logits.pool._GRACE", 0.2)
    with pytest.raises(ConversionError, match=words):
        Pool(2, pool_jobs.nothing, 30).run(pool_jobs.end_first, tmp_path, refuses)
    assert children() == []


def test_a_refusal_by_all_is_an_orderly_end() -> None:
    with Pool(2, pool_jobs.nothing, 30) as pool:
        with pytest.raises(ConversionError, match=r"^not today$"):
            pool.run(pool_jobs.refuse, "not today")
        assert len(children()) == 2
    assert children() == []


def test_silence_and_a_failure_end_the_pool(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"no answer from processes \[0, 1\] within 1.5 seconds"):
        Pool(2, pool_jobs.nothing, 1.5).run(pool_jobs.wait_for_ever, tmp_path)
    with pytest.raises(ConversionError, match=r"please report it(.|\n)*not ready"):
        Pool(1, pool_jobs.badly, 30).run(pool_jobs.wait_for_ever, tmp_path)
    assert children() == []


POOL_SCRIPT = """
import sys
from pathlib import Path
from megatron_converters.logits.pool import Pool
from tests.pool_jobs import nothing, wait_for_ever

if __name__ == "__main__":
    with Pool(2, nothing, 60) as pool:
        pool.run(wait_for_ever, Path(sys.argv[1]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_the_one_that_started_it(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "pids").mkdir()
    process = script(tmp_path, POOL_SCRIPT, tmp_path / "pids")
    deadline = time.monotonic() + 60
    while len(started := [int(path.name) for path in (tmp_path / "pids").iterdir()]) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)  # as a terminal does
    run = finished(process, timeout=10)  # returns when nobody holds its output
    assert "Traceback" not in run.err.replace("Traceback", "", 1), run.err  # at most its own
    while any(psutil.pid_exists(pid) for pid in started) or any((tmp_path / "temporary").iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_script_without_a_guard_is_told_so(tmp_path: Path) -> None:
    text = POOL_SCRIPT.replace('__name__ == "__main__"', "True")
    run = finished(script(tmp_path, text, tmp_path))
    assert run.code == 1
    assert "process 0 ended with exit code 1 before it started; a script must call this under" in run.err, run.err
