"""Options of the loader `core_mf`, as the documentation of MindSpore Transformers has them, and the source that they mean."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ...basics.errors import UsageError
from ...formats.kinds import MINDSPORE
from ...formats.mindspore.typed import TYPED
from .reading import add_mindspore_arguments, add_typed, read_options
from .shared import add_argument, add_shared
from .values import DTYPES, dtype_word, positive

if TYPE_CHECKING:
    from ...conversion.endpoint import Source

_SOURCE = "source"
_LEARNED, _ROPE = "learned_absolute", "rope"


def add_mindspore_loader_arguments(parser: Any) -> None:
    """Declare the loader's options."""
    add_typed(parser, TYPED, defaults=True)
    add_mindspore_arguments(parser)
    add_shared(
        parser,
        "--true-vocab-size",
        "--hf-config",
        "--ignore-config-fields",
        "--loader-transformer-impl",
        "--fp16",
        "--bf16",
        "--allow-inexpressible",
    )
    add_argument(
        parser,
        "--dtype",
        type=dtype_word,
        choices=[*DTYPES, _SOURCE],
        default=None,
        help="Type to send: bf16 by default, as the original does; source keeps that of the weights.",
    )
    add_argument(
        parser,
        "--padded-vocab-size",
        metavar="N",
        type=positive,
        default=None,
        help="Rows of the embeddings; an error where shapes say another. Originally 128000, which is never assumed here.",
    )
    add_argument(
        parser,
        "--seq-length",
        metavar="N",
        type=positive,
        default=None,
        help="Sequence length; the model's positions, where --max-position-embeddings does not say them. Originally 2048.",
    )
    add_argument(
        parser,
        "--position-embedding-type",
        default=None,
        choices=[_LEARNED, _ROPE],
        help="Kind of positions; the names of weights win. Originally learned_absolute.",
    )
    for name in ("--tokenizer-type", "--vocab-file"):
        add_argument(parser, name, metavar="X", default=None, help="Accepted for compatibility.")
    add_argument(
        parser,
        "--ms2torch-ckpt-path",
        metavar="DIR",
        default=None,
        help="Also write a checkpoint of TP 1 and PP 1 to this folder, which the original does on its way (to ./ms2pt_checkpoint).",
    )


def open_mindspore_loader(args: argparse.Namespace) -> Source:
    """The weights of --load-dir; a checkpoint on the way is written first, if it is asked for."""
    if args.max_position_embeddings is None:
        args.max_position_embeddings = args.seq_length
    args.dtype = _dtype(args)
    source = _open(args)
    _check_padding(source, args.padded_vocab_size)
    learned = args.position_embedding_type == _LEARNED
    if args.position_embedding_type is not None and learned != source.spec.learned_positions:
        source.origin.notes.append("warning: --position-embedding-type contradicts the names of the weights, which win")
    if args.ms2torch_ckpt_path is None:
        source.origin.notes.append("no intermediate checkpoint was made; --ms2torch-ckpt-path DIR writes one")
    else:
        _write_intermediate(args)
        source.origin.notes.append(f"a checkpoint of TP 1 and PP 1 is in {args.ms2torch_ckpt_path}")
    return source


def _open(args: argparse.Namespace) -> Source:
    from ...formats.reading import open_source

    return open_source(args.load_dir, read_options(args, MINDSPORE)).source


def _dtype(args: argparse.Namespace) -> str | None:
    """Type to send; None for that of the weights."""
    if args.fp16 and (args.bf16 or args.dtype not in (None, "fp16")):
        raise UsageError("--fp16 and another type exclude each other; give only one")
    chosen = "fp16" if args.fp16 else args.dtype or "bf16"
    args.fp16 = args.bf16 = False
    return None if chosen == _SOURCE else chosen


def _check_padding(source: Source, typed: int | None) -> None:
    """Raise unless the typed number of rows of embeddings is theirs."""
    from ...model.slots import SLOTS, Ref

    rows = sum(piece.data.shape[0] for piece in source.read(Ref(SLOTS["word_embeddings"])).pieces)
    if typed not in (None, rows):
        raise UsageError(
            f"--padded-vocab-size {typed} contradicts {rows} rows of embeddings; leave it out, or correct it"
        )


def _write_intermediate(args: argparse.Namespace) -> None:
    """Write a whole checkpoint of one rank, as the original loader does on its way."""
    from ...basics.dtypes import dtype_named
    from ...conversion.progress import Silent
    from ...conversion.run import convert
    from ...formats.megatron.options import MegatronOptions
    from ...formats.writing import open_target

    options = MegatronOptions(tp=1, pp=1, impl="local", overwrite=args.overwrite)
    dtype = None if args.dtype is None else dtype_named(args.dtype)
    convert(_open(args), open_target(args.ms2torch_ckpt_path, options), dtype, Silent())
