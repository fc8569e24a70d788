"""The families that can be converted, one table each. A new family is one file and one line here."""

from __future__ import annotations

from .llama import FAMILY as LLAMA
from .mistral import FAMILY as MISTRAL
from .mixtures import MIXTRAL, OLMOE, QWEN2_MOE, QWEN3_MOE
from .qwen import QWEN2, QWEN3
from .table import Family

#: In matching order: a checkpoint that names no family gets the first one that can express it.
FAMILIES: dict[str, Family] = {
    family.name: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, MIXTRAL, QWEN2_MOE, QWEN3_MOE, OLMOE)
}
