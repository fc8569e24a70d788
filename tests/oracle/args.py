"""Arguments (`args`) as a training run of Megatron-LM saves them."""

from __future__ import annotations

import math
import pickle
import signal
from argparse import Namespace
from typing import Any

import torch

#: Whether this Python pickles an enum as a class with a value. Others, such as 3.11.2, pickle it under names that
#: Megatron-LM's allow list lacks, so args with enums could not be loaded there.
ENUMS_LOAD = b"Signals" in pickle.dumps(signal.SIGTERM)

_DEFAULTS: dict[str, Any] = dict(
    num_layers=4,
    encoder_num_layers=4,
    hidden_size=64,
    ffn_hidden_size=112,
    num_attention_heads=8,
    num_query_groups=4,
    kv_channels=None,
    max_position_embeddings=512,
    seq_length=512,
    normalization="RMSNorm",
    layernorm_epsilon=1e-5,
    apply_layernorm_1p=False,
    add_bias_linear=False,
    add_qkv_bias=False,
    qk_layernorm=False,
    swiglu=True,
    squared_relu=False,
    quick_geglu=False,
    openai_gelu=False,
    untie_embeddings_and_output_weights=True,
    position_embedding_type="rope",
    rotary_base=10000,
    rotary_percent=1.0,
    rotary_interleaved=False,
    rotary_seq_len_interpolation_factor=None,
    use_rope_scaling=False,
    rope_scaling_factor=8.0,
    rope_type=None,
    apply_rope_fusion=True,
    no_rope_freq=None,
    window_size=None,
    window_attn_skip_freq=None,
    softmax_type="vanilla",
    multi_latent_attention=False,
    num_experts=None,
    moe_layer_freq=1,
    moe_ffn_hidden_size=None,
    moe_shared_expert_intermediate_size=None,
    moe_shared_expert_gate=False,
    moe_shared_expert_overlap=False,
    moe_grouped_gemm=False,
    moe_use_legacy_grouped_gemm=False,
    moe_router_topk=2,
    moe_router_pre_softmax=False,
    moe_router_score_function="softmax",
    moe_router_enable_expert_bias=False,
    moe_router_topk_scaling_factor=None,
    moe_router_num_groups=None,
    moe_router_group_topk=None,
    moe_router_dtype=None,
    moe_router_load_balancing_type="aux_loss",
    moe_aux_loss_coeff=0.0,
    moe_token_dispatcher_type="allgather",
    moe_latent_size=None,
    attention_dropout=0.0,
    hidden_dropout=0.0,
    vocab_size=199,
    make_vocab_size_divisible_by=16,
    tokenizer_type="HuggingFaceTokenizer",
    tokenizer_model=None,
    transformer_impl="local",
    tensor_model_parallel_size=1,
    pipeline_model_parallel_size=1,
    virtual_pipeline_model_parallel_size=None,
    num_layers_per_virtual_pipeline_stage=None,
    pipeline_model_parallel_layout=None,
    context_parallel_size=1,
    expert_model_parallel_size=1,
    expert_tensor_parallel_size=None,
    sequence_parallel=False,
    decoder_first_pipeline_num_layers=None,
    decoder_last_pipeline_num_layers=None,
    account_for_embedding_in_pipeline_split=False,
    account_for_loss_in_pipeline_split=False,
    bf16=False,
    fp16=False,
    params_dtype=torch.float32,
    main_params_dtype=torch.float32,
    ckpt_format="torch",
    use_dist_ckpt=False,
    save="checkpoints",
    load=None,
    micro_batch_size=1,
    global_batch_size=8,
    consumed_train_samples=8,
    consumed_valid_samples=0,
    train_iters=1,
    lr=1e-4,
    seed=1234,
    cp_comm_type=["p2p"],
    data_path=[],
    exit_signal=signal.SIGTERM if ENUMS_LOAD else None,  # an enum, as in real args; `jobs.py` adds megatron's own
)

#: Arguments of models that differ from Llama in kind, with Megatron-LM's defaults (0.16; muP: 0.17). They are added to the args
#: of models that set one of them; those of other models leave them out, as do checkpoints of earlier releases.
_OF_KINDS: dict[str, Any] = dict(
    add_position_embedding=True,
    bias_gelu_fusion=True,
    bias_swiglu_fusion=True,
    layernorm_zero_centered_gamma=False,
    attention_output_gate=False,
    q_lora_rank=None,
    kv_lora_rank=32,
    qk_head_dim=128,
    qk_pos_emb_head_dim=64,
    v_head_dim=128,
    rotary_scaling_factor=1.0,
    mscale=1.0,
    mscale_all_dim=0.0,
    experimental_attention_variant=None,
    linear_attention_freq=None,
    linear_conv_kernel_dim=4,
    linear_key_head_dim=128,
    linear_value_head_dim=128,
    linear_num_key_heads=16,
    linear_num_value_heads=32,
    mtp_num_layers=None,
    spec=None,
)
#: The same of `--use-mup`.
_OF_MUP: dict[str, Any] = dict(
    use_mup=False,
    mup_base_hidden_size=None,
    mup_embedding_mult=1.0,
    mup_output_mult=1.0,
    mup_base_head_dim=None,
    mup_attn_scale_power=1.0,
)


def megatron_args(**overrides: Any) -> Namespace:
    """Args of a small Llama-like model, including those that Megatron-LM derives; `overrides` are argument names.

    `num_query_groups=None` is multi-head attention, `expert_tensor_parallel_size=None` is the TP size. `params_dtype` is
    the dtype that `write_checkpoint` stores.
    """
    defaults = dict(_DEFAULTS)
    for more in (_OF_KINDS, _OF_MUP):
        defaults |= more if overrides.keys() & more.keys() else {}
    unknown = overrides.keys() - defaults.keys()
    if unknown:
        raise TypeError(f"not Megatron arguments: {sorted(unknown)}")
    args = Namespace(**{**defaults, **overrides})
    args.group_query_attention = args.num_query_groups is not None
    args.num_query_groups = args.num_query_groups or 1  # Megatron-LM's default where attention is not grouped
    args.kv_channels = args.kv_channels or args.hidden_size // args.num_attention_heads
    args.norm_epsilon = args.layernorm_epsilon
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    args.expert_tensor_parallel_size = args.expert_tensor_parallel_size or tp
    if args.num_experts:
        args.moe_ffn_hidden_size = args.moe_ffn_hidden_size or args.ffn_hidden_size
    args.data_parallel_size = math.lcm(tp, args.expert_tensor_parallel_size * args.expert_model_parallel_size) // tp
    args.world_size = args.data_parallel_size * tp * pp
    multiple = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
    args.padded_vocab_size = -(-args.vocab_size // multiple) * multiple
    return args
