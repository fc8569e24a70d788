"""Filling and comparing: exact bytes whatever the chunk, the run length, the stride and the cast."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from megatron_converters.basics.dtypes import DType, dtype_named
from megatron_converters.basics.errors import ConversionError
from megatron_converters.conversion import copying, gathering
from megatron_converters.conversion.composing import Piece, Planner, StoredName
from megatron_converters.conversion.copying import Executor
from megatron_converters.conversion.gathering import materialise
from megatron_converters.conversion.outline import Fill
from megatron_converters.formats.queue.source import MemoryTensor
from megatron_converters.storage import safetensors
from megatron_converters.storage.output_file import OutputFile
from tests.helpers import ROOT, wait_for
from tests.tiny import piece

Array = npt.NDArray[Any]
RANDOM = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def lanes_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors as small as those of tests go through the lanes, too."""
    monkeypatch.setattr(copying, "_SMALL_BYTES", -1)


@pytest.fixture(params=[1, 24, 1 << 20], ids=["chunks of a row", "chunks of 24 bytes", "one chunk"])
def chunk_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(gathering, "CHUNK_BYTES", request.param)
    yield request.param


def numbers(*shape: int) -> Array:
    return RANDOM.integers(0, 2**63, shape, dtype=np.uint64)


def put(
    executor: Executor,
    file: OutputFile,
    name: str,
    dtype: DType,
    shape: tuple[int, ...],
    rows: Array,
    col: int,
    pieces: list[Piece],
    **more: Any,
) -> None:
    fill = Fill(file.path, name, dtype, shape, rows, col, **more)
    executor.fill(file, fill, executor.plan(fill, pieces))


def filled(
    path: Path, rows: list[int], shape: tuple[int, ...], pieces: list[Piece], col: int = 0, dtype: str = "int64"
) -> Array:
    """What `Executor.fill` writes into a file, read back."""
    target_dtype = dtype_named(dtype)
    file = safetensors.lay_out(path, {"t": (target_dtype, shape)}, {})
    executor = Executor()
    put(executor, file, "t", target_dtype, shape, np.array(rows, np.int64), col, pieces)
    executor.finish()
    file.close()
    return safetensors.read(path).tensors["t"].array()


def test_rows_and_columns_from_several_pieces(tmp_path: Path, chunk_bytes: int) -> None:
    whole = numbers(6, 4)
    pieces = [
        piece(np.ascontiguousarray(whole[[4, 0, 2], :1]), [4, 0, 2]),
        piece(np.ascontiguousarray(whole[[1, 5, 3], :1]), [1, 5, 3]),
        piece(np.vstack([np.zeros((1, 3), np.uint64), whole[:, 1:]]), [-1, 0, 1, 2, 3, 4, 5], 1),
    ]
    assert np.array_equal(filled(tmp_path / "all", list(range(6)), (6, 4), pieces), whole)
    assert np.array_equal(filled(tmp_path / "some", [5, 2, 3], (3, 2), pieces, col=1), whole[[5, 2, 3], 1:3])
    assert np.array_equal(filled(tmp_path / "pad", [4, 5, 5, 5], (4, 4), pieces), whole[[4, 5, 5, 5]])


def test_vectors(tmp_path: Path, chunk_bytes: int) -> None:
    whole = numbers(7)
    pieces = [piece(whole[[0, 3, 6]], [0, 3, 6]), piece(whole[[1, 2, 4, 5]], [1, 2, 4, 5])]
    assert np.array_equal(filled(tmp_path / "v", [6, 5, 4, 3, 2, 1, 0], (7,), pieces), whole[::-1])


def test_one_piece_as_it_lies(tmp_path: Path, chunk_bytes: int) -> None:
    whole = numbers(5, 3)
    assert np.array_equal(filled(tmp_path / "t", [1, 2, 3], (3, 3), [piece(whole, range(5))]), whole[1:4])


