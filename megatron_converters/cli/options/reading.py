"""Options of what reads a model, and the source that they mean. Help declares them, so what reads is imported where it is used."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ...basics.errors import UsageError
from ...formats.kinds import FORMATS, HF, MEGATRON
from ...formats.mindspore.typed import TYPED, Typed
from .shared import add_argument, add_shared
from .values import comma_separated, patterns, positive

if TYPE_CHECKING:
    from ...conversion.endpoint import Source
    from ...formats.reading import Opened, ReadOptions
    from ...model.spec import ModelSpec

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
#: Number of parameters in such a name, of each expert where it says how many, and the factor by which it may be rounded: Mixtral
#: 8x7B has 47 billion.
_SIZE = re.compile(r"(?:(?P<experts>\d+)x)?(?P<each>\d+(?:\.\d+)?)b", re.IGNORECASE)
_SIZE_TOLERANCE = 1.5
#: Whether the models that a loader is named for have experts.
_HAS_EXPERTS = {"llama_mistral": False, "mixtral_hf": True}
_OF_CHECKPOINTS = (
    *(
        "--ckpt-dir-name",
        "--hf-config",
        "--ignore-config-fields",
        "--prefer-args",
        "--true-vocab-size",
        "--without-mtp",
        "--text-only",
        "--backfill-from",
    ),
    *("--mup", "--trained-by", "--ignore-args", "--ignore-tensors"),
)
_OF_MINDSPORE = ("--mf-mlp-layout", "--mf-qkv-layout", "--mf-version", "--mf-config", "--ignore-tensors")
_OF_FOLDERS = (
    "--untie",
    "--ignore-config-fields",
    "--without-mtp",
    "--text-only",
    "--backfill-from",
    "--ignore-tensors",
)


def read_options(args: argparse.Namespace, source_format: str | None = None) -> ReadOptions:
    """What the options say of a source; those that the command does not have are unset."""
    from ...formats.reading import ReadOptions

    def given(name: str) -> Any:
        return getattr(args, name, None)

    return ReadOptions(
        format=source_format or given("source_format"),
        ckpt_dir_name=given("ckpt_dir_name"),
        hf_config=given("hf_config"),
        true_vocab_size=given("true_vocab_size"),
        untie=bool(given("untie")),
        ignore_config_fields=comma_separated(given("ignore_config_fields")),
        trained_by=given("trained_by"),
        prefer_args=bool(given("prefer_args")),
        ignore_args=comma_separated(given("ignore_args")),
        without_mtp=bool(given("without_mtp")),
        text_only=bool(given("text_only")),
        backfill_from=given("backfill_from"),
        ignore_tensors=patterns(given("ignore_tensors")),
        mup=given("mup"),
        mf_mlp_layout=given("mf_mlp_layout"),
        mf_qkv_layout=given("mf_qkv_layout"),
        mf_version=given("mf_version"),
        mf_config=given("mf_config"),
        typed={row.field: value for row in TYPED if (value := given(row.attribute)) is not None},
        source_margs_file=given("source_margs_file"),
        family_file=given("family_file"),
        capacity_bins=bool(given("load_capacity_bins")),
        download=bool(given("download")),
    )


def add_reading_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verbs, which read a folder of any format."""
    group = parser.add_argument_group("reading")
    group.add_argument("--from", dest="source_format", choices=FORMATS, default=None, help="Format of the source.")
    add_shared(group, "--download", *_OF_CHECKPOINTS, *_OF_FOLDERS, "--source-margs-file", "--family-file")
    mindspore = parser.add_argument_group("reading MindSpore's weights, where neither they nor a configuration say it")
    add_mindspore_arguments(mindspore)
    add_typed(mindspore, [row for row in TYPED if row.in_verbs])


def add_mindspore_arguments(parser: Any) -> None:
    """Options of what reads MindSpore's weights."""
    add_shared(parser, *_OF_MINDSPORE)


def add_typed(parser: Any, rows: Iterable[Typed], *, defaults: bool = False) -> None:
    """Declare options by which a user types what a model is; `defaults` names those of the original loader in help."""
    for row in rows:
        words = f"{row.words}{'; an error where shapes say another' if row.is_size else '; the names of weights win'}."
        words += f" Originally {row.default}, which is never assumed here." if defaults else ""
        how: dict[str, Any]
        if isinstance(row.kind, type):
            how = {"metavar": "N", "type": positive if row.kind is int else float}
        elif isinstance(row.kind, tuple):
            how = {"choices": row.kind}
        else:
            how = {"action": "store_const", "const": row.kind}
        add_argument(parser, row.option, dest=row.attribute, default=None, help=words, **how)


def open_any(path: str, args: argparse.Namespace) -> Opened:
    """The folder that a verb reads alone; an option that its format does not heed is refused."""
    from ...formats.reading import open_source, refuse_unused

    options = read_options(args)
    opened = open_source(path, options)
    refuse_unused([opened.format], options)
    return opened


