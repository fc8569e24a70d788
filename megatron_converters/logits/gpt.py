"""megatron-core's GPTModel, built from Megatron-LM's args and run on a CPU, in a process that has called `cpu.prepare`."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.activations import squared_relu
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.experimental_attention_variant_module_specs import (
    get_transformer_block_with_experimental_attention_variant_spec,
)
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_decoder_layer_specs,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
    get_gpt_mtp_block_spec,
)
from megatron.core.transformer import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from ..basics.errors import ConversionError
from ..live.parallel_block import GPTModelWithHeadBias, parallel_layer_spec
from . import buildable_args
from .cpu import cuda_is_cpu

#: Config fields for float32 on a CPU; none of them changes what the model computes.
_ON_CPU: dict[str, Any] = dict(
    params_dtype=torch.float32,
    pipeline_dtype=torch.float32,
    use_cpu_initialization=True,
    gradient_accumulation_fusion=False,
    bias_activation_fusion=False,
    bias_dropout_fusion=False,
    masked_softmax_fusion=False,
    apply_rope_fusion=False,
    persist_layer_norm=False,
    hidden_dropout=0.0,
    attention_dropout=0.0,
    moe_token_dispatcher_type="allgather",  # the other dispatchers need CUDA streams
)
#: Kinds of position embeddings that are built here. Latent attention has a rotary one of its own, whatever the kind.
_POSITIONS = ("rope", "learned_absolute", "none")
#: Field that later releases lack; they behave as if it were False.
_ONLY_IN_0_16 = "moe_use_legacy_grouped_gemm"


def build(args: Namespace, initialise: bool = False, engine: bool = False) -> list[GPTModel]:
    """This rank's parts of the model that `args` describes, in float32, one for each of its virtual pipeline stages.

    They are built as by Megatron-LM's `gpt_builder` (0.16). Without `initialise` the parameters are uninitialised and lack
    megatron's attributes; a strict load then fills them all. `engine` says that this process has Transformer Engine's layers.
    Raises `ConversionError` if arguments are missing, or if the model needs those layers and there are none.
    """
    missing = [name for name in buildable_args.required(vars(args)) if not hasattr(args, name)]
    if missing:
        raise ConversionError(f"args lack {', '.join(missing)}")
    if args.position_embedding_type not in _POSITIONS:
        raise ConversionError(
            f"args.position_embedding_type is {args.position_embedding_type!r}, not {' or '.join(map(repr, _POSITIONS))}"
        )
    needing = buildable_args.needing_engine(vars(args))
    if needing and not engine:
        raise ConversionError(f"args have {', '.join(needing)}, which needs Transformer Engine")
    config = _config(args, initialise)
    vpp = config.virtual_pipeline_model_parallel_size
    parallel_state.set_virtual_pipeline_model_parallel_world_size(vpp)
    return [_stage(args, config, number) for number in (range(vpp) if vpp else [None])]


def _stage(args: Namespace, config: TransformerConfig, number: int | None) -> GPTModel:
    with cuda_is_cpu():
        model = (GPTModelWithHeadBias if getattr(args, "head_bias", False) else GPTModel)(
            config,
            _layer_spec(args, config, number),
            vocab_size=args.padded_vocab_size,
            max_sequence_length=args.max_position_embeddings,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=number),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=number),
            vp_stage=number,
            share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
            position_embedding_type=args.position_embedding_type,
            rotary_percent=args.rotary_percent,
            rotary_base=args.rotary_base,
            rope_scaling=args.use_rope_scaling,
            rope_scaling_factor=args.rope_scaling_factor,
            seq_len_interpolation_factor=args.rotary_seq_len_interpolation_factor,
            mtp_block_spec=_mtp_spec(args, config, number),
        )
    return model.eval()


def run(models: list[GPTModel], tokens: torch.Tensor) -> torch.Tensor | None:
    """Run the pipeline for int64 tokens [B, S]; on the last stage, returns float32 [B, S, padded vocabulary / TP]."""
    return [_run(model, tokens) for model in models][-1]


def _run(model: GPTModel, tokens: torch.Tensor) -> torch.Tensor | None:
    batch, length = tokens.shape
    if not model.pre_process:
        hidden = torch.empty(length, batch, model.config.hidden_size)
        dist.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
        model.set_input_tensor(hidden)
    with torch.no_grad(), cuda_is_cpu(), _only_next_token(model):
        out: torch.Tensor = model(tokens, torch.arange(length).expand(batch, -1), attention_mask=None)
    RotaryEmbedding.forward.cache_clear()  # else its cache keeps every model of the process alive
    if model.post_process:
        return out
    dist.send(out.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
    return None


@contextmanager
def _only_next_token(model: GPTModel) -> Iterator[None]:
    """Context without the layers that predict further tokens: they do not change the logits, and run only with labels."""
    config, process, layers = model.config, model.mtp_process, model.config.mtp_num_layers
    model.mtp_process, config.mtp_num_layers = False, None
    yield
    model.mtp_process, config.mtp_num_layers = process, layers


def _config(args: Namespace, initialise: bool) -> TransformerConfig:
    """Config as built by Megatron-LM's `core_transformer_config_from_args` (0.16)."""
    experts = _experts(args)
    fields = buildable_args.config_fields(vars(args))
    if not fields.get(_ONLY_IN_0_16):
        fields.pop(_ONLY_IN_0_16, None)
    if fields.get("rope_type", "") is None:  # Megatron-LM leaves it to the class, whose default is YaRN
        del fields["rope_type"]
    if experts:
        fields |= {"num_moe_experts": experts}
    fields |= dict(activation_func=_activation(args), gated_linear_unit=args.swiglu)
    fields |= dict(deterministic_mode=_linear_attention(args))  # then megatron has code of its own for it
    groups = args.num_query_groups if args.group_query_attention else None
    kind = MLATransformerConfig if _latent(args) else TransformerConfig
    return kind(**fields, **_ON_CPU, num_query_groups=groups, perform_initialization=initialise)


