"""What AutoBridge leaves in a process: nothing patched, no process group, little memory, and an exit without a word."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_converters.basics.errors import ConversionError
from megatron_converters.bridge import AutoBridge
from tests.conversions import different
from tests.helpers import ROOT, hf_tensors
from tests.live_process import live
from tests.oracle.hf import hf_logits, make_model
from tests.test_bridge import TOKENS, TOLERANCE, agree, built, exported, logits

HFModel = Callable[..., Path]
_MIB = 1 << 20


@pytest.fixture
def llama(hf_model: HFModel) -> Path:
    return hf_model("llama2")


@pytest.fixture
def mixture(hf_model: HFModel) -> Path:
    return hf_model("deepseek-v3")


def patched() -> dict[str, Any]:
    """Everything that is replaced while models are built or run on a CPU."""
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.moe import moe_utils

    return {
        "current_device": torch.cuda.current_device,
        "fork": CudaRNGStatesTracker.fork,
        "te_general_gemm": getattr(moe_utils, "te_general_gemm", "absent"),
        "HAVE_TE": multi_latent_attention.HAVE_TE,
        "cuda": torch.Tensor.cuda,
        "stance": torch._dynamo.eval_frame._stance.stance,
        "modes": torch.overrides._len_torch_function_stack(),
        "default device": torch.get_default_device(),
        "default dtype": torch.get_default_dtype(),
        "modules": {name for name in sys.modules if name.startswith(("triton", "transformer_engine", "apex"))},
    }


def untouched() -> None:
    """Assert that this process is as torch and megatron-core made it."""
    found = patched()
    assert found["current_device"].__module__ == "torch.cuda"
    assert found["fork"].__module__ == "megatron.core.tensor_parallel.random"
    assert found["te_general_gemm"] == "absent"
    assert (found["stance"], found["modes"]) == ("default", 0)
    assert found["default device"] == torch.device("cpu")
    with pytest.raises((AssertionError, RuntimeError)):  # torch's own words for a machine without CUDA
        torch.cuda.current_device()


@live
def test_nothing_stays_patched(llama: Path, mixture: Path) -> None:
    for folder in (llama, mixture):
        before = patched()
        bridge, model = built(folder)
        assert patched() == before
        untouched()
        agree(model, folder)
        assert different(exported(bridge, model), hf_tensors(folder)) == []
        assert patched() == before
        untouched()


@live
def test_nothing_stays_patched_after_an_error(llama: Path) -> None:
    before = patched()
    bridge = AutoBridge.from_hf_pretrained(llama)

    class Stop(Exception):
        pass

    def stop(*_: Any) -> None:
        raise Stop

    provider = bridge.to_megatron_provider()
    provider.transformer_layer_spec = stop
    with pytest.raises(Stop):
        provider(wrap_with_ddp=False)
    provider = bridge.to_megatron_provider()
    provider.normalization = "banana"  # which megatron-core refuses in the middle of building
    with pytest.raises(Exception, match="Only LayerNorm"):
        provider(wrap_with_ddp=False)
    _, model = built(llama)
    model.decoder.layers[1].register_forward_hook(stop)
    with pytest.raises(Stop):
        logits(model)
    assert patched() == before
    untouched()


@live
def test_threads_build_at_once(llama: Path, mixture: Path) -> None:
    """Models of several threads are right, whoever ends first, and nothing stays patched."""
    before = patched()
    built(llama)  # the process group is made once
    # Before the threads start: transformers, which patches itself while it loads, is not safe in several.
    theirs = {folder: hf_logits(folder, TOKENS) for folder in (llama, mixture)}
    found: list[Path] = []
    errors: list[BaseException] = []
    start = threading.Barrier(4)

    def work(folder: Path) -> None:
        try:
            start.wait()
            for _ in range(3):
                _, model = built(folder)
                difference = (logits(model) - theirs[folder]).abs().max() / theirs[folder].abs().max()
                assert float(difference) < TOLERANCE
                found.append(folder)
        except BaseException as error:  # noqa: BLE001 - shown by the test
            errors.append(error)

    threads = [threading.Thread(target=work, args=(folder,)) for folder in (llama, mixture) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(found) == 12
    assert patched() == before
    untouched()


@live
def test_random_weights_do_not_depend_on_patches(llama: Path) -> None:
    """A model without loaded weights draws from torch's generator: the same seed gives the same model."""
    bridge = AutoBridge.from_hf_pretrained(llama)
    drawn = []
    for _ in range(2):
        torch.manual_seed(5)
        (model,) = bridge.to_megatron_model(load_weights=False, wrap_with_ddp=False)
        drawn.append(exported(bridge, model))
    assert different(*drawn) == []
    weight = drawn[0]["model.layers.0.mlp.up_proj.weight"]
    assert float(weight.std()) == pytest.approx(0.02, rel=0.1)


