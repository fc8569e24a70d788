"""FP8 weights with block scales: decoded as torch does with the formula written out, at every cut, in every verb."""

from __future__ import annotations

import json
import pickle
import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_converters.basics.dtypes import BY_NAME
from megatron_converters.basics.errors import ConversionError
from megatron_converters.conversion import gathering
from megatron_converters.conversion.composing import Piece, Planner, Reader, StoredName
from megatron_converters.conversion.gathering import materialise, transposed_chunks
from megatron_converters.formats.huggingface.source import HFSource
from megatron_converters.formats.queue.handles import TensorHandle, to_torch
from megatron_converters.model.values import Affine
from megatron_converters.storage import decoding, safetensors
from megatron_converters.storage.decoding_8bit import ScaledBlocks
from tests.conversions import hf_to_megatron, hf_to_torch_dist, megatron_to_hf
from tests.helpers import ROOT, convert, edit_config, hf_tensors, rank_content, refused, same_tensors, succeeded, verb
from tests.oracle.hf import make_model

FP8, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu
BLOCK = (128, 128)
QUANTISATION = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}


def decoded(codes: torch.Tensor, scales: torch.Tensor, block: tuple[int, int] = BLOCK) -> torch.Tensor:
    """What the codes mean: each times the scale of its block, where the last block of an axis may be short."""
    if scales.dtype == torch.uint8:
        scales = torch.exp2(scales.double() - 127).float()
    rows, cols = codes.shape
    factors = scales.float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:rows, :cols]
    return (codes.float() * factors).bfloat16()


