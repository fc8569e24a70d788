"""`run_config.yaml`, in which Megatron-Bridge records the model of a checkpoint (src/megatron/bridge/training/checkpointing.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ..basics.dtypes import DType
from ..basics.yaml_files import read_yaml
from ..formats.megatron.options import MegatronOptions
from ..formats.megatron.run_config import RUN_CONFIG
from ..formats.megatron.torch_dist_target import TorchDistTarget
from ..live.buildable_args import activation, provider_fields

#: Class that reads the fields of a model's section, by whether the model has multi-latent attention.
_TARGETS = {
    False: "megatron.bridge.models.gpt_provider.GPTModelProvider",
    True: "megatron.bridge.models.mla_provider.MLAModelProvider",
}
#: Function that computes an activation, and whether it does so in the fused form.
_ACTIVATIONS = {
    "silu": ("torch.nn.functional.silu", False),
    "squared_relu": ("megatron.core.activations.squared_relu", False),
    "quick_gelu": ("megatron.core.fusions.fused_bias_geglu.quick_gelu", False),
    "gelu": ("torch.nn.functional.gelu", False),
    "gelu_tanh": ("torch.nn.functional.gelu", True),  # the fused kernel computes the tanh form alone
}
#: Spec of layers of which some may differ from others; that of Megatron-Bridge's providers knows only layers of one kind.
_BLOCK_SPEC = "megatron.core.models.gpt.gpt_layer_specs.get_gpt_decoder_block_spec"
#: Further fields that have the name of their argument.
_SAME_NAME = ("vocab_size", "make_vocab_size_divisible_by", "moe_router_dtype")


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
        model |= {name: args[name] for name in _SAME_NAME if name in args}
        model |= {name: _plain(value) for name, value in provider_fields(args).items()} | _dtypes(args["params_dtype"])
        function, fused = _ACTIVATIONS[activation(args)]
        model |= {"activation_func": _object(function), "bias_activation_fusion": fused, "should_pad_vocab": True}
        if args.get("spec"):  # Megatron-Bridge takes it once its `register_allowed_target_prefix` allows the package
            model["transformer_layer_spec"] = _object(".".join(args["spec"]))
        elif latent or args.get("num_experts"):
            model["transformer_layer_spec"] = {
                "_target_": _BLOCK_SPEC,
                "_partial_": True,
                "use_transformer_engine": args["transformer_impl"] == "transformer_engine",
            }
        text = yaml.safe_dump({"model": dict(sorted(model.items()))}, sort_keys=False)
        (folder / RUN_CONFIG).write_text(text, encoding="utf-8")


def _dtypes(dtype: DType) -> dict[str, Any]:
    """Fields that say the dtype of a model."""
    fields: dict[str, Any] = {name: _object(repr(dtype)) for name in ("params_dtype", "pipeline_dtype")}
    return fields | {"bf16": dtype.name == "bfloat16", "fp16": dtype.name == "float16"}


def _object(name: str) -> dict[str, Any]:
    """Object of a module, as the file has it."""
    return {"_target_": name, "_call_": False}


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