@live
def test_a_process_group_of_ones_own_is_used_and_left(llama: Path) -> None:
    import torch.distributed as dist
    from megatron.core import parallel_state

    for _ in range(2):  # with and without the group that an earlier test has left
        parallel_state.destroy_model_parallel()
        if dist.is_initialized():
            dist.destroy_process_group()
        built(llama)
        assert (dist.get_world_size(), dist.get_backend()) == (1, "gloo")
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    own = dist.group.WORLD
    _, model = built(llama)
    agree(model, llama)
    assert dist.group.WORLD is own
    provider = AutoBridge.from_hf_pretrained(llama).to_megatron_provider()
    provider.tensor_model_parallel_size = 2
    with pytest.raises(ConversionError, match="tensor_model_parallel_size=1, not 2"):
        provider(wrap_with_ddp=False)
    parallel_state.destroy_model_parallel()
    with pytest.raises(ConversionError, match="a world size of 1 cannot be divided into tp=2"):
        provider(wrap_with_ddp=False)
    dist.destroy_process_group()


def script(text: str, *options: Any, **environment: str) -> str:
    """What a script prints, which ends with exit code 0 and prints nothing else."""
    free = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(
        [sys.executable, "-c", text, *map(str, options)],
        cwd=ROOT,
        env={**free, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done
    complaints = [line for line in done.stderr.splitlines() if "destroy_process_group" in line or "Traceback" in line]
    assert not complaints, complaints
    return done.stdout


NOTHING_HEAVY = """
import sys
from megatron_converters.bridge import AutoBridge
assert not {"megatron", "transformers", "transformer_engine"} & {name.split(".")[0] for name in sys.modules}
"""
BUILD_AND_EXPORT = """
import sys
from megatron_converters.bridge import AutoBridge
bridge = AutoBridge.from_hf_pretrained(sys.argv[1])
model = bridge.to_megatron_model(wrap_with_ddp=False)
print(sum(weight.numel() for _, weight in bridge.export_hf_weights(model, show_progress=False)))
bridge.save_hf_pretrained(model, sys.argv[2], show_progress=False)
assert "transformers" not in sys.modules
"""
MEGATRON_FIRST = "import megatron.core.models.gpt.gpt_model\n"


def test_a_script_ends_without_a_word(llama: Path, tmp_path: Path) -> None:
    elements = sum(tensor.numel() for tensor in hf_tensors(llama).values())
    assert script(NOTHING_HEAVY + BUILD_AND_EXPORT, llama, tmp_path / "out") == f"{elements}\n"
    assert different(hf_tensors(tmp_path / "out"), hf_tensors(llama)) == []


def test_megatron_may_be_imported_before_in_a_process_of_a_launcher(llama: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launched = dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    script(MEGATRON_FIRST + BUILD_AND_EXPORT, llama, tmp_path / "out", **launched)
    assert different(hf_tensors(tmp_path / "out"), hf_tensors(llama)) == []


MEMORY = """
import sys, threading
import megatron.core.models.gpt.gpt_model, megatron.core.distributed, megatron.core.transformer.module
from megatron_converters.live import distributed_model, providing
def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) << 10
before = highest = anonymous()
done = threading.Event()
def watch():
    global highest
    while not done.wait(0.002):
        highest = max(highest, anonymous())
watcher = threading.Thread(target=watch)
watcher.start()
from megatron_converters.bridge import AutoBridge
bridge = AutoBridge.from_hf_pretrained(sys.argv[1])
model = bridge.to_megatron_model(wrap_with_ddp=False)
loaded = highest
for _ in bridge.export_hf_weights(model, show_progress=False, bucket_bytes=16 << 20):
    del _
done.set()
watcher.join()
print(loaded - before, max(highest, anonymous()) - before)
"""


def test_memory_is_the_model_and_little_more(tmp_path: Path) -> None:
    sizes = dict(hidden_size=768, intermediate_size=2048, num_hidden_layers=6, vocab_size=10000, head_dim=96)
    folder = make_model("llama2", tmp_path / "model", max_shard_size="50MB", **sizes)
    nbytes = sum(tensor.nbytes for tensor in hf_tensors(folder).values())
    assert nbytes > 200 * _MIB
    loading, exporting = map(int, script(MEMORY, folder).split())
    assert 0.9 * nbytes < loading < nbytes + 100 * _MIB
    assert exporting < nbytes + 200 * _MIB
