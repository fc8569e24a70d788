"""Values computed in the copy: torch's bits at every cut, nothing computed where functions cancel out, and damage is seen."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from megatron_converters.basics.casting import floats, not_finite, rounded
from megatron_converters.basics.dtypes import BY_NAME, dtype_named
from megatron_converters.basics.errors import ConversionError
from megatron_converters.comparison.tensors import Comparison, Rules, compare
from megatron_converters.conversion import gathering
from megatron_converters.conversion.composing import Piece, Planner, Sources
from megatron_converters.conversion.copying import Executor
from megatron_converters.conversion.dry_run import forecast
from megatron_converters.conversion.gathering import gather_chunks
from megatron_converters.conversion.journal import lost_lines
from megatron_converters.conversion.outline import Fill
from megatron_converters.conversion.progress import Silent
from megatron_converters.formats.huggingface.source import HFSource
from megatron_converters.formats.megatron.opening import open_megatron
from megatron_converters.formats.megatron.rank_files_target import MegatronTarget
from megatron_converters.formats.megatron.torch_dist_target import TorchDistTarget
from megatron_converters.formats.megatron.writing import MegatronOptions
from megatron_converters.model.slots import Ref
from megatron_converters.model.values import Affine, composed
from megatron_converters.storage import safetensors
from tests.conversions import run
from tests.helpers import hf_tensors, rank_content, verb
from tests.tiny import piece

Array = npt.NDArray[Any]
HFModel = Callable[..., Path]

TIMES_12, PLUS_1, MINUS_1 = Affine(12), Affine(1, 1), Affine(1, -1)
FLOATS = ["float32", "bfloat16", "float16", "float64"]


@pytest.fixture(params=[1, 24, 1 << 20], ids=["chunks of a row", "chunks of 24 bytes", "one chunk"])
def chunk_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(gathering, "CHUNK_BYTES", request.param)
    yield request.param


def bits(tensor: torch.Tensor) -> Array:
    """A tensor's bytes in the carrier type of its dtype."""
    array: Array = tensor.contiguous().view(getattr(torch, f"int{8 * tensor.itemsize}")).numpy()
    return array.view(f"u{tensor.itemsize}")


def random_bits(name: str, count: int, seed: int = 0) -> torch.Tensor:
    """Random bit patterns of a floating type, without NaN."""
    size = BY_NAME[name].itemsize
    drawn = np.random.default_rng(seed).integers(0, 256, count * size, dtype=np.uint8)
    tensor = torch.from_numpy(drawn.view(f"i{size}")).view(getattr(torch, name))
    return torch.where(tensor.isnan(), torch.ones_like(tensor), tensor)


# Numbers


@pytest.mark.parametrize("target", ["float32", "bfloat16", "float16"])
def test_rounding_is_torch_s(target: str) -> None:
    values = random_bits("float32", 200_000)
    assert np.array_equal(rounded(values.numpy(), BY_NAME[target]), bits(values.to(getattr(torch, target))))


@pytest.mark.parametrize("name", FLOATS)
def test_floats_are_exact(name: str) -> None:
    every = random_bits(name, 70_000)
    found = floats(bits(every), BY_NAME[name])
    assert found.dtype == (np.float64 if name == "float64" else np.float32)
    assert np.array_equal(found, every.double().numpy() if name == "float64" else every.float().numpy())
    assert np.array_equal(rounded(found, BY_NAME[name]), bits(every))
    assert np.array_equal(not_finite(bits(every), BY_NAME[name]), ~every.isfinite().numpy())


def test_float64_is_rounded_once() -> None:
    """Through float32, the first would be a tie, and would go to the even neighbour below."""
    values = 1 + 2.0**-8 + np.array([2.0**-40, -(2.0**-40), 0.0, 1e300, np.inf, np.nan])
    expected = [0x3F81, 0x3F80, 0x3F80, 0x7F80, 0x7F80, 0x7FC0]
    assert rounded(values, BY_NAME["bfloat16"]).tolist() == expected
    assert rounded(-values, BY_NAME["bfloat16"]).tolist() == [*(bit | 0x8000 for bit in expected[:5]), 0x7FC0]


