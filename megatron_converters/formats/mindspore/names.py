"""Names of slots in weights of MindSpore Transformers: of its training graphs on parallel_core, and of the older Llama classes.

Source: mindformers 1.6.0 to 2.1.0, parallel_core/training_graph (unfused norms, linears as [out, in]) and models/llama. Names of
the first are without a prefix; some models put `model.` before them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...model.layers import LAYER_NORM
from ...model.layouts import ALTERNATING, GATED, GROUPED_QKV, SAME, Layout, joined
from ...model.slots import DECODER, Ref, Scope
from ...model.spec import ModelSpec
from ...model.tables import Entry
from .options import CONTIGUOUS, GROUPED, INTERLEAVED

#: Layouts by the order of rows that they have.
MLP_LAYOUTS: Mapping[str, Layout] = {INTERLEAVED: ALTERNATING, CONTIGUOUS: SAME}
QKV_LAYOUTS: Mapping[str, Layout] = {GROUPED: SAME, CONTIGUOUS: joined(GROUPED_QKV)}
#: Prefix that some models put before all names.
PREFIX = "model."
_LAYER = "decoder.layers.{layer}."
_MTP = "mtp.layers.{layer}."
_ATTENTION = _LAYER + "self_attention."
_MLP = _LAYER + "mlp."
_GATED_SLOTS = ("fc1", "fc1_bias", "shared_fc1")
_QKV_SLOTS = ("qkv", "qkv_bias")
#: Ends of the names of norms: in general, and where they are LayerNorms.
_NORM_ENDS, _LAYER_NORM_ENDS = (".weight", ".bias"), (".gamma", ".beta")


def _both(slot: str, module: str) -> dict[str, str]:
    return {slot: f"{module}.weight", f"{slot}_bias": f"{module}.bias"}


#: Name of each slot whose tensor is its own.
MCORE: Mapping[str, str] = {
    "word_embeddings": "embedding.word_embeddings.weight",
    "position_embeddings": "embedding.position_embeddings.weight",
    **_both("input_norm", _LAYER + "input_layernorm"),
    **_both("qkv", _ATTENTION + "linear_qkv"),
    **_both("q_norm", _ATTENTION + "q_layernorm"),
    **_both("k_norm", _ATTENTION + "k_layernorm"),
    "q_down": _ATTENTION + "linear_q_down_proj.weight",
    "q_latent_norm": _ATTENTION + "q_layernorm.weight",
    "q_up": _ATTENTION + "linear_q_up_proj.weight",
    "q_whole": _ATTENTION + "linear_q_proj.weight",
    "kv_down": _ATTENTION + "linear_kv_down_proj.weight",
    "kv_latent_norm": _ATTENTION + "kv_layernorm.weight",
    "kv_up": _ATTENTION + "linear_kv_up_proj.weight",
    **_both("proj", _ATTENTION + "linear_proj"),
    **_both("mlp_norm", _LAYER + "pre_mlp_layernorm"),
    **_both("fc1", _MLP + "linear_fc1"),
    **_both("fc2", _MLP + "linear_fc2"),
    "router": _MLP + "router.weight",
    "expert_bias": _MLP + "router.expert_bias",
    "shared_fc1": _MLP + "shared_experts.linear_fc1.weight",
    "shared_fc2": _MLP + "shared_experts.linear_fc2.weight",
    "shared_gate": _MLP + "shared_experts.shared_experts_gate.weight",
    **_both("mtp_embedding_norm", _MTP + "enorm"),
    **_both("mtp_hidden_norm", _MTP + "hnorm"),
    "mtp_proj": _MTP + "eh_proj.weight",
    **_both("mtp_final_norm", _MTP + "final_layernorm"),
    **_both("final_norm", "decoder.final_layernorm"),
    "output_layer": "output_layer.weight",
}
#: Tensors of all experts of a layer: their transposed matrices one after the other. The first is [experts · hidden, 2 · size],
#: gate before up in every version; the second [experts · size, hidden]. Some versions store the same bytes in other shapes.
EXPERTS: Mapping[str, str] = {"expert_fc1": _MLP + "experts.weight1", "expert_fc2": _MLP + "experts.weight2"}
#: Where the layer of multi-token prediction holds its decoder layer.
_MTP_LAYER = _MTP + "transformer_layer."

_OLD_LAYER = "model.layers.{layer}."
_OLD_ATTENTION, _OLD_MLP = _OLD_LAYER + "attention.", _OLD_LAYER + "feed_forward."


def _old(kind: str) -> dict[str, Entry]:
    """Entries of linears' weights or biases; each is there as separate tensors, or as one (`fused`, in an order of its own)."""
    end = "" if kind == "weight" else "_bias"
    return {
        "qkv" + end: Entry(
            GROUPED_QKV, tuple(f"{_OLD_ATTENTION}w{part}.{kind}" for part in "qkv"), f"{_OLD_ATTENTION}w_qkv.{kind}"
        ),
        "proj" + end: Entry(SAME, (f"{_OLD_ATTENTION}wo.{kind}",)),
        "fc1" + end: Entry(GATED, (f"{_OLD_MLP}w1.{kind}", f"{_OLD_MLP}w3.{kind}"), f"{_OLD_MLP}w_gate_hidden.{kind}"),
        "fc2" + end: Entry(SAME, (f"{_OLD_MLP}w2.{kind}",)),
    }


#: Entries of the older Llama classes.
LEGACY: Mapping[str, Entry] = {
    "word_embeddings": Entry(SAME, ("model.tok_embeddings.embedding_weight",)),
    "input_norm": Entry(SAME, (_OLD_LAYER + "attention_norm.weight",)),
    **_old("weight"),
    **_old("bias"),
    "mlp_norm": Entry(SAME, (_OLD_LAYER + "ffn_norm.weight",)),
    "final_norm": Entry(SAME, ("model.norm_out.weight",)),
    "output_layer": Entry(SAME, ("lm_head.weight",)),
}


@dataclass(frozen=True)
class Dialect:
    """Names and layouts of one set of weights: the orders of rows of gated MLPs and of attention, and what is before all names."""

    spec: ModelSpec
    mlp_layout: str = INTERLEAVED
    qkv_layout: str = GROUPED
    prefix: str = ""

    def layout(self, slot: str) -> Layout:
        """Layout of a slot that one tensor holds."""
        if slot in _GATED_SLOTS:
            return MLP_LAYOUTS[self.mlp_layout]
        return QKV_LAYOUTS[self.qkv_layout] if slot in _QKV_SLOTS else SAME

    def name(self, ref: Ref) -> str:
        """Name of a ref's tensor; that of an expert holds all experts of its layer."""
        slot = ref.slot.name
        template = EXPERTS[slot] if slot in EXPERTS else MCORE[slot]
        if ref.stack != DECODER and ref.slot.scope is Scope.LAYER:
            template = template.replace(_LAYER, _MTP_LAYER)
        if self.spec.norm.normalization == LAYER_NORM and "norm" in slot:
            template = _with_end(template)
        return self.prefix + template.format(layer=ref.layer)


def _with_end(name: str) -> str:
    """Name of a LayerNorm's weight or bias."""
    for usual, end in zip(_NORM_ENDS, _LAYER_NORM_ENDS, strict=True):
        if name.endswith(usual):
            return name.removesuffix(usual) + end
    return name
