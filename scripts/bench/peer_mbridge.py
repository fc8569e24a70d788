"""A Llama to a live megatron-core model, and back, by mbridge 0.15.1, which `live.py` compares with ours.

    PEER/bin/python scripts/bench/peer_mbridge.py import HF_FOLDER [--uninitialised]
    PEER/bin/python scripts/bench/peer_mbridge.py export HF_FOLDER OUT [--uninitialised]
    PEER/bin/python scripts/bench/peer_mbridge.py stream HF_FOLDER [--uninitialised]

Prints seconds and memory by phase as JSON (see `watch.py`). `stream` gets all tensors in memory, one by one, and saves none.
mbridge initialises its model at random before it loads the weights, as its guide does; `--uninitialised` passes megatron-core's
`perform_initialization=False`, which spares it that.

The environment, of Python 3.11 (torch first and alone, so that nothing else chooses another build of it; a transformers of
mbridge's time, since version 5 gives every Llama a rope_scaling without the factor that mbridge reads):

    python3.11 -m venv PEER
    PEER/bin/pip install torch==2.13.0
    PEER/bin/pip install torch==2.13.0 'mbridge[megatron]==0.15.1' megatron-core==0.16.1 transformers==4.56.2 safetensors==0.8.0

No Transformer Engine, apex or triton: they are for GPUs.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import warnings
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

from watch import Watch

_STAND_IN = Path(__file__).resolve().parents[2] / "tests" / "oracle" / "transformer_engine_standin.py"


def _install_transformer_engine() -> None:
    """Install the tests' stand-in: mbridge builds Transformer Engine's layers only, and that library needs a GPU.

    Loaded by path, since beside it lies a `megatron.py`, which would be imported instead of the real one.
    """
    spec = importlib.util.spec_from_file_location(_STAND_IN.stem, _STAND_IN)
    if spec is None or spec.loader is None:
        sys.exit(f"{_STAND_IN} cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.install()


def _replace_cuda() -> None:
    """Replace what mbridge and megatron-core call of CUDA while they build a model and move its weights."""
    import torch
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    # Device of new parameters (tensor_parallel/layers.py) and of rotary frequencies.
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    # mbridge's get_model moves each finished module there (core/util.py).
    torch.nn.Module.cuda = lambda self, device=None: self  # type: ignore[method-assign]
    # Embedding and head are initialised under the CUDA generator's state.
    CudaRNGStatesTracker.fork = lambda self, name="": nullcontext()


def _join() -> None:
    """Make this process a group of one, which mbridge leaves to its caller; gloo instead of nccl, which needs a GPU."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # gloo then need not resolve the host's name
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    parallel_state.initialize_model_parallel()


def _loaded(watch: Watch, folder: Path, uninitialised: bool) -> tuple[Any, list[Any]]:
    """Import a folder as mbridge's guide does; returns the bridge and the live model."""
    _install_transformer_engine()
    from mbridge import AutoBridge

    watch.done("imports")
    _replace_cuda()
    _join()
    bridge = AutoBridge.from_pretrained(str(folder))
    if uninitialised:
        bridge.set_extra_args(perform_initialization=False)
    watch.done("set-up")
    models = bridge.get_model()
    watch.done("build")
    bridge.load_weights(models, str(folder))
    watch.done("load")
    return bridge, models


def main() -> None:
    """Run a command and print what it took."""
    watch = Watch()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["import", "export", "stream"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path, nargs="?")
    parser.add_argument("--uninitialised", action="store_true")
    args = parser.parse_args()
    if (args.command == "export") != (args.output is not None):
        parser.error("export takes a folder and an output, the others a folder")
    warnings.filterwarnings("ignore")  # about every fusion that a CPU lacks
    with redirect_stdout(sys.stderr):  # mbridge prints how many parameters there are
        bridge, models = _loaded(watch, args.folder, args.uninitialised)
    if args.command == "export":
        bridge.save_weights(models, str(args.output))
        watch.done("export")
    elif args.command == "stream":
        for _name, _tensor in bridge.export_weights(models):
            pass
        watch.done("stream")
    print(watch.report())


if __name__ == "__main__":
    main()
