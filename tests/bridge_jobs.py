"""Jobs of the pool's processes for `AutoBridge`, each of which imports what is slow itself."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_converters.basics.errors import ConversionError

#: Fields of a provider by the names of sizes here.
_FIELDS = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size",
}
#: Bytes that are moved at a time: less than most tensors have.
SMALL = 1000
#: Bytes of the files that are saved: each model has several.
FILE_SIZE = 60_000
#: Options of each export that `export_and_save` makes.
EXPORTS: Mapping[str, Mapping[str, Any]] = {
    "consolidate": dict(mode="consolidate"),
    "replicate": dict(mode="replicate", bucket_bytes=SMALL),
    "distribute": dict(mode="distribute", bucket_bytes=30 * SMALL),
    "distribute files": dict(mode="distribute", order="safetensors"),
    "replicate files": dict(mode="replicate", order="safetensors", bucket_bytes=SMALL),
    "stage": dict(current_pp_stage_only=True, bucket_bytes=SMALL),
}


class Digest(NamedTuple):
    """Shape, dtype and checksum of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    checksum: str


def digest(tensor: torch.Tensor) -> Digest:
    """Digest of a tensor's elements."""
    content = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
    return Digest(tuple(tensor.shape), tensor.dtype, hashlib.md5(content, usedforsecurity=False).hexdigest())


class Found(NamedTuple):
    """What a process has found: its pipeline stage, its logits, and the weights that it got of each export, in order."""

    stage: int
    logits: tuple[int, torch.Tensor] | None
    exports: dict[str, dict[str, Digest]]


def provider_with(bridge: Any, sizes: Mapping[str, Any], **options: Any) -> Any:
    """Provider of a bridge with sizes by their short names and other fields, of local layers unless they say otherwise."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    provider = bridge.to_megatron_provider(**options)
    fields = {"transformer_impl": "local", "moe_grouped_gemm": False, **sizes}
    for name, value in fields.items():
        setattr(provider, _FIELDS.get(name, name), value)
    return provider


def loaded(folder: Path, sizes: Mapping[str, Any]) -> tuple[Any, list[Any]]:
    """Bridge of a folder, and this process's models with its weights."""
    from megatron_converters.bridge import AutoBridge

    bridge = AutoBridge.from_hf_pretrained(folder)
    return bridge, provider_with(bridge, sizes)(wrap_with_ddp=False)


def run(models: list[Any], tokens: torch.Tensor) -> tuple[int, torch.Tensor] | None:
    """Part of the logits, as the pool's own jobs give it."""
    from megatron_converters.logits import gpt

    from .oracle.jobs import _shard

    return _shard(gpt.run([model.eval() for model in models], tokens))


def weights(exported: Iterable[Any]) -> dict[str, Digest]:
    """Digests of exported weights by name, in their order; none may come twice."""
    found: dict[str, Digest] = {}
    for name, weight in exported:
        assert name not in found, name
        found[name] = digest(weight)
    return found


def export_and_save(folder: Path, sizes: Mapping[str, Any], out: Path, tokens: torch.Tensor) -> Found:
    """Fill a model, run it, export it in all ways, and save it by one process and by two."""
    from megatron.core import parallel_state

    bridge, models = loaded(folder, sizes)
    found = Found(
        parallel_state.get_pipeline_model_parallel_rank(),
        run(models, tokens),
        {
            how: weights(bridge.export_hf_weights(models, show_progress=False, **options))
            for how, options in EXPORTS.items()
        },
    )
    quiet: Any = dict(show_progress=False)
    bridge.save_hf_pretrained(models, out / "by one", **quiet)
    bridge.save_hf_pretrained(
        models, out / "by two", distributed_save=True, save_every_n_ranks=2, max_shard_size=FILE_SIZE, **quiet
    )
    return found
