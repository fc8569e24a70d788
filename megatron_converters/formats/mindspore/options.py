"""Options for writing weights of MindSpore Transformers. Declaring them on a command line imports nothing that writes any."""

from __future__ import annotations

from dataclasses import dataclass

#: Orders of rows of a gated MLP's first linear, and of queries, keys and values. Neither names nor shapes tell them.
INTERLEAVED, CONTIGUOUS, GROUPED = "interleaved", "contiguous", "grouped"


@dataclass(frozen=True)
class MindSporeOptions:
    """Options for writing the folder: `max_shard_size` is in bytes, `tokenizer` a path that the user gave.

    `mlp_layout` is "interleaved" (gate and up row by row, the default of mindformers 1.7 on) or "contiguous"; `qkv_layout` is
    "grouped" (by query group, as in Megatron-LM) or "contiguous" (all queries, all keys, all values). With `fold`, multipliers of
    activations, which MindSpore Transformers lacks, become part of weights.
    """

    mlp_layout: str = INTERLEAVED
    qkv_layout: str = GROUPED
    max_shard_size: int = 3 * 10**9
    overwrite: bool = False
    tokenizer: str | None = None
    fold: bool = False