def test_a_nan_of_all_ones_stays_a_nan() -> None:
    ones = np.array([0xFFFFFFFF, 0x7FFFFFFF], np.uint32).view(np.float32)
    assert rounded(ones, BY_NAME["bfloat16"]).tolist() == [0x7FC0, 0x7FC0]


# Functions


@pytest.mark.parametrize("value", [TIMES_12, PLUS_1, Affine(49), Affine(0.22), Affine(-3, 0.7), Affine(1 / 3, 5)])
def test_a_function_and_its_inverse_cancel_out(value: Affine) -> None:
    assert value.then(value.inverse()).is_identity and value.inverse().then(value).is_identity
    assert composed(value, value.inverse()) is None
    assert composed(value, None) is value and composed(None, value) is value and composed(None, None) is None
    assert value.inverse().inverse() == value


def test_composition_comes_in_order() -> None:
    assert TIMES_12.then(MINUS_1) == Affine(12, -1)
    assert MINUS_1.then(TIMES_12) == Affine(12, -12)
    assert Affine().is_identity and not Affine(1, 1e-30).is_identity
    assert Affine(Fraction(1, 3)).then(Affine(3)).is_identity


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (TIMES_12, "× 12"),
        (TIMES_12.inverse(), "÷ 12"),
        (Affine(0.25), "× 0.25"),
        (MINUS_1, "- 1"),
        (PLUS_1, "+ 1"),
        (Affine(-2, 0.5), "× -2 + 0.5"),
        (Affine(), "unchanged"),
    ],
)
def test_in_words(value: Affine, text: str) -> None:
    assert value.described() == text


@pytest.mark.parametrize(("scale", "shift"), [(0.0, 1.0), (float("nan"), 0.0), (1.0, float("inf"))])
def test_what_cannot_be_undone_is_refused(scale: float, shift: float) -> None:
    with pytest.raises(ConversionError, match="must not be 0, and both must be finite"):
        Affine(scale, shift)


# Copies


def filled(path: Path, source: Piece, target: str, value: Affine | None, order: list[int]) -> Array:
    """What `Executor.fill` writes, read back."""
    dtype = dtype_named(target)
    shape = len(order), source.cols
    file = safetensors.lay_out(path, {"t": (dtype, shape)}, {})
    executor = Executor[Any]()
    fill = Fill(file.path, "t", dtype, shape, np.array(order, np.int64), 0, value=value)
    executor.fill(file, fill, executor.plan(fill, [source]))
    executor.finish()
    file.close()
    return safetensors.read(path).tensors["t"].array()


def in_torch(tensor: torch.Tensor, target: str, scale: float, shift: float) -> torch.Tensor:
    wide = tensor.double() if "float64" in (target, str(tensor.dtype).removeprefix("torch.")) else tensor.float()
    return (wide * scale + shift).to(getattr(torch, target))


