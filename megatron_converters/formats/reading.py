"""Opening of sources of any format, which is detected; options supplement what the folder says.

What reads a format is imported when a source of it is opened.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..basics.errors import UsageError
from ..basics.folders import existing_folder
from ..families import FAMILIES
from ..families.config_json import wrapper_in
from ..families.scope import family_of
from .detect import format_of, refuse_part
from .hub import located
from .kinds import FORMATS, HF, MEGATRON, META, MINDSPORE, WEIGHTS

if TYPE_CHECKING:
    from ..assets.origin import Origin
    from ..conversion.endpoint import Source
    from .megatron.reading import MegatronReadOptions


@dataclass(frozen=True)
class ReadOptions:
    """Options for reading a source; each field is the command-line option of the same name.

    `format` is "hf", "meta" or "megatron"; None detects it. With `download`, what the cache lacks of a model that is named as on
    the Hugging Face Hub is downloaded. For a Megatron-LM checkpoint, `ckpt_dir_name` is the folder to read
    (iter_0000008) instead of the latest, `hf_config` the folder of a reference model, `true_vocab_size` the vocabulary size
    without padding, if args lack it, `missing_args` attributes that fill what the args lack, and `families` those that may be
    inferred where nothing names the model's. For a Hugging Face folder, `untie` keeps a stored lm_head although config.json ties
    it; a file of weights has `hf_config`, too. `ignore_config_fields` names unknown fields that do not matter, of config.json (also
    that of a reference) or of params.json.
    `without_mtp` leaves out layers of multi-token prediction, `backfill_from` is the Hugging Face folder from which they are taken
    where training ran without them. `mup` ("flags", "fold" or "raw") says where a checkpoint has its
    model's multipliers, if its args do not. `trained_by` is the release of Megatron-LM ("0.16") that trained it, which may have
    ignored some of its args, or "args" for a program that heeds all. `prefer_args` takes only the family, names and tokenizer
    from `hf_config`, and `ignore_args` names arguments of other programs that change nothing. `source_margs_file` is a
    source_megatron_args.json whose training arguments are inherited, `family_file` a YAML file with a family of the user's own,
    and `capacity_bins` requests capacity_bins.pt. Of MindSpore's weights, `mf_mlp_layout` and `mf_qkv_layout` are the orders of
    rows, `mf_version` is the release of MindSpore Transformers that wrote them, `mf_config` its YAML, and `typed` has properties
    of the model that nothing else says. Of every format, `ignore_tensors` are patterns (`*`, `?`) of names of tensors that are left
    out, such as "v_head.*"; one that the model needs is then missing. `text_only` takes the text part alone of a model of
    images and text.
    """

    format: str | None = None
    ckpt_dir_name: str | None = None
    hf_config: str | os.PathLike[str] | None = None
    true_vocab_size: int | None = None
    untie: bool = False
    without_mtp: bool = False
    backfill_from: str | os.PathLike[str] | None = None
    mup: str | None = None
    trained_by: str | None = None
    prefer_args: bool = False
    ignore_args: tuple[str, ...] = ()
    ignore_config_fields: tuple[str, ...] = ()
    source_margs_file: str | os.PathLike[str] | None = None
    family_file: str | os.PathLike[str] | None = None
    capacity_bins: bool = False
    missing_args: Mapping[str, Any] | None = None
    families: tuple[str, ...] = ()
    mf_mlp_layout: str | None = None
    mf_qkv_layout: str | None = None
    mf_version: str | None = None
    mf_config: str | os.PathLike[str] | None = None
    typed: Mapping[str, Any] = field(default_factory=dict)
    download: bool = False
    ignore_tensors: tuple[str, ...] = ()
    text_only: bool = False


#: Options that take everything from the folder itself.
AS_FOUND = ReadOptions()


class Opened(NamedTuple):
    """Opened source and the name of its format."""

    format: str
    source: Source


def open_source(path: str | os.PathLike[str], options: ReadOptions = AS_FOUND) -> Opened:
    """Open a folder of any format, or a file of Hugging Face's weights, without reading weights.

    `path` may be the name of a model on the Hugging Face Hub (`formats/hub.py`), as may `hf_config`.
    Raises `ConversionError` if its format is unknown, if it is damaged, or if it does not hold the model that its configuration
    describes. What uses a source of a family file must do so in the scope of that (`families/scope.py`).
    """
    found_path, notes = located(path, download=options.download)
    margs = None if options.source_margs_file is None else _training_args(Path(options.source_margs_file))
    if options.format not in (None, *FORMATS):
        raise UsageError(f"format {options.format!r} is not one of {', '.join(FORMATS)}")
    found = options.format or format_of(found_path)
    if found_path.is_file() and found != MINDSPORE:
        refuse_part(found_path)
    if found == HF and found_path.is_file():
        found = WEIGHTS
    if options.hf_config is not None and found in _FORMAT_OF_OPTION["hf_config"]:
        reference = located(options.hf_config, config_only=True, download=options.download)
        options = dataclasses.replace(options, hf_config=reference.folder)
        notes = [*notes, *reference.notes]
    with family_of(options.family_file):
        source = _backfilled(_OPENERS[found](found_path, options), options)
        _note_unused_family(source, options)
    if wrapper_in(source.origin.hf_config) is not None:
        _settle_carried(source.origin, options)
    source.origin.say_first(notes)
    if margs is not None:
        _take_over(margs, source, options)
    return Opened(found, source)


def _settle_carried(origin: Origin, options: ReadOptions) -> None:
    """Leave out what lies beside a text part, or find it."""
    if options.text_only:
        from ..assets.side_file import leave_out_carried

        leave_out_carried(origin)
    elif origin.carried is None:
        from .carrying import complete

        complete(origin, _reference(options))


def _backfilled(source: Source, options: ReadOptions) -> Source:
    """The source, with what training ran without from another folder if one is named."""
    if options.backfill_from is None:
        return source
    if options.without_mtp:
        raise UsageError(
            "--backfill-from takes layers of multi-token prediction from a folder, and --without-mtp leaves them out; give only "
            "one of them"
        )
    from .backfilling import Backfilled
    from .huggingface.source import HFSource

    folder, notes = located(options.backfill_from, download=options.download)
    other = HFSource(
        existing_folder(folder),
        ignored_config=options.ignore_config_fields,
        ignored_tensors=options.ignore_tensors,
    )
    source.origin.say_first(notes)
    return Backfilled(source, other, folder)


def _training_args(path: Path) -> argparse.Namespace:
    from ..assets.training_args import named_margs

    return named_margs(path)


def _take_over(margs: argparse.Namespace, source: Source, options: ReadOptions) -> None:
    """Let the source have these training arguments; warns if they are of another model."""
    from .megatron.arguments import other_model

    source.origin.margs = margs
    foreign = other_model(source.spec, margs, source.origin.hf_config)
    if foreign:
        line = (
            f"warning: {options.source_margs_file} is of another model ({'; '.join(foreign)}), of which only training"
        )
        source.origin.tell_at_once(f"{line} arguments are taken over")


def refuse_unused(formats: Collection[str], options: ReadOptions) -> None:
    """Raise `UsageError` for an option that no source of these formats uses."""
    for name, only in _FORMAT_OF_OPTION.items():
        if getattr(options, name) and not only.intersection(formats):
            option = name.replace("_", "-")
            named = " or ".join(_NAMES[format_name] for format_name in _NAMES if format_name in only)
            raise UsageError(f"--{option} is for reading {named}, which this is not; leave it out")
    refuse_unread_fields(formats, options)


def refuse_unread_fields(formats: Collection[str], options: ReadOptions) -> None:
    """Raise `UsageError` for fields to ignore where no configuration is read that could have them."""
    if options.ignore_config_fields and options.hf_config is None and {*formats} == {MEGATRON}:
        raise UsageError(
            "--ignore-config-fields is for reading a config.json, and a Megatron-LM checkpoint has none without --hf-config; leave "
            "it out"
        )


def _note_unused_family(source: Source, options: ReadOptions) -> None:
    name, file = source.spec.family, FAMILIES.file
    if file is not None and name != file.family.name:
        source.origin.notes.append(
            f"warning: {options.family_file} describes the family {file.family.name}, but this is a {name} model, for which it is "
            "not used"
        )


def _open_hf(path: Path, options: ReadOptions) -> Source:
    from .huggingface.source import HFSource

    return _checked(
        HFSource(
            path,
            reference=_reference(options) if path.is_file() else None,
            ignored_config=options.ignore_config_fields,
            untie=options.untie,
            without_mtp=options.without_mtp,
            ignored_tensors=options.ignore_tensors,
        ),
        path.parent if path.is_file() else path,
        options,
    )


def _open_meta(folder: Path, options: ReadOptions) -> Source:
    from .meta.source import MetaSource

    source = MetaSource(
        existing_folder(folder),
        ignored_params=options.ignore_config_fields,
        ignored_tensors=options.ignore_tensors,
    )
    return _checked(source, folder, options)


def _open_megatron(folder: Path, options: ReadOptions) -> Source:
    from .megatron.opening import open_megatron

    return open_megatron(existing_folder(folder), megatron_options(options))


def megatron_options(options: ReadOptions) -> MegatronReadOptions:
    """Options of a Megatron-LM checkpoint."""
    from .megatron.reading import MegatronReadOptions
    from .megatron.trained_by import program

    if options.prefer_args and options.hf_config is None:
        raise UsageError(
            "--prefer-args is for reading beside a reference model; give one with --hf-config DIR, or leave it out"
        )
    return MegatronReadOptions(
        options.ckpt_dir_name,
        _reference(options),
        options.true_vocab_size,
        without_mtp=options.without_mtp,
        backfilled=options.backfill_from is not None,
        mup=options.mup,
        missing_args=options.missing_args,
        families=options.families,
        trained_by=program(options.trained_by),
        prefer_args=options.prefer_args,
        ignore_args=options.ignore_args,
        ignored_config=options.ignore_config_fields,
        ignore_tensors=options.ignore_tensors,
    )


def _open_mindspore(path: Path, options: ReadOptions) -> Source:
    from .mindspore.describing import MindSporeReadOptions
    from .mindspore.source import MindSporeSource

    return MindSporeSource(
        path,
        MindSporeReadOptions(
            options.mf_mlp_layout,
            options.mf_qkv_layout,
            options.mf_version,
            None if options.mf_config is None else Path(options.mf_config),
            _reference(options),
            options.true_vocab_size,
            options.typed,
            ignored_config=options.ignore_config_fields,
            ignore_tensors=options.ignore_tensors,
        ),
    )


def _reference(options: ReadOptions) -> Path | None:
    """Folder of the reference model, if one is given."""
    return None if options.hf_config is None else existing_folder(options.hf_config)


def _checked(source: Source, folder: Path, options: ReadOptions) -> Source:
    """Check options against a source whose configuration has the vocabulary size; add its capacity bins."""
    given, known = options.true_vocab_size, source.spec.vocab_size
    if given not in (None, known):
        raise UsageError(f"--true-vocab-size {given} disagrees with vocab_size {known} of config.json")
    _add_capacity_bins(source.origin, folder, options.capacity_bins)
    return source


def _add_capacity_bins(origin: Origin, folder: Path, wanted: bool) -> None:
    from ..assets import capacity_bins

    path = folder / capacity_bins.FILE
    if wanted:
        origin.capacity_bins = capacity_bins.read(path)
    elif path.exists():
        origin.notes.append(
            f"{path} is left out; a saver of Megatron-LM checkpoints takes it with --load-capacity-bins"
        )


_OPENERS: dict[str, Callable[[Path, ReadOptions], Source]] = {
    HF: _open_hf,
    WEIGHTS: _open_hf,
    META: _open_meta,
    MEGATRON: _open_megatron,
    MINDSPORE: _open_mindspore,
}
#: Formats that use an option, where not all do.
_FORMAT_OF_OPTION = {
    "ckpt_dir_name": {MEGATRON},
    "hf_config": {MEGATRON, WEIGHTS, MINDSPORE},
    "mup": {MEGATRON},
    **{name: {MEGATRON} for name in ("trained_by", "prefer_args", "ignore_args")},
    "missing_args": {MEGATRON},
    "families": {MEGATRON},
    "untie": {HF, WEIGHTS},
    "backfill_from": {HF, WEIGHTS, MEGATRON},
    **{name: {MINDSPORE} for name in ("mf_mlp_layout", "mf_qkv_layout", "mf_version", "mf_config", "typed")},
}
_NAMES = {
    MEGATRON: "a Megatron-LM checkpoint",
    HF: "a Hugging Face folder",
    WEIGHTS: "a file of weights",
    MINDSPORE: "MindSpore's weights",
}
