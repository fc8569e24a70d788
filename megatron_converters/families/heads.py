"""Classes of a family besides the language model: the base model without a head, and that of sequence classification.

Source: transformers 5.23, modeling_layers.py (GenericForSequenceClassification: `score`, without bias) and configuration_utils.py
(the number of labels). Reward models are of the second class.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ..basics.errors import ConversionError
from ..model.checks import is_whole
from ..model.layouts import SAME
from ..model.tables import Entry
from .table import Family

#: Rows of the head of a class, which is what the property `num_labels` says: none of a base model; None for a language model.
_BASE, _LANGUAGE = 0, None
#: Entries of heads, which have the same names in all families.
ENTRIES: Mapping[str, Entry] = {"score": Entry(SAME, ("score.weight",))}
_CAUSAL_ENDS = ("ForCausalLM", "LMHeadModel")
_BASE_END, _CLASSIFIER_END = "Model", "ForSequenceClassification"
#: Ends of the names of classes with heads that are not converted, and what these compute.
_OTHER_ENDS = {
    "ForTokenClassification": "labels for each token, with a bias",
    "ForQuestionAnswering": "where an answer begins and ends",
    "ForMultipleChoice": "a choice",
    "DoubleHeadsModel": "tokens and a choice",
}
BASE_NOTE = (
    "a base model without a head: Megatron-LM takes the embeddings for its output layer, so that its logits mean nothing, and what "
    "comes before them is this model's output"
)
_KEYS = ("id2label", "label2id", "num_labels")
#: Number of labels where config.json has none.
_LABELS = 2


def _stem(family: Family) -> str:
    """Beginning of the names of a family's other classes; empty if its architecture is named otherwise."""
    return family.stem or next(
        (family.architecture.removesuffix(end) for end in _CAUSAL_ENDS if family.architecture.endswith(end)), ""
    )


def class_names(family: Family) -> tuple[str, ...]:
    """Names of the classes of a family that are converted, the language model's first."""
    stem = _stem(family)
    return (*family.architectures, *((stem + end for end in (_BASE_END, _CLASSIFIER_END)) if stem else ()))


def class_of(family: Family, num_labels: int | None) -> str:
    """Name of the class with this head."""
    if num_labels is _LANGUAGE:
        return family.architecture
    return _stem(family) + (_CLASSIFIER_END if num_labels else _BASE_END)


def refused_head(family: Family, architectures: Collection[str]) -> str:
    """Why a class of the family with another head is not converted; empty if none is named."""
    stem = _stem(family)
    for end, meaning in _OTHER_ENDS.items():
        if stem and stem + end in architectures:
            return (
                f"whose head says {meaning}, for which Megatron-LM has no place; the classes {', '.join(class_names(family))} are "
                "converted"
            )
    return ""


def num_labels_of(config: Mapping[str, Any], family: Family, architectures: Collection[str]) -> int | None:
    """Rows of the head of the class that config.json names, as its table of labels or its `num_labels` says them."""
    named = next((name for name in class_names(family) if name in architectures), family.architecture)
    if named in family.architectures:
        return _LANGUAGE
    if named.endswith(_BASE_END):
        return _BASE
    table, number = config.get("id2label"), config.get("num_labels")
    if table is not None and not isinstance(table, Mapping):
        raise ConversionError(f"config.json has id2label={table!r:.80}; it must be an object of labels")
    found = number if table is None else len(table)
    found = _LABELS if found is None else found
    if not is_whole(found) or found < 1 or number not in (None, found):
        raise ConversionError(
            f"config.json has num_labels={number!r} and {found!r} labels in id2label; both must be one number above 0"
        )
    return found


def with_head(properties: Mapping[str, Any], num_labels: int | None) -> dict[str, Any]:
    """Properties of a model, of which those of the language model's head are as a class with another head has them.

    A base model counts as tied, since Megatron-LM then has no further tensor; a classifier's head is never tied.
    """
    if num_labels is _LANGUAGE:
        return dict(properties)
    own = {"tied": num_labels == _BASE, "head_bias": False}
    return {name: own.get(name, value) for name, value in properties.items()}


def written_labels(num_labels: int | None) -> dict[str, Any]:
    """Keys of config.json that say the number of labels, with the names that transformers gives to these."""
    if not num_labels:
        return {}
    names = {str(number): f"LABEL_{number}" for number in range(num_labels)}
    return {"id2label": names, "label2id": {name: int(number) for number, name in names.items()}}


def relabelled(config: Mapping[str, Any], num_labels: int | None) -> dict[str, Any]:
    """config.json with this number of labels: as it is where its table has as many."""
    table = config.get("id2label")
    as_said = len(table) if isinstance(table, Mapping) else config.get("num_labels") or _LABELS
    if not num_labels or as_said == num_labels:
        return dict(config)
    return {**{key: value for key, value in config.items() if key not in _KEYS}, **written_labels(num_labels)}
