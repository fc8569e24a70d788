"""Layers of multi-token prediction (MTP) of a checkpoint that is read: how many are stored, and leaving them out."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from ...basics.errors import ConversionError, UnknownArchitecture
from ...basics.quantities import count
from ...families.config_json import infer_family
from ...model.spec import ModelSpec
from .reading import MegatronReadOptions

_LAYER = re.compile(r"(?:^|\.)mtp\.layers\.(\d{1,6})\.")
#: Property of a model, and attribute of args, with the number of these layers.
PREDICTION = "mtp_num_layers"
_REMEDY = "pass --without-mtp to leave them out"


def stored_layers(names: Iterable[str]) -> int:
    """Number of layers of multi-token prediction among the names of stored tensors."""
    return len({match[1] for name in names if (match := _LAYER.search(name))})


def inferred(fields: Mapping[str, Any], among: Collection[str]) -> ModelSpec:
    """Spec with the first family that has these properties; raises `ConversionError` that says if it is MTP that none has."""
    try:
        return infer_family(fields, among)
    except UnknownArchitecture:
        if not fields.get(PREDICTION):
            raise
    family = infer_family({**fields, PREDICTION: 0}, among).family
    raise ConversionError(
        f"the args have {PREDICTION}={fields[PREDICTION]}: no family has both this model's shape and multi-token prediction, but "
        f"{family} fits without those layers; {_REMEDY}"
    )


def trained_without(args: argparse.Namespace) -> bool:
    """Whether these are args, and they have no layers of multi-token prediction."""
    return getattr(args, "num_layers", None) is not None and not getattr(args, PREDICTION, None)


def without_layers(fields: Mapping[str, Any], left_out: bool) -> dict[str, Any]:
    """Properties of a model, without layers of multi-token prediction if they are left out."""
    return {**fields, **({PREDICTION: 0} if left_out and fields.get(PREDICTION) else {})}


def as_stored(
    spec: ModelSpec, stored: int, args: argparse.Namespace, options: MegatronReadOptions, where: object
) -> ModelSpec:
    """Spec with the layers of multi-token prediction that are stored, which are matched before they are left out.

    Raises `ConversionError` if they are not to be left out and only one of both has any, the checkpoint or the model that the args,
    or a reference, describe; where they are to come from elsewhere, only if the args say that training ran without them.
    """
    if options.without_mtp or (options.backfilled and not stored and trained_without(args)):
        return spec if len(spec.mtp) == stored else spec.replaced(mtp_num_layers=stored)
    reference = options.hf_config
    described = "the args describe" if reference is None else f"{reference} is"
    if spec.mtp and not stored:
        raise ConversionError(
            f"{described} a model with {count(len(spec.mtp), 'layer')} of multi-token prediction, but {where} holds none (mtp.*); "
            f"{_REMEDY}"
        )
    if stored and not spec.mtp:
        raise ConversionError(
            f"{where} holds {count(stored, 'layer')} of multi-token prediction (mtp.*), but {described} a model without; {_REMEDY}"
        )
    return spec


def without_prediction(spec: ModelSpec, left_out: bool) -> tuple[ModelSpec, list[str]]:
    """Spec without layers of multi-token prediction if they are left out, and a note on it."""
    if not (left_out and spec.mtp):
        return spec, []
    note = f"{count(len(spec.mtp), 'layer')} of multi-token prediction: left out, as --without-mtp says"
    return dataclasses.replace(spec, mtp=()), [note]