def quantised(weight: torch.Tensor, block: tuple[int, int] = BLOCK) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and float32 scales of a matrix, each block scaled so that its largest element is the largest code."""
    rows, cols = weight.shape
    high, wide = -(-rows // block[0]), -(-cols // block[1])
    padded = torch.zeros(high * block[0], wide * block[1])
    padded[:rows, :cols] = weight.float()
    blocks = padded.reshape(high, block[0], wide, block[1])
    scales = blocks.abs().amax((1, 3)).clamp(min=1e-12) / 448
    codes = (blocks / scales[:, None, :, None]).reshape(padded.shape)[:rows, :cols].contiguous().to(FP8)
    return codes, scales


def random_pair(rows: int, cols: int, kind: str = "float32", seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of every value but NaN, and scales of the given kind."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (rows, cols), generator=generator, dtype=torch.uint8)
    codes[codes & 0x7F == 0x7F] = 0x31
    counts = -(-rows // 128), -(-cols // 128)
    if kind in ("uint8", "float8_e8m0fnu"):
        scales = torch.randint(100, 150, counts, generator=generator, dtype=torch.uint8)
        return codes.view(FP8), scales if kind == "uint8" else scales.view(E8M0)
    return codes.view(FP8), (0.01 + torch.rand(counts, generator=generator)).to(getattr(torch, kind))


def reader(folder: Path, codes: torch.Tensor, scales: torch.Tensor, block: tuple[int, int] = BLOCK) -> ScaledBlocks:
    """Reader of a pair that safetensors itself has written."""
    path = folder / "model.safetensors"
    save_file({"a.weight": codes, "a.weight_scale_inv": scales}, path)
    tensors = safetensors.read(path).tensors
    return ScaledBlocks("a.weight", tensors["a.weight"], "a.weight_scale_inv", tensors["a.weight_scale_inv"], block)


def as_bits(tensor: torch.Tensor) -> Any:
    return tensor.contiguous().view(torch.int16).numpy().view(np.uint16)


# Decoding


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float8_e8m0fnu", "uint8"])
@pytest.mark.parametrize("shape", [(576, 320), (128, 128), (300, 130), (1, 1), (129, 127)])
def test_a_whole_matrix(shape: tuple[int, int], kind: str, tmp_path: Path) -> None:
    codes, scales = random_pair(*shape, kind)
    found = reader(tmp_path, codes, scales)
    assert (found.shape, found.dtype, found.exact) == (shape, BY_NAME["bfloat16"], False)
    assert list(found.stored) == ["a.weight", "a.weight_scale_inv"]
    assert isinstance(found, Reader)
    assert np.array_equal(found.read(slice(0, shape[0]), slice(0, shape[1])), as_bits(decoded(codes, scales)))


@pytest.mark.parametrize("kind", ["uint8", "float8_e8m0fnu"])
def test_every_exponent_has_torch_s_value(kind: str, tmp_path: Path) -> None:
    codes = torch.full((1, 128 * 255), 1.0).to(FP8)
    scales = torch.arange(255, dtype=torch.uint8)[None]
    found = reader(tmp_path, codes, scales if kind == "uint8" else scales.view(E8M0))
    every = scales.view(E8M0).float().repeat_interleave(128, 1).bfloat16()
    assert np.array_equal(found.read(slice(0, 1), slice(0, 128 * 255)), as_bits(every))


@pytest.mark.parametrize("block", [(128, 128), (64, 32), (7, 5), (1, 400), (1000, 1), (1, 1)])
def test_any_rows_and_columns(block: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "STEP", 1000)
    codes, scales = quantised(torch.randn(576, 320, generator=torch.Generator().manual_seed(0)), block)
    found, expected = reader(tmp_path, codes, scales, block), as_bits(decoded(codes, scales, block))
    chosen = np.random.default_rng(0)
    for _ in range(20):
        first, last = sorted(chosen.integers(0, 321, 2).tolist())
        start, stop = sorted(chosen.integers(0, 577, 2).tolist())
        cols = slice(first, max(last, first + 1))
        assert np.array_equal(found.read(slice(start, stop), cols), expected[start:stop, cols])
        rows = chosen.integers(0, 576, 50)
        assert np.array_equal(found.read(rows, cols), expected[rows][:, cols])


@pytest.mark.parametrize("ways", [1, 2, 4])
@pytest.mark.parametrize("chunk_bytes", [2000, 1 << 20])
def test_a_permutation_and_cuts_come_after_it(
    ways: int, chunk_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cuts of 576 rows in 4 and of 320 columns in 4 go through blocks; so does a permutation of single rows."""
    monkeypatch.setattr(gathering, "CHUNK_BYTES", chunk_bytes)
    codes, scales = random_pair(576, 320)
    expected = as_bits(decoded(codes, scales))
    order = np.random.default_rng(0).permutation(576)
    held = Piece(reader(tmp_path, codes, scales), order, 0, StoredName("here", "a"))  # row i is the slot's order[i]
    slot = np.empty_like(expected)
    slot[order] = expected
    for part in range(ways):
        rows = np.arange(576 // ways) + part * (576 // ways)
        col, cols = part * (320 // ways), 320 // ways
        gathers = Planner().compose(rows, 0, 320, [held])
        found = [
            chunk.copy() for _, chunk in gathering.gather_chunks(gathers, (rows.size, 320), BY_NAME["bfloat16"], "t")
        ]
        assert np.array_equal(np.concatenate(found), slot[rows])
        gathers = Planner().compose(np.arange(576), col, cols, [held])
        chunks = transposed_chunks(gathers, (576, cols), BY_NAME["bfloat16"], "t")
        assert np.array_equal(np.concatenate([chunk for _, chunk in chunks]), slot[:, col : col + cols].T)


def test_a_function_comes_after_it(tmp_path: Path) -> None:
    codes, scales = random_pair(200, 130)
    held = Piece(reader(tmp_path, codes, scales), np.arange(200), 0, StoredName("here", "a"), Affine(12))
    found = materialise(Planner(), [held], (200, 130), BY_NAME["bfloat16"])
    assert np.array_equal(found, as_bits((decoded(codes, scales).float() * 12).bfloat16()))


def test_wrong_scales_are_seen(tmp_path: Path) -> None:
    """A neighbour's scale; a short last block of 80 rows, as if the rows were shared out evenly among two blocks."""
    codes, scales = quantised(torch.randn(160, 320, generator=torch.Generator().manual_seed(0)))
    found = reader(tmp_path, codes, scales).read(slice(0, 160), slice(0, 320))
    assert np.array_equal(found, as_bits(decoded(codes, scales)))
    assert not np.array_equal(found, as_bits(decoded(codes, scales.roll(1, 1))))
    even = decoded(codes, scales, (80, 128))
    assert not np.array_equal(found[80:128], as_bits(even)[80:128])
    assert np.array_equal(found[:80], as_bits(even)[:80])


def test_memory_does_not_grow_with_the_matrix(tmp_path: Path) -> None:
    def peak(rows: int) -> int:
        generator = torch.Generator().manual_seed(0)
        codes = torch.randint(0, 120, (rows, 2048), generator=generator, dtype=torch.uint8).view(FP8)
        scales = torch.ones(-(-rows // 128), 16)
        found = reader(tmp_path, codes, scales)
        gathers = Planner().compose(np.arange(rows), 0, 2048, [Piece(found, np.arange(rows), 0, StoredName("a", "b"))])
        tracemalloc.start()
        for _ in gathering.gather_chunks(gathers, (rows, 2048), BY_NAME["bfloat16"], "t"):
            pass
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return highest

    peak(256)
    assert peak(8192) < 1.2 * peak(512) < 12 << 20


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_a_code_of_nan_is_refused(code: int, tmp_path: Path) -> None:
    codes, scales = random_pair(140, 140)
    codes.view(torch.uint8)[135, 3] = code
    found = reader(tmp_path, codes, scales)
    found.read(slice(0, 135), slice(0, 140))
    with pytest.raises(ConversionError, match=r"model\.safetensors: a\.weight holds codes that stand for no number"):
        found.read(slice(0, 140), slice(0, 140))


@pytest.mark.parametrize(
    ("kind", "scale", "text"),
    [
        ("float32", float("nan"), "a.weight has scales in a.weight_scale_inv that are infinite or NaN"),
        ("bfloat16", float("inf"), "a.weight has scales in a.weight_scale_inv that are infinite or NaN"),
        ("uint8", 255, "a.weight has scales in a.weight_scale_inv that are infinite or NaN"),
        ("float32", 3e38, "a.weight times its scales holds values beyond the range of bfloat16"),
    ],
)
def test_a_scale_that_is_no_number_is_refused(kind: str, scale: float, text: str, tmp_path: Path) -> None:
    codes, scales = random_pair(140, 140, kind)
    scales[1, 0] = scale
    with pytest.raises(ConversionError, match=text):
        reader(tmp_path, codes, scales).read(slice(120, 140), slice(0, 140))


@pytest.mark.parametrize("value", [None, Affine(12), Affine(0.22, -1)])
def test_it_goes_through_the_queue(value: Affine | None, tmp_path: Path) -> None:
    codes, scales = random_pair(200, 130)
    held = Piece(reader(tmp_path, codes, scales), np.arange(200)[::-1].copy(), 0, StoredName("here", "a"), value)
    handle = TensorHandle((200, 130), BY_NAME["bfloat16"], [held])
    received = pickle.loads(pickle.dumps(handle))  # as in a process that is not of this project
    assert isinstance(received, torch.Tensor)
    assert torch.equal(received, to_torch(handle))
    expected = decoded(codes, scales).flip(0)
    if value is not None:
        expected = (expected.float() * float(value.scale) + float(value.shift)).bfloat16()
    assert torch.equal(received, expected)


# Folders

SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 320,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}


def quantise(plain: Path, folder: Path, scale_dtype: torch.dtype = torch.float32) -> Path:
    """Copy of a model with its linear layers in FP8, and with the decoded bfloat16 model beside it as `decoded`."""
    tensors = load_file(plain / "model.safetensors")
    stored, true = {}, {}
    for name, tensor in tensors.items():
        if name.endswith(("proj.weight", "proj_with_mqa.weight")):
            codes, scales = quantised(tensor)
            if scale_dtype == torch.uint8:
                scales = (scales.log2().ceil() + 127).to(torch.uint8)
            stored[name], stored[f"{name}_scale_inv"] = (
                codes,
                scales if scale_dtype == torch.uint8 else scales.to(scale_dtype),
            )
            true[name] = decoded(codes, stored[f"{name}_scale_inv"])
        else:
            stored[name] = true[name] = tensor
    for path, content in ((folder, stored), (folder / "decoded", true)):
        path.mkdir(parents=True)
        for file in plain.iterdir():
            if file.suffix != ".safetensors":
                shutil.copy(file, path)
        save_file(content, path / "model.safetensors", {"format": "pt"})
    edit_config(folder, quantization_config=QUANTISATION)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama2", tmp_path_factory.mktemp("plain") / "model", dtype="bfloat16", **SIZES)


@pytest.fixture(scope="module")
def model(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Quantised model; its folder `decoded` holds what it means."""
    return quantise(plain, tmp_path_factory.mktemp("fp8") / "model")


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy to be damaged."""
    shutil.copytree(model, tmp_path / "copy")
    yield tmp_path / "copy"


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("write", [hf_to_megatron, hf_to_torch_dist])
def test_a_checkpoint_is_that_of_the_decoded_model(tp: int, write: Any, model: Path, tmp_path: Path) -> None:
    write(model, tmp_path / "a", tp=tp)
    write(model / "decoded", tmp_path / "b", tp=tp)
    if write is hf_to_megatron:
        for rank in range(tp):
            one, other = (rank_content(tmp_path / name, f"mp_rank_{rank:02d}") for name in "ab")
            assert one["args"].hf_config == other["args"].hf_config
            weights = [
                {key: tensor for key, tensor in content["model"].items() if "_extra" not in key}
                for content in (one, other)
            ]
            same_tensors(*weights)
    one, other = (megatron_to_hf(tmp_path / name, tmp_path / f"{name}-hf") for name in "ab")
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    same_tensors(hf_tensors(one), hf_tensors(model / "decoded"))
    assert "quantization_config" not in (one / "config.json").read_text()


def test_other_block_edges(tmp_path: Path) -> None:
    """576 rows with 5 scales, heads that lie across blocks."""
    sizes = {**SIZES, "hidden_size": 576, "num_attention_heads": 12, "num_key_value_heads": 4}
    folder = quantise(make_model("qwen2", tmp_path / "plain", dtype="bfloat16", **sizes), tmp_path / "model")
    for tp in (1, 4):
        back = megatron_to_hf(hf_to_megatron(folder, tmp_path / f"m{tp}", tp=tp), tmp_path / f"h{tp}")
        same_tensors(hf_tensors(back), hf_tensors(folder / "decoded"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8])
def test_a_folder_of_other_scales_written_as_bfloat16(dtype: torch.dtype, plain: Path, tmp_path: Path) -> None:
    folder = quantise(plain, tmp_path / "model", dtype)
    succeeded(verb("convert", folder, tmp_path / "out", "--to", "hf", "--quiet"))
    same_tensors(hf_tensors(tmp_path / "out"), hf_tensors(folder / "decoded"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"


def test_experts(tmp_path: Path) -> None:
    sizes = {**SIZES, "moe_intermediate_size": 192}
    folder = quantise(make_model("qwen3-moe", tmp_path / "plain", dtype="bfloat16", **sizes), tmp_path / "model")
    back = megatron_to_hf(hf_to_megatron(folder, tmp_path / "m", tp=2, ep=2), tmp_path / "h")
    same_tensors(hf_tensors(back), hf_tensors(folder / "decoded"))


def test_deepseek_v3_as_published(tmp_path: Path) -> None:
    """Latents of 568 and 8 rotated rows: kv_a_proj_with_mqa has 576 rows and 5 scales, as in the published model."""
    sizes = {"kv_lora_rank": 568, "hidden_size": 192, "moe_intermediate_size": 160}
    plain = make_model("deepseek-v3", tmp_path / "plain", dtype="bfloat16", **sizes)
    folder = quantise(plain, tmp_path / "model")
    scales = load_file(folder / "model.safetensors")
    assert scales["model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv"].shape == (5, 2)
    for number, write in enumerate((hf_to_megatron, hf_to_torch_dist)):
        options = dict(tp=2, pp=2, ep=2, etp=1)
        one = write(folder, tmp_path / f"fp8-{number}", **options)
        other = write(folder / "decoded", tmp_path / f"bf16-{number}", **options)
        files = [path.relative_to(other) for path in sorted(other.rglob("*")) if path.suffix in (".pt", ".distcp")]
        assert files
        assert all((one / file).read_bytes() == (other / file).read_bytes() for file in files)
        wanted = {
            name: tensor.float() if name.endswith("correction_bias") else tensor  # Megatron-LM holds it in float32
            for name, tensor in hf_tensors(folder / "decoded").items()
        }
        same_tensors(hf_tensors(megatron_to_hf(one, tmp_path / f"hf-{number}")), wanted)


def test_scales_may_lie_in_another_file(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sharded"
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = {name: f"model-0000{1 + name.endswith('_scale_inv')}-of-00002.safetensors" for name in tensors}
    for file in set(names.values()):
        save_file({name: tensors[name] for name in names if names[name] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    source = HFSource(folder)
    assert source.origin.identity is not None
    assert set(names.values()) < source.origin.identity.keys()
    succeeded(verb("convert", folder, tmp_path / "out", "--tp", "2", "--quiet"))
    assert verb("verify", tmp_path / "out", model / "decoded").code == 0
    manifest = json.loads(next((tmp_path / "out").rglob("conversion.json")).read_text())
    entries = [entry for file in manifest["files"].values() for entry in file["tensors"].values()]
    assert {where.partition(":")[0] for entry in entries for where in entry["from"]} == set(names.values())


# Verbs


def test_the_manifest_says_what_was_decoded(model: Path, tmp_path: Path) -> None:
    planned = json.loads(verb("plan", model, tmp_path / "out", "--tp", "2", "--json", "--no-measure").out)
    run = succeeded(verb("convert", model, tmp_path / "out", "--tp", "2"))
    assert "14 tensors: decoded from float8_e4m3fn in blocks of 128×128, rounded to bfloat16" in run.out + run.err
    manifest = json.loads(next((tmp_path / "out").rglob("conversion.json")).read_text())
    entries = [entry for file in manifest["files"].values() for entry in file["tensors"].values()]
    for entry in entries:
        slot = entry["holds"][0].split()[-1]
        text = "decoded from float8_e4m3fn in blocks of 128×128, rounded to bfloat16"
        assert entry.get("computed") == (text if slot in ("qkv", "proj", "fc1", "fc2") else None)
    sources = {where for entry in entries for where in entry["from"]}
    assert len(sources) == planned["source_tensors"] == len(load_file(model / "model.safetensors"))
    assert "model.safetensors: model.layers.0.mlp.up_proj.weight_scale_inv" in sources
    assert planned["computed"] == {text: 2 * 2 * 4}
    written = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*.pt"))
    assert planned["nbytes"] == written and planned["casts"] == {}
    assert text in verb("plan", model, tmp_path / "other", "--tp", "2").out


def test_the_queue_carries_it(model: Path, tmp_path: Path) -> None:
    loader = ("--loader", "llama_mistral", "--saver", "mcore", "--load-dir", model, "--save-dir", tmp_path / "out")
    succeeded(convert(*loader, "--target-tensor-parallel-size", 2))
    succeeded(verb("verify", model / "decoded", tmp_path / "out"))


def test_several_processes_decode(model: Path, tmp_path: Path) -> None:
    succeeded(verb("convert", model, tmp_path / "out", "--tp", "2", "--workers", "2", "--quiet", cwd=ROOT))
    succeeded(verb("verify", model / "decoded", tmp_path / "out"))


def test_inspect_counts_parameters_once(model: Path) -> None:
    one, other = (json.loads(succeeded(verb("inspect", folder, "--json")).out) for folder in (model, model / "decoded"))
    assert one["parameters"] == other["parameters"]
    tensors = load_file(model / "model.safetensors")
    assert one["weights"]["tensors"] == len(tensors)
    assert one["weights"]["bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    assert one["weights"]["dtypes"]["float8_e4m3fn"]["tensors"] == 14
    assert one["weights"]["dtypes"]["float32"]["tensors"] == 14
    assert one["model"]["dtype"] == "bfloat16"
    text = succeeded(verb("inspect", model)).out
    assert "decoded from float8_e4m3fn" in text
    succeeded(verb("args", model))


def test_verify_and_diff(model: Path, copy: Path, tmp_path: Path) -> None:
    succeeded(verb("convert", model, tmp_path / "out", "--tp", "2", "--quiet"))
    for one, other in ((model, tmp_path / "out"), (tmp_path / "out", model), (model, model / "decoded")):
        succeeded(verb("verify", one, other))
        assert verb("diff", one, other).code == 0
    succeeded(verb("verify", tmp_path / "out"))
    name = "model.layers.1.mlp.down_proj.weight_scale_inv"
    edit_tensors(copy, lambda tensors: tensors[name][1, 2].mul_(2))  # the ragged edge
    for action in ("verify", "diff"):
        run = verb(action, copy, tmp_path / "out")
        assert run.code == 1 and "layer 1 fc2" in run.out and "layer 0" not in run.out, run


def test_a_flipped_byte_is_seen(model: Path, tmp_path: Path) -> None:
    succeeded(verb("convert", model, tmp_path / "out", "--tp", "2", "--quiet"))
    manifest = json.loads(next((tmp_path / "out").rglob("conversion.json")).read_text())
    file, entry = next(iter(manifest["files"].items()))
    name = "decoder.layers.1.mlp.linear_fc1.weight"
    path = next((tmp_path / "out").rglob("conversion.json")).parent / file
    content = bytearray(path.read_bytes())
    (place,) = [tensor["at"][0] for key, tensor in entry["tensors"].items() if key.endswith(name)]
    content[place + 1000] ^= 1
    path.write_bytes(content)
    assert "layer 1 fc1" in verb("verify", tmp_path / "out").out
    run = verb("verify", model, tmp_path / "out")
    assert run.code == 1 and "1 of 163840 elements differ" in run.out, run


def test_logits_of_a_quantised_folder_are_not_left_to_transformers(model: Path) -> None:
    run = verb("verify", model, model / "decoded", "--logits")
    refused(run, "is quantised, and transformers decodes", "--to hf", code=2)


def test_a_quantised_reference_describes_a_checkpoint(model: Path, tmp_path: Path) -> None:
    hf_to_megatron(model, tmp_path / "m", tp=2)
    succeeded(verb("convert", tmp_path / "m", tmp_path / "out", "--hf-config", model, "--quiet"))
    assert "quantization_config" not in (tmp_path / "out" / "config.json").read_text()
    same_tensors(hf_tensors(tmp_path / "out"), hf_tensors(model / "decoded"))


def test_a_tied_copy_may_be_quantised(plain: Path, tmp_path: Path) -> None:
    """A stored lm_head of a tied model must equal the embeddings, decoded or not."""
    folder = quantise(plain, tmp_path / "model")
    edit_config(folder, tie_word_embeddings=True)
    codes, scales = quantised(load_file(plain / "model.safetensors")["model.embed_tokens.weight"])
    head = {"lm_head.weight": codes, "lm_head.weight_scale_inv": scales}
    edit_tensors(folder, lambda tensors: tensors.update({**head, "model.embed_tokens.weight": decoded(codes, scales)}))
    succeeded(verb("convert", folder, tmp_path / "out", "--tp", "2", "--quiet"))
    edit_tensors(folder, lambda tensors: tensors["lm_head.weight_scale_inv"][1, 0].mul_(2))
    refused(verb("convert", folder, tmp_path / "other"), "lm_head.weight", "differs from", "in row 128")


# Refusals

FAULTS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], list[str]]] = {
    "no scale": (
        lambda tensors: tensors.pop("model.layers.0.mlp.up_proj.weight_scale_inv"),
        ["mlp.up_proj.weight is float8_e4m3fn, but there is no model.layers.0.mlp.up_proj.weight_scale_inv"],
    ),
    "no weight": (
        lambda tensors: tensors.pop("model.layers.0.mlp.up_proj.weight"),
        ["model.layers.0.mlp.up_proj.weight_scale_inv has no model.layers.0.mlp.up_proj.weight"],
    ),
    "shape": (
        lambda tensors: tensors.update({"model.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(2, 2)}),
        [
            "has shape [2, 2]; model.layers.0.mlp.up_proj.weight of shape [320, 256], in blocks of 128×128, has scales of",
            "shape [3, 2]",
        ],
    ),
    "dtype": (
        lambda tensors: tensors.update({"model.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(3, 2).half()}),
        ["up_proj.weight_scale_inv is float16 instead of one of float32, bfloat16, float8_e8m0fnu, uint8"],
    ),
    "plain weight": (
        lambda tensors: tensors.update({"model.layers.0.mlp.up_proj.weight": torch.ones(320, 256).bfloat16()}),
        ["belongs to model.layers.0.mlp.up_proj.weight, which is bfloat16 instead of float8_e4m3fn"],
    ),
    "vector": (
        lambda tensors: tensors.update(
            {"model.norm.weight": torch.ones(256).to(FP8), "model.norm.weight_scale_inv": torch.ones(2)}
        ),
        ["model.norm.weight is float8_e4m3fn of shape [256]; only a matrix can have scales for blocks"],
    ),
    "all of them": (
        lambda tensors: [
            tensors.pop("model.layers.0.mlp.up_proj.weight_scale_inv"),
            tensors.pop("model.layers.1.mlp.up_proj.weight"),
        ],
        ["layers.0.mlp.up_proj.weight is float8", "layers.1.mlp.up_proj.weight_scale_inv has no"],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_codes_and_scales_that_do_not_belong_together(fault: str, copy: Path, tmp_path: Path) -> None:
    change, words = FAULTS[fault]
    edit_tensors(copy, change)
    refused(verb("convert", copy, tmp_path / "out"), "do not belong together", *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quant_method": "gptq"}, "quantised by GPTQ, which cannot be read"),
        ({"fmt": "e5m2"}, "fmt=e5m2"),
        ({"activation_scheme": "none"}, "activation_scheme=none"),
        ({"weight_block_size": [128, 0]}, "weight_block_size=[128, 0]"),
        ({"group_size": 32}, "group_size=32"),
        ({"quant_method": None}, "quantised by an unnamed method"),
    ],
)
def test_other_quantisations_are_refused(changes: dict[str, Any], words: str, copy: Path, tmp_path: Path) -> None:
    edit_config(copy, quantization_config={**QUANTISATION, **changes})
    refused(verb("convert", copy, tmp_path / "out"), words, "convert the unquantised model instead")


def test_a_short_description_is_enough(copy: Path, tmp_path: Path) -> None:
    described = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": None, "modules_to_not_convert": None}
    edit_config(copy, quantization_config=described)
    succeeded(verb("verify", copy, copy / "decoded"))


def test_a_quantised_model_that_does_not_say_so_is_refused(copy: Path, tmp_path: Path) -> None:
    edit_config(copy, quantization_config=None)
    refused(
        verb("convert", copy, tmp_path / "out"),
        "14 tensors such as",
        "(FP8 with scales), but config.json has no quantization_config",
    )


def test_a_damaged_code_ends_the_conversion(copy: Path, tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    edit_tensors(copy, lambda tensors: tensors[name].view(torch.uint8)[5, 7].fill_(0x7F))
    refused(verb("convert", copy, tmp_path / "out"), name, "holds codes that stand for no number (NaN)")
