"""Checkpoints of Megatron-LM from live models or from Hugging Face, and back, with Megatron-Bridge's `run_config.yaml`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..basics.errors import ConversionError
from ..basics.folders import new_folder
from ..conversion.endpoint import Source
from ..conversion.progress import make_progress
from ..conversion.run import convert
from ..families.config_json import config_from_spec
from ..formats.huggingface.options import HFOptions
from ..formats.huggingface.target import HFTarget
from ..formats.megatron.locating import checkpoint_directory
from ..formats.megatron.options import MegatronOptions
from ..formats.megatron.run_config import RUN_CONFIG
from ..formats.reading import ReadOptions, open_source
from ..live.log import LOG
from .pretrained import Location, Pretrained
from .run_config import BridgeCheckpoint, recorded_model
from .weights import write

_WARNING = "warning: "


class Checkpoints:
    """Methods of `AutoBridge` that read and write checkpoints."""

    hf_pretrained: Pretrained

    @classmethod
    def import_ckpt(
        cls,
        hf_model_id: str | os.PathLike[str],
        megatron_path: str | os.PathLike[str],
        *,
        low_memory_save: bool = False,
        show_progress: bool = True,
        overwrite: bool = False,
        **options: Any,
    ) -> None:
        """Convert a model of Hugging Face into a distributed checkpoint (`torch_dist`) with `run_config.yaml`.

        No model is built, and memory does not grow with it, whatever `low_memory_save` says. `options` are those of
        `from_hf_pretrained`. Raises `ConversionError` and leaves nothing that looks complete.
        """
        bridge = cls.from_hf_pretrained(hf_model_id, **options)  # type: ignore[attr-defined]
        pretrained: Pretrained = bridge.hf_pretrained
        target = _checkpoint(megatron_path, pretrained, overwrite)
        convert(pretrained.source(), target, pretrained.dtype, make_progress(not show_progress))

    def export_ckpt(
        self,
        megatron_path: str | os.PathLike[str],
        hf_path: str | os.PathLike[str],
        show_progress: bool = True,
        strict: bool = True,
        source_path: str | os.PathLike[str] | None = None,
        *,
        overwrite: bool = False,
    ) -> None:
        """Convert a checkpoint of Megatron-LM, of any format and sizes, into a Hugging Face folder; no model is built.

        Configuration and tokenizer are those of the bridge's model, or of the folder `source_path`. Every tensor is converted,
        whatever `strict` says.
        """
        reference = source_path
        if reference is None and self.hf_pretrained.location is not None:
            reference = self.hf_pretrained.location.folder(config_only=True)
        source = open_source(megatron_path, ReadOptions(hf_config=reference)).source
        _warn_of(source)
        convert(
            source,
            HFTarget(new_folder(hf_path), HFOptions(overwrite=overwrite)),
            None,
            make_progress(not show_progress),
        )

    def save_megatron_model(
        self,
        model: Any,
        path: str | os.PathLike[str],
        hf_tokenizer_path: str | os.PathLike[str] | None = None,
        low_memory_save: bool = False,
        hf_tokenizer_kwargs: dict[str, Any] | None = None,
        *,
        show_progress: bool = True,
        overwrite: bool = False,
    ) -> None:
        """Save a live model as a distributed checkpoint (`torch_dist`) with `run_config.yaml`. All its processes call this.

        `hf_tokenizer_path` is recorded as the tokenizer. Weights alone are saved, without optimizer states.
        """
        tokenizer = None if hf_tokenizer_path is None else os.fspath(hf_tokenizer_path)
        target = _checkpoint(path, self.hf_pretrained, overwrite, tokenizer)
        write(self.hf_pretrained, model, target, self.hf_pretrained.origin(), show_progress=show_progress)

    def load_megatron_model(
        self, path: str | os.PathLike[str], *, mp_overrides: Any = None, **options: Any
    ) -> list[Any]:
        """This process's models with the weights of a checkpoint of Megatron-LM, of any format and sizes.

        `mp_overrides` has parallel sizes by the names of the provider's fields, as a dictionary or attributes, 1 where it has
        none; `options` are those of `provide_distributed_model`.
        """
        from ..live.providing import load, provider_for

        source = open_source(path).source
        _warn_of(source)
        provider = provider_for(source.spec)
        overrides = mp_overrides if isinstance(mp_overrides, dict) else vars(mp_overrides or object)
        for name, value in overrides.items():
            if not name.startswith("_") and value is not None:
                if not hasattr(provider, name):
                    raise ConversionError(f"mp_overrides has {name}, which is no setting of a model; leave it out")
                setattr(provider, name, value)
        provider.loading(lambda models: load(models, source, source.spec))
        found: list[Any] = provider.provide_distributed_model(**options)
        return found

    @classmethod
    def from_auto_config(
        cls, megatron_path: str | os.PathLike[str], hf_model_id: str | os.PathLike[str], trust_remote_code: bool = False
    ) -> Any:
        """Bridge whose configuration is that of a checkpoint of Megatron-LM, and whose tokenizer is that of `hf_model_id`."""
        source = open_source(megatron_path).source
        config = source.origin.hf_config or config_from_spec(source.spec)
        return cls(Pretrained(config, None, beside=Location(os.fspath(hf_model_id))))  # type: ignore[call-arg]

    @classmethod
    def get_hf_model_id_from_checkpoint(cls, path: str | os.PathLike[str]) -> str | None:
        """Name of the model of Hugging Face that a checkpoint was made from, as its `run_config.yaml` records it; else None."""
        return recorded_model(checkpoint_directory(Path(path), None) / RUN_CONFIG)


def _warn_of(source: Source) -> None:
    """Log the warnings on a checkpoint: that a reference overrides its args, or that its program may have ignored some."""
    for note in source.origin.notes:
        if note.startswith(_WARNING):
            LOG.warning(note.removeprefix(_WARNING))


def _checkpoint(
    path: str | os.PathLike[str], pretrained: Pretrained, overwrite: bool, tokenizer: str | None = None
) -> BridgeCheckpoint:
    options = MegatronOptions(ckpt_format=BridgeCheckpoint.format, overwrite=overwrite, tokenizer=tokenizer)
    return BridgeCheckpoint(new_folder(path), options, pretrained.model_name_or_path)
