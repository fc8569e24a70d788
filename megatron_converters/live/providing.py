"""Provider for a model description, whose models are filled from a source."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.transformer_block import get_num_layers_to_build

from ..basics.errors import ConversionError, raise_all
from ..conversion.endpoint import Source
from ..formats.megatron.argument import Context, Group
from ..formats.megatron.arguments import inexpressible, written_args
from ..model.spec import ModelSpec
from ..sharding.ranks import Parallel, has_whole_experts, padded_vocab, parallel_for
from ..sharding.stages import EVEN, PipelineSplit
from .buildable_args import needing_engine, unheeded
from .filling import fill
from .layer_specs import ENGINE, LOCAL
from .layout import LiveLayout, least_divisor, live_conventions
from .parameters import naming_of, parameters_of, unwrapped
from .process_group import own_rank
from .provider import ON_CPU, GPTModelProvider, MLAModelProvider, provider_of

_GROUPS = (Group.MODEL, Group.EXPERTS, Group.ROUTER, Group.LAYOUT, Group.EXPERT_LAYOUT)


def has_engine() -> bool:
    """Whether Transformer Engine can be imported."""
    try:
        return importlib.util.find_spec("transformer_engine") is not None
    except ValueError:  # a stand-in without a spec
        return True


def provider_for(spec: ModelSpec) -> GPTModelProvider | MLAModelProvider:
    """Provider of a model, of one process unless its sizes are changed. Raises `ConversionError` for one that it cannot build."""
    stored = live_conventions(spec).spec
    raise_all("megatron-core would compute another model than this:", inexpressible(stored, with_own=True))
    impl = ENGINE if has_engine() else LOCAL
    whole = parallel_for(stored, 1, 1)
    layout = "grouped" if impl == ENGINE and stored.num_experts else "sequential"
    args = written_args(Context(stored, whole, layout, impl=impl), _GROUPS)
    needing = [] if impl == ENGINE else needing_engine(args)
    if needing:
        raise ConversionError(
            f"megatron-core builds a model with {', '.join(needing)} from Transformer Engine's layers alone, which are not "
            "installed here; install transformer_engine"
        )
    raise_all("megatron-core's model cannot be built here with", unheeded(args))
    dtype = spec.dtype.torch
    settings: dict[str, Any] = {} if torch.cuda.is_available() else dict(ON_CPU)
    settings |= dict(
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        moe_router_dtype=args.get("moe_router_dtype"),
        # None is the tensor-parallel size that the user sets, as by default in megatron-core.
        expert_tensor_parallel_size=1 if has_whole_experts(spec) else None,
        vocab_size=spec.vocab_size,
        make_vocab_size_divisible_by=least_divisor(spec.vocab_size),
    )
    provider = provider_of(args, **settings)
    provider.checking(partial(check_sizes, spec))
    return provider


def check_sizes(spec: ModelSpec, config: Any) -> None:
    """Raise `ConversionError`, with the sizes that fit, for parallel sizes of a config that a model of this spec cannot have."""
    layout = config.pipeline_model_parallel_layout
    if config.num_layers != spec.num_layers or not (layout is None or isinstance(layout, str)):
        return  # then it is another model, or megatron-core checks the stages
    split = PipelineSplit(
        config.num_layers_in_first_pipeline_stage,
        config.num_layers_in_last_pipeline_stage,
        config.account_for_embedding_in_pipeline_split,
        config.account_for_loss_in_pipeline_split,
        config.virtual_pipeline_model_parallel_size if layout is None else None,
        layout=layout,
    )
    parallel_for(
        spec,
        config.tensor_model_parallel_size,
        config.pipeline_model_parallel_size,
        split,
        config.expert_model_parallel_size,
        config.expert_tensor_parallel_size,
        directories=False,
    )


def load(model: Any, source: Source, spec: ModelSpec, allowed: Collection[str] = ()) -> None:
    """Fill this process's part of a model from a source, without a collective operation.

    Raises `ConversionError` with every parameter that is not the source's; those whose names are in `allowed` are left as they are.
    """
    models = unwrapped(model)
    parameters = parameters_of(models)
    config: Any = models[0].config
    layout = LiveLayout(
        spec, parallel_of(config, spec), [own_rank()], _padded(models, config, spec), naming_of(parameters)
    )
    with torch.no_grad():
        fill(parameters, source, layout, 0, allowed=allowed)


def parallel_of(config: Any, spec: ModelSpec) -> Parallel:
    """Sizes by which a model with this config is cut. Raises `ConversionError` for sizes that a model of this spec cannot have."""
    pp, vpp = config.pipeline_model_parallel_size, config.virtual_pipeline_model_parallel_size or 1
    stages = tuple(
        get_num_layers_to_build(config, vp_stage=number if vpp > 1 else None, pp_rank=stage)
        for number in range(vpp)
        for stage in range(pp)
    )
    if sum(stages) != spec.num_layers:
        raise ConversionError(
            f"the model has {sum(stages)} layers ({'+'.join(map(str, stages))}), but {spec.num_layers} are to be loaded; give the "
            "provider as many, or load_weights=False"
        )
    tp, ep = config.tensor_model_parallel_size, config.expert_model_parallel_size
    experts = (ep, config.expert_tensor_parallel_size or tp) if spec.num_experts else (1, None)
    cut = parallel_for(spec, tp, 1, EVEN, *experts, directories=False)
    return Parallel(cut.tp, stages, EVEN, cut.ep, cut.etp, vpp)


def _padded(models: list[torch.nn.Module], config: Any, spec: ModelSpec) -> int:
    """Rows of the embedding on all tensor-parallel ranks, by what this process has of it."""
    for model in models:
        for holder in ("embedding.word_embeddings", "output_layer"):
            try:
                weight: Any = model.get_submodule(holder).weight
            except AttributeError:
                continue
            if weight is not None:
                return int(weight.shape[0]) * int(config.tensor_model_parallel_size)
    return padded_vocab(spec.vocab_size, 1, config.tensor_model_parallel_size)
