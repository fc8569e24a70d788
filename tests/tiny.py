"""Tiny specs and in-memory pieces, for tests of the arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_converters.basics.dtypes import dtype_named
from megatron_converters.conversion.composing import Piece, StoredName
from megatron_converters.formats.queue.source import MemoryTensor
from megatron_converters.model.spec import ModelSpec


def tiny_spec(**fields: Any) -> ModelSpec:
    """Spec with 4 heads in 2 query groups and head dimension 2; `fields` replace its properties."""
    return ModelSpec.of(
        **{
            "family": "llama",
            "num_layers": 2,
            "hidden_size": 8,
            "ffn_hidden_size": 4,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "kv_channels": 2,
            "vocab_size": 5,
            "max_position_embeddings": 64,
            "norm_epsilon": 1e-5,
            "rotary_base": 10000.0,
            "dtype": dtype_named("float32"),
            **fields,
        }
    )


def piece(values: npt.NDArray[Any], rows: Sequence[int], col: int = 0, dtype: str = "int64", where: str = "") -> Piece:
    """Piece of a slot: `values` in the carrier type of `dtype`; `rows` are the slot's rows of its rows."""
    data = MemoryTensor(dtype_named(dtype), values.shape, values)
    return Piece(
        data, np.array(rows, np.int64), col, StoredName("here", where or f"rows {list(rows)} from column {col}")
    )
