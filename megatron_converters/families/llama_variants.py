"""Llamas with a rule or two of their own: SmolLM3, Seed-OSS, InternLM3, IQuest-Coder, CWM, ERNIE-4.5 (dense) and Helium.

Names and defaults: transformers 5.23, models/smollm3, seed_oss, internlm3, iquestcoder, cwm, ernie4_5 and helium.
"""

from __future__ import annotations

from ..model.layouts import GROUPED_INTERLEAVED_QKV
from .entries import implied, linear
from .llama import ATTENTION, DENSE, MLP_BIAS, PROJ_BIAS, head_dim, query_groups
from .llama import FAMILY as LLAMA
from .rules import Agreeing, Passed, Row, overridden
from .rules_attention import Rope
from .rules_layer_kinds import ListedWindow, RotatedLayers
from .table import Family, Proof

SMOLLM3 = Family(
    name="smollm3",
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    since="0.13",
    proof=Proof.LOGITS,
    models="SmolLM3-3B",
    covers="layers without rotary embeddings (`--no-rope-freq`), sliding window",
    tensors=LLAMA.tensors,
    rules=overridden(
        LLAMA.rules,
        [
            query_groups(absent=4),
            Rope(2e6),
            RotatedLayers(interval=4),
            Passed(("max_window_layers",)),  # Qwen's, in the published file
            Row("max_position_embeddings", "max_position_embeddings", 32768),
            Row("tied", "tie_word_embeddings", True),
        ],
    ),
)

SEED_OSS = Family(
    name="seed_oss",
    model_type="seed_oss",
    architecture="SeedOssForCausalLM",
    since="0.8",
    proof=Proof.LOGITS,
    models="Seed-OSS-36B",
    covers="biases of queries, keys, values and output apart",
    tensors=LLAMA.tensors,
    rules=overridden(
        LLAMA.rules,
        [
            query_groups(absent=8),
            head_dim(absent=128),
            Row("max_position_embeddings", "max_position_embeddings", 524288),
            Row("attention_dropout", "attention_dropout", 0.1),
            Row("qkv_bias", "attention_bias", True),
            Row("proj_bias", "attention_out_bias", False),
        ],
    ),
)

_OF_128 = overridden(LLAMA.rules, [head_dim(absent=128), Row("norm_epsilon", "rms_norm_eps", 1e-5)])

INTERNLM3 = Family(
    name="internlm3",
    model_type="internlm3",
    architecture="InternLM3ForCausalLM",
    computed_by=LLAMA.architecture,
    since="0.8",
    proof=Proof.LOGITS,
    models="InternLM3-8B",
    covers="one switch for all biases, dynamic RoPE up to the model's positions",
    tensors=LLAMA.tensors,
    rules=overridden(
        _OF_128,
        [
            query_groups(absent=2),
            Row("max_position_embeddings", "max_position_embeddings", 32768),
            # transformers computes it with Llama's class, where both are one; the model's own code knows them apart.
            Agreeing(("qkv_bias", "proj_bias", "mlp_bias"), (("qkv_bias", "attention_bias"), ("bias", "mlp_bias"))),
        ],
    ),
)

IQUESTCODER = Family(
    name="iquestcoder",
    model_type="iquestcoder",
    architecture="IQuestCoderForCausalLM",
    computed_by=LLAMA.architecture,
    since="0.8",
    proof=Proof.LOGITS,
    models="IQuest-Coder-V1",
    covers="as Llama, which transformers computes it with",
    tensors=LLAMA.tensors,
    rules=overridden(
        _OF_128, [query_groups(absent=8), Row("max_position_embeddings", "max_position_embeddings", 131072)]
    ),
)

#: What the class takes where config.json has no table.
_LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 8192},
    **{"high_freq_factor": 4.0, "low_freq_factor": 1.0},
}

CWM = Family(
    name="cwm",
    model_type="cwm",
    architecture="CwmForCausalLM",
    since="0.15",
    proof=Proof.LOGITS,
    models="CWM-32B",
    covers="sliding window on most layers, llama3 RoPE",
    tensors={**DENSE, **MLP_BIAS},
    rules=overridden(
        [rule for rule in _OF_128 if rule.keys != ("attention_bias",)],
        [
            query_groups(absent=8),
            Rope(1e6, absent=(*_LLAMA3.items(),)),
            ListedWindow(default=8192, full=4),
            Row("max_position_embeddings", "max_position_embeddings", 131072),
        ],
    ),
)

#: Neighbouring rows of a head rotate together; they stay so where Megatron-LM rotates them with --rotary-interleaved.
_INTERLEAVED = {
    **DENSE,
    **linear("qkv", *(f"{ATTENTION}{part}_proj" for part in "qkv"), layout=GROUPED_INTERLEAVED_QKV),
    **MLP_BIAS,
}

ERNIE4_5 = Family(
    name="ernie4_5",
    model_type="ernie4_5",
    architecture="Ernie4_5ForCausalLM",
    further_architectures=("Ernie4_5_ForCausalLM",),
    since="0.8",
    proof=Proof.LOGITS,
    models="ERNIE-4.5-0.3B",
    covers="neighbouring rotary pairs, tied embeddings",
    tensors={**_INTERLEAVED, **PROJ_BIAS},
    rules=overridden(
        _OF_128,
        [
            query_groups(absent=2),
            Rope(5e5),
            Row("max_position_embeddings", "max_position_embeddings", 131072),
            Row("tied", "tie_word_embeddings", True),
            *(Row(bias, "use_bias", False) for bias in ("qkv_bias", "proj_bias", "mlp_bias")),
            *implied(rotary_interleaved=True),
        ],
    ),
)

HELIUM = Family(
    name="helium",
    model_type="helium",
    architecture="HeliumForCausalLM",
    since="0.8",
    proof=Proof.LOGITS,
    models="Helium-1",
    covers="neighbouring rotary pairs",
    tensors=_INTERLEAVED,
    rules=overridden(
        LLAMA.rules,
        [
            query_groups(absent=20),
            Row("kv_channels", "head_dim", 128),
            Rope(1e5),
            Row("norm_epsilon", "rms_norm_eps", 1e-8),
            Row("max_position_embeddings", "max_position_embeddings", 4096),
            *implied(rotary_interleaved=True, proj_bias=False),
        ],
    ),
)
