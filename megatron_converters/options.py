"""Option groups that several entry points share, and their meaning."""

from __future__ import annotations

import argparse
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from . import capacity_bins
from .endpoints.base import Origin, Source
from .endpoints.hf_source import HFSource
from .endpoints.hf_target import FUSED, SEPARATE, HFOptions, HFTarget
from .endpoints.megatron_checkpoint import CheckpointTarget, MegatronOptions
from .endpoints.megatron_common import MegatronReadOptions
from .endpoints.megatron_target import MegatronTarget
from .endpoints.meta_source import MetaSource
from .endpoints.open_megatron import open_megatron
from .endpoints.torch_dist_target import TorchDistTarget
from .errors import UsageError
from .hf_config import read_json
from .margs_json import margs_from_json
from .megatron_names import EXPERTS
from .pipeline import PipelineSplit
from .plugins import add_argument, folder

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
#: Families that a stock --model-size name may mean, by how it begins.
_MODEL_SIZES = {
    "mixtral": "mixtral",
    "llama": "llama",
    "yi": "llama",
    "mistral": "mistral",
    "qwen2.5": "qwen2",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
}
_IMPLS = ("local", "transformer_engine")


def byte_size(text: str) -> int:
    """Bytes in "5GB", "500MB", "2GiB" or plain digits, as huggingface_hub counts (decimal unless "i")."""
    match = re.fullmatch(r"(\d+)\s*([KMGT]?I?)B?", text.strip().upper())
    if match is None or match[2] not in _UNITS or int(match[1]) == 0:
        raise UsageError(f"{text!r} is no size; write for example 5GB, 500MB or 2GiB")
    return int(match[1]) * _UNITS[match[2]]


def positive(text: str) -> int:
    """A whole number above 0, as an argument."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def add_dtype_arguments(parser: Any) -> None:
    """--bf16 and --fp16."""
    add_argument(parser, "--bf16", action="store_true", help="Write bfloat16; without it the source's dtype is kept.")
    add_argument(parser, "--fp16", action="store_true", help="Write float16; without it the source's dtype is kept.")


def _add_margs_argument(parser: Any) -> None:
    add_argument(
        parser,
        "--source-margs-file",
        default=None,
        help="source_megatron_args.json with training arguments to take over.",
    )


def add_hf_source_arguments(parser: Any) -> None:
    """Options of loaders that read a Hugging Face folder."""
    add_dtype_arguments(parser)
    unneeded = "Accepted for compatibility; config.json says it."
    add_argument(parser, "--model-size", default=None, help=f"{unneeded} A name of another architecture is an error.")
    add_argument(
        parser, "--checkpoint-type", default="hf", choices=["meta", "hf"], help="Type of the source; hf by default."
    )
    add_argument(
        parser, "--true-vocab-size", type=positive, default=None, help=f"{unneeded} Another value is an error."
    )
    add_argument(parser, "--vocab-file", default=None, help=unneeded)
    add_argument(
        parser, "--tokenizer-model", default=None, help="Tokenizer to record in args; by default the folder itself."
    )
    add_argument(
        parser,
        "--make-vocab-size-divisible-by",
        type=positive,
        default=None,
        help="Vocabulary padding; 128 by default.",
    )
    add_argument(
        parser,
        "--loader-transformer-impl",
        default="local",
        choices=_IMPLS,
        help="Accepted for compatibility; not needed.",
    )
    _add_margs_argument(parser)
    add_argument(
        parser, "--untie", action="store_true", help="Keep a stored lm_head apart although config.json ties it."
    )
    add_argument(
        parser, "--ignore-config-fields", default="", help="Comma-separated unknown config.json fields to ignore."
    )


def open_hf_source(args: argparse.Namespace) -> HFSource | MetaSource:
    """The Hugging Face or Meta folder of --load-dir, checked against the options that repeat what it says."""
    source: HFSource | MetaSource
    if args.checkpoint_type == "meta":
        source = MetaSource(folder(args.load_dir))
    else:
        ignored = [name for name in args.ignore_config_fields.split(",") if name]
        source = HFSource(folder(args.load_dir), ignored_config=ignored, untie=args.untie)
    spec = source.spec
    if args.true_vocab_size is not None and args.true_vocab_size != spec.vocab_size:
        raise UsageError(
            f"--true-vocab-size {args.true_vocab_size} disagrees with vocab_size {spec.vocab_size} of config.json"
        )
    meant = _model_size_family(args.model_size)
    if meant is not None and meant != spec.family:
        raise UsageError(
            f"--model-size {args.model_size} means a {meant} model, but config.json describes a {spec.family} model"
        )
    if args.source_margs_file is not None:
        source.origin.margs = margs_from_json(Path(args.source_margs_file))
    if args.tokenizer_model is not None:
        source.origin.tokenizer = args.tokenizer_model
    _add_bins(source.origin, args)
    return source


def _add_bins(origin: Origin, args: argparse.Namespace) -> None:
    """The capacity bins beside the model, if the saver's --load-capacity-bins asks for them."""
    path = Path(args.load_dir) / capacity_bins.FILE
    if getattr(args, "load_capacity_bins", False):
        origin.capacity_bins = capacity_bins.read(path)
    elif path.exists():
        origin.notes.append(
            f"{path} is left out; a saver of Megatron-LM checkpoints takes it with --load-capacity-bins"
        )


