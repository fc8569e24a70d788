"""Megatron-LM → Hugging Face in one process, with the options of Habana's convert_mlm_to_hf_checkpoint.py and our own."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ..basics.exit_codes import EXIT_CODES
from .console import exit_on_error, prepare_process, program, report
from .numpy_threads import import_numpy
from .options.reading import add_checkpoint_arguments, open_checkpoint
from .options.shared import add_common_arguments
from .options.values import DTYPES, dtype_word
from .options.writing import add_hf_target_arguments, open_hf_target
from .parser import Parser

#: Name of the command where the package is installed.
_COMMAND = "megatron-convert-mlm-to-hf"
_PROG = "convert_mlm_to_hf_checkpoint.py"


def main(argv: Sequence[str] | None = None) -> None:
    """Run a conversion; exits with a code of its row in `EXIT_CODES`, 0 only if the output is complete."""
    prepare_process()
    with exit_on_error(program("convert_mlm_to_hf_checkpoint", _COMMAND), EXIT_CODES[_PROG]):
        args = parser().parse_args(sys.argv[1:] if argv is None else argv)
        import_numpy()
        _convert(args)


def _convert(args: argparse.Namespace) -> None:
    from ..basics.dtypes import dtype_named
    from ..conversion.progress import make_progress
    from ..conversion.run import convert
    from ..families.scope import family_of

    dtype = dtype_named(args.target_params_dtype) if args.target_params_dtype else None
    with family_of(args.family_file):
        source = open_checkpoint(args)
        parallel = source.origin.parallel
        sizes = "" if parallel is None else f", tp={parallel.tp}, pp={parallel.pp}"
        report(args, f"loading {source.origin.described} ({source.spec.family}{sizes})")
        for line in convert(source, open_hf_target(args), dtype, make_progress(args.quiet), restart=args.restart):
            report(args, line)


def parser() -> Parser:
    """Parser of the command line."""
    name = program(_PROG, _COMMAND)
    script = Parser(
        prog=name,
        usage=f"{name} --load-path DIR --save-path DIR [options]",
        description="Convert a Megatron-LM checkpoint, torch or torch_dist, of any parallel sizes to Hugging Face format.",
        epilog=str(EXIT_CODES[_PROG]),
        conflict_handler="resolve",
        examples=(
            f"python {_PROG} --load-path llama-megatron --save-path llama-hf",
            f"python {_PROG} --load-path llama-megatron --save-path llama-bf16 --target-params-dtype bf16",
        ),
    )
    script.add_argument(
        "--load-path",
        metavar="DIR",
        dest="load_dir",
        required=True,
        help="Folder that holds iter_*, or one of these.",
    )
    script.add_argument("--save-path", metavar="DIR", dest="save_dir", required=True, help="Folder to write to.")
    script.add_argument(
        "--target-params-dtype",
        type=dtype_word,
        choices=DTYPES,
        default=None,
        help="Type to write; the checkpoint's by default.",
    )
    add_checkpoint_arguments(script)
    add_hf_target_arguments(script)
    add_common_arguments(script)
    return script


if __name__ == "__main__":
    main()
