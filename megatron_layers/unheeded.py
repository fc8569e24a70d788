"""Options under which megatron-core runs parts of a layer by itself, one after the other, so that parallel blocks refuse them."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.core.transformer import TransformerConfig

#: Part of a layer that may be recomputed alone; others belong to one of two blocks that run one after the other.
_RECOMPUTED = "core_attn"
#: Such options, and the value that leaves them off.
_LEFT_OFF = {
    "cuda_graph_impl": "none",
    "enable_cuda_graph": False,
    "external_cuda_graph": False,
    "fine_grained_activation_offloading": False,
    "inference_fuse_tp_communication": False,
}


def check(config: TransformerConfig) -> None:
    """Raise `ValueError` for options that a parallel block does not have."""
    found = [*_unheeded(config)]
    if found:
        raise ValueError(f"a layer whose attention and MLP are parallel cannot have {'; '.join(found)}")


def _unheeded(config: TransformerConfig) -> Iterator[str]:
    for name, off in _LEFT_OFF.items():
        value = getattr(config, name, off)
        if value != off:
            yield f"{name}={value!r}, set it to {off!r}"
    others = {*(config.recompute_modules or ())} - {_RECOMPUTED}
    if config.recompute_granularity == "selective" and others:
        yield f"recompute_modules={sorted(others)}, use {[_RECOMPUTED]}, or recompute_granularity='full'"
