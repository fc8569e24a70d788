"""Options of everything that reads a model, and the source that they mean."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ...assets import capacity_bins
from ...assets.origin import Origin
from ...assets.training_args import margs_from_json
from ...basics.errors import UsageError
from ...basics.json_files import read_json
from ...conversion.endpoint import Source
from ...formats.huggingface.source import HFSource
from ...formats.megatron.opening import open_megatron
from ...formats.megatron.reading import MegatronReadOptions
from ...formats.meta.source import MetaSource
from .values import IMPLS, add_argument, add_dtype_arguments, add_margs_argument, folder, positive

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


def add_hf_source_arguments(parser: Any) -> None:
    """Options of loaders that read a Hugging Face folder."""
    add_dtype_arguments(parser)
    unneeded = "Accepted for compatibility; config.json says it."
    add_argument(
        parser,
        "--model-size",
        metavar="NAME",
        default=None,
        help=f"{unneeded} A name of another architecture is an error.",
    )
    add_argument(
        parser, "--checkpoint-type", default="hf", choices=["meta", "hf"], help="Type of the source; hf by default."
    )
    add_argument(
        parser,
        "--true-vocab-size",
        metavar="N",
        type=positive,
        default=None,
        help=f"{unneeded} Another value is an error.",
    )
    add_argument(parser, "--vocab-file", metavar="FILE", default=None, help=unneeded)
    add_argument(
        parser,
        "--tokenizer-model",
        metavar="PATH",
        default=None,
        help="Tokenizer to record in args; by default the folder itself.",
    )
    add_argument(
        parser,
        "--make-vocab-size-divisible-by",
        metavar="N",
        type=positive,
        default=None,
        help="Vocabulary padding; 128 by default.",
    )
    add_argument(
        parser,
        "--loader-transformer-impl",
        default="local",
        choices=IMPLS,
        help="Accepted for compatibility; not needed.",
    )
    add_margs_argument(parser)
    add_argument(
        parser, "--untie", action="store_true", help="Keep a stored lm_head apart although config.json ties it."
    )
    add_argument(
        parser,
        "--ignore-config-fields",
        metavar="NAMES",
        default="",
        help="Comma-separated unknown config.json fields to ignore.",
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
    add_argument(
        parser,
        "--ckpt-dir-name",
        metavar="NAME",
        default=None,
        help="Folder to read (iter_0000008) instead of the latest.",
    )
    add_argument(
        parser,
        "--hf-config",
        metavar="DIR",
        default=None,
        help="Reference model folder: configuration and tokenizer are taken from it.",
    )
    add_argument(
        parser,
        "--true-vocab-size",
        metavar="N",
        type=positive,
        default=None,
        help="Vocabulary without padding, where args lack it.",
    )


def add_core_loader_arguments(parser: Any) -> None:
    """Options of the loader plugin that reads a Megatron-LM checkpoint."""
    add_dtype_arguments(parser)
    add_margs_argument(parser)
    add_checkpoint_arguments(parser)
    add_argument(
        parser,
        "--vocab-file",
        metavar="FILE",
        default=None,
        help="JSON vocabulary; its length is the vocabulary without padding.",
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
        choices=IMPLS,
        help="Accepted for compatibility; the names in the checkpoint say it.",
    )
    add_argument(
        parser,
        "--make-vocab-size-divisible-by",
        metavar="N",
        type=positive,
        default=None,
        help="Vocabulary padding of the output.",
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
