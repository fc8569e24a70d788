"""Options of everything that writes a model, and the target that they mean. Help declares them without what writes."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from ...basics.errors import UsageError
from ...formats.huggingface.options import FUSED, SEPARATE, HFOptions
from ...formats.megatron.options import (
    CKPT_FORMATS,
    DYNAMIC,
    EXPERT_LAYOUTS,
    GROUPED,
    MLA_LAYOUTS,
    SEQUENTIAL,
    SINGLE,
    STACKED,
    TORCH,
    MegatronOptions,
)
from ...formats.mindspore.options import MindSporeOptions
from ...sharding.stages import PipelineSplit
from .shared import add_argument, add_shared
from .values import IMPLS, byte_size, positive

if TYPE_CHECKING:
    from ...conversion.endpoint import Target
    from ...formats.writing import TargetOptions


def add_megatron_target_arguments(parser: Any) -> None:
    """Options of savers that write a Megatron-LM checkpoint."""
    default = "by default the source's, or 1"
    add_argument(
        parser,
        "--target-tensor-parallel-size",
        "--tp",
        metavar="N",
        type=positive,
        default=None,
        help=f"Tensor-parallel size; {default}.",
    )
    add_argument(
        parser,
        "--target-pipeline-parallel-size",
        "--pp",
        metavar="N",
        type=positive,
        default=None,
        help=f"Pipeline-parallel size; {default}.",
    )
    add_argument(
        parser,
        "--target-expert-parallel-size",
        "--target-expert-paralell-size",  # the spelling of Habana's documentation
        "--ep",
        metavar="N",
        type=positive,
        default=None,
        help=f"Expert-parallel size; {default}.",
    )
    add_argument(
        parser,
        "--target-expert-tensor-parallel-size",
        "--etp",
        metavar="N",
        type=positive,
        default=None,
        help="Tensor-parallel size of experts; by default the source's if it has one of its own that goes with the target's "
        "sizes, else that of the rest, or 1 where experts have biases.",
    )
    add_argument(
        parser,
        "--pad-vocab-for-tp",
        metavar="N",
        type=positive,
        default=None,
        help="Pad the vocabulary so that runs of tensor-parallel size N can load it, too: Megatron-LM takes its padded size from "
        "the checkpoint, and every tensor-parallel size must divide it.",
    )
    add_expert_layout_argument(parser, EXPERT_LAYOUTS)
    add_argument(
        parser,
        "--mla-layout",
        choices=list(MLA_LAYOUTS),
        default=None,
        help="How the down projections of multi-latent attention are stored: two tensors (separate, the default), or one (fused: "
        "with transformer_engine, 0.19 on, for --mla-down-proj-fusion).",
    )
    add_argument(
        parser,
        "--saver-transformer-impl",
        default=None,
        choices=IMPLS,
        help="Whose parameter names to write; by default those of transformer_engine, in model_pt local.",
    )
    add_argument(
        parser,
        "--decoder-first-pipeline-num-layers",
        metavar="N",
        type=positive,
        default=None,
        help="Layers on the first stage.",
    )
    add_argument(
        parser,
        "--decoder-last-pipeline-num-layers",
        metavar="N",
        type=positive,
        default=None,
        help="Layers on the last stage.",
    )
    counted = "Count the {} as a layer when stages are cut."
    add_argument(
        parser, "--account-for-embedding-in-pipeline-split", action="store_true", help=counted.format("embedding")
    )
    add_argument(parser, "--account-for-loss-in-pipeline-split", action="store_true", help=counted.format("loss"))
    virtual = "Several stages on each rank (interleaved pipeline): how many {}."
    add_argument(
        parser,
        "--target-num-layers-per-virtual-pipeline-stage",
        metavar="N",
        type=positive,
        default=None,
        help=virtual.format("layers each has"),
    )
    add_argument(
        parser,
        "--target-num-virtual-stages-per-pipeline-rank",
        metavar="N",
        type=positive,
        default=None,
        help=virtual.format("they are"),
    )
    add_argument(
        parser,
        "--pipeline-model-parallel-layout",
        metavar="LAYOUT",
        default=None,
        help="Every stage spelled out as in Megatron-LM, such as 'Et*3|(tt|)*6,L'.",
    )
    add_argument(
        parser,
        "--ckpt-format",
        choices=sorted(CKPT_FORMATS),
        default=TORCH,
        help="Format of the checkpoint: a file for each rank (torch, the default), chunks that any sizes load (torch_dist), or the "
        "state dict of the whole model in model.pt, described by metadata.json (model_pt).",
    )
    add_argument(
        parser,
        "--megatron-version",
        metavar="X",
        default=None,
        help="Release of Megatron-LM that is to read the checkpoint, such as 0.16; by default the newest that is known.",
    )
    add_shared(parser, "--mup")
    add_argument(parser, "--release", action="store_true", help="Write a release directory instead of iter_0000001.")
    add_shared(parser, "--allow-inexpressible")
    add_argument(
        parser,
        "--load-capacity-bins",
        action="store_true",
        help="Restore Habana's capacity bins, from capacity_bins.pt of a Hugging Face folder; for the same parallel sizes alone.",
    )


#: How experts can be stored, in the words of help; the first of each format is its default.
_EXPERT_LAYOUTS = {
    GROUPED: "grouped weights (with transformer_engine)",
    SEQUENTIAL: "one module for each expert (with local)",
    SINGLE: "one tensor for all experts of a rank (with transformer_engine, 0.19 on)",
    STACKED: "weight1 and weight2 of older Megatron-LM",
    DYNAMIC: "Habana's",
    SEPARATE: "separate tensors, as published models have",
    FUSED: "3-D tensors, as transformers 5 holds them in memory",
}


def add_expert_layout_argument(parser: Any, layouts: Sequence[str]) -> None:
    """--expert-layout for a target that has these."""
    words = "; ".join(f"{name}: {_EXPERT_LAYOUTS[name]}" for name in layouts)
    add_argument(
        parser, "--expert-layout", choices=list(layouts), default=None, help=f"How experts are stored. {words}."
    )


def _expert_layout(args: argparse.Namespace, layouts: Collection[str], format_name: str) -> str | None:
    layout: str | None = args.expert_layout
    if layout is not None and layout not in layouts:
        raise UsageError(f"--expert-layout {layout}: {format_name} has {', '.join(layouts)}")
    return layout


def megatron_options(args: argparse.Namespace) -> MegatronOptions:
    """How to write a checkpoint."""
    split = PipelineSplit(
        args.decoder_first_pipeline_num_layers,
        args.decoder_last_pipeline_num_layers,
        args.account_for_embedding_in_pipeline_split,
        args.account_for_loss_in_pipeline_split,
        args.target_num_virtual_stages_per_pipeline_rank,
        args.target_num_layers_per_virtual_pipeline_stage,
        args.pipeline_model_parallel_layout,
    )
    return MegatronOptions(
        tp=args.target_tensor_parallel_size,
        pp=args.target_pipeline_parallel_size,
        ep=args.target_expert_parallel_size,
        etp=args.target_expert_tensor_parallel_size,
        expert_layout=_expert_layout(args, EXPERT_LAYOUTS, "a Megatron-LM checkpoint"),
        mla_layout=args.mla_layout,
        split=split,
        impl=args.saver_transformer_impl,
        divisor=getattr(args, "make_vocab_size_divisible_by", None),
        pad_vocab_for_tp=args.pad_vocab_for_tp,
        release=args.release,
        overwrite=args.overwrite,
        allow_inexpressible=args.allow_inexpressible,
        load_capacity_bins=args.load_capacity_bins,
        tokenizer=getattr(args, "tokenizer_model", None),
        ckpt_format=args.ckpt_format,
        megatron_version=args.megatron_version,
        mup=args.mup,
    )


def open_megatron_target(args: argparse.Namespace) -> Target:
    """The checkpoint to write in --save-dir."""
    return _open(args, megatron_options(args))


#: Largest file by default: as huggingface_hub has it, and as mindspore.unified_safetensors does.
_HF_SHARD_SIZE, _MINDSPORE_SHARD_SIZE = "5GB", "3GB"


def _add_shard_size(parser: Any, default: str) -> None:
    add_argument(
        parser,
        "--max-shard-size",
        metavar="SIZE",
        default=default,
        help=f"Largest file, such as 500MB; by default {_HF_SHARD_SIZE}, of MindSpore's weights {_MINDSPORE_SHARD_SIZE}.",
    )


def add_hf_target_arguments(parser: Any) -> None:
    """Options of entry points that write a Hugging Face folder."""
    _add_shard_size(parser, _HF_SHARD_SIZE)
    add_shared(parser, "--tokenizer-model")
    add_argument(
        parser,
        "--instruct",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="The model is instruction-tuned: write its end-of-turn token, chat template and generation_config.json.",
    )
    add_expert_layout_argument(parser, (SEPARATE, FUSED))
    add_argument(
        parser,
        "--source-model-type",
        default=None,
        choices=["llama2", "llama3", "llama3.1", "mixtral"],
        help="Special tokens of a Llama 3 tokenizer rebuilt from a tiktoken file; the architecture comes from args.",
    )
    add_argument(
        parser,
        "--as",
        dest="as_family",
        metavar="FAMILY",
        default=None,
        help="Write the model as another family, such as MiniCPM as llama, which needs no remote code: multipliers that the other "
        "family lacks are folded into weights.",
    )
    add_argument(
        parser,
        "--save-capacity-bins",
        action="store_true",
        help="Keep the capacity bins of Habana's routers in capacity_bins.pt.",
    )


def hf_options(args: argparse.Namespace) -> HFOptions:
    """How to write a Hugging Face folder."""
    return HFOptions(
        max_shard_size=byte_size(str(args.max_shard_size)),
        overwrite=args.overwrite,
        tokenizer=args.tokenizer_model,
        instruct=args.instruct,
        source_model_type=args.source_model_type,
        expert_layout=_expert_layout(args, (SEPARATE, FUSED), "a Hugging Face folder") or SEPARATE,
        save_capacity_bins=args.save_capacity_bins,
        as_family=args.as_family,
    )


def open_hf_target(args: argparse.Namespace) -> Target:
    """The folder to write in --save-dir; with --download, the tokenizer that is named is fetched."""
    return _open_with_tokenizer(args, hf_options(args))


def add_mindspore_target_arguments(parser: Any) -> None:
    """Options of entry points that write weights of MindSpore Transformers."""
    _add_shard_size(parser, _MINDSPORE_SHARD_SIZE)
    add_shared(parser, "--tokenizer-model", "--mf-mlp-layout", "--mf-qkv-layout")
    add_argument(
        parser,
        "--mf-fold",
        action="store_true",
        help="Fold the multipliers of MiniCPM, Granite and the like into weights, which rounds them: MindSpore Transformers has no "
        "settings for them.",
    )


def mindspore_options(args: argparse.Namespace) -> MindSporeOptions:
    """How to write weights of MindSpore Transformers."""
    experts = getattr(args, "expert_layout", None)
    if experts is not None:
        raise UsageError(
            f"--expert-layout {experts}: weights of MindSpore Transformers have one layout of experts; leave it out"
        )
    layouts = {"mlp_layout": args.mf_mlp_layout, "qkv_layout": args.mf_qkv_layout}
    return MindSporeOptions(
        **{name: layout for name, layout in layouts.items() if layout is not None},
        max_shard_size=byte_size(str(args.max_shard_size)),
        overwrite=args.overwrite,
        tokenizer=args.tokenizer_model,
        fold=args.mf_fold,
    )


def open_mindspore_target(args: argparse.Namespace) -> Target:
    """The folder to write in --save-dir; with --download, the tokenizer that is named is fetched."""
    return _open_with_tokenizer(args, mindspore_options(args))


def _open_with_tokenizer(args: argparse.Namespace, options: HFOptions | MindSporeOptions) -> Target:
    if args.download:
        from ...assets.tokenizer import fetch_tokenizer

        fetch_tokenizer(args.tokenizer_model, explicit=True)
    return _open(args, options)


def _open(args: argparse.Namespace, options: TargetOptions) -> Target:
    from ...formats.writing import open_target

    return open_target(args.save_dir, options)
