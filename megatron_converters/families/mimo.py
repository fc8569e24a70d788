"""MiMo-7B (remote MiMoForCausalLM): Qwen2 and a layer of multi-token prediction.

Names and defaults: configuration_mimo.py and modeling_mimo.py of the published models.
"""

from __future__ import annotations

from .entries import tensor
from .qwen import QWEN2
from .rules import Restated, Row
from .table import Family, Proof

_PREDICTION = "model.mtp_layers.{layer}."

MIMO = Family(
    name="mimo",
    model_type="mimo",
    architecture="MiMoForCausalLM",
    since="0.12",
    proof=Proof.EQUIVALENT,
    models="MiMo-7B",
    covers="as Qwen2, and multi-token prediction, whose projection has its halves swapped",
    tensors={
        **QWEN2.tensors,
        **tensor("mtp_embedding_norm", _PREDICTION + "token_layernorm.weight"),
        **tensor("mtp_hidden_norm", _PREDICTION + "hidden_layernorm.weight"),
        # It reads the hidden state first and then the embedding, Megatron-LM the embedding first.
        **tensor("mtp_proj", _PREDICTION + "input_proj.weight", swapped=True),
        **tensor("mtp_final_norm", _PREDICTION + "final_layernorm.weight"),
    },
    rules=(*QWEN2.rules, Row("mtp_num_layers", "num_nextn_predict_layers", 0), Restated("attention_bias", True)),
    mtp_layer=_PREDICTION,
)
