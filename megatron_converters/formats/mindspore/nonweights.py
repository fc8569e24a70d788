"""Tensors in MindSpore checkpoints that are no weights: patterns by group.

Sources: mindspore 2.8.0 nn/optim and train/serialization.py; mindformers 1.6.0 to 2.1.0, core/optim, core/callback/callback.py,
wrapper/ and parallel_core/ (router buffers).
"""

from __future__ import annotations

import fnmatch
import re

OPTIMIZER, RUN_STATE = "optimizer", "run state"
#: Groups of shell patterns; a pattern covers the whole name.
_GROUPS = {
    OPTIMIZER: (
        *(
            f"{moment}.*"
            for moment in (
                "adam_m adam_v exp_avg exp_avg_sq max_exp_avg_sq muon_m moments moment1 moment2 main_param accu_grads "
                "exp_avg_sq_row exp_avg_sq_col exp_avg_insta_row exp_avg_insta_col"
            ).split()
        ),
        "pma_weight_*",
        "beta1_power",
        "beta2_power",
    ),
    RUN_STATE: (
        *(
            "global_step step_num epoch_num loss_scale global_batch_size learning_rate scale_sense "
            "current_iterator_step last_overflow_iterator_step scale_window* list_index random_op"
        ).split(),
        "*dropout*",
    ),
    "monitors": (
        "_device_local_loss*",
        "_device_local_norm*",
        "*.core_attention.max_logits_val",
    ),
    "router buffers": (
        *(f"*.mlp.router.{name}" for name in "expert_load fi_accu global_tokens_per_expert ga_steps".split()),
        *(
            f"*.mlp.{name}"
            for name in "expert_load_history expert_load_history_cnt experts.num_tokens_per_expert tokens_per_expert".split()
        ),
        *(
            f"*.{name}"
            for name in "router.expert_load cumsum_value hot_expert_index cold_expert_index pi_cache fi_cache".split()
        ),
        "*fi_parameter*",
    ),
    "inference caches": (
        *(f"*{name}" for name in "key_cache value_cache mask_cache __param_key__".split()),
        *(f"*{name}*" for name in "zeros_k_pe zeros_k_nope zeros_value_states".split()),
    ),
}
_MATCH = {
    group: re.compile("|".join(f"(?:{fnmatch.translate(pattern)})" for pattern in patterns))
    for group, patterns in _GROUPS.items()
}


def group_of(name: str) -> str | None:
    """Group of a tensor that is no weight; None for every other name."""
    return next((group for group, pattern in _MATCH.items() if pattern.match(name)), None)