def _model_size_family(name: str | None) -> str | None:
    if name is None:
        return None
    for prefix, family in _MODEL_SIZES.items():
        if name.lower().startswith(prefix):
            return family
    raise UsageError(f"--model-size {name} is no known name; leave it out, config.json says what the model is")


def add_checkpoint_arguments(parser: Any) -> None:
    """Options of everything that reads a Megatron-LM checkpoint."""
    add_argument(parser, "--ckpt-dir-name", default=None, help="Folder to read (iter_0000008) instead of the latest.")
    add_argument(
        parser,
        "--hf-config",
        default=None,
        help="Reference model folder: configuration and tokenizer are taken from it.",
    )
    add_argument(
        parser, "--true-vocab-size", type=positive, default=None, help="Vocabulary without padding, where args lack it."
    )


def add_core_loader_arguments(parser: Any) -> None:
    """Options of the loader plugin that reads a Megatron-LM checkpoint."""
    add_dtype_arguments(parser)
    _add_margs_argument(parser)
    add_checkpoint_arguments(parser)
    add_argument(
        parser, "--vocab-file", default=None, help="JSON vocabulary; its length is the vocabulary without padding."
    )
    add_argument(
        parser,
        "--position-embedding-type",
        default=None,
        choices=["learned_absolute", "rope"],
        help="Accepted for compatibility; args say it, and another value is an error.",
    )
    add_argument(
        parser,
        "--loader-transformer-impl",
        default="transformer_engine",
        choices=_IMPLS,
        help="Accepted for compatibility; the names in the checkpoint say it.",
    )
    add_argument(
        parser, "--make-vocab-size-divisible-by", type=positive, default=None, help="Vocabulary padding of the output."
    )


def open_checkpoint(args: argparse.Namespace) -> Source:
    """The checkpoint of --load-dir, of whatever format."""
    reference = folder(args.hf_config) if args.hf_config is not None else None
    options = MegatronReadOptions(args.ckpt_dir_name, reference, args.true_vocab_size)
    return open_megatron(folder(args.load_dir), options)


def open_core_loader(args: argparse.Namespace) -> Source:
    """The checkpoint of --load-dir, with what the loader's further options say."""
    if args.position_embedding_type == "learned_absolute":
        raise UsageError(
            "--position-embedding-type learned_absolute disagrees with the checkpoint: only rope is supported"
        )
    if args.vocab_file is not None:
        vocab = len(read_json(Path(args.vocab_file)))
        if args.true_vocab_size not in (None, vocab):
            raise UsageError(
                f"--true-vocab-size {args.true_vocab_size} disagrees with the {vocab} tokens of --vocab-file"
            )
        args.true_vocab_size = vocab
    source = open_checkpoint(args)
    if args.source_margs_file is not None:
        source.origin.margs = margs_from_json(Path(args.source_margs_file))
    return source


