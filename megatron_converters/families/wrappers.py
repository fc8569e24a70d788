"""Wrappers: classes whose text part is the model of another family, with a tower for images and a projector beside it.

A wrapper is a row: how names of its text part begin, what lies beside that, and where config.json has its text part. The text part
is a model of the family that config.json names for it. Sources: transformers 5.23, models/<model_type> and conversion_mapping.py,
and config.json of published models.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..basics.errors import ConversionError
from ..model.layouts import SAME
from ..model.tables import Entry
from .entries import tensor
from .llama import MLP
from .table import Family, Proof

#: Prefix of the base model's tensors in tables of families that can be the text part of a wrapper.
BASE = "model."
_EMBEDDINGS = "word_embeddings"


@dataclass(frozen=True)
class Spelling:
    """How files name the tensors: `text` stands for "model." of the family's table, `head` comes before its "lm_head.".

    Names of what lies `beside` the text part begin so.
    """

    text: str
    head: str
    beside: tuple[str, ...]

    def name(self, name: str) -> str:
        """Name in the files of a name in the family's table."""
        if name.startswith(BASE):
            return self.text + name.removeprefix(BASE)
        return self.head + name


@dataclass(frozen=True)
class Wrapper:
    """Class of transformers around a text part; the first of its `spellings` is that of published files.

    config.json has the text part as `text_config`, or, where it is `flat`, in older files at the top. `text_type` is its
    model_type, and with `any_text` only where config.json says none; `ties` says whether transformers ties its head where
    config.json does not. `stacks` are forms in which files have experts besides the family's, by name.
    """

    model_type: str
    architecture: str
    spellings: tuple[Spelling, ...]
    text_type: str
    models: str
    covers: str
    proof: Proof = Proof.LOGITS
    text_families: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    any_text: bool = False
    flat: bool = False
    ties: bool = False
    stacks: Mapping[str, Mapping[str, Entry]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name in lists of families."""
        return self.model_type

    def table(self, family: Family, spelling: Spelling, stacks: str = "") -> Family:
        """Table of the text part in files of this spelling, with experts in one of the `stacks` if it is named."""
        entries = {**family.tensors, **(self.stacks[stacks] if stacks else {})}
        return dataclasses.replace(
            family,
            tensors={slot: _respelt(entry, spelling) for slot, entry in entries.items()},
            layer=spelling.name(family.layer),
            mtp_layer=spelling.name(family.mtp_layer) if family.mtp_layer else "",
            replicas={slot: spelling.name(name) for slot, name in family.replicas.items()},
            renamed={},
        )


def _respelt(entry: Entry, spelling: Spelling) -> Entry:
    fused = None if entry.fused is None else spelling.name(entry.fused)
    return dataclasses.replace(entry, names=tuple(map(spelling.name, entry.names)), fused=fused)


def spelling_of(wrapper: Wrapper, family: Family, names: Collection[str]) -> Spelling:
    """Spelling of these names of a folder, by those of the embeddings."""
    embeddings = {spelling.name(family.tensors[_EMBEDDINGS].names[0]): spelling for spelling in wrapper.spellings}
    found = [spelling for name, spelling in embeddings.items() if name in names]
    if len(found) != 1:
        there = "both are there" if found else "none is there"
        raise ConversionError(
            f"the embeddings of the text part of {wrapper.architecture} are called {' or '.join(embeddings)}, of which {there}"
        )
    return found[0]


_LLAVA = (
    Spelling("language_model.model.", "language_model.", ("vision_tower.", "multi_modal_projector.", "image_newline")),
    Spelling(
        "model.language_model.", "", ("model.vision_tower.", "model.multi_modal_projector.", "model.image_newline")
    ),
)
_KIMI = (
    Spelling("language_model.model.", "language_model.", ("vision_tower.", "mm_projector.")),
    Spelling("model.language_model.", "", ("model.vision_tower.", "model.mm_projector.")),
)
_QWEN = Spelling("model.language_model.", "", ("model.visual.",))
_OLDER_QWEN = (Spelling("model.", "", ("visual.",)), _QWEN)
#: Experts of Qwen3-VL: both matrices of all experts under the same names, as transformers 5 saves them, and as they are published.
_QWEN_STACKS = {
    kind: {
        **tensor("expert_fc1", MLP + "experts.gate_up_proj", layout=SAME, stacked=True, transposed=transposed),
        **tensor("expert_fc2", MLP + "experts.down_proj", layout=SAME, stacked=True, transposed=transposed),
    }
    for kind, transposed in {"stacked": False, "transposed": True}.items()
}
_ANY_TEXT = "text part of Llama, Mistral, Qwen2 or Qwen3, whichever config.json names"

WRAPPERS = (
    Wrapper(
        "qwen2_vl",
        "Qwen2VLForConditionalGeneration",
        _OLDER_QWEN,
        "qwen2_vl_text",
        models="Qwen2-VL",
        covers="text part (Qwen2)",
        text_families=("qwen2",),
        flat=True,
    ),
    Wrapper(
        "qwen2_5_vl",
        "Qwen2_5_VLForConditionalGeneration",
        _OLDER_QWEN,
        "qwen2_5_vl_text",
        models="Qwen2.5-VL",
        covers="text part (Qwen2)",
        text_families=("qwen2",),
        flat=True,
    ),
    Wrapper(
        "qwen3_vl",
        "Qwen3VLForConditionalGeneration",
        (_QWEN,),
        "qwen3_vl_text",
        models="Qwen3-VL",
        covers="text part (Qwen3)",
        text_families=("qwen3",),
    ),
    Wrapper(
        "qwen3_vl_moe",
        "Qwen3VLMoeForConditionalGeneration",
        (_QWEN,),
        "qwen3_vl_moe_text",
        models="Qwen3-VL-MoE",
        covers="text part (Qwen3-MoE), experts in both orientations",
        text_families=("qwen3_moe",),
        stacks=_QWEN_STACKS,
    ),
    Wrapper(
        "qwen3_5",
        "Qwen3_5ForConditionalGeneration",
        (_QWEN,),
        "qwen3_5_text",
        models="Qwen3.5, 3.6",
        covers="text part (Qwen3.5), multi-token prediction",
        text_families=("qwen3_5_text",),
    ),
    Wrapper(
        "qwen3_5_moe",
        "Qwen3_5MoeForConditionalGeneration",
        (_QWEN,),
        "qwen3_5_moe_text",
        models="Qwen3.5-MoE, 3.6-MoE",
        covers="text part (Qwen3.5-MoE), experts in one tensor or in many, multi-token prediction",
        text_families=("qwen3_5_moe_text",),
    ),
    Wrapper(
        "llava",
        "LlavaForConditionalGeneration",
        _LLAVA,
        "llama",
        models="LLaVA-1.5, Pixtral (HF)",
        covers=_ANY_TEXT,
        any_text=True,
        text_families=("llama", "mistral", "qwen2", "qwen3"),
    ),
    Wrapper(
        "llava_next",
        "LlavaNextForConditionalGeneration",
        _LLAVA,
        "llama",
        models="LLaVA-1.6 (NeXT)",
        covers=_ANY_TEXT,
        any_text=True,
        text_families=("llama", "mistral", "qwen2", "qwen3"),
    ),
    Wrapper(
        "llava_onevision",
        "LlavaOnevisionForConditionalGeneration",
        _LLAVA,
        "qwen2",
        models="LLaVA-OneVision",
        covers="text part (Qwen2)",
        any_text=True,
        text_families=("qwen2",),
    ),
    Wrapper(
        "internvl",
        "InternVLForConditionalGeneration",
        _LLAVA,
        "qwen2",
        models="InternVL (HF)",
        covers=_ANY_TEXT,
        any_text=True,
        text_families=("qwen2", "llama", "qwen3"),
        ties=True,
    ),
    Wrapper(
        "mistral3",
        "Mistral3ForConditionalGeneration",
        _LLAVA,
        "mistral",
        models="Mistral-Small-3.1, 3.2, Ministral 3",
        covers="text part (Mistral, Ministral 3)",
        any_text=True,
        text_families=("mistral", "ministral3"),
        ties=True,
    ),
    Wrapper(
        "gemma3",
        "Gemma3ForConditionalGeneration",
        _LLAVA,
        "gemma3_text",
        models="Gemma 3 (4B to 27B)",
        covers="text part (Gemma 3), as far as that is converted",
        text_families=("gemma3_text",),
        ties=True,
    ),
    Wrapper(
        "kimi_k25",
        "Kimi_K25ForConditionalGeneration",
        _KIMI,
        "deepseek_v3",
        models="Kimi-K2.5, K2.6",
        covers="text part (Kimi-K2), INT4 of its experts",
        any_text=True,
        text_families=("deepseek_v3",),
        ties=True,
    ),
)


def wrapper_of(config: Mapping[str, Any]) -> Wrapper | None:
    """Wrapper that config.json names by model_type or, without it, by its class; None for any other model."""
    model_type, architectures = config.get("model_type"), config.get("architectures") or []
    for wrapper in WRAPPERS:
        if model_type in (wrapper.model_type, *wrapper.aliases):
            return wrapper
        if model_type is None and wrapper.architecture in architectures:
            return wrapper
    return None