def _activation(args: Namespace) -> Callable[[torch.Tensor], torch.Tensor]:
    if args.swiglu:
        return F.silu
    if getattr(args, "squared_relu", False):
        return cast("Callable[[torch.Tensor], torch.Tensor]", squared_relu)
    # The fused kernel of bias and GELU, which is off here, computes the tanh form (core/fusions/fused_bias_gelu.py).
    return partial(F.gelu, approximate="tanh") if args.bias_gelu_fusion else F.gelu


def _experts(args: Namespace) -> int:
    return getattr(args, "num_experts", None) or 0


def _latent(args: Namespace) -> bool:
    return getattr(args, "multi_latent_attention", False)


def _linear_attention(args: Namespace) -> bool:
    return getattr(args, "experimental_attention_variant", None) is not None


def _layer_spec(
    args: Namespace, config: TransformerConfig, number: int | None
) -> ModuleSpec | TransformerBlockSubmodules:
    impl = args.transformer_impl
    if impl not in ("local", "transformer_engine"):
        raise ConversionError(f"transformer_impl {impl!r} is neither 'local' nor 'transformer_engine'")
    if getattr(args, "parallel_block", False):
        return parallel_layer_spec(config, engine=impl == "transformer_engine")
    if _linear_attention(args):
        return get_transformer_block_with_experimental_attention_variant_spec(config, vp_stage=number)
    if _experts(args):
        engine = impl == "transformer_engine"
        return get_gpt_decoder_block_spec(config, engine, normalization=args.normalization, vp_stage=number)
    options = dict(qk_layernorm=args.qk_layernorm, multi_latent_attention=_latent(args))
    if impl == "local":
        return get_gpt_layer_local_spec(**options, normalization=args.normalization)
    return get_gpt_layer_with_transformer_engine_spec(**options)


def _mtp_spec(args: Namespace, config: TransformerConfig, number: int | None) -> Any:
    """Spec of the layers that predict further tokens, or None if this stage has none."""
    if not getattr(args, "mtp_num_layers", None):
        return None
    engine = args.transformer_impl == "transformer_engine"
    layer = get_gpt_decoder_layer_specs(config, engine, normalization=args.normalization, vp_stage=number)[-1]
    return get_gpt_mtp_block_spec(config, layer, use_transformer_engine=engine, vp_stage=number)