@pytest.mark.parametrize("count", [31, 32, 33, 34, 200])
def test_many_short_runs_are_gathered_by_index(tmp_path: Path, chunk_bytes: int, count: int) -> None:
    whole = numbers(2 * count, 2)
    order = [2 * row for row in range(count)]  # no two rows follow each other
    assert np.array_equal(filled(tmp_path / "one", order, (count, 2), [piece(whole, range(2 * count))]), whole[order])
    even, odd = piece(whole[::2].copy(), range(0, 2 * count, 2)), piece(whole[1::2].copy(), range(1, 2 * count, 2))
    both = filled(tmp_path / "two", list(range(2 * count)), (2 * count, 2), [even, odd])
    assert np.array_equal(both, whole)


def test_sources_that_are_not_contiguous(tmp_path: Path, chunk_bytes: int) -> None:
    stored = numbers(4, 80)
    sources = {"transposed": stored.T, "strided": stored[::2, 1::2], "backwards": stored[::-1, ::-1]}
    for name, array in sources.items():
        rows, cols = array.shape
        for order in (list(range(rows)), list(range(rows))[::-1]):
            found = filled(tmp_path / f"{name}{order[0]}", order, (rows, cols), [piece(array, range(rows))])
            assert np.array_equal(found, array[order]), name
    column = stored[:, 3]
    assert np.array_equal(filled(tmp_path / "column", [0, 1, 2, 3], (4,), [piece(column, range(4))]), column)


SPECIAL = [0.0, -0.0, 1.0, 65504.0, 65520.0, 1e5, -1e39, 3.3e38, 1e-8, 6e-8, 2**-24, 1.00390625, 1.01171875]
SPECIAL += [float("inf"), float("-inf"), float("nan")]


@pytest.mark.parametrize("target", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("source", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "by index"])
def test_casts_are_torch_s(tmp_path: Path, chunk_bytes: int, source: str, target: str, layout: str) -> None:
    """Ties, subnormals, infinities and NaN included; equal bits, but for the payload of a NaN."""
    generator = torch.Generator().manual_seed(0)
    values = torch.cat([torch.tensor(SPECIAL), torch.randn(80 * 4 - len(SPECIAL), generator=generator) * 1e3])
    tensor = values.to(getattr(torch, source)).reshape(80, 4)
    tensor[tensor.isfinite() & ~tensor.to(getattr(torch, target)).isfinite()] = 1.0  # such a cast is refused
    stored = tensor.T.contiguous().T if layout == "transposed" else tensor
    array = stored.view(getattr(torch, f"int{8 * tensor.itemsize}")).numpy().view(f"u{tensor.itemsize}")
    order = list(range(0, 80, 2)) if layout == "by index" else list(range(80))
    found = filled(tmp_path / "t", order, (len(order), 4), [piece(array, range(80), dtype=source)], dtype=target)
    expected = tensor[order].to(getattr(torch, target))
    bits = expected.view(getattr(torch, f"int{8 * expected.itemsize}")).numpy().view(f"u{expected.itemsize}")
    assert np.array_equal(np.where(expected.isnan(), 0, bits), np.where(expected.isnan(), 0, found))
    returned = torch.from_numpy(found.copy().view(f"i{expected.itemsize}")).view(expected.dtype)
    assert torch.equal(returned.isnan(), expected.isnan())


@pytest.mark.parametrize(
    ("source", "target", "value"), [("float32", "float16", 65520.0), ("float64", "float32", -1e39)]
)
def test_a_cast_that_overflows_is_refused(
    tmp_path: Path, chunk_bytes: int, source: str, target: str, value: float
) -> None:
    values = torch.ones(6, 2, dtype=getattr(torch, source))
    values[4, 1] = value
    array = values.view(getattr(torch, f"int{8 * values.itemsize}")).numpy().view(f"u{values.itemsize}")
    with pytest.raises(ConversionError, match=f"the piece holds values beyond the range of {target}"):
        filled(
            tmp_path / "t",
            list(range(6)),
            (6, 2),
            [piece(array, range(6), dtype=source, where="the piece")],
            dtype=target,
        )


def test_materialise(chunk_bytes: int) -> None:
    whole = numbers(4, 6)
    pieces = [piece(whole[:, 2:].copy(), range(4), 2), piece(whole[:, :2].copy(), range(4))]
    assert np.array_equal(materialise(Planner(), pieces, (4, 6), dtype_named("int64")), whole)
    vector = numbers(5)
    assert np.array_equal(materialise(Planner(), [piece(vector, range(5))], (5,), dtype_named("int64")), vector)


