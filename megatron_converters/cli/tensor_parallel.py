"""Command lines of `megatron_converters.tp_pp_converter` and `ckpt_to_hf_minicpm_with_tp_pp.py`: one checkpoint to one file."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from ..basics.exit_codes import EXIT_CODES
from ..conversion.progress import make_progress
from ..tensor_parallel.converting import DIRECTORY, FILE, Wishes, to_hf
from ..tensor_parallel.numbers import Numbers
from ..tensor_parallel.presets import LLAMA, MINICPM, PRESETS, Preset
from .console import exit_on_error, prepare_process, report, warn
from .options.shared import add_shared
from .options.values import DTYPES, comma_separated, dtype_word, patterns, positive
from .parser import Parser

#: What the direct converter takes where nothing else says a number.
_DIRECT = Preset(80, 8, 4, 8, 64)
_PROG = "python -m megatron_converters.tp_pp_converter"
_DIRECT_PROG = "ckpt_to_hf_minicpm_with_tp_pp.py"
_NUMBERS = {
    "num_layer": "Layers",
    "tp_size": "Tensor-parallel size",
    "pp_size": "Pipeline-parallel size",
    "num_kv_heads": "KV heads",
    "num_query_heads": "Query heads",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run `python -m megatron_converters.tp_pp_converter`; exits with 0 only if the output is complete."""
    parser = _parser(
        _PROG,
        "Convert a checkpoint of MiniCPM or Llama, with or without args, of any tensor- and pipeline-parallel sizes.",
        "--save_path llama-hf --format directory --dtype bf16",
    )
    sizes = "; ".join(f"{name}: {', '.join(presets)}" for name, presets in PRESETS.items())
    parser.add_argument(
        "--model_type", choices=[MINICPM, LLAMA], default=None, help="Type of the model; detected by default."
    )
    parser.add_argument(
        "--model_size",
        metavar="SIZE",
        default=None,
        help=f"Preset for numbers that nothing else says ({sizes}).",
    )
    _run(parser, sys.argv[1:] if argv is None else argv)


def main_direct(argv: Sequence[str] | None = None) -> None:
    """Run `ckpt_to_hf_minicpm_with_tp_pp.py`; exits with 0 only if the output is complete."""
    defaults = ", ".join(f"--{name} {value}" for name, value in zip(_NUMBERS, _DIRECT, strict=True))
    parser = _parser(
        _DIRECT_PROG,
        f"Convert a MiniCPM checkpoint. Where nothing says a number, it is one of {defaults}.",
        "--save_path model.pt --num_layer 40 --num_kv_heads 8 --num_query_heads 40",
    )
    parser.set_defaults(model_type=MINICPM, model_size=None, preset=_DIRECT, preset_name="this script's defaults")
    _run(parser, sys.argv[1:] if argv is None else argv)


def _parser(prog: str, description: str, example: str) -> Parser:
    parser = Parser(
        prog=prog,
        usage=f"{prog} --in_dir DIR --save_path PATH [options]",
        description=description,
        epilog=str(EXIT_CODES[prog]),
        examples=(f"{prog} --in_dir checkpoint --save_path model.pt", f"{prog} --in_dir checkpoint {example}"),
    )
    parser.add_argument(
        "--in_dir", metavar="DIR", required=True, help="Checkpoint: a root, or the folder of mp_rank_*."
    )
    parser.add_argument("--save_path", metavar="PATH", required=True, help="File to write, or folder.")
    for name, words in _NUMBERS.items():
        told = "; an error where the checkpoint says another"
        parser.add_argument(f"--{name}", metavar="N", type=positive, default=None, help=f"{words}{told}.")
    parser.add_argument(
        "--format",
        choices=[FILE, DIRECTORY],
        default=FILE,
        help="One file of weights (the default), or a Hugging Face folder with config.json.",
    )
    parser.add_argument(
        "--hf_config", metavar="DIR", default=None, help="Reference model: its configuration and tokenizer are taken."
    )
    parser.add_argument(
        "--ignore_config_fields",
        metavar="NAMES",
        default="",
        help="Unknown fields of its config.json to ignore, by commas.",
    )
    parser.add_argument(
        "--true_vocab_size", metavar="N", type=positive, default=None, help="Vocabulary without padding, where unknown."
    )
    parser.add_argument(
        "--dtype",
        type=dtype_word,
        choices=DTYPES,
        default=None,
        help="Type to write; the checkpoint's by default.",
    )
    parser.add_argument(
        "--ignore_tensors",
        metavar="PATTERN,…",
        action="append",
        default=None,
        help="Leave out tensors of these names (* and ? as in a shell), which the model must not need.",
    )
    parser.add_argument("--verbose", action="store_true", help="Show each step, and each number with what says it.")
    add_shared(parser, "--overwrite", "--restart", "--quiet", "--download")
    parser.set_defaults(preset=None, preset_name="")
    return parser


def _run(parser: Parser, argv: Sequence[str]) -> None:
    prepare_process()
    with exit_on_error(parser.prog, EXIT_CODES[parser.prog]):
        args = parser.parse_args(argv)
        if args.verbose:
            logging.basicConfig(level=logging.DEBUG, format="%(message)s")
        wishes = Wishes(
            Numbers(*(getattr(args, name) for name in _NUMBERS)),
            args.model_type,
            args.model_size,
            args.preset,
            args.preset_name,
            args.format,
            args.hf_config,
            args.dtype,
            args.overwrite,
            args.true_vocab_size,
            restart=args.restart,
            download=args.download,
            ignore_config_fields=comma_separated(args.ignore_config_fields),
            ignore_tensors=patterns(args.ignore_tensors),
        )
        result = to_hf(args.in_dir, args.save_path, wishes, make_progress(args.quiet))
        for line in result.notes:
            report(args, line)
        for line in result.warnings:
            warn(f"warning: {line}")
