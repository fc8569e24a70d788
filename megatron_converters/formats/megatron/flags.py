"""Command-line flags of `pretrain_gpt.py` that set the attributes of `args`, as one table.

Source: training/arguments.py of Megatron-LM core_v0.12.0 to core_v0.19.0, whose parsers turn these flags back into the values of
`args`.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from ...model.spec import ModelSpec
from .limits import MEGATRON_LLAMA3


class Group(Enum):
    """Subject of a flag."""

    MODEL = "model"
    EXPERTS = "experts"
    LAYOUT = "layout"
    EXPERT_LAYOUT = "layout of experts"
    TOKENIZER = "tokenizer"
    LOAD = "load"


def _value(value: Any) -> tuple[str, ...] | None:
    """Shell words of a plain value; a list has several. None leaves the flag out."""
    if value is None:
        return None
    return tuple(map(str, value)) if isinstance(value, (list, tuple)) else (str(value),)


def _switch(value: Any) -> tuple[str, ...] | None:
    """No words for a true value, else None."""
    return () if value else None


def _off_switch(value: Any) -> tuple[str, ...] | None:
    """No words for a false value, else None."""
    return None if value else ()


def _joined(value: Any) -> tuple[str, ...] | None:
    """One word for a sequence, joined by commas."""
    return None if value is None else (",".join(map(str, value)),)


def _frequency(value: Any) -> tuple[str, ...] | None:
    """Words for a number, or for a list in brackets, which Megatron-LM evaluates."""
    return ("[" + ",".join(map(str, value)) + "]",) if isinstance(value, list) else _value(value)


@dataclass(frozen=True)
class Flag:
    """Flag, and the attribute of `args` that it sets: `sets`, by default the flag's own name.

    `words` turns the value into the words after the flag, or None to leave the flag out; it is also left out for the value
    `default`, which Megatron-LM uses anyway, and if the attribute `needs` is false. `restored` is whether the flag is unnecessary
    for loading: `--use-checkpoint-args` restores the attribute in every release from 0.8 on (0.10 for experts), or a loaded model
    does not need it; parallel sizes are never restored. `since` and `until` are the first and last release that know the flag,
    where a note is useful. Releases before `effective_since` parse the flag but ignore it when they build the model.
    """

    name: str
    group: Group = Group.MODEL
    words: Callable[[Any], tuple[str, ...] | None] = _value
    restored: bool = True
    sets: str = ""
    default: Any = None
    needs: str = ""
    since: str = ""
    until: str = ""
    effective_since: str = ""

    @property
    def attribute(self) -> str:
        """Attribute of `args` that the flag sets."""
        return self.sets or self.name.removeprefix("--").replace("-", "_")

    def shown(self, args: Mapping[str, Any]) -> str | None:
        """Flag with its value, quoted for a shell; None where `args` do not need it."""
        value = args.get(self.attribute)
        omitted = (self.needs and not args.get(self.needs)) or (value is not None and value == self.default)
        words = None if omitted else self.words(value)
        return None if words is None else shlex.join((self.name, *words))


_M, _E, _L, _EL, _T, _O = Group.MODEL, Group.EXPERTS, Group.LAYOUT, Group.EXPERT_LAYOUT, Group.TOKENIZER, Group.LOAD
FLAGS = (
    Flag("--num-layers"),
    Flag("--hidden-size"),
    Flag("--ffn-hidden-size"),
    Flag("--num-attention-heads"),
    Flag("--group-query-attention", _M, _switch),
    Flag("--num-query-groups", needs="group_query_attention"),
    Flag("--kv-channels"),
    Flag("--max-position-embeddings"),
    Flag("--seq-length"),
    Flag("--position-embedding-type"),
    Flag("--rotary-base", restored=False),  # before 0.10 the checkpoint does not restore it
    Flag("--use-rope-scaling", _M, _switch, restored=False, since="0.10"),
    Flag("--rope-scaling-factor", restored=False, default=MEGATRON_LLAMA3.factor, since="0.11"),
    Flag("--rotary-seq-len-interpolation-factor", restored=False, effective_since="0.19"),
    Flag("--swiglu", _M, _switch),
    Flag("--normalization"),
    Flag("--norm-epsilon", restored=False),
    Flag("--disable-bias-linear", _M, _off_switch, sets="add_bias_linear"),
    Flag("--add-qkv-bias", _M, _switch),
    Flag("--qk-layernorm", _M, _switch, restored=False),
    Flag("--untie-embeddings-and-output-weights", _M, _switch),
    Flag("--window-size", _M, _joined, restored=False, since="0.15"),
    Flag("--attention-dropout", restored=False),
    Flag("--hidden-dropout", restored=False),
    Flag("--init-method-std"),
    Flag("--bf16", _M, _switch, restored=False),
    Flag("--fp16", _M, _switch, restored=False),
    Flag("--num-experts", _E),
    Flag("--moe-layer-freq", _E, _frequency, default=1, since="0.10"),
    Flag("--moe-ffn-hidden-size", _E, since="0.10"),
    Flag("--moe-router-topk", _E),
    Flag("--moe-router-pre-softmax", _E, _switch),
    Flag("--moe-router-dtype", _E, restored=False, since="0.12"),
    Flag("--moe-router-load-balancing-type", _E, restored=False),
    Flag("--moe-aux-loss-coeff", _E, restored=False, default=0.0),
    Flag("--moe-shared-expert-intermediate-size", _E, since="0.10"),
    Flag("--moe-shared-expert-gate", _E, _switch, restored=False, since="0.16"),
    Flag("--moe-grouped-gemm", _E, _switch),
    Flag("--moe-use-legacy-grouped-gemm", _E, _switch, restored=False, since="0.11", until="0.16"),
    Flag("--moe-token-dispatcher-type", _E, restored=False),
    Flag("--transformer-impl", _L, restored=False),
    Flag("--tensor-model-parallel-size", _L, restored=False),
    Flag("--sequence-parallel", _L, _switch, restored=False, needs="num_experts"),
    Flag("--pipeline-model-parallel-size", _L, restored=False),
    Flag("--decoder-first-pipeline-num-layers", _L, restored=False, since="0.9"),
    Flag("--decoder-last-pipeline-num-layers", _L, restored=False, since="0.9"),
    Flag("--account-for-embedding-in-pipeline-split", _L, _switch, restored=False, since="0.11"),
    Flag("--account-for-loss-in-pipeline-split", _L, _switch, restored=False, since="0.11"),
    Flag("--num-layers-per-virtual-pipeline-stage", _L, restored=False),
    Flag("--num-virtual-stages-per-pipeline-rank", _L, restored=False, since="0.11"),
    Flag("--pipeline-model-parallel-layout", _L, restored=False, since="0.13"),
    Flag("--expert-model-parallel-size", _EL, restored=False),
    Flag("--expert-tensor-parallel-size", _EL, restored=False, since="0.10"),
    Flag("--make-vocab-size-divisible-by", _L, restored=False),
    Flag("--padded-vocab-size", _L, since="0.14"),
    Flag("--ckpt-format", _L, restored=False, default="torch", since="0.9"),
    Flag("--tokenizer-type", _T),
    Flag("--tokenizer-model", _T),
    Flag("--load", _O),
    Flag("--no-load-optim", _O, _switch, sets="no_save_optim"),
    Flag("--no-load-rng", _O, _switch, sets="no_save_rng"),
)
_BY_NAME = {flag.name: flag for flag in FLAGS}
#: Attributes that describe how a checkpoint is cut, and not the model itself.
LAYOUT_ATTRIBUTES = frozenset(flag.attribute for flag in FLAGS if flag.group in (Group.LAYOUT, Group.EXPERT_LAYOUT))
_EXPERT_GROUPS = (Group.EXPERTS, Group.EXPERT_LAYOUT)


def all_flags(args: Mapping[str, Any]) -> list[str]:
    """All flags that set these `args`, each with its value, quoted for a shell."""
    return _shown(FLAGS, args)


def flags(args: Mapping[str, Any]) -> list[str]:
    """Flags that this model needs besides `--use-checkpoint-args`, which does not restore them in every release."""
    return [
        "--use-checkpoint-args",
        *("--no-load-optim", "--no-load-rng"),
        *_shown((flag for flag in FLAGS if not flag.restored), args),
    ]


def _shown(chosen: Iterable[Flag], args: Mapping[str, Any]) -> list[str]:
    dense = not args.get("num_experts")
    return [shown for flag in chosen if not (dense and flag.group in _EXPERT_GROUPS) and (shown := flag.shown(args))]


def as_shell(shown: Iterable[str]) -> str:
    """Flags one per line, joined for a shell."""
    return " \\\n  ".join(shown)


def flag_warnings(spec: ModelSpec, shown: Iterable[str], tp: int = 1) -> list[str]:
    """Notes and warnings for the user about the flags that are shown, for a checkpoint cut over `tp`."""
    shown = list(shown)
    known = [_BY_NAME[name] for name in (flag.split()[0] for flag in shown) if name in _BY_NAME]
    warnings = [f"{flag.name} exists from Megatron-LM {flag.since} on" for flag in known if flag.since]
    warnings += [f"{flag.name} exists up to Megatron-LM {flag.until} only" for flag in known if flag.until]
    warnings += [
        f"warning: {flag.name}: the pretrain_gpt.py of Megatron-LM before {flag.effective_since} accepts it but builds the "
        "model without it; pass seq_len_interpolation_factor to GPTModel in your model provider"
        for flag in known
        if flag.effective_since
    ]
    if tp > spec.num_query_groups:
        warnings.append(
            f"tensor-parallel {tp} over {spec.num_query_groups} query groups needs Megatron-LM 0.16 or later"
        )
    if {"--transformer-impl local", "--sequence-parallel"} <= set(shown):
        warnings.append(
            "warning: Megatron-LM trains experts at a tensor-parallel size above 1 with sequence parallelism only, for which its "
            "local RMS norms cannot be built; use --saver-transformer-impl transformer_engine, tensor-parallel size 1, or a "
            "Megatron-LM with norms of its own, such as Habana's"
        )
    scaling = spec.rope_scaling
    if scaling is not None and scaling.kind == "llama3" and scaling.factor != MEGATRON_LLAMA3.factor:
        warnings.append(
            f"warning: RoPE scaling factor {scaling.factor:g}: Megatron-LM up to 0.19 accepts --rope-scaling-factor, but its "
            "pretrain_gpt.py builds the model with a factor of 8; pass rope_scaling_factor to GPTModel in your model provider"
        )
    return warnings