def compare(replica: Piece, pieces: list[Piece]) -> None:
    executor = Executor()
    executor.compare(replica, pieces, "final_norm")
    executor.finish()


def test_replicas_that_agree(chunk_bytes: int) -> None:
    whole = numbers(4, 6)
    parts = [piece(whole[:3].copy(), [0, 1, 2]), piece(whole[3:].copy(), [3])]
    compare(piece(whole, range(4)), parts)
    compare(piece(whole[1:3, 2:4].copy(), [1, 2], 2), parts)
    junk = np.full((1, 6), 77, np.uint64)
    compare(piece(np.vstack([whole[3:], junk]), [3, -1]), parts)  # padding holds anything
    nan = np.array([[0x7FC00001]], np.uint32)
    compare(piece(nan, [0], dtype="float32"), [piece(nan.copy(), [0], dtype="float32")])  # bits are compared


@pytest.mark.parametrize("row", range(4))
def test_a_replica_that_differs_is_named_with_its_row(chunk_bytes: int, row: int) -> None:
    whole = numbers(4, 6)
    changed = whole.copy()
    changed[row, 5] ^= 1
    with pytest.raises(ConversionError, match=f"^final_norm: here: rank 1 differs from here: rank 0 in row {row}$"):
        compare(piece(changed, range(4), where="rank 1"), [piece(whole, range(4), where="rank 0")])


def test_minus_zero_is_not_zero(chunk_bytes: int) -> None:
    zeros = np.zeros((2, 2), np.uint32)
    negative = np.array([[0, 0], [0, 1 << 31]], np.uint32)
    with pytest.raises(ConversionError, match="in row 1"):
        compare(piece(negative, [0, 1], dtype="float32"), [piece(zeros, [0, 1], dtype="float32")])


class Failing(MemoryTensor):
    """A tensor that cannot be read."""

    def array(self) -> Array:
        raise OSError("the disk is gone")


def failing() -> Piece:
    return Piece(Failing(dtype_named("int64"), (2, 2), numbers(2, 2)), np.arange(2), 0, StoredName("here", "broken"))


#: Three hundred executors, each interrupted at another moment while its main thread queues tasks.
INTERRUPTED = """
import random, signal
import numpy as np
from megatron_converters.conversion import copying
from megatron_converters.conversion.copying import Executor
from tests.tiny import piece

copying._SMALL_BYTES = -1
chance, data = random.Random(1), piece(np.zeros((1, 1), np.uint64), [0])
signal.signal(signal.SIGALRM, signal.default_int_handler)
for _ in range(300):
    executor = Executor(lanes=2)
    try:
        signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-5, 0.002))
        while True:
            executor.compare(data, [data], "w")
    except KeyboardInterrupt:
        executor.cancel()
"""


def test_an_interrupt_at_any_moment_ends_the_lanes() -> None:
    """Ctrl-C reaches the main thread between any two steps of Python code, also just after it has taken a lock there."""
    subprocess.run([sys.executable, "-c", INTERRUPTED], cwd=ROOT, timeout=60, check=True)


def test_a_failure_in_a_thread_is_raised_by_finish(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="the disk is gone"):
        filled(tmp_path / "t", [0, 1], (2, 2), [failing()])


def test_a_failure_is_raised_by_a_later_fill_and_the_file_stays_incomplete(tmp_path: Path) -> None:
    good = piece(numbers(2, 2), [0, 1])
    file = safetensors.lay_out(tmp_path / "t", dict.fromkeys("01", (good.data.dtype, (2, 2))), {})
    executor = Executor(lanes=1)
    put(executor, file, "0", good.data.dtype, (2, 2), np.arange(2), 0, [failing()])
    wait_for(lambda: executor._stopped)
    with pytest.raises(OSError, match="the disk is gone"):
        put(executor, file, "1", good.data.dtype, (2, 2), np.arange(2), 0, [good])
    executor.cancel()
    with pytest.raises(ConversionError, match="is incomplete"):
        file.close()
    file.discard()


