"""Files beside a checkpoint in which programs record the configuration of its model, where its args would be.

They are read as plain values: `_target_` and the like name code of the program, and nothing of it is ever imported or called.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ...basics.errors import Unclear
from ...basics.json_files import read_json
from .argument import Args
from .arguments import ATTRIBUTES
from .config_fields import args_of_fields, value_of_text

RUN_CONFIG = "run_config.yaml"
#: Section of a GPTModelConfig for what TransformerConfig has (Megatron-LM 0.19, training/models/gpt.py).
_NESTED = "transformer"
#: What a file must say before it can describe a model alone, since TransformerConfig's defaults are other than args'.
_NEEDED = (
    *(
        "num_layers",
        "hidden_size",
        "num_attention_heads",
        "ffn_hidden_size",
        "max_position_embeddings",
        "num_query_groups",
    ),
    *("position_embedding_type", "normalization", "layernorm_epsilon", "add_bias_linear", "swiglu"),
    "untie_embeddings_and_output_weights",
)
_ROTARY = "rotary_base"


def _yaml(path: Path) -> dict[str, Any]:
    from ...basics.yaml_files import read_yaml  # which imports yaml

    return read_yaml(path, aliases=True)


def _json(path: Path) -> dict[str, Any]:
    return dict(read_json(path))


class _Kind(NamedTuple):
    """File of a program: where it lies from a checkpoint's folder, the section that has the model, and how it is read."""

    path: str
    section: str | None
    read: Callable[[Path], dict[str, Any]]
    #: Whether it has `str` of each value that is no number, text or switch.
    as_text: bool = False


#: In the order in which they are looked for: those that say more first.
_KINDS = (
    # Megatron-Bridge, training/utils/checkpoint_utils.py; Megatron-LM after 0.19.
    _Kind(RUN_CONFIG, "model", _yaml),
    # NeMo 2, lightning/io/mixin.py: the weights lie in the folder `weights` beside it.
    _Kind("context/model.yaml", "config", _yaml),
    _Kind("../context/model.yaml", "config", _yaml),
    # verl, utils/checkpoint/megatron_checkpoint_manager.py: the weights lie in the folder `dist_ckpt` beside it.
    _Kind("../transformer_config.json", None, _json),
    _Kind("transformer_config.json", None, _json),
    # ModelOpt, torch/opt/plugins/mcore_dist_checkpointing.py: TransformerConfig, or all of a provider.
    _Kind("modelopt_run_config.yaml", None, _yaml, as_text=True),
)


@dataclass(frozen=True)
class Record:
    """Configuration of a model that a program has recorded in `path`, as args. What it does not say is not in them."""

    path: Path
    args: argparse.Namespace

    @property
    def margs(self) -> argparse.Namespace:
        """Args that a new checkpoint inherits: those that Megatron-LM has."""
        return argparse.Namespace(**{name: value for name, value in vars(self.args).items() if name in ATTRIBUTES})

    def require(self) -> None:
        """Raise `Unclear` unless it says all that describes a model."""
        values = vars(self.args)
        missing = [name for name in _NEEDED if values.get(name) is None]
        if values.get("position_embedding_type") == "rope" and values.get(_ROTARY) is None:
            missing.append(_ROTARY)
        if missing:
            raise Unclear(
                f"the checkpoint has no args, and {self.path}, which describes its model, does not say {', '.join(missing)}; give "
                "a reference model with --hf-config DIR"
            )


def recorded_beside(directory: Path) -> Record | None:
    """Configuration that lies beside the checkpoint in a folder; None without any that has a model's sizes."""
    return next(_records(directory), None)


def _records(directory: Path) -> Iterator[Record]:
    for kind in _KINDS:
        path = directory / kind.path
        if path.is_file():
            content = kind.read(path)
            fields = content if kind.section is None else content.get(kind.section)
            if isinstance(fields, Mapping) and (found := _args(fields, kind)):
                yield Record(path, argparse.Namespace(**found))


def _args(fields: Mapping[str, Any], kind: _Kind) -> Args:
    """Args of a model's section, empty if it has no model's sizes. Objects of classes are left out but an activation function."""
    nested = fields.get(_NESTED)
    merged = {**(nested if isinstance(nested, Mapping) else {}), **fields}
    merged.pop(_NESTED, None)
    named = {name: value for name, value in merged.items() if isinstance(name, str) and name.isidentifier()}
    plain = {name: value_of_text(value) if kind.as_text else value for name, value in named.items()}
    values = args_of_fields(plain)
    if "num_layers" not in values or "hidden_size" not in values:
        return {}
    return {name: value for name, value in values.items() if not _is_object(value)}


def _is_object(value: Any) -> bool:
    return isinstance(value, Mapping) and "_target_" in value