def add_megatron_target_arguments(parser: Any) -> None:
    """Options of savers that write a Megatron-LM checkpoint."""
    default = "by default the source's, or 1"
    add_argument(
        parser,
        "--target-tensor-parallel-size",
        "--tp",
        type=positive,
        default=None,
        help=f"Tensor-parallel size; {default}.",
    )
    add_argument(
        parser,
        "--target-pipeline-parallel-size",
        "--pp",
        type=positive,
        default=None,
        help=f"Pipeline-parallel size; {default}.",
    )
    add_argument(
        parser,
        "--target-expert-parallel-size",
        "--target-expert-paralell-size",  # the spelling of Habana's documentation
        "--ep",
        type=positive,
        default=None,
        help=f"Expert-parallel size; {default}.",
    )
    add_argument(
        parser,
        "--target-expert-tensor-parallel-size",
        "--etp",
        type=positive,
        default=None,
        help="Tensor-parallel size of experts; by default the source's if it has one of its own that goes with the target's "
        "sizes, else that of the rest.",
    )
    add_expert_layout_argument(parser, tuple(EXPERTS))
    add_argument(
        parser,
        "--saver-transformer-impl",
        default="transformer_engine",
        choices=_IMPLS,
        help="Whose parameter names to write.",
    )
    add_argument(
        parser, "--decoder-first-pipeline-num-layers", type=positive, default=None, help="Layers on the first stage."
    )
    add_argument(
        parser, "--decoder-last-pipeline-num-layers", type=positive, default=None, help="Layers on the last stage."
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
        type=positive,
        default=None,
        help=virtual.format("layers each has"),
    )
    add_argument(
        parser,
        "--target-num-virtual-stages-per-pipeline-rank",
        type=positive,
        default=None,
        help=virtual.format("they are"),
    )
    add_argument(
        parser,
        "--pipeline-model-parallel-layout",
        default=None,
        help="Every stage spelled out as in Megatron-LM, such as 'Et*3|(tt|)*6,L'.",
    )
    add_argument(
        parser,
        "--ckpt-format",
        choices=sorted(_CHECKPOINTS),
        default="torch",
        help="Format of the checkpoint: a file for each rank (torch, the default), or chunks that any sizes load (torch_dist).",
    )
    add_argument(parser, "--release", action="store_true", help="Write a release directory instead of iter_0000001.")
    add_argument(
        parser,
        "--allow-inexpressible",
        action="store_true",
        help="Convert although Megatron-LM's arguments cannot express all of the model; warns what it will not compute.",
    )
    add_argument(
        parser,
        "--load-capacity-bins",
        action="store_true",
        help="Restore Habana's capacity bins, from capacity_bins.pt of a Hugging Face folder; for the same parallel sizes alone.",
    )


#: How experts can be stored, in the words of help; the first of each format is its default.
_EXPERT_LAYOUTS = {
    "grouped": "grouped weights (with transformer_engine)",
    "sequential": "one module for each expert (with local)",
    "stacked": "weight1 and weight2 of older Megatron-LM",
    "dynamic": "Habana's",
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


_CHECKPOINTS: dict[str, type[CheckpointTarget]] = {kind.format: kind for kind in (MegatronTarget, TorchDistTarget)}


def open_megatron_target(args: argparse.Namespace) -> CheckpointTarget:
    """The checkpoint to write in --save-dir."""
    split = PipelineSplit(
        args.decoder_first_pipeline_num_layers,
        args.decoder_last_pipeline_num_layers,
        args.account_for_embedding_in_pipeline_split,
        args.account_for_loss_in_pipeline_split,
        args.target_num_virtual_stages_per_pipeline_rank,
        args.target_num_layers_per_virtual_pipeline_stage,
        args.pipeline_model_parallel_layout,
    )
    options = MegatronOptions(
        tp=args.target_tensor_parallel_size,
        pp=args.target_pipeline_parallel_size,
        ep=args.target_expert_parallel_size,
        etp=args.target_expert_tensor_parallel_size,
        expert_layout=_expert_layout(args, EXPERTS, "a Megatron-LM checkpoint"),
        split=split,
        impl=args.saver_transformer_impl,
        divisor=getattr(args, "make_vocab_size_divisible_by", None),
        release=args.release,
        overwrite=args.overwrite,
        allow_inexpressible=args.allow_inexpressible,
        load_capacity_bins=args.load_capacity_bins,
        tokenizer=getattr(args, "tokenizer_model", None),
    )
    return _CHECKPOINTS[args.ckpt_format](Path(args.save_dir), options)


def add_hf_target_arguments(parser: Any) -> None:
    """Options of entry points that write a Hugging Face folder."""
    add_argument(parser, "--max-shard-size", default="5GB", help="Largest file, such as 5GB or 500MB.")
    add_argument(
        parser, "--tokenizer-model", default=None, help="Tokenizer to write; by default the one that args name."
    )
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
        "--save-capacity-bins",
        action="store_true",
        help="Keep the capacity bins of Habana's routers in capacity_bins.pt.",
    )


def open_hf_target(args: argparse.Namespace) -> HFTarget:
    """The folder to write in --save-dir."""
    options = HFOptions(
        max_shard_size=byte_size(str(args.max_shard_size)),
        overwrite=args.overwrite,
        tokenizer=args.tokenizer_model,
        instruct=args.instruct,
        source_model_type=args.source_model_type,
        expert_layout=_expert_layout(args, (SEPARATE, FUSED), "a Hugging Face folder") or SEPARATE,
        save_capacity_bins=args.save_capacity_bins,
    )
    return HFTarget(Path(args.save_dir), options)
