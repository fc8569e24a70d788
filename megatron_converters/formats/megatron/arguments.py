"""Translation between Megatron-LM's `args` Namespace and `ModelSpec`, by the table of arguments.

Attribute names: Megatron-LM core_v0.8.0 to core_v0.19.0, training/arguments.py and `load_args_from_checkpoint` in
training/checkpointing.py. Written `args` hold only plain values and torch dtypes, which `weights_only` loading accepts.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from ...assets.training_args import inheritable
from ...basics.dtypes import DType
from ...basics.errors import ConversionError, Unclear, raise_all
from ...model.slots import Ref, refs
from ...model.spec import ModelSpec, PerLayer
from ...sharding.ranks import Parallel
from .argument import Args, Argument, Build, Context, Group
from .conventions import FOLDED, HALVES, Conventions, conventions
from .options import FOLD, RAW
from .rows_attention import GATED_DELTA, LATENT, MUP, PREDICTION
from .rows_experts import EXPERTS, check_balancing, is_sinkhorn, wide_router
from .rows_layout import LAYOUT, LOADING
from .rows_mindspeed import MINDSPEED
from .rows_model import BLOCKS, SEQ_LENGTH, SIZES, TRAINING
from .rows_positions import POSITIONS
from .rows_providers import CAPS, LAYER_ROPES
from .rows_sparse import SPARSE
from .rows_swift import SWIFT
from .rows_yarn import YARN_ROWS

#: Every argument that is written, read or refused, in the order in which flags are shown.
ARGUMENTS: tuple[Argument, ...] = (
    *SIZES,
    SEQ_LENGTH,
    *POSITIONS,
    *LAYER_ROPES,
    *BLOCKS,
    *CAPS,
    *LATENT,
    *YARN_ROWS,
    *GATED_DELTA,
    *SPARSE,
    *MUP,
    *MINDSPEED,
    *SWIFT,
    *PREDICTION,
    *TRAINING,
    *EXPERTS,
    *LAYOUT,
    *LOADING,
)
#: Names of all these.
ATTRIBUTES = frozenset(row.attribute for row in ARGUMENTS)
_DEFAULT_SEQ_LENGTH = 4096
#: Sizes without which no model can be described.
_REQUIRED = ("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "max_position_embeddings")
_PARALLEL = ("tensor_model_parallel_size", "pipeline_model_parallel_size")
_WRITTEN = (Group.MODEL, Group.EXPERTS, Group.ROUTER, Group.LAYOUT, Group.EXPERT_LAYOUT)


def spec_fields(args: argparse.Namespace) -> dict[str, Any]:
    """Properties of a model that `args` decide: all but family, dtype and vocab_size. Raises `ConversionError`."""
    values = vars(args)
    refuse_unsupported(values)
    missing = _missing(values, _REQUIRED)
    if missing:
        raise Unclear(
            f"the checkpoint's args have no valid {', '.join(missing)}", "give a reference model with --hf-config DIR"
        )
    fields: dict[str, Any] = {}
    for row in ARGUMENTS:
        fields |= row.read(values)
    return {name: _collapsed(value) for name, value in fields.items()}


def _missing(values: Args, names: Iterable[str]) -> list[str]:
    """Sizes that args do not have, or that are not valid."""
    return [name for name in names if type(values.get(name)) is not int or values[name] < 1]


def missing_sizes(args: argparse.Namespace) -> list[str]:
    """Sizes of every model that args do not have, or that are not valid."""
    return _missing(vars(args), _REQUIRED)


def lacks_sizes(args: argparse.Namespace | None) -> bool:
    """Whether args do not say all sizes without which a checkpoint cannot be read; None are those of one without args."""
    values = {} if args is None else vars(args)
    groups = ("num_query_groups", "group_query_attention")
    return bool(_missing(values, (*_REQUIRED, *_PARALLEL))) or not any(name in values for name in groups)


def _collapsed(value: Any) -> Any:
    """Property with one value where it is the same in all layers."""
    same = isinstance(value, PerLayer) and all(each == value[0] for each in value)
    return value[0] if same else value


def refuse_unsupported(args: Args) -> None:
    """Raise `ConversionError` if `args`, as a mapping, describe a model that is not supported."""
    for row in ARGUMENTS:
        value = args.get(row.attribute, row.absent)
        if row.meaning and not row.is_usual(value):
            raise ConversionError(
                f"the checkpoint's args have {row.attribute}={value!r}, which means {row.meaning}; only {row.absent!r} is "
                "supported"
            )
    check_balancing(args)


def inexpressible(spec: ModelSpec, *, with_own: bool = False) -> list[str]:
    """Properties of a model that Megatron-LM's arguments cannot express, one reason each.

    `with_own` leaves out those that this project builds itself (`live/`).
    """
    rows = (row for row in ARGUMENTS if not (with_own and row.build is Build.OWN))
    return list(filter(None, (row.limit(spec) for row in rows)))


def check_expressible(reasons: Iterable[str], *, allowed: bool) -> list[str]:
    """Warnings of reasons why a model cannot be expressed; raises `ConversionError` with them unless the user has `allowed` it."""
    found = list(reasons)
    if not allowed:
        raise_all(
            "Megatron-LM cannot express this model (pass --allow-inexpressible to convert the weights anyway):", found
        )
    return [f"warning: Megatron-LM will not compute {reason}" for reason in found]


def written_args(context: Context, groups: Collection[Group] = _WRITTEN) -> dict[str, Any]:
    """Attributes of `args` for a model and its checkpoint, of arguments of these groups."""
    return dict(_written(context, groups))


def _written(context: Context, groups: Collection[Group]) -> Iterator[tuple[str, Any]]:
    for row in ARGUMENTS:
        if row.group not in groups or not row.written(context.spec):
            continue
        value = row.write(context)
        if not row.optional or value != row.absent:
            yield row.attribute, value


def model_args(spec: ModelSpec) -> dict[str, Any]:
    """Attributes that describe the model, complete for `--use-checkpoint-args` of Megatron-LM 0.8 to 0.19."""
    return written_args(Context(spec, Parallel(1, (spec.num_layers,))), (Group.MODEL, Group.EXPERTS))


#: Attributes by which args of another model are known: sizes that no conversion and no training changes, and kinds of blocks.
_TELLING = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_experts"),
    *("normalization", "swiglu", "qk_layernorm", "multi_latent_attention"),
)


def other_model(spec: ModelSpec, args: argparse.Namespace, config: Mapping[str, Any] | None) -> list[str]:
    """Differences that show args to be of another model than this, which has this configuration of Hugging Face."""
    own, given = model_args(spec), vars(args)
    absent = {row.attribute: row.absent for row in ARGUMENTS}
    found = []
    for name in _TELLING:
        theirs, ours = (values.get(name) for values in (given, own))
        theirs, ours = (absent[name] if value is None else value for value in (theirs, ours))
        if name in given and theirs != ours:
            found.append(f"{name} {theirs}, here {ours}")
    recorded, here = given.get("hf_config"), (config or {}).get("model_type")
    kind = recorded.get("model_type") if isinstance(recorded, dict) else None
    return found + (
        [f"model_type {kind}, here {here}"] if kind is not None and here is not None and kind != here else []
    )


def training_args(spec: ModelSpec, source_args: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes of training that a new checkpoint inherits from its source's args, instead of this project's defaults."""
    names = ["hidden_dropout"]
    if spec.num_experts:
        names += ["moe_token_dispatcher_type"]
        names += ["moe_aux_loss_coeff"] if isinstance(source_args.get("moe_aux_loss_coeff"), list) else []
        # Sinkhorn weights experts by a softmax over all of them, whatever other attributes say.
        names += (
            ["moe_router_load_balancing_type"]
            if spec.values["moe_router_pre_softmax"] or not is_sinkhorn(source_args)
            else []
        )
    return {name: source_args[name] for name in names if source_args.get(name) is not None}


