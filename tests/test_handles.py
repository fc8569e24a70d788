"""What crosses the queue: handles for a process of ours, torch tensors and dtypes for any other."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from megatron_converters.basics.dtypes import BY_NAME
from megatron_converters.basics.errors import ConversionError
from megatron_converters.basics.handover import receive_own_types, receives_own_types
from megatron_converters.conversion.composing import Piece, Planner, StoredName
from megatron_converters.conversion.gathering import materialise
from megatron_converters.formats.queue.handles import TensorHandle, part_of, to_torch
from megatron_converters.storage import safetensors
from megatron_converters.storage.tensor import StoredTensor
from tests.tiny import piece, tiny_spec


@pytest.fixture(params=[True, False], ids=["ours", "another's"])
def ours(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whose process unpickles."""
    before = receives_own_types()
    receive_own_types(request.param)
    yield request.param
    receive_own_types(before)


@pytest.fixture
def as_torch() -> Iterator[None]:
    before = receives_own_types()
    receive_own_types(False)
    yield
    receive_own_types(before)


@pytest.fixture
def as_ours() -> Iterator[None]:
    before = receives_own_types()
    receive_own_types(True)
    yield
    receive_own_types(before)


def sent(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def stored(path: Path, tensor: torch.Tensor) -> StoredTensor:
    save_file({"t": tensor}, path)
    return safetensors.read(path).tensors["t"]


def whole(data: StoredTensor, rows: Any = None, col: int = 0) -> Piece:
    return Piece(
        data, np.arange(data.shape[0]) if rows is None else np.array(rows, np.int64), col, StoredName("here", data.path)
    )


def values(dtype: str, *shape: int) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 9).to(getattr(torch, dtype))


@pytest.mark.parametrize("name", BY_NAME)
def test_dtypes_cross_as_ours_or_as_torch_s(ours: bool, name: str) -> None:
    dtype = BY_NAME[name]
    assert sent(dtype) is (dtype if ours else getattr(torch, name))
    assert sent([dtype, {"a": dtype}])[1]["a"] is sent(dtype)


def test_copies_within_a_process_stay_ours(ours: bool) -> None:
    spec = tiny_spec()
    assert copy.deepcopy(spec) == spec
    assert dataclasses.replace(spec).dtype is spec.dtype
    assert copy.copy(spec.dtype) is spec.dtype


def test_a_handle_crosses_as_directions(as_ours: None, tmp_path: Path) -> None:
    tensor = values("float32", 4, 3)
    data = stored(tmp_path / "a", tensor)
    handle = TensorHandle((4, 3), BY_NAME["bfloat16"], [whole(data, [2, -1, 0, 1]), whole(data, [3, -1, -1, -1])])
    packed = pickle.dumps(handle)
    assert len(packed) < 1000
    found = pickle.loads(packed)
    assert isinstance(found, TensorHandle)
    assert (found.shape, found.dtype, len(found.pieces)) == ((4, 3), BY_NAME["bfloat16"], 2)
    for one, other in zip(found.pieces, handle.pieces, strict=True):
        assert (one.data, one.col, one.name) == (other.data, other.col, other.name)
        assert one.rows.tolist() == other.rows.tolist()


def test_row_maps_that_repeat_arrive_as_one_object(as_ours: None, tmp_path: Path) -> None:
    """Plans are kept by the identity of row maps; a model's layers must share them."""
    data = stored(tmp_path / "a", values("float32", 4, 3))
    one, other = (sent(TensorHandle((4, 3), data.dtype, [whole(data, [3, 2, -1, 0])])) for _ in range(2))
    assert one.pieces[0].rows is other.pieces[0].rows


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64", "int64", "uint8"])
@pytest.mark.parametrize("shape", [(5, 3), (7,)])
def test_a_plain_handle_becomes_the_same_torch_tensor(
    as_torch: None, tmp_path: Path, dtype: str, shape: tuple[int, ...]
) -> None:
    tensor = values(dtype, *shape)
    data = stored(tmp_path / "a", tensor)
    found = sent(TensorHandle(shape, data.dtype, [whole(data)]))
    assert isinstance(found, torch.Tensor)
    assert (found.dtype, tuple(found.shape)) == (tensor.dtype, shape)
    assert torch.equal(found, tensor)


