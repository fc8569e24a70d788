"""megatron-core's GPTModel built from a checkpoint's args, loaded and run, in the pool's processes only."""

from __future__ import annotations

import dataclasses
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
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel import (
    gather_from_tensor_model_parallel_region,
    scatter_to_tensor_model_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.moe.experts import GroupedMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from . import checkpoint
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
# Those that a model with experts needs besides.
_REQUIRED_WITH_EXPERTS = (
    *("moe_ffn_hidden_size", "moe_layer_freq", "moe_router_topk", "moe_router_pre_softmax", "moe_grouped_gemm"),
    *("moe_shared_expert_intermediate_size", "expert_model_parallel_size", "expert_tensor_parallel_size"),
)
_OPTIONAL_WITH_EXPERTS = (
    *("moe_shared_expert_gate", "moe_router_score_function", "moe_router_enable_expert_bias", "moe_router_dtype"),
    *("moe_router_topk_scaling_factor", "moe_router_num_groups", "moe_router_group_topk"),
    *("moe_router_load_balancing_type", "moe_use_legacy_grouped_gemm"),
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
    moe_token_dispatcher_type="allgather",  # the other ones want CUDA streams
)
_LAYER = re.compile(r"(?<=^decoder\.layers\.)\d+")
_EXPERT = re.compile(r"(?<=\.local_experts\.)\d+|(?<=\.linear_fc[12]\.weight)\d+")
_LEGACY_GROUPED = (".experts.weight1", ".experts.weight2")
# Transformer Engine 2's norms own an `_extra_state`, those of version 1 and torch's do not: both loads must work.
_NORM_EXTRA_STATE = re.compile(r".*layernorm\._extra_state")


def build(args: Namespace, impl: str | None = None, qk_norm_over_heads: bool = False) -> GPTModel:
    """This rank's part of the model that `args` describes, float32, as Megatron-LM's `gpt_builder` builds it.

    `impl` stands for the user's `--transformer-impl`; None takes the one in `args`. `qk_norm_over_heads` gives the
    attention OLMoE's norms, which no argument of Megatron-LM stands for.
    """
    required = (*_REQUIRED, *_REQUIRED_ELSEWHERE, *(_REQUIRED_WITH_EXPERTS if _experts(args) else ()))
    missing = [name for name in required if not hasattr(args, name)]
    if missing:
        raise OracleError(f"args lack {', '.join(missing)}")
    if args.position_embedding_type != "rope":
        raise OracleError(f"args.position_embedding_type is {args.position_embedding_type!r}, not 'rope'")
    config = _config(args)
    with cuda_is_cpu():
        model = GPTModel(
            config,
            _layer_spec(args, config, impl or args.transformer_impl),
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
    for module in model.modules():
        if isinstance(module, GroupedMLP):  # its forward asserts bf16; nothing else of it needs that
            module.config = dataclasses.replace(config, bf16=True)
        if isinstance(module, SelfAttention) and qk_norm_over_heads:
            module.q_layernorm = _NormOverHeads(config, config.num_attention_heads)
            module.k_layernorm = _NormOverHeads(config, config.num_query_groups)
    return model.eval()


class _NormOverHeads(torch.nn.Module):
    """RMS norm of all heads [s, b, heads / TP, channels] together: OLMoE's, where megatron-core norms each by itself."""

    def __init__(self, config: TransformerConfig, heads: int):
        super().__init__()
        self.eps = config.layernorm_epsilon
        self.weight = torch.nn.Parameter(torch.ones(heads * config.kv_channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        whole = gather_from_tensor_model_parallel_region(x.flatten(2).contiguous())
        normed = F.rms_norm(whole, whole.shape[-1:], self.weight, self.eps)
        mine: torch.Tensor = scatter_to_tensor_model_parallel_region(normed)
        return mine.view_as(x)


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
    names = _GlobalNames(model)
    with torch.no_grad():
        for name, parameter in (*model.named_parameters(), *_expert_biases(model)):
            key = f"{seed} {_shard(name, parameter)} {names.of(name)}"
            generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(_scaled(name, noise).to(checkpoint.stored_dtype(name, dtype)))


def fingerprints(model: GPTModel) -> list[tuple[str, tuple[int, ...], int]]:
    """Each parameter's name, the part of the model that it is, and a checksum: equal parts must have equal ones."""
    stage = parallel_state.get_pipeline_model_parallel_rank()
    experts = parallel_state.get_expert_model_parallel_rank()
    return [
        (name, (stage, experts if ".experts." in name else 0, _shard(name, value)), zlib.crc32(value.detach().numpy()))
        for name, value in (*model.named_parameters(), *_expert_biases(model))
    ]


def _expert_biases(model: GPTModel) -> list[tuple[str, torch.Tensor]]:
    return [(name, buffer) for name, buffer in model.named_buffers() if name.endswith(".router.expert_bias")]


def _shard(name: str, parameter: torch.Tensor) -> int:
    """The number of this rank's part of a parameter; ranks with the same number hold the same values."""
    if ".experts." in name:
        return int(parallel_state.get_expert_tensor_parallel_rank())
    cut = getattr(parameter, "tensor_model_parallel", False)
    return int(parallel_state.get_tensor_model_parallel_rank()) if cut else 0


class _GlobalNames:
    """Names of a rank's parameters with layers and experts numbered in the whole model."""

    def __init__(self, model: GPTModel):
        self.layers = get_transformer_layer_offset(model.config)
        experts = model.config.num_moe_experts or 0
        self.experts = (
            experts // model.config.expert_model_parallel_size * (parallel_state.get_expert_model_parallel_rank())
        )
        self.tied = model.share_embeddings_and_output_weights

    def of(self, name: str) -> str:
        if self.tied and name == "output_layer.weight":
            return "embedding.word_embeddings.weight"
        name = _LAYER.sub(lambda match: str(int(match[0]) + self.layers), name)
        if name.endswith(_LEGACY_GROUPED):  # all of the rank's experts in one
            return f"{name} from {self.experts}"
        return _EXPERT.sub(lambda match: str(int(match[0]) + self.experts), name)


def _scaled(name: str, noise: torch.Tensor) -> torch.Tensor:
    if name.endswith(("norm.weight", "layer_norm_weight")):
        return 1 + 0.3 * noise
    if name.endswith(("bias", "router.weight", "gate_weight")):
        return 0.3 * noise
    return (0.1 if "linear_qkv" in name else 0.05) * noise


def _config(args: Namespace) -> TransformerConfig:
    """As Megatron-LM's `core_transformer_config_from_args` (0.16)."""
    fields = {name: getattr(args, name) for name in (*_REQUIRED, *_OPTIONAL) if hasattr(args, name)}
    if experts := _experts(args):
        fields |= {"num_moe_experts": experts}
        fields |= {name: getattr(args, name) for name in _REQUIRED_WITH_EXPERTS}
        fields |= {name: getattr(args, name) for name in _OPTIONAL_WITH_EXPERTS if hasattr(args, name)}
    if args.swiglu:
        fields |= dict(activation_func=F.silu, gated_linear_unit=True)
    return TransformerConfig(
        **fields,
        **_ON_CPU,
        num_query_groups=args.num_query_groups if args.group_query_attention else None,
        num_layers_in_first_pipeline_stage=getattr(args, "decoder_first_pipeline_num_layers", None),
        num_layers_in_last_pipeline_stage=getattr(args, "decoder_last_pipeline_num_layers", None),
    )


def _experts(args: Namespace) -> int:
    return getattr(args, "num_experts", None) or 0


def _layer_spec(args: Namespace, config: TransformerConfig, impl: str) -> ModuleSpec | TransformerBlockSubmodules:
    if impl not in ("local", "transformer_engine"):
        raise OracleError(f"transformer_impl {impl!r} is neither 'local' nor 'transformer_engine'")
    if _experts(args):
        return get_gpt_decoder_block_spec(config, impl == "transformer_engine", normalization=args.normalization)
    if impl == "local":
        return get_gpt_layer_local_spec(qk_layernorm=args.qk_layernorm, normalization=args.normalization)
    return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=args.qk_layernorm)