def add_hf_source_arguments(parser: Any) -> None:
    """Options of loaders that read a Hugging Face folder."""
    add_shared(parser, "--bf16", "--fp16", "--dtype")
    add_argument(
        parser,
        "--model-size",
        metavar="NAME",
        default=None,
        help="Accepted for compatibility; config.json says it. A name of another architecture is an error.",
    )
    add_argument(
        parser, "--checkpoint-type", default=HF, choices=["meta", HF], help="Type of the source; hf by default."
    )
    add_shared(
        parser,
        "--true-vocab-size",
        "--vocab-file",
        "--tokenizer-model",
        "--make-vocab-size-divisible-by",
        "--loader-transformer-impl",
        "--source-margs-file",
        "--allow-inexpressible",
        *_OF_FOLDERS,
    )


def open_hf_source(args: argparse.Namespace) -> Source:
    """The Hugging Face or Meta folder of --load-dir, checked against the options that repeat what it says."""
    from ...assets.tokenizer import check_named
    from ...formats.reading import open_source

    check_named(args.tokenizer_model)
    source = open_source(args.load_dir, read_options(args, args.checkpoint_type)).source
    family = source.spec.family
    meant = _model_size_family(args.model_size)
    if meant not in (None, family):
        raise UsageError(
            f"--model-size {args.model_size} means a {meant} model, but config.json describes a {family} model"
        )
    if args.tokenizer_model is not None:
        source.origin.tokenizer = args.tokenizer_model
    for line in _size_warning(args.model_size, source.spec):
        source.origin.tell_at_once(line)
    source.origin.notes += _loader_note(args, source.spec)
    return source


def _model_size_family(name: str | None) -> str | None:
    if name is None:
        return None
    for prefix, family in _MODEL_SIZES.items():
        if name.lower().startswith(prefix):
            return family
    raise UsageError(f"--model-size {name} is no known name; leave it out, config.json says what the model is")


def _size_warning(name: str | None, spec: ModelSpec) -> list[str]:
    """Warning that a name such as llama3-70B is of a model of another size."""
    found = _SIZE.search(name or "")
    if found is None:
        return []
    from ...inspection.inventory import count_parameters

    said, total = float(found["each"]) * int(found["experts"] or 1) * 1e9, count_parameters(spec).total
    if total / _SIZE_TOLERANCE < said < total * _SIZE_TOLERANCE:
        return []
    return [f"warning: --model-size {name} is not this model, which has {total:,} parameters; config.json is taken"]


def _loader_note(args: argparse.Namespace, spec: ModelSpec) -> list[str]:
    """Note that a loader is named for another kind of model, which it reads all the same."""
    loader = getattr(args, "loader", "").rpartition("loader_")[2]
    if loader not in _HAS_EXPERTS or _HAS_EXPERTS[loader] == bool(spec.num_experts):
        return []
    kinds = ("a model without experts", "a mixture of experts")
    return [f"the loader {loader} reads {kinds[bool(spec.num_experts)]}, {spec.family}, as --loader hf does"]


def add_checkpoint_arguments(parser: Any) -> None:
    """Options of what reads a Megatron-LM checkpoint alone."""
    add_shared(parser, *_OF_CHECKPOINTS)


def add_core_loader_arguments(parser: Any) -> None:
    """Options of the loader plugin that reads a Megatron-LM checkpoint."""
    add_shared(parser, "--bf16", "--fp16", "--dtype", "--source-margs-file", *_OF_CHECKPOINTS, "--vocab-file")
    add_argument(
        parser,
        "--position-embedding-type",
        default=None,
        choices=["learned_absolute", "rope"],
        help="Accepted for compatibility; args say it, and another value is an error.",
    )
    add_shared(parser, "--loader-transformer-impl", "--make-vocab-size-divisible-by", "--allow-inexpressible")


def open_checkpoint(args: argparse.Namespace) -> Source:
    """The checkpoint of --load-dir, of whatever format; with --download, the tokenizer that it names is fetched, too."""
    from ...assets.tokenizer import fetch_tokenizer
    from ...formats.reading import open_source, refuse_unread_fields

    options = read_options(args, MEGATRON)
    refuse_unread_fields([MEGATRON], options)
    source = open_source(args.load_dir, options).source
    if args.download and getattr(args, "tokenizer_model", None) is None:
        source.origin.notes += fetch_tokenizer(source.origin.tokenizer, explicit=False)
    return source


def open_core_loader(args: argparse.Namespace) -> Source:
    """The checkpoint of --load-dir, with what the loader's further options say."""
    if args.vocab_file is not None:
        from ...basics.folders import existing_path
        from ...basics.json_files import read_json

        vocab = len(read_json(existing_path(args.vocab_file)))
        if args.true_vocab_size not in (None, vocab):
            raise UsageError(
                f"--true-vocab-size {args.true_vocab_size} disagrees with the {vocab} tokens of --vocab-file"
            )
        args.true_vocab_size = vocab
    source = open_checkpoint(args)
    learned = args.position_embedding_type == "learned_absolute"
    if args.position_embedding_type is not None and learned != source.spec.learned_positions:
        raise UsageError(
            f"--position-embedding-type {args.position_embedding_type} disagrees with the args of the checkpoint; leave it out"
        )
    return source
