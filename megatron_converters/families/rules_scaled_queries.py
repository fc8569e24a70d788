"""Rule for Ministral 3's rotary embeddings, whose table also scales queries (transformers 5.23, models/ministral3)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from ..basics.errors import ConversionError
from ..model.checks import number
from ..model.spec import ModelSpec
from .rules import Config
from .rules_attention import YARN, Rope

_BETA = "llama_4_scaling_beta"


@dataclass(frozen=True)
class ScaledQueries(Rope):
    """YaRN, and queries beyond the original positions that are scaled by `llama_4_scaling_beta`. The class needs both."""

    scalings: tuple[str, ...] = (YARN,)

    def read(self, config: Config) -> dict[str, Any]:
        beta, plain = self._apart(config)
        found = super().read(plain)
        if found["rope_scaling"] is None or beta is None:
            raise ConversionError(
                f"config.json has rotary embeddings without YaRN or {_BETA}, both of which the architecture's class needs"
            )
        scaling = dataclasses.replace(found["rope_scaling"], llama_4_scaling_beta=number(beta, _BETA))
        return {**found, "rope_scaling": scaling}

    def unread(self, config: Config) -> list[str]:
        """Fields of the table that the class does not know."""
        return super().unread(self._apart(config)[1])

    def write(self, spec: ModelSpec) -> dict[str, Any]:
        written, scaling = super().write(spec), spec.values["rope_scaling"]
        beta = {} if scaling is None else {_BETA: scaling.llama_4_scaling_beta}
        return {**written, "rope_scaling": {**written["rope_scaling"], **beta}}

    def _apart(self, config: Config) -> tuple[Any, Config]:
        """Scale of queries, and the configuration without it and without positions that the table repeats."""
        table = self._given(config)
        if not isinstance(table, dict):
            return None, config
        plain = {key: value for key, value in table.items() if key not in (_BETA, "max_position_embeddings")}
        return table.get(_BETA), {**config, "rope_scaling": None, "rope_parameters": plain}
