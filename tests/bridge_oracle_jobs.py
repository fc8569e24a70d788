"""Jobs of the oracle's processes for `AutoBridge`, each of which imports what is slow itself."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

from megatron_converters.basics.errors import ConversionError

from .bridge_jobs import bridge_and_model

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
    content = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return Digest(tuple(tensor.shape), tensor.dtype, hashlib.md5(content, usedforsecurity=False).hexdigest())


class Found(NamedTuple):
    """What a process has found: its pipeline stage, its logits, and the weights that it got of each export, in order."""

    stage: int
    logits: tuple[int, torch.Tensor] | None
    exports: dict[str, dict[str, Digest]]


def loaded(folder: Path, sizes: Mapping[str, Any]) -> tuple[Any, list[Any]]:
    """Bridge of a folder, and this process's models with its weights; of local layers unless the sizes say otherwise."""
    return bridge_and_model(folder, {"transformer_impl": "local", "moe_grouped_gemm": False, **sizes})


def run(models: list[Any], tokens: torch.Tensor) -> tuple[int, torch.Tensor] | None:
    """Part of the logits, as the pool's own jobs give it."""
    from megatron_converters.logits import gpt

    from .oracle.jobs import shard

    return shard(gpt.run(models, tokens))


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


def train(folder: Path, sizes: Mapping[str, Any], out: Path, tokens: torch.Tensor) -> dict[str, Any]:
    """Save a model, train it for a step, and try to save it at the same place; returns its own state and, by name, the export."""
    from megatron.core import parallel_state

    bridge, models = loaded(folder, sizes)
    bridge.save_hf_pretrained(models, out, show_progress=False)
    state = {name: value.clone() for name, value in _state(models[0]).items()}
    _step(models[0], tokens)
    refused = ""
    try:
        bridge.save_hf_pretrained(models, out, show_progress=False)
    except ConversionError as error:
        refused = str(error)
    bridge.save_hf_pretrained(models, out, show_progress=False, overwrite=True)
    after = _state(models[0])
    return {
        "rank": parallel_state.get_tensor_model_parallel_rank(),
        "state": {name: value.detach().clone() for name, value in after.items()},
        "unchanged": [name for name, value in after.items() if torch.equal(value, state[name])],
        "exported": {name: weight.clone() for name, weight in bridge.export_hf_weights(models, show_progress=False)},
        "refused": refused,
    }


def _state(model: Any) -> dict[str, torch.Tensor]:
    """Parameters and buffers; the norms' `_extra_state` is empty."""
    found = model.state_dict().items()
    return {name: value for name, value in found if isinstance(value, torch.Tensor) and value.numel()}


def _step(model: Any, tokens: torch.Tensor) -> None:
    """One step of SGD; gradients of what tensor-parallel ranks have copies of are added up, as megatron-core does it.

    Not in training mode, in which megatron-core wants sequence parallelism for experts, and which has no other effect here.
    """
    from megatron.core import parallel_state

    positions = torch.arange(tokens.shape[1]).expand(tokens.shape[0], -1)
    model(tokens, positions, None, labels=tokens.roll(-1, 1)).mean().backward()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            gradient = parameter.grad
            assert gradient is not None, name
            if not getattr(parameter, "tensor_model_parallel", False):
                dist.all_reduce(gradient, group=parallel_state.get_tensor_model_parallel_group())
            parameter -= 0.1 * gradient


def swapped(folder: Path) -> dict[str, Digest]:
    """Export by a layout that takes the shares of tensor-parallel ranks for each other's."""
    from megatron_converters.live.layout import LiveLayout

    bridge, models = loaded(folder, dict(tp=2, pp=2))
    holdings = LiveLayout.holdings

    def swapping(self: LiveLayout, ref: Any) -> Any:
        for place in holdings(self, ref):
            found = list(place)
            yield [each._replace(holders=other.holders) for each, other in zip(found, reversed(found), strict=True)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LiveLayout, "holdings", swapping)
        return weights(bridge.export_hf_weights(models, show_progress=False))


def export_damaged(folder: Path, name: str, damage: str) -> None:
    """Export a model of which the last process has renamed or cut a parameter."""
    bridge, models = loaded(folder, dict(tp=2, pp=2))
    if dist.get_rank() == 3:
        owner, _, key = name.rpartition(".")
        module = models[0].get_submodule(owner)
        parameter = module._parameters[key]
        if damage == "renamed":
            del module._parameters[key]
            key = "other"
        else:
            parameter = torch.nn.Parameter(parameter[:-1].detach())
        module._parameters[key] = parameter
    weights(bridge.export_hf_weights(models, show_progress=False))


def export_by_other(folder: Path, other: Path) -> None:
    """Export a model by the bridge of another one."""
    from megatron_converters.bridge import AutoBridge

    _, models = loaded(folder, dict(tp=2, pp=2))
    weights(AutoBridge.from_hf_pretrained(other).export_hf_weights(models, show_progress=False))


def export_all(folder: Path, sizes: Mapping[str, Any]) -> dict[str, Digest]:
    """Digests of the weights that all processes get."""
    bridge, models = loaded(folder, sizes)
    return weights(bridge.export_hf_weights(models, show_progress=False, mode="replicate"))


def refusal(job: Callable[..., Any], *args: Any) -> str:
    """Text with which a job refuses in this process."""
    try:
        job(*args)
    except ConversionError as error:
        return str(error)
    return ""