def test_writing_into_a_received_tensor_never_reaches_the_file(as_torch: None, tmp_path: Path) -> None:
    tensor = values("float32", 5, 3)
    data = stored(tmp_path / "a", tensor)
    before = (tmp_path / "a").read_bytes()
    found = sent(TensorHandle((5, 3), data.dtype, [whole(data)]))
    found.zero_()
    del found
    assert (tmp_path / "a").read_bytes() == before
    assert torch.equal(sent(TensorHandle((5, 3), data.dtype, [whole(data)])), tensor)


def test_a_handle_of_pieces_is_gathered_and_cast(as_torch: None, tmp_path: Path) -> None:
    left, right = values("float32", 4, 2), values("float32", 4, 1) + 1
    pieces = [whole(stored(tmp_path / "a", left), [3, 2, 1, 0]), whole(stored(tmp_path / "b", right), col=2)]
    found = sent(TensorHandle((4, 3), BY_NAME["bfloat16"], pieces))
    assert torch.equal(found, torch.cat([left.flip(0), right], dim=1).bfloat16())


@pytest.mark.parametrize(
    ("rows", "dtype"), [([1, 0, 2], "float32"), ([0, 1, 2], "bfloat16")], ids=["other order", "other dtype"]
)
def test_a_single_piece_that_is_not_the_tensor_is_not_taken_for_it(
    as_torch: None, tmp_path: Path, rows: list[int], dtype: str
) -> None:
    tensor = values("float32", 3, 2)
    found = sent(TensorHandle((3, 2), BY_NAME[dtype], [whole(stored(tmp_path / "a", tensor), rows)]))
    assert torch.equal(found, tensor[rows].to(getattr(torch, dtype)))


def test_a_transposed_source_arrives_upright(as_torch: None, tmp_path: Path) -> None:
    tensor = values("float32", 3, 3)
    data = dataclasses.replace(stored(tmp_path / "a", tensor), strides=(1, 3))
    assert torch.equal(sent(TensorHandle((3, 3), data.dtype, [whole(data)])), tensor.T)


def test_a_tensor_in_memory_cannot_be_handed_over(ours: bool) -> None:
    handle = TensorHandle((2, 2), BY_NAME["int64"], [piece(np.zeros((2, 2), np.uint64), [0, 1], where="the queue")])
    with pytest.raises(ConversionError, match="the queue is not in a file"):
        pickle.dumps(handle)


def test_parts_of_a_slot_see_their_own_rows(tmp_path: Path) -> None:
    """A slot of 6 rows in two files, the second with padding; the part is rows 4, 1, 5."""
    first, second = values("float32", 3, 2), values("float32", 4, 2) + 50
    pieces = [whole(stored(tmp_path / "a", first), [0, 1, 2]), whole(stored(tmp_path / "b", second), [3, 4, 5, -1])]
    seen = part_of(pieces, np.array([4, 1, 5]), 6)
    assert [one.rows.tolist() for one in seen] == [[-1, 1, -1], [-1, 0, 2, -1]]
    found = to_torch(TensorHandle((3, 2), BY_NAME["float32"], seen))
    assert torch.equal(found, torch.stack([second[1], first[1], second[2]]))
    assert [one.rows.tolist() for one in part_of(pieces, np.array([0]), 6)] == [[0, -1, -1]]  # only what gives a row
    assert part_of(pieces, np.array([2]), 6)[0].name == pieces[0].name


def test_a_handle_sent_on_is_still_the_same_tensor(as_ours: None, tmp_path: Path) -> None:
    tensor = values("bfloat16", 6, 2)
    data = stored(tmp_path / "a", tensor)
    handle = sent(sent(TensorHandle((6, 2), data.dtype, [whole(data, [5, 4, 3, 2, 1, 0])])))
    found = materialise(Planner(), handle.pieces, (6, 2), data.dtype)
    assert torch.equal(torch.from_numpy(found.view(np.int16)).view(torch.bfloat16), tensor.flip(0))
