"""Whatever the bytes of a damaged file, its reader succeeds or says in a sentence what is wrong, and nothing of it runs.

For more of it than the suite has time for: `FUZZ_SEED=1 FUZZ_TIMES=10 bash scripts/test.sh tests/test_fuzz.py`.
"""

from __future__ import annotations

import argparse
import encodings.cp437  # noqa: F401 - zipfile imports it where a name is not marked as UTF-8
import os
import resource
import signal
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from safetensors.torch import save_file

from megatron_converters.basics.errors import ConversionError
from megatron_converters.families import FAMILIES
from megatron_converters.families.config_json import config_from_spec, spec_from_config
from megatron_converters.formats.megatron.arguments import inexpressible, model_args, spec_fields
from megatron_converters.formats.megatron.conventions import conventions
from megatron_converters.formats.megatron.locating import COMMON_FILE
from megatron_converters.formats.megatron.torch_dist_source import TorchDistSource
from megatron_converters.storage import dcp, safetensors, torch_zip
from tests.conversions import hf_to_torch_dist
from tests.damage import Damage, any_bytes, any_json, any_opcodes, in_archive, in_header
from tests.oracle.hf_kinds import KINDS

HFModel = Callable[..., Path]

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

_SEED, _TIMES = (int(os.environ.get(name, default)) for name, default in (("FUZZ_SEED", "0"), ("FUZZ_TIMES", "1")))
_MUTATIONS = 400
#: What reading a damaged file of some kilobytes may take.
_SECONDS, _BYTES = 5, 256 << 20
#: Audit events of code that is found or run, and of what it would do first.
_FORBIDDEN = ("import", "exec", "compile", "pickle.", "ctypes.", "subprocess.", "socket.", "os.system", "os.exec")
_SEEN: list[str] = []


class _Hanging(BaseException):
    """Not caught by anything."""


class _Subject(NamedTuple):
    """A sound file and what opens it."""

    path: Path
    read: Callable[[], object]


def _state() -> dict[str, Any]:
    """What of a checkpoint is harder than dictionaries of numbers."""
    weight = torch.arange(24.0).view(4, 6)
    model = OrderedDict(
        a=weight, b=weight.T.bfloat16(), c=torch.nn.Parameter(weight[1:]), d=weight.to(torch.float8_e5m2)
    )
    args = argparse.Namespace(
        num_layers=2, params_dtype=torch.bfloat16, window_size=(3, 0), lr=1e-4, name="x", none=None
    )
    state = np.random.RandomState(0).get_state(legacy=True)
    return {"args": args, "model": model, "rng": [{"np": state, "device": torch.device("cpu")}], "at": np.float64(3)}


def _of_torch(folder: Path) -> _Subject:
    path = folder / "state.pt"
    torch.save(_state(), path)
    return _Subject(path, partial(torch_zip.read, path))


def _of_safetensors(folder: Path) -> _Subject:
    path = folder / "state.safetensors"
    save_file({f"layer.{n}": torch.zeros(n, 3, dtype=torch.bfloat16) for n in range(5)}, path, {"format": "pt"})
    return _Subject(path, partial(safetensors.read, path))


def _of_index(folder: Path) -> _Subject:
    torch_dcp.save({"w": torch.zeros(3, 4), "v": torch.zeros(2), "x": [None]}, checkpoint_id=folder, no_dist=True)
    return _Subject(folder / dcp.METADATA, partial(_read_all, folder))


def _of_our_index(folder: Path, model: Path) -> _Subject:
    made = hf_to_torch_dist(model, folder, tp=2) / "iter_0000001"
    return _Subject(made / dcp.METADATA, partial(_read_all, made))


def _of_common(folder: Path, model: Path) -> _Subject:
    made = hf_to_torch_dist(model, folder, tp=2) / "iter_0000001"
    return _Subject(made / COMMON_FILE, partial(TorchDistSource, made))


def _read_all(folder: Path) -> None:
    for tensor in dcp.read_index(folder).tensors.values():
        for chunk in tensor.chunks:
            dcp.stored(chunk, tensor.dtype)


