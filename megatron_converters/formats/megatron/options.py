"""Options for writing a Megatron-LM checkpoint. Declaring them on a command line imports nothing that writes one."""

from __future__ import annotations

from dataclasses import dataclass

from ...sharding.stages import EVEN, PipelineSplit

#: Where a model's multipliers go, as `--mup` has it: flags of muP, into weights, or to arguments of MindSpeed-LLM.
FLAGS, FOLD, RAW = "flags", "fold", "raw"
#: How experts can be stored; `names.EXPERTS` has their names.
EXPERT_LAYOUTS = SEQUENTIAL, GROUPED, SINGLE, DYNAMIC, STACKED = "sequential", "grouped", "single", "dynamic", "stacked"
#: How the down projections of multi-latent attention can be stored: as two tensors, or as one.
MLA_LAYOUTS = SEPARATE, FUSED = "separate", "fused"
#: Formats of checkpoints (`--ckpt-format`): a file for each rank, chunks that any sizes load, the whole model in one file.
CKPT_FORMATS = TORCH, TORCH_DIST, MODEL_PT = "torch", "torch_dist", "model_pt"


@dataclass(frozen=True)
class MegatronOptions:
    """Options for cutting and naming the checkpoint. Sizes that are None default to the source's, or 1."""

    tp: int | None = None
    pp: int | None = None
    ep: int | None = None
    etp: int | None = None
    split: PipelineSplit = EVEN
    #: Key of `names.EXPERTS`; None selects the layout that current Megatron-LM trains fastest.
    expert_layout: str | None = None
    #: One of `MLA_LAYOUTS`; None selects two tensors.
    mla_layout: str | None = None
    #: Key of `names.DIALECTS`; None selects the format's default.
    impl: str | None = None
    divisor: int | None = None
    #: A further tensor-parallel size that the padded vocabulary is to allow.
    pad_vocab_for_tp: int | None = None
    release: bool = False
    overwrite: bool = False
    allow_inexpressible: bool = False
    load_capacity_bins: bool = False
    tokenizer: str | None = None
    #: "torch" (one file per rank) and "torch_dist" (chunks that runs of any sizes load) are Megatron-LM's formats; "model_pt" is
    #: the state dict of a whole model in one file, with metadata.json.
    ckpt_format: str = TORCH
    #: Release that is to read the checkpoint, such as "0.16"; None takes the newest that is known.
    megatron_version: str | None = None
    #: Where a model's multipliers go: "flags" of muP, "fold" into weights, or "raw", to arguments of MindSpeed-LLM. None takes
    #: flags where the release has them and they suffice.
    mup: str | None = None
