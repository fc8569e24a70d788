"""megatron-core's GPTModel built from a checkpoint's args, loaded and run, in the pool's processes only."""

from __future__ import annotations

import re
import zlib
from argparse import Namespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from .cpu import cuda_is_cpu
from .errors import OracleError

# Arguments that a checkpoint must hold: Megatron-LM's defaults for them are another model, or none.
_REQUIRED = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels", "normalization"),
    *("layernorm_epsilon", "add_bias_linear", "add_qkv_bias", "qk_layernorm", "window_size"),
    *("tensor_model_parallel_size", "pipeline_model_parallel_size"),
)
_REQUIRED_ELSEWHERE = (
    *("group_query_attention", "num_query_groups", "swiglu", "padded_vocab_size", "max_position_embeddings"),
    *("untie_embeddings_and_output_weights", "position_embedding_type", "rotary_base", "rotary_percent"),
    *("use_rope_scaling", "rope_scaling_factor", "rotary_seq_len_interpolation_factor", "transformer_impl"),
)
# Arguments named as the config's fields, whose absence means Megatron-LM's default.
_OPTIONAL = (
    *("rotary_interleaved", "account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split"),
    *("window_attn_skip_freq", "apply_residual_connection_post_layernorm", "no_rope_freq", "softmax_type"),
)
# What a CPU and a comparison in float32 need; none of it changes what the model computes.
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
)
# Transformer Engine 2's norms own an `_extra_state`, those of version 1 and torch's do not: both loads must work.
_NORM_EXTRA_STATE = re.compile(r".*layernorm\._extra_state")


def build(args: Namespace, impl: str | None = None) -> GPTModel:
    """This rank's part of the model that `args` describes, float32, as Megatron-LM's `gpt_builder` builds it.

    `impl` stands for the user's `--transformer-impl`; None takes the one in `args`.
    """
    missing = [name for name in (*_REQUIRED, *_REQUIRED_ELSEWHERE) if not hasattr(args, name)]
    if missing:
        raise OracleError(f"args lack {', '.join(missing)}")
    if args.position_embedding_type != "rope":
        raise OracleError(f"args.position_embedding_type is {args.position_embedding_type!r}, not 'rope'")
    config = _config(args)
    with cuda_is_cpu():
        model = GPTModel(
            config,
            _layer_spec(args, impl or args.transformer_impl),
            vocab_size=args.padded_vocab_size,
            max_sequence_length=args.max_position_embeddings,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
            share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
            position_embedding_type="rope",
            rotary_percent=args.rotary_percent,
            rotary_base=args.rotary_base,
            rope_scaling=args.use_rope_scaling,
            rope_scaling_factor=args.rope_scaling_factor,
            seq_len_interpolation_factor=args.rotary_seq_len_interpolation_factor,
        )
    return model.eval()


def load(model: GPTModel, state: dict[str, Any], where: str) -> str | None:
    """Load a rank's state strictly; the text that names every missing, unexpected and misshapen key, or None."""
    state = dict(state)
    expected = model.state_dict()
    for key in filter(_NORM_EXTRA_STATE.fullmatch, expected.keys() - state.keys()):
        state[key] = None
    for key in filter(_NORM_EXTRA_STATE.fullmatch, state.keys() - expected.keys()):
        del state[key]
    try:
        model.load_state_dict(state, strict=True)
    except (RuntimeError, ValueError) as error:
        return f"{where}: {error}"
    return None


def logits(model: GPTModel, tokens: torch.Tensor) -> torch.Tensor | None:
    """Run the pipeline for long [B, S] tokens: this rank's float32 [B, S, padded vocabulary / TP] on the last stage."""
    batch, length = tokens.shape
    if not model.pre_process:
        hidden = torch.empty(length, batch, model.config.hidden_size)
        dist.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
        model.set_input_tensor(hidden)
    with torch.no_grad(), cuda_is_cpu():
        out: torch.Tensor = model(tokens, torch.arange(length).expand(batch, -1), attention_mask=None)
    RotaryEmbedding.forward.cache_clear()  # its cache would keep every model of the session alive
    if model.post_process:
        return out
    dist.send(out.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
    return None


def randomise(model: GPTModel, seed: int, dtype: torch.dtype) -> None:
    """Give every parameter random values that `dtype` can hold; a parameter's copies on several ranks agree."""
    offset = get_transformer_layer_offset(model.config)
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            shard = tp_rank if getattr(parameter, "tensor_model_parallel", False) else 0
            key = f"{seed} {shard} {_global_name(name, offset, model.share_embeddings_and_output_weights)}"
            generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(_scaled(name, noise).to(dtype))


def _global_name(name: str, offset: int, tied: bool) -> str:
    if tied and name == "output_layer.weight":
        return "embedding.word_embeddings.weight"
    return re.sub(r"(?<=^decoder\.layers\.)\d+", lambda match: str(int(match[0]) + offset), name)


def _scaled(name: str, noise: torch.Tensor) -> torch.Tensor:
    if name.endswith(("norm.weight", "layer_norm_weight")):
        return 1 + 0.3 * noise
    if name.endswith("bias"):
        return 0.3 * noise
    return (0.1 if "linear_qkv" in name else 0.05) * noise


def _config(args: Namespace) -> TransformerConfig:
    """As Megatron-LM's `core_transformer_config_from_args` (0.16)."""
    fields = {name: getattr(args, name) for name in (*_REQUIRED, *_OPTIONAL) if hasattr(args, name)}
    if args.swiglu:
        fields |= dict(activation_func=F.silu, gated_linear_unit=True)
    return TransformerConfig(
        **fields,
        **_ON_CPU,
        num_query_groups=args.num_query_groups if args.group_query_attention else None,
        num_layers_in_first_pipeline_stage=getattr(args, "decoder_first_pipeline_num_layers", None),
        num_layers_in_last_pipeline_stage=getattr(args, "decoder_last_pipeline_num_layers", None),
    )


def _layer_spec(args: Namespace, impl: str) -> ModuleSpec:
    if impl == "local":
        return get_gpt_layer_local_spec(qk_layernorm=args.qk_layernorm, normalization=args.normalization)
    if impl == "transformer_engine":
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=args.qk_layernorm)
    raise OracleError(f"transformer_impl {impl!r} is neither 'local' nor 'transformer_engine'")
