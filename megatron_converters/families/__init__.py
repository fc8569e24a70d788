"""The families that can be converted, one table each. A new family is one file and one line here."""

from __future__ import annotations

from .deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from .glm import GLM, GLM4_MOE
from .gpt2 import FAMILY as GPT2
from .granite import GRANITE
from .llama import FAMILY as LLAMA
from .mistral import FAMILY as MISTRAL
from .mixtures import MIXTRAL, OLMOE, QWEN2_MOE, QWEN3_MOE
from .phi import PHI3
from .qwen import QWEN2, QWEN3
from .qwen3_next import QWEN3_NEXT
from .starcoder import STARCODER2
from .table import Family

#: In matching order: a checkpoint that names no family gets the first one that can express it.
FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        *(LLAMA, MISTRAL, QWEN2, QWEN3, MIXTRAL, QWEN2_MOE, QWEN3_MOE, OLMOE),
        *(GPT2, STARCODER2, PHI3, GLM, GRANITE, GLM4_MOE, DEEPSEEK_V2, DEEPSEEK_V3, QWEN3_NEXT),
    )
}
