"""Run of an unmodified release of Megatron-LM on a CPU: it loads a checkpoint with the given flags, and computes logits.

Start it by torchrun, one process for each rank, with the release's tree and the root of this project on PYTHONPATH:

    python -m torch.distributed.run --nproc-per-node N -m tests.oracle.release TOKENS OUT FLAGS...

`TOKENS` is a file of int64 tokens [B, S]; logits, float32 [B, S, padded vocabulary], are written to the file `OUT`. The release
parses the flags, builds the model, loads the checkpoint strictly and runs its pipeline. CUDA, compilers, and packages that need
them are replaced; Transformer Engine is replaced by this folder's stand-in, which works with 0.8 to 0.13 and 0.15 to 0.16.
Written for releases 0.8 to 0.19.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
import typing
from typing import Any
from unittest.mock import MagicMock

import torch
import torch._dynamo  # before triton is replaced
import torch.distributed as dist

from megatron_converters.live.on_cpu import cuda_is_cpu
from megatron_converters.logits import cpu

from . import transformer_engine_standin

#: Packages that a release imports but does not need here.
_UNNEEDED = ("einops", "pkg_resources", "six", "triton", "triton.language")
_CUDA = (
    *("synchronize", "empty_cache", "reset_peak_memory_stats", "set_device", "set_rng_state", "manual_seed"),
    *("Stream", "Event", "stream", "current_stream", "memory_stats"),
)


def main(tokens_file: str, out_file: str, flags: list[str]) -> None:
    """Load and run the model; the first process of the last stage writes the logits."""
    replace_packages("transformer_engine" in flags)
    replace_torch()
    cpu.prepare()
    sys.argv = ["pretrain_gpt.py", *flags]
    with cuda_is_cpu(), torch.no_grad():
        logits = _run(_load(), torch.load(tokens_file))
    if logits is not None:
        torch.save(logits, out_file)
    dist.barrier()
    dist.destroy_process_group()


def replace_packages(engine: bool) -> None:
    if not hasattr(typing, "override"):  # 0.19 needs Python 3.12
        typing.override = lambda method: method  # type: ignore[attr-defined]
    for name in _UNNEEDED:
        if name.split(".")[0] in sys.modules or importlib.util.find_spec(name.split(".")[0]) is None:
            sys.modules[name] = MagicMock(__spec__=None, __version__="3.0.0")
    import packaging.version

    sys.modules["pkg_resources"].packaging = packaging  # type: ignore[attr-defined] # up to 0.8
    for name in ("apex", "transformer_engine"):
        sys.modules[name] = None  # type: ignore[assignment] # `import` then raises ImportError
    if engine:
        transformer_engine_standin.install()


def replace_torch() -> None:
    for name in _CUDA:
        setattr(torch.cuda, name, MagicMock())
    torch.cuda.device_count = lambda: 1  # type: ignore[assignment]
    torch.cuda.get_rng_state = lambda *_: torch.get_rng_state()
    torch.cuda.get_device_properties = lambda *_: MagicMock(major=9, minor=0)
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.compile = lambda function=None, **_: function or (lambda later: later)  # type: ignore[assignment]
    torch.Tensor.cuda = torch.nn.Module.cuda = lambda self, *_, **__: self  # type: ignore[method-assign,assignment]
    torch.load = functools.partial(torch.load, weights_only=False)  # torch's default when 0.11 was released
    original = dist.all_to_all_single

    def exchange(tensor_out: Any, tensor_in: Any, out_sizes: Any = None, in_sizes: Any = None, **more: Any) -> Any:
        """Convert sizes to lists: without a GPU, Megatron-LM leaves them in tensors."""
        sizes = (size.tolist() if isinstance(size, torch.Tensor) else size for size in (out_sizes, in_sizes))
        return original(tensor_out, tensor_in, *sizes, **more)

    def all_to_all_single(out: Any, tensor: Any, **more: Any) -> Any:
        return exchange(out, tensor, more.pop("output_split_sizes", None), more.pop("input_split_sizes", None), **more)

    dist.all_to_all_single = all_to_all_single
    from megatron.core import parallel_state

    if not hasattr(parallel_state, "create_group"):  # before 0.10
        parallel_state.create_group = dist.new_group


def _load() -> list[torch.nn.Module]:
    """This rank's parts of the model, from the release's own parser, builder and loader."""
    from megatron.core.enums import ModelType
    from megatron.training import arguments, checkpointing, initialize, training

    initialize._compile_dependencies = lambda: None
    if hasattr(arguments, "parse_and_validate_args"):  # from 0.19 on
        arguments.parse_and_validate_args()
    initialize.initialize_megatron(allow_no_cuda=True)
    models = training.get_model(_provider(), ModelType.encoder_or_decoder, wrap_with_ddp=False)
    checkpointing.load_checkpoint(models, None, None, strict=True)
    return [model.eval() for model in models]


def _provider() -> Any:
    try:
        from gpt_builders import gpt_builder
        from model_provider import model_provider
    except ModuleNotFoundError:  # before 0.15
        from pretrain_gpt import model_provider

        return model_provider
    return functools.partial(model_provider, gpt_builder)


def _run(models: list[torch.nn.Module], tokens: torch.Tensor) -> torch.Tensor | None:
    from megatron.core import mpu
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    batch, length = tokens.shape
    positions = torch.arange(length).expand(batch, -1)
    found: list[torch.Tensor] = []

    def step(_: Any, model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        out = model(tokens, positions, None)

        def loss(out: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
            found.append(out.float().clone())
            return out.float().mean(), {}

        return out, loss

    get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter([None]),
        model=models,
        num_microbatches=1,
        seq_length=length,
        micro_batch_size=batch,
        forward_only=True,
    )
    if not found:
        return None
    logits: torch.Tensor = gather_from_tensor_model_parallel_region(found[0])
    return logits if mpu.get_tensor_model_parallel_rank() == 0 and mpu.get_data_parallel_rank() == 0 else None


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
