"""`run_config.yaml`, in which Megatron-Bridge records the model of a checkpoint (src/megatron/bridge/training/checkpointing.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ..basics.dtypes import DType
from ..basics.yaml_files import read_yaml
from ..formats.megatron.torch_dist_target import TorchDistTarget
from ..formats.megatron.writing import MegatronOptions
from ..live.buildable_args import config_fields

RUN_CONFIG = "run_config.yaml"
#: Class that reads the fields of a model's section, by whether the model has multi-latent attention.
_TARGETS = {
    False: "megatron.bridge.models.gpt_provider.GPTModelProvider",
    True: "megatron.bridge.models.mla_provider.MLAModelProvider",
}
#: Fields of a provider that are none of its config, by the argument that has their value.
_OF_PROVIDER = {
    "vocab_size": "vocab_size",
    "seq_length": "max_position_embeddings",
    "make_vocab_size_divisible_by": "make_vocab_size_divisible_by",
    "position_embedding_type": "position_embedding_type",
    "rotary_base": "rotary_base",
    "rotary_percent": "rotary_percent",
    "seq_len_interpolation_factor": "rotary_seq_len_interpolation_factor",
    "num_query_groups": "num_query_groups",
    "num_moe_experts": "num_experts",
    "gated_linear_unit": "swiglu",
}


class BridgeCheckpoint(TorchDistTarget):
    """Distributed checkpoint with a `run_config.yaml`."""

    def __init__(self, save_dir: Path, options: MegatronOptions, model_name: str | None) -> None:
        super().__init__(save_dir, options)
        self._model_name = model_name

    def assets(self, folder: Path) -> None:
        """Write the small files, that of the model's settings among them."""
        super().assets(folder)
        args: dict[str, Any] = self._args
        latent = bool(args.get("multi_latent_attention"))
        model: dict[str, Any] = {"_target_": _TARGETS[latent], "hf_model_id": self._model_name}
        model |= {name: _plain(value) for name, value in config_fields(args).items()}
        model |= {field: _plain(args.get(name)) for field, name in _OF_PROVIDER.items()}
        model["share_embeddings_and_output_weights"] = not args["untie_embeddings_and_output_weights"]
        model["params_dtype"] = str(args["params_dtype"])
        text = yaml.safe_dump({"model": dict(sorted(model.items()))}, sort_keys=False)
        (folder / RUN_CONFIG).write_text(text, encoding="utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return repr(value) if isinstance(value, DType) else value


def recorded_model(path: Path) -> str | None:
    """Name of the model of Hugging Face in a `run_config.yaml`; None where it has none, or is not there."""
    if not path.is_file():
        return None
    model = read_yaml(path, aliases=True).get("model")
    found = model.get("hf_model_id") if isinstance(model, dict) else None
    return found if isinstance(found, str) else None
