"""`verify A B --as-cast`: B is A rounded to B's dtypes, as torch rounds, bit for bit; nothing else passes for it."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest
import torch

import megatron_converters as mc
from megatron_converters.comparison.tensors import Comparison, Rules, compare
from megatron_converters.conversion.progress import Silent
from megatron_converters.formats.huggingface.source import HFSource
from tests.helpers import Run, rank_content, refused, succeeded, verb
from tests.plain_llama import Tensors, cast, weights, write_llama

NORM, HEAD, DOWN = "model.norm.weight", "lm_head.weight", "model.layers.1.mlp.down_proj.weight"
#: Values where a wrong rounding shows: ties, next to one, subnormal, a zero with a sign, near the end of float16.
TIES = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-23, -(1 + 2**-11), 1 + 3 * 2**-11, 2**-25, -0.0, 65024])


def odd_weights(dtype: torch.dtype) -> Tensors:
    """Tensors of any bits that float16 can hold, with `TIES` in the last norm."""
    found = weights()
    generator = torch.Generator().manual_seed(1)
    for name, tensor in found.items():
        bits = torch.randint(-(2**31), 2**31 - 1, tensor.shape, generator=generator).to(torch.int32).view(torch.float32)
        found[name] = torch.where(bits.isfinite() & (bits.abs() < 65024), bits, tensor)
    found[NORM] = TIES.clone()
    return cast(found, dtype)


def as_cast(a: Path, b: Path, *options: str) -> Run:
    return verb("verify", a, b, "--as-cast", *options)


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("after", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("before", [*DTYPES, torch.float64], ids=str)
def test_torch_s_casts_are_confirmed_and_one_wrong_bit_is_not(
    before: torch.dtype, after: torch.dtype, tmp_path: Path
) -> None:
    tensors = odd_weights(before)
    rounded = cast(tensors, after)
    a, b = write_llama(tmp_path / "a", tensors), write_llama(tmp_path / "b", rounded)
    shown = succeeded(as_cast(a, b)).out
    assert "EQUAL: 15 tensors" in shown
    names = [str(dtype).removeprefix("torch.") for dtype in (before, after)]
    assert (before == after) or f"(15 cast from {names[0]} to {names[1]})" in shown
    whole = {torch.float32: torch.int32, torch.float64: torch.int64}.get(after, torch.int16)
    for position in (0, 6):  # of a number, and the sign of a zero
        wrong = {**rounded, NORM: rounded[NORM].clone()}
        wrong[NORM].view(whole)[position] ^= 1 if position == 0 else torch.iinfo(whole).min
        run = as_cast(a, write_llama(tmp_path / f"wrong-{position}", wrong))
        assert run.code == 1 and "DIFFERENT: 1 of 15 tensors" in run.out
        assert "different: final_norm: " in run.out


def test_what_torch_truncates_is_not_rounded(tmp_path: Path) -> None:
    """The upper halves of float32 are bfloat16, too, but not what a cast gives."""
    tensors = weights()
    cut = {
        name: (tensor.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16) for name, tensor in tensors.items()
    }
    run = as_cast(write_llama(tmp_path / "a", tensors), write_llama(tmp_path / "b", cut))
    assert run.code == 1 and "DIFFERENT: 15 of 15 tensors" in run.out


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_conversion_is_confirmed_across_formats(dtype: str, tmp_path: Path) -> None:
    source, out = write_llama(tmp_path / "hf", weights()), tmp_path / "meg"
    succeeded(verb("convert", source, out, "--tp", "2", "--pp", "2", "--dtype", dtype, "--quiet"))
    long = {"bf16": "bfloat16", "fp16": "float16"}[dtype]
    assert rank_content(out, "mp_rank_00_000")["model"]["embedding.word_embeddings.weight"].dtype == getattr(
        torch, long
    )
    plain = verb("verify", source, out)
    assert plain.code == 1 and plain.out.splitlines()[-1].startswith(
        "only dtypes differ, as after a cast; --as-cast tells"
    )
    assert f"(15 cast from float32 to {long})" in succeeded(as_cast(source, out)).out
    report = json.loads(as_cast(source, out, "--json").out)
    assert (report["equal"], report["as_cast"], report["casts"]) == (True, True, {f"float32 to {long}": 15})
    assert mc.verify(source, out, as_cast=True) and not mc.verify(source, out)
    back = as_cast(out, source)  # the checkpoint as float32 has lost what was rounded
    assert back.code == 1
    line = next(line for line in back.out.splitlines() if line.startswith("different: "))
    assert line.endswith(f" and 12 more tensors: A is B rounded to {long}, and B is not A as float32; give B first")


def test_a_wider_copy_must_hold_the_same_values(tmp_path: Path) -> None:
    """Else a tensor of which only the upper halves were written would pass."""
    narrow = cast(weights(), torch.bfloat16)
    wide = cast(narrow, torch.float32)
    a, b = write_llama(tmp_path / "a", narrow), write_llama(tmp_path / "b", wide)
    succeeded(as_cast(a, b))
    succeeded(as_cast(b, a))
    wide[DOWN].view(torch.int32)[3, 2] |= 1
    noisy = write_llama(tmp_path / "noisy", wide)
    run = as_cast(a, noisy)
    assert run.code == 1
    assert "different: layer 1 fc2: A is B rounded to bfloat16, and B is not A as float32; give B first" in run.out
    succeeded(as_cast(noisy, a))


def test_each_tensor_has_dtypes_of_its_own(tmp_path: Path) -> None:
    tensors = weights()
    mixed = {name: tensor.bfloat16() if "norm" in name else tensor for name, tensor in tensors.items()}
    other = {name: tensor.float() if "norm" in name else tensor.half() for name, tensor in mixed.items()}
    a, b = write_llama(tmp_path / "a", mixed), write_llama(tmp_path / "b", other)
    assert "(10 cast from float32 to float16, 5 cast from bfloat16 to float32)" in succeeded(as_cast(a, b)).out


def test_values_beyond_the_range_are_different_and_the_rest_is_compared(tmp_path: Path) -> None:
    """Torch makes them infinite, which is no weight any more."""
    tensors = weights()
    tensors[HEAD][4, 3] = 1e6
    rounded = cast(tensors, torch.float16)
    rounded[DOWN][0, 0] += 1
    assert rounded[HEAD].isinf().any()
    run = as_cast(write_llama(tmp_path / "a", tensors), write_llama(tmp_path / "b", rounded))
    assert run.code == 1 and "DIFFERENT: 2 of 15 tensors" in run.out
    assert "output_layer: A cannot be cast to float16: model.safetensors: lm_head.weight holds values beyond" in run.out
    assert "different: layer 1 fc2: 1 of 96 elements differ" in run.out


def test_infinities_and_nan_of_the_source_stay_what_they_are(tmp_path: Path) -> None:
    tensors = weights()
    tensors[HEAD][1, :3] = torch.tensor([float("inf"), float("-inf"), float("nan")])
    a, b = write_llama(tmp_path / "a", tensors), write_llama(tmp_path / "b", cast(tensors, torch.bfloat16))
    succeeded(as_cast(a, b))


def test_folded_scales_are_computed_as_a_conversion_does(tmp_path: Path) -> None:
    multipliers = {
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.6,
        "logits_scaling": 7.0,
    }
    granite = {"model_type": "granite", "architectures": ["GraniteForCausalLM"], **multipliers}
    source, out = write_llama(tmp_path / "hf", weights(), **granite), tmp_path / "out"
    options = ("--tp", "2", "--mup", "fold", "--dtype", "bf16", "--quiet")
    succeeded(verb("convert", source, out, *options))
    stored = weights()["model.embed_tokens.weight"]
    ranks = [rank_content(out, f"mp_rank_0{rank}")["model"]["embedding.word_embeddings.weight"] for rank in (0, 1)]
    expected = (stored * (12 / 0.5)).bfloat16()  # what follows is in units of the residual multiplier
    assert torch.equal(torch.cat(ranks)[: len(stored)], expected)
    assert "EQUAL" in succeeded(as_cast(source, out)).out
    succeeded(verb("convert", out, tmp_path / "wide", "--to", "hf", "--dtype", "fp32", "--quiet"))
    succeeded(as_cast(out, tmp_path / "wide"))


def test_nothing_else_is_hinted_at(tmp_path: Path) -> None:
    """Where more than dtypes differs, a cast explains nothing."""
    tensors = weights()
    rounded = cast(tensors, torch.bfloat16)
    rounded["model.embed_tokens.weight"] = rounded["model.embed_tokens.weight"][:-1]
    rounded[HEAD] = rounded[HEAD][:-1]
    a, b = write_llama(tmp_path / "a", tensors), write_llama(tmp_path / "b", rounded)
    assert "--as-cast" not in verb("verify", a, b).out
    other = write_llama(tmp_path / "other", weights(1))
    assert "--as-cast" not in verb("verify", a, other).out
    assert "--as-cast" not in verb("verify", a, a).out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--tolerance", "0.1"), "--as-cast compares bits"),
        (("--ignore-dtype",), "leave out --tolerance and --ignore-dtype"),
        (("--logits",), "--as-cast is for comparing tensors"),
    ],
)
def test_what_excludes_it(options: tuple[str, ...], words: str, tmp_path: Path) -> None:
    a = write_llama(tmp_path / "a", weights())
    refused(as_cast(a, a, *options), words, code=2)
    refused(verb("verify", a, "--as-cast"), "--as-cast compares two folders", code=2)


def test_memory_does_not_grow_with_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "megatron_converters.comparison.tensors.default_lanes", lambda: 1
    )  # each has buffers of its own

    def peak(folder: Path, vocabulary: int) -> int:
        tensors = weights(hidden=1024, vocabulary=vocabulary)
        a, b = write_llama(folder / "a", tensors), write_llama(folder / "b", cast(tensors, torch.bfloat16))
        sources = HFSource(a), HFSource(b)
        tracemalloc.start()
        found: Comparison = compare(*sources, Rules(as_cast=True), Silent())
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert found.equal and len(found.casts) == 1
        return highest

    peak(tmp_path / "first", 16)  # what is imported and cached
    small, large = (peak(tmp_path / str(vocabulary), vocabulary) for vocabulary in (1024, 4096))
    assert large < 1.2 * small < 16 << 20, (small, large)
