"""Options of the verbs, which read a folder of any format, and the source that they mean."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection

from ...basics.errors import UsageError
from ...conversion.endpoint import Source
from ...formats.detect import FORMATS, HF, MEGATRON, META, format_of
from .reading import open_checkpoint, open_hf_source
from .values import folder, positive


def add_reading_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that say more about a source than it does itself."""
    group = parser.add_argument_group("reading")
    group.add_argument("--from", dest="source_format", choices=FORMATS, default=None, help="Format of the source.")
    group.add_argument(
        "--ckpt-dir-name",
        metavar="NAME",
        default=None,
        help="Megatron: folder to read (iter_0000008) instead of the latest.",
    )
    group.add_argument(
        "--hf-config",
        metavar="DIR",
        default=None,
        help="Megatron: reference model folder; configuration and tokenizer are taken from it.",
    )
    group.add_argument(
        "--true-vocab-size",
        metavar="N",
        type=positive,
        default=None,
        help="Megatron: vocabulary without padding, where args lack it.",
    )
    group.add_argument(
        "--untie", action="store_true", help="Hugging Face: keep a stored lm_head although config.json ties it."
    )
    group.add_argument(
        "--ignore-config-fields",
        metavar="NAMES",
        default="",
        help="Hugging Face: comma-separated unknown config.json fields to ignore.",
    )
    group.add_argument(
        "--source-margs-file",
        metavar="FILE",
        default=None,
        help="source_megatron_args.json with arguments to take over.",
    )


def open_any(path: str, args: argparse.Namespace) -> tuple[str, Source]:
    """The format and the source of a folder. `args` are those of `add_reading_arguments`; what it lacks has its default."""
    found = args.source_format or format_of(folder(path))
    given = {**vars(args), "load_dir": path, "checkpoint_type": META if found == META else HF}
    return found, _OPENERS[found](argparse.Namespace(**{**_UNSAID, **given}))


def refuse_unheeded(formats: Collection[str], args: argparse.Namespace) -> None:
    """Raise where an option of `add_reading_arguments` is given that none of these formats heeds."""
    for name, only in _HEEDED_BY.items():
        if getattr(args, name) and only not in formats:
            option = name.replace("_", "-")
            raise UsageError(f"--{option} is for reading {_NAMES[only]}, which this is not; leave it out")


_HEEDED_BY = {"ckpt_dir_name": MEGATRON, "hf_config": MEGATRON, "untie": HF, "ignore_config_fields": HF}
_NAMES = {MEGATRON: "a Megatron-LM checkpoint", HF: "a Hugging Face folder"}
#: Options of the loaders that the verbs do not repeat.
_UNSAID = {"model_size": None, "vocab_file": None, "tokenizer_model": None}
_OPENERS: dict[str, Callable[[argparse.Namespace], Source]] = {
    HF: open_hf_source,
    META: open_hf_source,
    MEGATRON: open_checkpoint,
}
