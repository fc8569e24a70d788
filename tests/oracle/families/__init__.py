"""Tiny models of every family: what the proof of each family runs on, one module a lineage."""

from __future__ import annotations

from collections.abc import Mapping

from . import earlier, layer_norm
from .model import Model

MODELS: Mapping[str, Model] = {
    name: model for lineage in (earlier, layer_norm) for name, model in lineage.MODELS.items()
}
"""Models by name; the first word of a name is mostly the family's."""
