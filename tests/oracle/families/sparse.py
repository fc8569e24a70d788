"""Models with sparse attention, whose logits no megatron-core without a GPU computes.

There are as many indexed positions as tokens at least, so that the models compute what they would without their indexers.
"""

from __future__ import annotations

from typing import Any

from ..hf_kinds import KINDS

_MLA = KINDS["deepseek-v3"] | dict(index_n_heads=3, index_head_dim=10, index_topk=40)
SPARSE: dict[str, dict[str, Any]] = {
    "deepseek-v3.2": _MLA | dict(model_type="deepseek_v32"),
    "glm-5": _MLA | dict(model_type="glm_moe_dsa", n_group=1, topk_group=1),
    "glm-5.2": _MLA
    | dict(model_type="glm_moe_dsa", n_group=1, topk_group=1, indexer_types=["full", "shared", "full", "shared"]),
}
"""Fields of config.json by name."""