@pytest.fixture
def subject(request: pytest.FixtureRequest, hf_model: HFModel, tmp_path: Path) -> _Subject:
    make, of_model = request.param
    sizes = dict(
        num_hidden_layers=1, hidden_size=16, intermediate_size=16, num_attention_heads=2, num_key_value_heads=2
    )
    return make(tmp_path, hf_model("llama2", **sizes)) if of_model else make(tmp_path)


_IN_PICKLE, _IN_HEADER = partial(in_archive, change=any_opcodes), partial(in_header, change=any_json)


@pytest.mark.parametrize(
    ("subject", "damage"),
    [
        ((_of_torch, False), any_bytes),
        ((_of_torch, False), partial(in_archive, change=any_bytes)),
        ((_of_torch, False), _IN_PICKLE),
        ((_of_safetensors, False), any_bytes),
        ((_of_safetensors, False), partial(in_header, change=any_bytes)),
        ((_of_safetensors, False), _IN_HEADER),
        ((_of_index, False), any_bytes),
        ((_of_index, False), any_opcodes),
        ((_of_our_index, True), any_opcodes),
        ((_of_common, True), any_bytes),
        ((_of_common, True), _IN_PICKLE),
    ],
    ids=[
        "torch",
        "torch, pickle's bytes",
        "torch, opcodes",
        "safetensors",
        "safetensors, header's bytes",
        "safetensors, header's values",
        "index",
        "index, opcodes",
        "our index, opcodes",
        "common",
        "common, opcodes",
    ],
    indirect=["subject"],
)
def test_a_damaged_file(subject: _Subject, damage: Damage) -> None:
    sound = subject.path.read_bytes()
    subject.read()
    for number in range(_MUTATIONS * _TIMES):
        seed = f"{_SEED} {number}"
        subject.path.write_bytes(damage(sound, Random(seed)))
        with _watched(seed):
            _read(subject.read)


def _read(read: Callable[[], object]) -> None:
    try:
        read()
    except ConversionError as error:
        assert not isinstance(error.__cause__, MemoryError)
        first, *rest = str(error).split("\n")
        assert all(line.startswith("  - ") for line in rest[:-1]), error  # the last may say what to do
        assert all(line.isprintable() for line in (first, *rest)), error


@contextmanager
def _watched(what: str) -> Iterator[None]:
    """Fail where what is done inside runs code, takes too long or asks for too much memory."""
    with open("/proc/self/statm", encoding="ascii") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    limits, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, _hanging)
    resource.setrlimit(resource.RLIMIT_AS, (used + _BYTES, limits[1]))
    signal.alarm(_SECONDS)
    _SEEN.clear()
    try:
        yield
        assert not _SEEN, what
    except BaseException as error:
        error.add_note(f"mutation {what}")
        raise
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def _hanging(*_: object) -> None:
    raise _Hanging


def _audit(event: str, about: tuple[Any, ...]) -> None:
    if event.startswith(_FORBIDDEN):
        _SEEN.append(f"{event} {about[:1]}")


sys.addaudithook(_audit)


#: Values that no config.json should have, at least not under most keys.
JUNK = (
    *(None, 0, -1, 1, 2, 3, 1e9, 10**12, -0.5, 1.5, float("nan"), float("inf"), "x", "", [], [1], ["a"], {}, {"a": 1}),
    *(
        True,
        False,
        [0, 1, 1, 0],
        ["full_attention"] * 4,
        ["sliding_attention"] * 4,
        ["linear_attention"] * 4,
        ["dense"] * 4,
    ),
)


def test_a_config_with_any_value_under_any_key_is_read_or_refused() -> None:
    random = Random(11)
    for _ in range(40):
        for fields in KINDS.values():
            family = FAMILIES[fields["model_type"]]
            config = {**fields, "architectures": [family.architecture]}
            keys = [
                key for key in (*fields, *(key for rule in family.rules for key in rule.keys)) if key != "model_type"
            ]
            config |= {random.choice(keys): random.choice(JUNK) for _ in range(random.choice((1, 1, 2, 3)))}
            with suppress(ConversionError):
                spec = spec_from_config(config)
                stored = conventions(spec).spec
                inexpressible(stored)
                spec_fields(argparse.Namespace(**model_args(stored)))
                config_from_spec(spec)
