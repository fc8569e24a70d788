"""`source_megatron_args.json`: training arguments kept beside a Hugging Face model, typed.

Habana's converter writes such a file with every value that is not JSON as its `str`; those files are read too.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..basics.dtypes import BY_NAME, DType, dtype_named
from ..basics.errors import MissingPath, UsageError
from ..basics.json_files import read_json

#: Attributes that belong to one run on one machine, not to the model: a new checkpoint must not inherit them.
_RUN_ARGUMENTS = frozenset(
    """
    load save pretrained_checkpoint tensorboard_dir wandb_save_dir data_path train_data_path valid_data_path
    test_data_path rank local_rank world_size data_parallel_size tokenizer_type use_checkpoint_args exit_on_missing_checkpoint
    use_distributed_optimizer sequence_parallel consumed_train_samples consumed_valid_samples skipped_train_samples
    no_load_optim no_load_rng finetune ckpt_step hf_family_file
    """.split()
)
#: Name of the file beside a Hugging Face model.
FILE = "source_megatron_args.json"
_DTYPE_PREFIX = "torch."


def margs_to_json(margs: argparse.Namespace) -> dict[str, Any]:
    """Arguments as JSON values; dtypes as `torch.bfloat16`, anything else that is not JSON as its `str`."""
    result: dict[str, Any] = json.loads(json.dumps(vars(margs), default=_json_value))
    return dict(sorted(result.items()))


def _json_value(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):  # whose order differs between processes
        return sorted(value, key=str)
    return f"{_DTYPE_PREFIX}{value}" if isinstance(value, DType) else str(value)


def margs_from_json(path: Path) -> argparse.Namespace:
    """Arguments of a `source_megatron_args.json`; `torch.bfloat16` comes back as a dtype."""
    return margs_from_values(read_json(path))


def named_margs(path: Path) -> argparse.Namespace:
    """Arguments of a file that a user names; raises `UsageError` if it is none of these files."""
    if path.is_dir():
        raise UsageError(f"--source-margs-file {path} is a folder; name the file in it, such as {path / FILE}")
    if not path.exists():
        raise MissingPath(
            f"--source-margs-file {path} does not exist; only the way back from a checkpoint writes one, so leave the option out "
            "for a model from elsewhere, such as the Hugging Face Hub"
        )
    values = read_json(path)
    if "architectures" in values:
        raise UsageError(
            f"--source-margs-file {path} is a configuration of Hugging Face, not training arguments; name a {FILE}, or leave it out"
        )
    return margs_from_values(values)


def margs_from_values(values: Mapping[str, Any]) -> argparse.Namespace:
    """The inverse of `margs_to_json`, as far as that kept the values."""
    return argparse.Namespace(**{name: _restored(value) for name, value in values.items()})


def _restored(value: Any) -> Any:
    if isinstance(value, str) and value.startswith(_DTYPE_PREFIX) and value.removeprefix(_DTYPE_PREFIX) in BY_NAME:
        return dtype_named(value)
    return value


def inheritable(margs: argparse.Namespace | None) -> dict[str, Any]:
    """Arguments of an older checkpoint that a new one takes over."""
    return {} if margs is None else {name: value for name, value in vars(margs).items() if name not in _RUN_ARGUMENTS}