def router_dtype(spec: ModelSpec, dtype_of: Callable[[Ref], DType]) -> DType | None:
    """Widest dtype of any router; None for a model without routers."""
    dtypes = (dtype_of(ref) for ref in refs(spec) if ref.slot.name in ("router", "block_router"))
    return max(dtypes, key=lambda dtype: dtype.itemsize, default=None)


def router_warnings(spec: ModelSpec, router: DType | None) -> list[str]:
    """Warning that Megatron-LM rounds the weights of a wider router (core/transformer/moe/router.py, `reset_parameters`)."""
    if not wide_router(Context(spec, Parallel(1, (spec.num_layers,)), router=router)):
        return []
    return [
        f"warning: the router is stored in {router}, but Megatron-LM holds it in {spec.dtype} like other weights and rounds it "
        "when loading; --moe-router-dtype makes it compute in the wider dtype"
    ]


def stated_heads(args: argparse.Namespace) -> tuple[str, ...]:
    """`ModelSpec` fields of attention heads, which shapes do not determine, that `args` set explicitly."""
    values = vars(args)
    stated = {
        "num_attention_heads": values.get("num_attention_heads"),
        "num_query_groups": values.get("group_query_attention"),
        "kv_channels": values.get("kv_channels"),
    }
    return tuple(name for name, value in stated.items() if value)


