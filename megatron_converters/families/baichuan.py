"""Baichuan-7B (remote BaiChuanForCausalLM) and Baichuan2-7B (remote BaichuanForCausalLM): Llamas with query, key and value in one.

Baichuan2 divides each row of its head by the row's length as it runs. Megatron-LM's head is plain, so the divided rows are stored.
Names and defaults: modeling_baichuan.py and configuration_baichuan.py of baichuan-inc/Baichuan-7B and Baichuan2-7B-Base.
"""

from __future__ import annotations

import dataclasses

from ..model.layouts import GROUPED_QKV, joined
from .defaults import Quotient, SameAs
from .entries import implied, tensor
from .llama import ATTENTION, DENSE, SIZES
from .rules import Passed, Row, Rule
from .rules_remote import BaichuanRelease
from .table import Family, Proof

_RULES: tuple[Rule, ...] = (
    *SIZES,
    *implied(
        num_query_groups=SameAs("num_attention_heads"), kv_channels=Quotient("hidden_size", "num_attention_heads")
    ),
    *implied(rotary_base=10000.0, rope_scaling=None),
    Row("max_position_embeddings", "max_position_embeddings", 4096),
    Passed(("_from_model_config",)),
)

BAICHUAN = Family(
    name="baichuan",
    model_type="baichuan",
    architecture="BaiChuanForCausalLM",
    since="0.8",
    proof=Proof.EQUIVALENT,
    models="Baichuan-7B",
    covers="fused `W_pack`; 13B, which has ALiBi, is refused",
    tensors={**DENSE, **tensor("qkv", ATTENTION + "W_pack.weight", layout=joined(GROUPED_QKV))},
    rules=(*_RULES, BaichuanRelease(normed_head=False)),
)

BAICHUAN2 = dataclasses.replace(
    BAICHUAN,
    name="baichuan2",
    architecture="BaichuanForCausalLM",
    models="Baichuan2-7B",
    covers="the same; rows of the head are stored with length 1, as its code computes it",
    tensors={**BAICHUAN.tensors, **tensor("output_layer", "lm_head.weight", unit_rows=True)},
    rules=(*_RULES, BaichuanRelease(normed_head=True)),
)
