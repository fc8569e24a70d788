"""Run of megatron-core 0.19 on a CPU: it loads a checkpoint of one rank with sparse attention strictly, and computes logits.

Start it with the release's tree and the root of this project on PYTHONPATH:

    python -m tests.oracle.sparse_release CHECKPOINT TOKENS OUT

`TOKENS` is a file of int64 tokens [B, S]; logits, float32 [B, S, padded vocabulary], are written to the file `OUT`. The model is
built of the checkpoint's args by the release's own spec. Transformer Engine is replaced by this folder's stand-in, to which are
added the arguments that 0.19 gives; attention and indexer are the release's own code in torch, without the rotation of activations,
which changes no score.
"""

from __future__ import annotations

import os
import sys
import typing
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
import torch._dynamo  # before triton is replaced
import torch.nn.functional as F

from megatron_converters.live.on_cpu import cuda_is_cpu
from megatron_converters.logits import cpu

from . import transformer_engine_standin as engine

#: Attributes of args that are fields of the config under the same name.
_FIELDS = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "normalization", "layernorm_epsilon"),
    *("add_bias_linear", "qk_layernorm", "multi_latent_attention", "apply_rope_fusion", "rotary_base", "rope_type"),
    *("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim"),
    *("rotary_scaling_factor", "mscale", "mscale_all_dim", "experimental_attention_variant"),
    *("dsa_indexer_n_heads", "dsa_indexer_head_dim", "dsa_indexer_topk", "dsa_indexer_rope_interleaved"),
    *("dsa_indexer_topk_freq", "dsa_indexer_skip_topk_offset", "dsa_indexer_k_norm_epsilon"),
    *("moe_layer_freq", "moe_ffn_hidden_size", "moe_router_topk", "moe_router_score_function", "moe_router_dtype"),
    *("moe_router_enable_expert_bias", "moe_router_topk_scaling_factor", "moe_router_num_groups"),
    *("moe_router_group_topk", "moe_shared_expert_intermediate_size", "moe_grouped_gemm"),
)


def main(checkpoint: str, tokens_file: str, out_file: str) -> None:
    """Load and run the model, and write its logits."""
    _replace_packages()
    cpu.prepare()
    os.environ.update(MASTER_ADDR="127.0.0.1", RANK="0", WORLD_SIZE="1")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    content = torch.load(Path(checkpoint) / "iter_0000001/mp_rank_00/model_optim_rng.pt", weights_only=False)
    tokens = torch.load(tokens_file)
    length = tokens.shape[1]
    with cuda_is_cpu(), torch.no_grad():
        model = _built(content["args"])
        model.load_state_dict(content["model"], strict=True)
        mask = torch.triu(torch.ones(1, 1, length, length, dtype=torch.bool), 1)
        logits = model(tokens, torch.arange(length).expand_as(tokens), mask)
    torch.save(logits.float(), out_file)


def _replace_packages() -> None:
    if not hasattr(typing, "override"):  # 0.19 needs Python 3.12
        typing.override = lambda method: method  # type: ignore[attr-defined]
    for name in ("einops", "triton", "triton.language"):
        sys.modules.setdefault(name, MagicMock(__spec__=None, __version__="3.0.0"))
    torch.compile = lambda function=None, **_: function or (lambda later: later)  # type: ignore[assignment]
    engine.install()
    fp8 = sys.modules["transformer_engine.pytorch.fp8"]
    for name in ("FP8GlobalStateManager", "fp8_autocast", "fp8_model_init"):
        if not hasattr(fp8, name):
            setattr(fp8, name, nullcontext)
    for norm in (engine._Norm, engine.LayerNorm):
        norm.__init__ = _with_shape(norm.__init__)  # type: ignore[method-assign]


def _with_shape(make: Any) -> Any:
    """Constructor of a norm that takes its size by Transformer Engine's own name, too."""

    def init(self: Any, hidden_size: int | None = None, *args: Any, normalized_shape: Any = None, **more: Any) -> None:
        make(self, normalized_shape if hidden_size is None else hidden_size, *args, **more)

    return init


def _built(args: Any) -> Any:
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.experimental_attention_variant_module_specs import (
        get_transformer_block_with_experimental_attention_variant_spec,
    )
    from megatron.core.transformer import MLATransformerConfig

    parallel_state.initialize_model_parallel(1, 1)
    config = MLATransformerConfig(
        **{name: getattr(args, name) for name in _FIELDS if hasattr(args, name)},
        **dict(num_moe_experts=args.num_experts, activation_func=F.silu, gated_linear_unit=True),
        **dict(use_cpu_initialization=True, transformer_impl="transformer_engine", persist_layer_norm=False),
        **dict(moe_token_dispatcher_type="allgather", bias_activation_fusion=False),
        **dict(hidden_dropout=0.0, attention_dropout=0.0, dsa_indexer_rotate_activation=False),
    )
    return GPTModel(
        config,
        get_transformer_block_with_experimental_attention_variant_spec(config),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        rotary_base=args.rotary_base,
    ).eval()


if __name__ == "__main__":
    main(*sys.argv[1:4])