def rank_invariants(iteration: Any, args: argparse.Namespace | None, also: Iterable[str] = ()) -> dict[str, Any]:
    """Values that all ranks' files of one save have in common: iteration, model and parallel sizes.

    A file without an iteration or args gives none of these; a missing attribute of args counts as None. `also` names further
    attributes that may change what the model computes.
    """
    found = {} if iteration is None else {"iteration": iteration}
    recorded = {} if args is None else {name: getattr(args, name, None) for name in (*_INVARIANT, *also)}
    # Objects, such as Megatron-LM's pipeline layout, never compare equal, but their representations do.
    return {**found, **{name: value if _is_plain(value) else repr(value) for name, value in recorded.items()}}


#: Attributes of which all ranks of one save record the same value: all that describe the model and how it is cut. A conversion also
#: records the Hugging Face configuration, which has what they cannot express, and what is stored otherwise.
_INVARIANT = sorted(
    {"hf_config", FOLDED, HALVES, *(row.attribute for row in ARGUMENTS if row.group in _WRITTEN and not row.per_rank)}
)


def seq_length_of(spec: ModelSpec, inherited: Mapping[str, Any]) -> int:
    """Sequence length of the source's training; by default the model's maximum, limited to `_DEFAULT_SEQ_LENGTH`."""
    length: int = inherited.get("seq_length") or min(_DEFAULT_SEQ_LENGTH, spec.max_position_embeddings)
    return length


#: Defaults for attributes of a training run; the source's own values take precedence.
RUN_DEFAULTS: dict[str, Any] = {
    "micro_batch_size": 1,
    "global_batch_size": 1024,
    "consumed_train_samples": 0,
    "consumed_valid_samples": 0,
    "seed": 1234,
}


def sent_conventions(spec: ModelSpec) -> Conventions:
    """Conventions of a model in messages, which hold weights as they are: arguments say multipliers that flags cannot."""
    stored = conventions(spec)
    return conventions(spec, mup=RAW) if stored.mup == FOLD else stored


def uncut_args(spec: ModelSpec, margs: argparse.Namespace | None) -> dict[str, Any]:
    """Attributes of an uncut model with sequential experts, as loaders send them; `margs` are the source's args."""
    groups = (Group.MODEL, Group.EXPERTS, Group.EXPERT_LAYOUT)
    stored = sent_conventions(spec)
    context = Context(stored.spec, Parallel(1, (spec.num_layers,)))
    return {**RUN_DEFAULTS, **plain_args(inheritable(margs)), **written_args(context, groups), **stored.marks}


def plain_args(args: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes whose values are plain, torch dtypes or containers of these; others (enums, timers) are left out."""
    return {name: value for name, value in args.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, (str, int)) and _is_plain(item) for key, item in value.items())
    return value is None or type(value) in (bool, int, float, str) or isinstance(value, DType)
