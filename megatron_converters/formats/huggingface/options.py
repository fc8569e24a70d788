"""Options for writing a Hugging Face folder. Declaring them on a command line imports nothing that writes one."""

from __future__ import annotations

from dataclasses import dataclass

#: Expert layouts: separate tensors for each expert, as in published models, or fused ones, as transformers 5 has in memory.
SEPARATE, FUSED = "separate", "fused"


@dataclass(frozen=True)
class HFOptions:
    """Options for writing the folder: `max_shard_size` is in bytes, `tokenizer` a path that the user gave."""

    max_shard_size: int = 5 * 10**9
    overwrite: bool = False
    tokenizer: str | None = None
    instruct: bool = False
    source_model_type: str | None = None
    expert_layout: str = SEPARATE
    save_capacity_bins: bool = False
    #: Family to write the model as, such as "llama": with multipliers in its weights, where that has none. None keeps its own.
    as_family: str | None = None
    #: Write the weights alone, as one file of `torch.save`; the path then names that file.
    single_file: bool = False
