"""Run of a tree's own tools/checkpoint/convert.py on a CPU, with the plugins that its command line names.

    python -m tests.oracle.tree_convert TREE OPTIONS...

The tree's files are used as they are. CUDA, compilers and packages that need them are replaced, as in `release.py`, for the saver's
process, too, which is forked from this one.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import runpy
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
import torch.distributed as dist

from megatron_converters.live.on_cpu import cuda_is_cpu
from megatron_converters.logits import cpu

from . import release, transformer_engine_standin


def main(tree: Path, options: list[str]) -> None:
    """Prepare this process, and run the tree's convert.py in it."""
    tools = tree / "tools" / "checkpoint"
    sys.path[:0] = [str(tools), str(tree)]
    for name in ("megatron.legacy.fused_kernels", "fused_weight_gradient_mlp_cuda"):
        sys.modules[name] = MagicMock(__spec__=None)
    gaudi = (tools / "verify_checkpoint_non_tp_consistency.py").exists()
    release.replace_packages(engine=not gaudi)
    if gaudi:
        _replace_intel_engine()
    release.replace_torch()
    real = importlib.metadata.version
    importlib.metadata.version = lambda name: (
        transformer_engine_standin.VERSION if name == "transformer-engine" else real(name)
    )
    cpu.prepare()
    _fuse()
    _group_of_one()
    if (tree / "model_provider.py").exists():
        _default_builder()
    if gaudi:
        from megatron.core import version_utils

        version_utils.get_driver_version = lambda: None
        version_utils.get_habana_frameworks_version = lambda: version_utils.CURRENTLY_VALIDATED_GAUDI_VERSION
    os.register_at_fork(after_in_child=_join, after_in_parent=_join)
    sys.argv = [str(tools / "convert.py"), *options]
    with cuda_is_cpu():
        runpy.run_path(sys.argv[0], run_name="__main__")


def _replace_intel_engine() -> None:
    """Stand-ins for the packages of Habana's tree: Intel's Transformer Engine, and what tells versions."""
    engine = MagicMock(__spec__=None)
    for name in ("Linear", "GroupedLinear"):
        setattr(engine, name, getattr(transformer_engine_standin, name))
    for name in ("FusedAttention", "MixtureOfExperts"):
        setattr(engine, name, type(name, (_Accepting,), {}))
    engine.recipe.DelayedScaling = type("DelayedScaling", (), {})
    for name in ("", ".utils", ".cpp_extensions", ".cpp_extensions.cast", ".distributed"):
        sys.modules[f"intel_transformer_engine{name}"] = engine


class _Accepting(torch.nn.Module):
    """Module that takes any arguments and has no parameters."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()


def _join() -> None:
    """Initialise torch.distributed with one rank, in each of the two processes of the queue."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def _fuse() -> None:
    """Let Megatron-LM's check find the fused rotary embeddings that it is to use by default; nothing is computed here."""
    try:
        from megatron.core.models.common.embeddings import rope_utils
    except ImportError:  # before 0.9
        return
    for name in ("fused_apply_rotary_pos_emb", "fused_apply_rotary_pos_emb_thd"):
        setattr(rope_utils, name, MagicMock())


def _group_of_one() -> None:
    """Let getters of process groups that the tree's tools leave unset return a group of one rank."""
    from megatron.core import parallel_state

    def lenient(getter: Any) -> Any:
        @functools.wraps(getter)
        def get(*args: Any, **options: Any) -> Any:
            try:
                return getter(*args, **options)
            except AssertionError:
                return dist.group.WORLD

        return get

    for name in dir(parallel_state):
        if name.startswith("get_") and name.endswith(("_group", "_group_gloo")):
            setattr(parallel_state, name, lenient(getattr(parallel_state, name)))


def _default_builder() -> None:
    """Repair loader_core of 0.15 to main, which calls the provider of models without the builder that it takes first."""
    import model_provider
    from gpt_builders import gpt_builder

    provide = model_provider.model_provider

    def provider(builder: Any = gpt_builder, *args: Any, **options: Any) -> Any:
        return provide(builder, *args, **options)

    model_provider.model_provider = provider


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
