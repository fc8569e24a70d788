"""Jobs of processes that hold a live model together: built, run, trained and exported by AutoBridge."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_converters.live.export import WeightDistributionMode
from megatron_converters.logits import cpu

#: Short names of a provider's fields.
SIZES = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size",
    "layout": "pipeline_model_parallel_layout",
}
Weights = dict[str, torch.Tensor]


class Seen(NamedTuple):
    """What a process has seen: logits on the last stage's first copy (by TP number), and weights by how they were exported."""

    tp: int
    logits: torch.Tensor | None
    exports: dict[str, Weights]


def join(rank: int, size: int, folder: Path) -> None:
    """Setup of the pool: the process group that a launcher would make."""
    torch.set_num_threads(1)
    cpu.init_gloo(rank, size, folder)


def bridge_and_model(folder: Path, sizes: dict[str, Any], **settings: Any) -> tuple[Any, list[Any]]:
    """Bridge of a folder, and this process's models in evaluation."""
    from megatron.core import parallel_state

    from megatron_converters.bridge import AutoBridge

    parallel_state.destroy_model_parallel()
    bridge = AutoBridge.from_hf_pretrained(folder)
    provider = bridge.to_megatron_provider()
    for name, value in {**{SIZES.get(size, size): number for size, number in sizes.items()}, **settings}.items():
        setattr(provider, name, value)
    models = provider(wrap_with_ddp=False)
    return bridge, [model.eval() for model in models]


def exported(bridge: Any, models: list[Any], **options: Any) -> Weights:
    """Weights that this process gets, copied as they come."""
    return {name: weight.clone() for name, weight in bridge.export_hf_weights(models, show_progress=False, **options)}


def round_trip(folder: Path, out: Path, tokens: torch.Tensor, sizes: dict[str, Any]) -> Seen:
    """Build a model, run it, and export it in every manner; it is saved by one process, and by several."""
    from megatron.core import parallel_state

    from megatron_converters.logits import gpt

    bridge, models = bridge_and_model(folder, sizes)
    logits = gpt.run(models, tokens)
    exports = {
        mode.value: exported(bridge, models, mode=mode.value)
        for mode in WeightDistributionMode
        if mode is not WeightDistributionMode.STAGE
    }
    exports["by file"] = exported(bridge, models, mode="replicate", order="safetensors")
    exports["stage"] = exported(bridge, models, current_pp_stage_only=True, bucket_bytes=1000)
    exports["usual"] = exported(bridge, models)
    bridge.save_hf_pretrained(models, out / "one", show_progress=False)
    bridge.save_hf_weights(
        models,
        out / "several",
        show_progress=False,
        distributed_save=True,
        save_every_n_ranks=2,
        max_shard_size=100_000,
    )
    first = parallel_state.get_data_parallel_rank() == 0
    return Seen(parallel_state.get_tensor_model_parallel_rank(), logits if first else None, exports)


class Trained(NamedTuple):
    """A process's numbers in the tensor-, pipeline- and expert-parallel groups, its parameters, and what it exported."""

    tp: int
    pp: int
    ep: int
    parameters: list[Weights]
    exported: Weights


def trained(folder: Path, tokens: torch.Tensor, sizes: dict[str, Any]) -> Trained:
    """Take a step of gradient descent on one stage, and export the model to all processes."""
    from megatron.core import parallel_state

    from megatron_converters.live.on_cpu import on_cpu

    bridge, models = bridge_and_model(folder, sizes)
    positions = torch.arange(tokens.shape[1]).expand(tokens.shape[0], -1)
    with on_cpu():
        models[0](tokens, positions, attention_mask=None, labels=tokens.roll(-1, 1)).mean().backward()
    with torch.no_grad():
        for parameter in models[0].parameters():
            parameter -= 0.5 * parameter.grad
    found = exported(bridge, models, mode="replicate")
    own = [{name: value.detach().clone() for name, value in model.named_parameters()} for model in models]
    return Trained(
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_expert_model_parallel_rank(),
        own,
        found,
    )


def saved(folder: Path, out: Path, sizes: dict[str, Any]) -> None:
    """Save a live model as a distributed checkpoint."""
    bridge, models = bridge_and_model(folder, sizes)
    bridge.save_megatron_model(models, out, show_progress=False)


def loaded(folder: Path, checkpoint: Path, tokens: torch.Tensor, sizes: dict[str, Any]) -> Seen:
    """Logits of a model that is loaded from a checkpoint at other sizes."""
    from megatron.core import parallel_state

    from megatron_converters.bridge import AutoBridge
    from megatron_converters.logits import gpt

    parallel_state.destroy_model_parallel()
    bridge = AutoBridge.from_hf_pretrained(folder)
    overrides = {SIZES.get(size, size): number for size, number in sizes.items()}
    models = bridge.load_megatron_model(checkpoint, mp_overrides=overrides, wrap_with_ddp=False)
    logits = gpt.run([model.eval() for model in models], tokens)
    first = parallel_state.get_data_parallel_rank() == 0
    return Seen(parallel_state.get_tensor_model_parallel_rank(), logits if first else None, {})


def refused(folder: Path, sizes: dict[str, Any]) -> None:
    """Build a model of sizes that it cannot have."""
    bridge_and_model(folder, sizes)


def damaged(folder: Path, sizes: dict[str, Any], process: int) -> None:
    """Export a model of which one process has lost a parameter."""
    import torch.distributed as dist

    bridge, models = bridge_and_model(folder, sizes)
    if dist.get_rank() == process:
        del models[0].decoder.layers[0].mlp.linear_fc2.weight
    exported(bridge, models, mode="replicate")


def swapped(folder: Path, sizes: dict[str, Any]) -> Weights:
    """Export of a model whose layout gives the shares of the MLP to the wrong processes."""
    import pytest

    from megatron_converters.live.layout import LiveLayout

    bridge, models = bridge_and_model(folder, sizes)
    usual = LiveLayout.holdings

    def wrong(self: Any, ref: Any) -> Any:
        for place in usual(self, ref):
            found = list(place)
            if ref.slot.name == "fc2":
                first, *others, last = found
                found = [first._replace(cut=last.cut), *others, last._replace(cut=first.cut)]
            yield found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LiveLayout, "holdings", wrong)
        return exported(bridge, models, mode="replicate")
