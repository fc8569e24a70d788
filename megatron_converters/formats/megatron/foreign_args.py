"""Arguments of programs built on Megatron-LM that may change what a model computes, and that no row of the table describes.

A deny list of one program's names misses the next program's. So any argument that is set, that no release of Megatron-LM has, and
whose name is about the forward pass is refused, until the user says that it changes nothing (`--ignore-args`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any

from ...basics.errors import ConversionError, one_line
from .argument import Args
from .arguments import ATTRIBUTES
from .conventions import FOLDED, HALVES
from .rows_mindspeed import SCALING_TYPE, says_kind
from .rows_swift import ROPE_SCALING, says_scaling

#: Parts of names that are about the forward pass.
_FORWARD = re.compile(
    r"rope|rotary|yarn|theta|alibi|window|softcap|logit_cap|offset|normaliz|norm(s|_|$|head)|scal(e|es|ed|ing|ar)(_|$)"
    r"|mult(iplier)?s?(_|$)|glu|gelu|relu|xielu|activation(_func|_type|$)|(^|_)sinks?(_|$)|bidirectional"
)
#: Names that no model depends on: other programs' servers, logs, losses, optimizers, loops and kernels.
_ASIDE = re.compile(
    r"(sglang|vllm|rollout|eval|log|wandb|tensorboard|swanlab|mlflow|profile|rl|grpo|dpo|ppo|kd|critic|rewards?|ref|data|dataset|"
    r"dataloader|optimizer|muon|adam|lr|loss|ckpt|checkpoint|recompute|swap|inference|logits|ci|debug|retro|vision|dino|deepspeed|"
    r"offload|cpu_offloading|fp8|fp4|moe_adaptive_recompute|deprecated|use_(fused|turbo|fla|triton|npu))_|(.*_)?grad_"
)
#: Arguments of Megatron-LM (core_v0.8.0 to core_v0.19.0: training/arguments.py, core/transformer/transformer_config.py,
#: core/optimizer/optimizer_config.py, training/config) without a row: they choose kernels, precision, training, or parts of models
#: that are refused by another argument.
_UPSTREAM = frozenset(
    """
    activation_func activation_func_fp8_input_store apply_wd_to_qk_layernorm bias_swiglu_fusion dsa_indexer_k_norm_fp32
    dsa_indexer_rotate_activation experimental_attention_variant_loss_scale_func export_qk_l2_norm
    fused_residual_rmsnorm fused_single_qkv_rope head_lr_mult initial_loss_scale memory_efficient_layer_norm min_loss_scale
    moe_grad_scale_func mrope_section mtp_grad_scale_func mtp_loss_scaling_factor mup_width_mult no_persist_layer_norm
    no_rope_fusion offset_sampling_seed_by_dp_rank persist_layer_norm renormalize_blend_weights retriever_score_scaling
    throughput_window_size use_flashinfer_fused_rope use_te_activation_func
    yarn_mscale yarn_mscale_all_dim yarn_rotary_scaling_factor
    """.split()
)
#: Value that matters to no model, whatever it is.
_ANY = object()
#: Arguments of other programs, by the value that changes nothing. Those of MindSpeed(-LLM) have it in every run.
_USUAL: dict[str, Any] = {
    # MindSpeed 2.3 and MindSpeed-LLM 2.3: mindspeed/arguments.py, features_manager of both.
    "rope_scaling_beta_fast": _ANY,  # these four matter with a rope_scaling_type alone
    "rope_scaling_beta_slow": _ANY,
    "rope_scaling_mscale": _ANY,
    "rope_scaling_mscale_all_dim": _ANY,
    "longrope_freqs_type": "mul",
    "embedding_multiplier_scale": 1.0,
    "yarn_scaling_factor": 1.0,
    "dynamic_factor": 1.0,
    "attention_mask_type": "causal",
    "cp_window_size": _ANY,
    "compress_rope_theta": _ANY,  # these six are of attention with an index, whose tensors no supported model has
    "rope_theta": 10000.0,
    "index_skip_topk_offset": _ANY,
    "sliding_window_size": 128,
    "hc_mult": _ANY,
    "apply_rope_no_in_complex": _ANY,
    "rmsnorm_weight_in_fp32": _ANY,
    "input_layernorm_in_fp32": _ANY,
    "init_norm_weight_in_fp32": _ANY,
    # Habana's Megatron-LM 1.20: megatron/training/arguments.py.
    "use_fast_softmax": _ANY,
    # AMD's Megatron-LM, megatron/training/arguments.py, and Primus, primus/configs/modules.
    "disable_te_fused_rope": _ANY,
    "sink_level": _ANY,
    "file_sink_level": _ANY,
    "stderr_sink_level": _ANY,
    "master_sink_level": _ANY,
    # The Swiss AI Initiative's: megatron/training/arguments.py. Without a norm they are false.
    "attn_layernorm": True,
    "mlp_layernorm": True,
    "final_layernorm": True,
    "input_embeddings_multiplier": 1.0,
    "layernorm_init": _ANY,
    "qknorm_impl": _ANY,
    # Pai-Megatron-Patch: megatron_patch/arguments.py.
    "rotary_scale_factor": 1,
    "no_rotary_embed_copy": _ANY,
    # slime: slime/utils/arguments.py. ms-swift: swift/megatron/arguments/megatron_args.py.
    "normalize_advantages": _ANY,
    "scale_rewards": _ANY,
}
_OWN = frozenset({FOLDED, HALVES})
_KNOWN = ATTRIBUTES | _UPSTREAM | _OWN
#: Arguments of which some values are read.
_PARTLY = {ROPE_SCALING: says_scaling, SCALING_TYPE: says_kind}
#: Factors that change nothing.
_FACTOR = re.compile(r"scal|mult|factor")


def foreign(args: Args) -> Iterator[str]:
    """Names of arguments that are set, that no release of Megatron-LM has, and that may change what a model computes."""
    for name, value in args.items():
        if name in _PARTLY:
            if not _PARTLY[name](value):
                yield name
        elif name in _KNOWN or not isinstance(name, str):
            continue
        elif name in _USUAL:
            usual = _USUAL[name]
            if usual is not _ANY and value is not None and value != usual:
                yield name
        elif _FORWARD.search(name) and not _ASIDE.match(name) and _is_set(name, value):
            yield name


def _is_set(name: str, value: Any) -> bool:
    """Whether a value is another than those by which programs say that there is none."""
    if value is None or (isinstance(value, (bool, int, float, str, list, tuple, dict)) and not value):
        return False
    return not (value == 1 and not isinstance(value, bool) and _FACTOR.search(name))


def foreign_notes(args: Args, ignored: Collection[str], *, settled: str = "") -> list[str]:
    """Warning for each such argument that the user ignores; raises `ConversionError` for the others.

    `settled` says what describes the model instead, in which case no argument is refused.
    """
    found = {name: f"{one_line(name)}={one_line(repr(args[name]))}" for name in sorted(foreign(args))}
    refused = [name for name in found if name not in ignored and not settled]
    if refused:
        names = ",".join(map(one_line, refused))
        raise ConversionError(
            f"the checkpoint's args have {', '.join(found[name] for name in refused)}, which no release of Megatron-LM knows and "
            "which may change what the model computes. Give the configuration of the model that it is with --hf-config DIR or, "
            f"if this changes nothing, pass --ignore-args {names}"
        )
    unused = [one_line(name) for name in ignored if name not in found]
    notes = (
        [f"warning: --ignore-args {','.join(unused)}: the args have nothing of this that is refused"] if unused else []
    )
    return notes + [
        f"warning: the args have {shown}, which no release of Megatron-LM knows: "
        + ("ignored, as --ignore-args says" if name in ignored else f"{settled} must say the same")
        for name, shown in found.items()
    ]