def test_the_first_failure_stops_tensors_that_are_being_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mismatch found while a large tensor is copied must not wait for the rest of it."""
    monkeypatch.setattr(gathering, "CHUNK_BYTES", 16)
    failed, written = threading.Event(), []
    good = piece(numbers(500, 2), range(500))

    def progress(count: int) -> None:
        written.append(count)
        failed.wait(10)

    file = safetensors.lay_out(tmp_path / "t", {"large": (good.data.dtype, (500, 2))}, {})
    executor = Executor(progress, lanes=2)
    put(executor, file, "large", good.data.dtype, (500, 2), np.arange(500), 0, [good])
    executor.compare(failing(), [good], "replica")
    wait_for(lambda: executor._stopped)
    failed.set()
    with pytest.raises(OSError, match="the disk is gone"):
        executor.finish()
    assert len(written) < 500
    file.discard()


def test_cancel_stops_within_a_tensor_and_raises_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathering, "CHUNK_BYTES", 16)
    begun, go_on, written = threading.Event(), threading.Event(), []

    def progress(count: int) -> None:
        written.append(count)
        begun.set()
        go_on.wait(10)

    good = piece(numbers(500, 2), range(500))
    file = safetensors.lay_out(tmp_path / "t", {"large": (good.data.dtype, (500, 2))}, {})
    executor = Executor(progress)
    put(executor, file, "large", good.data.dtype, (500, 2), np.arange(500), 0, [good])
    assert begun.wait(10)
    executor._stopped = True  # as cancel() does, which would wait for the thread that waits for us
    go_on.set()
    executor.cancel()
    assert len(written) == 1
    file.discard()


@pytest.mark.parametrize("small", [True, False])
def test_small_tensors_are_written_by_the_thread_that_plans(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: bool
) -> None:
    """And a file that is full is closed by a lane all the same, since that waits for the disk."""
    monkeypatch.setattr(copying, "_SMALL_BYTES", 2 * 2 * 8 if small else 2 * 2 * 8 - 1)
    wrote, closed = [], []
    good = piece(numbers(2, 2), range(2))
    file = safetensors.lay_out(tmp_path / "t", {"a": (good.data.dtype, (2, 2))}, {})
    executor = Executor(
        lambda _: wrote.append(threading.current_thread()), lambda _: closed.append(threading.current_thread())
    )
    put(executor, file, "a", good.data.dtype, (2, 2), np.arange(2), 0, [good])
    executor.finish()
    file.close()
    assert [thread is threading.main_thread() for thread in [*wrote, *closed]] == [small, False]


def test_a_small_replica_is_compared_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "_SMALL_BYTES", 2 * 2 * 8)
    executor: Executor[Any] = Executor()
    with pytest.raises(ConversionError, match=r"w: .* differs from .* in row 1"):
        executor.compare(
            piece(np.eye(2, dtype=np.int64).view(np.uint64), [0, 1]),
            [piece(np.array([[1, 0], [0, 2]], np.uint64), [0, 1])],
            "w",
        )
    assert executor.cancel()


def test_progress_counts_every_byte_once(tmp_path: Path, chunk_bytes: int) -> None:
    counted: list[int] = []
    good = piece(numbers(9, 3), range(9))
    file = safetensors.lay_out(tmp_path / "t", {"a": (good.data.dtype, (9, 3)), "b": (good.data.dtype, (4, 3))}, {})
    executor = Executor(counted.append)
    put(executor, file, "a", good.data.dtype, (9, 3), np.arange(9), 0, [good])
    put(executor, file, "b", good.data.dtype, (4, 3), np.arange(4), 0, [good])
    executor.finish()
    file.close()
    assert sum(counted) == (9 + 4) * 3 * 8


def test_many_tensors_on_several_threads(tmp_path: Path) -> None:
    """More than the queue holds."""
    whole = numbers(300, 2)
    source = piece(whole, range(300))
    file = safetensors.lay_out(tmp_path / "t", {str(i): (source.data.dtype, (2, 2)) for i in range(150)}, {})
    executor = Executor()
    for i in range(150):
        put(executor, file, str(i), source.data.dtype, (2, 2), np.array([i, 299 - i]), 0, [source])
    executor.finish()
    file.close()
    tensors = safetensors.read(tmp_path / "t").tensors
    assert all(np.array_equal(tensors[str(i)].array(), whole[[i, 299 - i]]) for i in range(150))
