"""Megatron-LM → Hugging Face in one process, with the options of Habana's convert_mlm_to_hf_checkpoint.py and our own."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ..basics.dtypes import dtype_named
from ..basics.exit_codes import EXIT_CODES
from ..conversion.progress import make_progress
from ..conversion.run import convert
from ..families.scope import family_of
from .console import exit_on_error, prepare_process, report
from .options.reading import add_checkpoint_arguments, open_checkpoint
from .options.writing import add_hf_target_arguments, open_hf_target
from .plugins import add_common_arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Run a conversion; exits with a code of its row in `EXIT_CODES`, 0 only if the output is complete."""
    prepare_process()
    with exit_on_error("convert_mlm_to_hf_checkpoint", EXIT_CODES["convert_mlm_to_hf_checkpoint.py"]):
        args = _parser().parse_args(sys.argv[1:] if argv is None else argv)
        dtype = dtype_named(args.target_params_dtype) if args.target_params_dtype else None
        with family_of(args.family_file):
            source = open_checkpoint(args)
            parallel = source.origin.parallel
            sizes = "" if parallel is None else f", tp={parallel.tp}, pp={parallel.pp}"
            report(args, f"loading {source.origin.described} ({source.spec.family}{sizes})")
            for line in convert(source, open_hf_target(args), dtype, make_progress(args.quiet), restart=args.restart):
                report(args, line)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="convert_mlm_to_hf_checkpoint.py",
        description="Convert a Megatron-LM checkpoint, torch or torch_dist, of any parallel sizes to Hugging Face format.",
        epilog=str(EXIT_CODES["convert_mlm_to_hf_checkpoint.py"]),
        allow_abbrev=False,
        conflict_handler="resolve",
    )
    parser.add_argument(
        "--load-path",
        metavar="DIR",
        dest="load_dir",
        required=True,
        help="Folder that holds iter_*, or one of these.",
    )
    parser.add_argument("--save-path", metavar="DIR", dest="save_dir", required=True, help="Folder to write to.")
    parser.add_argument(
        "--target-params-dtype",
        choices=["fp16", "bf16", "fp32"],
        default=None,
        help="Type to write; the checkpoint's by default.",
    )
    add_checkpoint_arguments(parser)
    add_hf_target_arguments(parser)
    add_common_arguments(parser)
    return parser


if __name__ == "__main__":
    main()