@pytest.mark.parametrize("target", FLOATS)
@pytest.mark.parametrize("source", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("layout", ["in order", "by index"])
def test_the_arithmetic_is_torch_s(tmp_path: Path, chunk_bytes: int, source: str, target: str, layout: str) -> None:
    tensor = torch.randn(80 * 4, generator=torch.Generator().manual_seed(1)).to(getattr(torch, source)).reshape(80, 4)
    order = list(range(0, 80, 2)) if layout == "by index" else list(range(80))
    stored = piece(bits(tensor), range(80), dtype=source)
    for value, scale, shift in ((TIMES_12, 12.0, 0.0), (MINUS_1, 1.0, -1.0), (Affine(0.22, 0.5), 0.22, 0.5)):
        expected = in_torch(tensor[order], target, scale, shift)
        if source == "float64" and target in ("bfloat16", "float16"):
            expected = torch.from_numpy(
                rounded(tensor[order].numpy() * scale + shift, BY_NAME[target]).view("i2")
            ).view(expected.dtype)  # torch rounds twice
        for kind in ("piece", "fill"):
            source_value, fill_value = (value, None) if kind == "piece" else (None, value)
            held = dataclasses.replace(stored, value=source_value)
            found = filled(tmp_path / f"{scale}{kind}", held, target, fill_value, order)
            assert np.array_equal(found, bits(expected)), (scale, kind)


def test_both_functions_are_applied_with_one_rounding(tmp_path: Path) -> None:
    tensor = random_bits("bfloat16", 400)
    tensor = torch.where(tensor.abs() < 1e30, tensor, torch.ones_like(tensor)).reshape(100, 4)
    held = piece(bits(tensor), range(100), dtype="bfloat16")
    found = filled(tmp_path / "t", dataclasses.replace(held, value=TIMES_12), "bfloat16", MINUS_1, list(range(100)))
    assert np.array_equal(found, bits((tensor.float() * 12 - 1).bfloat16()))


def test_division_rounds_once(tmp_path: Path) -> None:
    tensor = torch.randn(1000, 1, generator=torch.Generator().manual_seed(2))
    held = piece(bits(tensor), range(1000), dtype="float32")
    found = filled(tmp_path / "t", held, "float32", TIMES_12.inverse(), list(range(1000)))
    assert np.array_equal(found, bits(tensor / 12))
    assert not np.array_equal(found, bits(tensor * (1 / 12)))


def test_functions_that_cancel_out_leave_the_direct_path() -> None:
    whole = np.arange(24, dtype=np.uint16).reshape(6, 4)
    held = piece(whole, range(6), dtype="bfloat16")
    for value, target_value, direct in ((PLUS_1, MINUS_1, True), (None, None, True), (PLUS_1, None, False)):
        gathers = Planner().compose(np.arange(6), 0, 4, [dataclasses.replace(held, value=value)])
        ((_, chunk),) = gather_chunks(gathers, (6, 4), BY_NAME["bfloat16"], "t", value=target_value)
        assert np.shares_memory(chunk, whole) == direct


@pytest.mark.parametrize(
    ("source", "target", "number", "value"),
    [
        ("float16", "float16", 60000.0, TIMES_12),
        ("bfloat16", "bfloat16", 3e38, TIMES_12),
        ("float32", "float16", 6000.0, TIMES_12),
        ("float64", "float32", 1e38, TIMES_12),
        ("float64", "float64", 1e308, TIMES_12),
    ],
)
def test_what_exceeds_the_target_is_refused(
    tmp_path: Path, chunk_bytes: int, source: str, target: str, number: float, value: Affine
) -> None:
    tensor = torch.ones(6, 2, dtype=getattr(torch, source))
    tensor[4, 1] = number
    held = piece(bits(tensor), range(6), dtype=source, where="the piece")
    with pytest.raises(ConversionError, match=f"the piece, × 12, holds values beyond the range of {target}; keep"):
        filled(tmp_path / "t", held, target, value, list(range(6)))


def test_infinities_of_the_source_stay(tmp_path: Path) -> None:
    tensor = torch.tensor([[float("inf"), float("-inf"), float("nan"), 1.0]]).bfloat16()
    found = filled(tmp_path / "t", piece(bits(tensor), [0], dtype="bfloat16"), "bfloat16", TIMES_12, [0])
    assert found.tolist() == [[0x7F80, 0xFF80, 0x7FC0, 0x4140]]


# Replicas


def check_replica(replica: Piece, source: Piece) -> None:
    executor = Executor[Any]()
    executor.compare(replica, [source], "final_norm")
    executor.finish()


def test_replicas_are_compared_as_they_are_stored(chunk_bytes: int) -> None:
    """Of 0.001 and its neighbour, 1 more is the same in bfloat16."""
    one = piece(np.array([[0x3A83], [0x3A83]], np.uint16), [0, 1], dtype="bfloat16")
    other = piece(np.array([[0x3A83], [0x3A84]], np.uint16), [0, 1], dtype="bfloat16", where="copy")
    shifted = [dataclasses.replace(held, value=PLUS_1) for held in (one, other)]
    check_replica(shifted[0], dataclasses.replace(one, value=PLUS_1))
    with pytest.raises(ConversionError, match=r"^final_norm: here: copy differs from .* in row 1$"):
        check_replica(shifted[1], shifted[0])


def test_replicas_that_are_stored_otherwise_are_computed(chunk_bytes: int) -> None:
    tensor = torch.randn(8, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    multiplied = (tensor.float() * 12).bfloat16()
    plain = piece(bits(multiplied), range(8), dtype="bfloat16")
    check_replica(plain, dataclasses.replace(piece(bits(tensor), range(8), dtype="bfloat16"), value=TIMES_12))
    changed = bits(multiplied).copy()
    changed[5, 1] ^= 1
    with pytest.raises(ConversionError, match=r"differs from .* in row 5"):
        check_replica(
            piece(changed, range(8), dtype="bfloat16"),
            dataclasses.replace(piece(bits(tensor), range(8), dtype="bfloat16"), value=TIMES_12),
        )


# What comes back


@pytest.mark.parametrize(("value", "scale", "shift"), [(TIMES_12, 12.0, 0.0), (MINUS_1, 1.0, -1.0)])
def test_elements_that_the_way_back_does_not_restore_are_counted(
    tmp_path: Path, chunk_bytes: int, value: Affine, scale: float, shift: float
) -> None:
    tensor = (1 + 0.3 * torch.randn(999, 3, generator=torch.Generator().manual_seed(0))).bfloat16()
    there = (tensor.float() * scale + shift).bfloat16()
    back = ((there.float() - shift) / scale).bfloat16()
    expected = int((bits(back) != bits(tensor)).sum())
    assert 0 < expected < 3000
    counts: list[int] = []
    file = safetensors.lay_out(tmp_path / "t", {"t": (BY_NAME["bfloat16"], (999, 3))}, {})
    executor = Executor[Any](lost=lambda fill, count: counts.append(count))
    fill = Fill(file.path, "t", BY_NAME["bfloat16"], (999, 3), np.arange(999), 0, value=value)
    executor.fill(file, fill, executor.plan(fill, [piece(bits(tensor), range(999), dtype="bfloat16")]))
    executor.finish()
    assert sum(counts) == expected


def test_a_line_for_each_kind_of_slot() -> None:
    def entry(holds: str, lost: int, how: str) -> dict[str, Any]:
        return {"holds": [holds], "computed": how, "not restored": lost}

    finished = {
        "a": {"tensors": {"x": entry("layer 0 mlp_norm", 1000, "- 1"), "y": {"holds": ["final_norm"]}}},
        "b": {"tensors": {"x": entry("layer 1 mlp_norm", 234, "- 1"), "z": entry("final_norm", 1, "× 12")}},
    }
    assert lost_lines(finished) == [
        "mlp_norm: computing back would not restore the bits of 1,234 elements in 2 tensors (- 1)",
        "final_norm: computing back would not restore the bits of 1 element in 1 tensor (× 12)",
    ]


# Conversions


class Valued:
    """Source whose slots of these names are `values` of what it stores."""

    def __init__(self, source: Any, values: Mapping[str, Affine]) -> None:
        self._source, self._values = source, values
        self.spec, self.origin = source.spec, source.origin
        self.dtype_of, self.close = source.dtype_of, source.close

    def read(self, ref: Ref) -> Sources:
        found, value = self._source.read(ref), self._values.get(ref.slot.name)
        valued = [
            tuple(dataclasses.replace(held, value=value) for held in pieces)
            for pieces in (found.pieces, found.replicas)
        ]
        return Sources(*valued)


def with_values(target: Any, values: Mapping[str, Affine]) -> Any:
    """Target that stores these values of slots."""
    fills = target.fills
    target.fills = lambda ref: (fill._replace(value=values.get(ref.slot.name)) for fill in fills(ref))
    return target


#: Of a muP model: embeddings and what is added to the residual are multiplied; norms are stored around 0.
READ = {"word_embeddings": TIMES_12, "proj": Affine(0.22), "fc1": Affine(0.5)}
WRITTEN = {"input_norm": MINUS_1, "final_norm": MINUS_1}
#: The source that reads what was written so.
BACK = {name: value.inverse() for name, value in WRITTEN.items()}


def converted(
    hf_model: HFModel, out: Path, tp: int, kind: Any = MegatronTarget, **options: Any
) -> tuple[Path, list[str]]:
    source = hf_model("llama2", dtype="bfloat16")
    target = with_values(kind(out, MegatronOptions(tp=tp, **options)), WRITTEN)
    return source, run(Valued(HFSource(source), READ), target)


def compared(source: Path, out: Path, *, swapped: bool = False, norms: bool = False) -> Comparison:
    sides: list[Any] = [Valued(HFSource(source), READ), Valued(open_megatron(out), BACK)]
    return compare(*(reversed(sides) if swapped else sides), Rules(norms=norms), Silent())


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_a_conversion_computes_what_torch_does(tp: int, hf_model: HFModel, tmp_path: Path) -> None:
    source, lines = converted(hf_model, tmp_path / "out", tp)
    theirs = hf_tensors(source)
    ranks = [rank_content(tmp_path / "out", f"mp_rank_{rank:02d}")["model"] for rank in range(tp)]
    layer, name = "decoder.layers.1.", "model.layers.1."

    def joined(key: str, dim: int) -> torch.Tensor:
        return torch.cat([rank[key] for rank in ranks], dim)

    def product(tensor: torch.Tensor, scale: float) -> torch.Tensor:
        return (tensor.float() * scale).bfloat16()

    embeddings = joined("embedding.word_embeddings.weight", 0)[:199]
    assert torch.equal(embeddings, product(theirs["model.embed_tokens.weight"], 12))
    proj = joined(layer + "self_attention.linear_proj.weight", 1)
    assert torch.equal(proj, product(theirs[name + "self_attn.o_proj.weight"], 0.22))
    halves = [rank[layer + "mlp.linear_fc1.weight"].chunk(2) for rank in ranks]
    assert torch.equal(torch.cat([gate for gate, _ in halves]), theirs[name + "mlp.gate_proj.weight"] / 2)
    assert torch.equal(torch.cat([up for _, up in halves]), theirs[name + "mlp.up_proj.weight"] / 2)
    norm = theirs[name + "input_layernorm.weight"]
    for rank in ranks:
        assert torch.equal(rank[layer + "self_attention.linear_qkv.layer_norm_weight"], (norm.float() - 1).bfloat16())
    down = joined(layer + "mlp.linear_fc2.weight", 1)
    assert torch.equal(down, theirs[name + "mlp.down_proj.weight"])
    lost = [line for line in lines if "would not restore" in line]
    assert sorted(line.partition(":")[0] for line in lost) == sorted([*(READ.keys() - {"fc1"}), *WRITTEN])
    assert any("(× 12 in float32, rounded once)" in line for line in lost)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("kind", [MegatronTarget, TorchDistTarget])
def test_verify_computes_the_same(tp: int, swapped: bool, kind: Any, hf_model: HFModel, tmp_path: Path) -> None:
    source, _ = converted(hf_model, tmp_path / "out", tp, kind)
    assert compared(source, tmp_path / "out", swapped=swapped).equal
    plain = compare(HFSource(source), open_megatron(tmp_path / "out"), Rules(), Silent())
    assert {found.ref.slot.name for found in plain.different} == {*READ, *WRITTEN}


def test_each_value_may_be_read_back(hf_model: HFModel, tmp_path: Path) -> None:
    """Resharded with the functions that read it, a checkpoint keeps every bit."""
    _, _ = converted(hf_model, tmp_path / "out", 2)
    target = with_values(MegatronTarget(tmp_path / "again", MegatronOptions(tp=2)), WRITTEN)
    lines = run(Valued(open_megatron(tmp_path / "out"), BACK), target)
    assert not any("would not restore" in line for line in lines)
    for rank in ("mp_rank_00", "mp_rank_01"):
        one, other = (rank_content(tmp_path / name, rank)["model"] for name in ("out", "again"))
        assert all(torch.equal(one[key], other[key]) for key in one if "_extra_state" not in key)
    assert '"computed"' not in next((tmp_path / "again").rglob("conversion.json")).read_text()


def flip(out: Path, tensor: str, rank: str = "mp_rank_00") -> None:
    """Change the last bit of a tensor's first element in a rank's file."""
    manifest = json.loads(next(out.rglob("conversion.json")).read_text())
    name, entry = next((name, entry) for name, entry in manifest["files"].items() if rank in name)
    (key,) = [key for key in entry["tensors"] if key.endswith(tensor)]
    path = next(out.rglob("conversion.json")).parent / name
    content = bytearray(path.read_bytes())
    content[entry["tensors"][key]["at"][0]] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("tensor", ["word_embeddings.weight", "layers.1.self_attention.linear_proj.weight"])
def test_one_changed_bit_is_seen(tensor: str, hf_model: HFModel, tmp_path: Path) -> None:
    source, _ = converted(hf_model, tmp_path / "out", 2)
    assert verb("verify", tmp_path / "out").code == 0
    flip(tmp_path / "out", tensor)
    for swapped in (False, True):
        (found,) = compared(source, tmp_path / "out", swapped=swapped).different
        assert found.findings[0].measure is not None and found.findings[0].measure.differing == 1
    damaged = verb("verify", tmp_path / "out")
    assert damaged.code == 1 and tensor in damaged.out


def test_a_changed_bit_of_a_norm_that_is_hidden_by_its_shift_is_seen(hf_model: HFModel, tmp_path: Path) -> None:
    converted(hf_model, tmp_path / "a", 1)
    converted(hf_model, tmp_path / "b", 1)
    path = next((tmp_path / "b").rglob("model_optim_rng.pt"))
    content = torch.load(path, weights_only=False)
    norms = content["model"]["decoder.final_layernorm.weight"]
    flip(tmp_path / "b", "final_layernorm.weight")
    sides = [Valued(open_megatron(tmp_path / name), {"final_norm": Affine(1, 64)}) for name in "ab"]
    assert float((norms[0].float() + 64).bfloat16()) == 64 + round(float(norms[0]) * 2) / 2  # few bits are left
    (found,) = compare(sides[0], sides[1], Rules(), Silent()).different  # type: ignore[arg-type]
    assert found.ref.slot.name == "final_norm"


def test_the_manifest_says_what_was_computed(hf_model: HFModel, tmp_path: Path) -> None:
    converted(hf_model, tmp_path / "out", 2)
    manifest = json.loads(next((tmp_path / "out").rglob("conversion.json")).read_text())
    found: dict[str, set[str | None]] = {}
    for file in manifest["files"].values():
        for entry in file["tensors"].values():
            found.setdefault(entry["holds"][0].split()[-1], set()).add(entry.get("computed"))
            assert "computed" in entry or "not restored" not in entry
    assert {slot: texts for slot, texts in found.items() if texts != {None}} == {
        "word_embeddings": {"× 12 in float32, rounded once"},
        "proj": {"× 0.22 in float32, rounded once"},
        "fc1": {"× 0.5 in float32, rounded once"},
        "input_norm": {"- 1 in float32, rounded once"},
        "final_norm": {"- 1 in float32, rounded once"},
    }


def test_the_plan_says_what_is_computed(hf_model: HFModel, tmp_path: Path) -> None:
    target = with_values(MegatronTarget(tmp_path / "out", MegatronOptions(tp=2)), WRITTEN)
    planned = forecast(Valued(HFSource(hf_model("llama2", dtype="bfloat16")), READ), target, None)
    assert planned.computed["× 12 in float32, rounded once"] == 2
    assert planned.computed["- 1 in float32, rounded once"] == 2 * (4 + 1)
    assert planned.casts == {}


def test_a_sink_need_not_be_a_file() -> None:
    class Parameters:
        def __init__(self) -> None:
            self.found: dict[str, bytearray] = {}

        def write(self, name: str, start: int, data: Array, /) -> None:
            assert start == len(self.found.setdefault(name, bytearray()))
            self.found[name] += data.tobytes()

        def writeback(self) -> None: ...

        def claim(self) -> bool:
            return len(self.found.get("t", b"")) == 12

    whole, done = np.arange(6, dtype=np.uint16).reshape(3, 2), []
    sink, fill = Parameters(), Fill("a model", "t", BY_NAME["bfloat16"], (3, 2), np.array([2, 0, 1]), 0)
    executor = Executor(filled=done.append)
    executor.fill(sink, fill, executor.plan(fill, [piece(whole, range(3), dtype="bfloat16")]))
    executor.finish()
    assert bytes(sink.found["t"]) == whole[[2, 0, 1]].tobytes() and done == [sink]
