"""Arguments of how a checkpoint is cut, named and loaded, and those of its tokenizer.

Names: Megatron-LM core_v0.8.0 to core_v0.19.0, training/arguments.py.
"""

from __future__ import annotations

from typing import Any

from .argument import Argument, Build, Context, Flag, Group, flag, switch

_DISTRIBUTED = "torch_dist"
#: Formats of Megatron-LM that are read and not written.
_STATE_DICTS = ("torch_dcp", "fsdp_dtensor")


def _layout(attribute: str, write: Any, flagged: Flag | None = None, **more: Any) -> Argument:
    return Argument(attribute, write, group=Group.LAYOUT, flag=flagged, **more)


def _lost(name: str, words: Any = None, **more: Any) -> Flag:
    return flag(name, *([words] if words else []), lost=True, **more)


def _saved_format(context: Context) -> str:
    """Megatron-LM's name of the format; one that it does not know holds what a rank's file does."""
    return context.ckpt_format if context.ckpt_format in (_DISTRIBUTED, *_STATE_DICTS) else "torch"


def _stage_layers(context: Context) -> int | None:
    """Layers of each virtual stage; None without virtual stages, or where first or last stage differ in layers."""
    parallel, split = context.parallel, context.parallel.split
    if parallel.vpp == 1 or split.layout is not None or split.first is not None or split.last is not None:
        return None
    return (sum(parallel.stages) + split.embedding + split.loss) // len(parallel.stages)


def _virtual_stages(context: Context) -> int | None:
    """Virtual stages of each rank, where first or last stage differ in layers; else None."""
    parallel, split = context.parallel, context.parallel.split
    uneven = split.layout is None and (split.first is not None or split.last is not None)
    return parallel.vpp if parallel.vpp > 1 and uneven else None


def _trains_sequences(context: Context) -> bool:
    """Whether sequence parallelism is needed: Megatron-LM trains experts with tensor parallelism only together with it."""
    return bool(context.spec.num_experts) and context.parallel.tp > 1


LAYOUT = (
    _layout("transformer_impl", lambda c: c.impl, _lost("--transformer-impl"), build=Build.CONFIG),
    _layout(
        "tensor_model_parallel_size",
        lambda c: c.parallel.tp,
        _lost("--tensor-model-parallel-size"),
        build=Build.CONFIG,
    ),
    _layout("sequence_parallel", _trains_sequences, _lost("--sequence-parallel", switch, needs=("num_experts",))),
    _layout(
        "pipeline_model_parallel_size",
        lambda c: c.parallel.pp,
        _lost("--pipeline-model-parallel-size"),
        build=Build.CONFIG,
    ),
    _layout("transformer_pipeline_model_parallel_size", lambda c: c.parallel.pp),
    _layout(
        "decoder_first_pipeline_num_layers",
        lambda c: c.parallel.split.first,
        _lost("--decoder-first-pipeline-num-layers", since="0.9"),
        build=Build.OPTIONAL,
        config="num_layers_in_first_pipeline_stage",
    ),
    _layout(
        "decoder_last_pipeline_num_layers",
        lambda c: c.parallel.split.last,
        _lost("--decoder-last-pipeline-num-layers", since="0.9"),
        build=Build.OPTIONAL,
        config="num_layers_in_last_pipeline_stage",
    ),
    _layout(
        "account_for_embedding_in_pipeline_split",
        lambda c: c.parallel.split.embedding,
        _lost("--account-for-embedding-in-pipeline-split", switch, since="0.11"),
        build=Build.OPTIONAL,
    ),
    _layout(
        "account_for_loss_in_pipeline_split",
        lambda c: c.parallel.split.loss,
        _lost("--account-for-loss-in-pipeline-split", switch, since="0.11"),
        build=Build.OPTIONAL,
    ),
    _layout(
        "virtual_pipeline_model_parallel_size",
        lambda c: None if c.parallel.vpp == 1 else c.parallel.vpp,
        build=Build.OPTIONAL,
    ),
    _layout("num_layers_per_virtual_pipeline_stage", _stage_layers, _lost("--num-layers-per-virtual-pipeline-stage")),
    _layout(
        "num_virtual_stages_per_pipeline_rank",
        _virtual_stages,
        _lost("--num-virtual-stages-per-pipeline-rank", since="0.11"),
    ),
    _layout(
        "pipeline_model_parallel_layout",
        lambda c: c.parallel.split.layout,
        _lost("--pipeline-model-parallel-layout", since="0.13"),
        build=Build.OPTIONAL,
    ),
    Argument(
        "expert_model_parallel_size",
        lambda c: c.parallel.ep,
        group=Group.EXPERT_LAYOUT,
        flag=_lost("--expert-model-parallel-size"),
        build=Build.CONFIG,
    ),
    Argument(
        "expert_tensor_parallel_size",
        lambda c: c.parallel.etp,
        group=Group.EXPERT_LAYOUT,
        flag=_lost("--expert-tensor-parallel-size", since="0.10"),
        build=Build.CONFIG,
    ),
    _layout("context_parallel_size", lambda _: 1),
    _layout("data_parallel_size", lambda _: 1),
    _layout("world_size", lambda c: c.parallel.tp * c.parallel.pp),
    _layout("rank", lambda _: 0, per_rank=True),
    _layout("make_vocab_size_divisible_by", lambda c: c.divisor, _lost("--make-vocab-size-divisible-by")),
    _layout(
        "padded_vocab_size", lambda c: c.padded_vocab, flag("--padded-vocab-size", since="0.14"), build=Build.MODEL
    ),
    _layout("ckpt_format", _saved_format, _lost("--ckpt-format", default="torch", since="0.9")),
    _layout("use_dist_ckpt", lambda c: c.ckpt_format == _DISTRIBUTED),
    _layout("use_distributed_optimizer", lambda _: False),
)
LOADING = (
    Argument("tokenizer_type", group=Group.TOKENIZER, flag=flag("--tokenizer-type")),
    Argument("tokenizer_model", group=Group.TOKENIZER, flag=flag("--tokenizer-model")),
    Argument("load", group=Group.LOAD, flag=flag("--load")),
    _layout("no_save_optim", lambda _: True, flag("--no-load-optim", switch)),
    _layout("no_save_rng", lambda _: True, flag("--no-load-rng", switch)),
)
