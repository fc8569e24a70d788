"""`AutoBridge`, the facade, with the names of Megatron-Bridge from its first guide to 0.7."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from ..basics.errors import ConversionError
from ..conversion.endpoint import Source
from ..formats.huggingface.options import HFOptions
from ..live.export import BUCKET_BYTES, WeightDistributionMode
from ..live.layout import planned
from ..live.shard_map import ShardMap
from .checkpoints import Checkpoints
from .pretrained import Location, Pretrained, loading_options, other_source, supported_models
from .publishing import Publishing
from .registry import ConversionTask, ModelBridge, tasks
from .unsupported import Unsupported
from .weights import HFSourcedWeightTuple, HFWeightTuple, export_options, map_of, save, weights


class AutoBridge(Checkpoints, Publishing, Unsupported):
    """Bridge between a model of Hugging Face and live models of megatron-core with the same weights.

    Nothing imports megatron-core before a model or a provider is asked for, and no model of transformers is built.
    """

    def __init__(self, hf_pretrained: Pretrained) -> None:
        """Use `from_hf_pretrained` or `from_hf_config`."""
        self.hf_pretrained = hf_pretrained

    @classmethod
    def from_hf_pretrained(
        cls, path: str | os.PathLike[str], *, ignore_tensors: Sequence[str] = (), **options: Any
    ) -> AutoBridge:
        """Bridge of a local folder, or of a model on the Hub, whose weights are downloaded when they are needed.

        `options` are those of transformers' `from_pretrained`: `torch_dtype` (or `dtype`) casts; `revision`, `token`, `cache_dir`
        concern the Hub; those on how transformers would hold or run a model are named in one warning; code of the model is never
        run, whatever `trust_remote_code` says. `ignore_tensors` are patterns of names, such as "v_head.*", of tensors that the
        model does not need. Raises `UnsupportedModel`, a `ValueError`, with the models that are supported.
        """
        known, dtype = loading_options(options)
        return cls(Pretrained.at(Location(os.fspath(path), **known), dtype, ignored_tensors=ignore_tensors))

    @classmethod
    def from_hf_config(cls, config: Any) -> AutoBridge:
        """Bridge of a configuration of transformers, or a dictionary like config.json, which has no weights to load."""
        return cls(Pretrained.of_config(config))

    @classmethod
    def can_handle(cls, path: str | os.PathLike[str], trust_remote_code: bool = False) -> bool:
        """Whether a folder or a model on the Hub is supported, by its configuration alone; never raises."""
        try:
            Pretrained.at(Location(os.fspath(path)), config_only=True)
        except (ConversionError, OSError, TypeError):
            return False
        return True

    @classmethod
    def supports(cls, config: Any) -> bool:
        """Whether a model with this configuration is supported."""
        try:
            Pretrained.of_config(config)
        except (ConversionError, TypeError):
            return False
        return True

    @classmethod
    def list_supported_models(cls) -> list[str]:
        """Architectures that are supported, sorted, those of registered families and plug-ins among them."""
        return supported_models()

    @classmethod
    def get_supported_bridges(cls) -> list[str]:
        """Same as `list_supported_models`, whose earlier name it is."""
        return supported_models()

    # -- from Hugging Face to megatron-core

    def to_megatron_provider(self, load_weights: bool = True, hf_path: str | None = None) -> Any:
        """Provider of the model: a dataclass over `TransformerConfig`, every field of which may be set before models are built.

        With `load_weights`, models that it builds get the weights, of `hf_path` where that is given.
        """
        from ..live.providing import load, provider_for

        pretrained = self.hf_pretrained
        source = self._weights(hf_path) if load_weights else None
        provider = provider_for(pretrained.spec)
        provider.hf_model_id = pretrained.model_name_or_path
        if source is not None:
            provider.loading(partial(load, source=source, spec=pretrained.spec))
        return provider

    def to_megatron_model(self, load_weights: bool = True, hf_path: str | None = None, **options: Any) -> list[Any]:
        """This process's models, as `to_megatron_provider` and its `provide_distributed_model(**options)` give them."""
        found: list[Any] = self.to_megatron_provider(load_weights, hf_path).provide_distributed_model(**options)
        return found

    def get_model_config(self) -> Any:
        """Provider whose models do not get the weights."""
        return self.to_megatron_provider(load_weights=False)

    def get_model(
        self,
        model_config: Any = None,
        *,
        load_weights: bool = True,
        hf_path: str | None = None,
        pg_collection: None = None,
        **options: Any,
    ) -> list[Any]:
        """This process's models for a provider, which may be changed before, such as that of `get_model_config`."""
        if pg_collection is not None:
            raise NotImplementedError(
                "pg_collection: models are built on megatron-core's parallel state alone; leave it out"
            )
        provider = self.to_megatron_provider(load_weights, hf_path) if model_config is None else model_config
        models: list[Any] = provider.provide_distributed_model(**options)
        return self.load_hf_weights(models, hf_path) if load_weights and model_config is not None else models

    def load_hf_weights(
        self, model: Any, hf_path: str | None = None, allowed_mismatched_params: Collection[str] | None = None
    ) -> list[Any]:
        """Fill this process's models with the weights, without a collective operation; returns the models.

        Parameters named in `allowed_mismatched_params` may be missing or of another shape, and keep their values.
        """
        from ..live.providing import load

        load(model, self._weights(hf_path), self.hf_pretrained.spec, allowed_mismatched_params or ())
        return list(model) if isinstance(model, (list, tuple)) else [model]

    def _weights(self, hf_path: str | None) -> Source:
        """Weights of the model, or of another one of the same kind."""
        pretrained = self.hf_pretrained
        return pretrained.source() if hf_path is None else other_source(hf_path, pretrained.spec)

    @property
    def transformer_config(self) -> Any:
        """Config of the model, checked and complete, on which models without a bridge can be built."""
        provider = self.to_megatron_provider(load_weights=False)
        provider.finalize()
        return provider

    @property
    def mla_transformer_config(self) -> Any:
        """The same of a model with multi-latent attention; raises `ConversionError` for another one."""
        from ..live.provider import MLAModelProvider

        config = self.transformer_config
        if not isinstance(config, MLAModelProvider):
            raise ConversionError("the model has no multi-latent attention; use transformer_config")
        return config

    # -- from megatron-core to Hugging Face

    def export_hf_weights(
        self,
        model: Any,
        cpu: bool = False,
        show_progress: bool = True,
        conversion_tasks: Sequence[ConversionTask] | None = None,
        merge_adapter_weights: bool = True,
        weight_dtype: Any = None,
        *,
        order: str | None = None,
        mode: str | WeightDistributionMode | None = None,
        bucket_bytes: int = BUCKET_BYTES,
        with_megatron_names: bool = False,
        current_pp_stage_only: bool = False,
    ) -> Iterator[HFWeightTuple | HFSourcedWeightTuple]:
        """Weights under Hugging Face's names and in its shapes, one after the other; all processes go through them together.

        `mode` says who gets them: "consolidate", the first process (the default); "replicate", all (the default with
        `conversion_tasks`, `weight_dtype` or `with_megatron_names`, which came after the modes); "distribute", each process its
        share. `order` is that of the model, or "safetensors", by file. At most `bucket_bytes` are moved at a time, unless one
        tensor is larger. `current_pp_stage_only` gives each process the weights of its own pipeline stage. Each weight is a tensor
        of its own, which training does not change; `cpu` moves it to the CPU.
        """
        newer = conversion_tasks is not None or weight_dtype is not None or with_megatron_names
        if mode is None:
            mode = WeightDistributionMode.REPLICATE if newer else WeightDistributionMode.CONSOLIDATE
        if current_pp_stage_only:
            mode = WeightDistributionMode.STAGE
        names = (
            None if conversion_tasks is None else list(dict.fromkeys(n for t in conversion_tasks for n in t.hf_names))
        )
        return weights(
            self.hf_pretrained,
            model,
            export_options(cpu, order, mode, weight_dtype, bucket_bytes),
            names=names,
            show_progress=show_progress,
            with_megatron_names=with_megatron_names,
        )

    def save_hf_pretrained(
        self,
        model: Any,
        path: str | os.PathLike[str],
        show_progress: bool = True,
        source_path: str | os.PathLike[str] | None = None,
        strict: bool = True,
        merge_adapter_weights: bool = True,
        distributed_save: bool = False,
        save_every_n_ranks: int = 1,
        weight_dtype: Any = None,
        *,
        overwrite: bool = False,
        max_shard_size: int = HFOptions.max_shard_size,
    ) -> None:
        """Save configuration, tokenizer, code files and weights: all or nothing, with a manifest. All processes call this.

        `source_path` has a tokenizer to save instead of the model's own. With `distributed_save`, each `save_every_n_ranks`-th
        process writes files of its own. Every weight is saved, whatever `strict` says. A folder that holds a model is replaced
        only with `overwrite`.
        """
        save(
            self.hf_pretrained,
            model,
            path,
            source_path=None if source_path is None else os.fspath(source_path),
            show_progress=show_progress,
            every_n_ranks=save_every_n_ranks if distributed_save else 0,
            weight_dtype=weight_dtype,
            overwrite=overwrite,
            max_shard_size=max_shard_size,
        )

    def save_hf_weights(
        self,
        model: Any,
        path: str | os.PathLike[str],
        show_progress: bool = True,
        strict: bool = True,
        merge_adapter_weights: bool = True,
        distributed_save: bool = False,
        save_every_n_ranks: int = 1,
        weight_dtype: Any = None,
        *,
        overwrite: bool = False,
        max_shard_size: int = HFOptions.max_shard_size,
    ) -> None:
        """Save the weights alone, as `save_hf_pretrained` does."""
        save(
            self.hf_pretrained,
            model,
            path,
            weights_only=True,
            show_progress=show_progress,
            every_n_ranks=save_every_n_ranks if distributed_save else 0,
            weight_dtype=weight_dtype,
            overwrite=overwrite,
            max_shard_size=max_shard_size,
        )

    def shard_map(
        self, parallel: Mapping[str, Any] | None = None, *, model: Any = None, names: str = "local"
    ) -> ShardMap:
        """Which rows and columns of which process's parameters make up each tensor of Hugging Face; see `ShardMap`.

        `parallel` has sizes "tp", "pp", "ep", "etp" and "vpp", 1 where it has none, "world", the number of processes, any of the
        fields of `PipelineSplit` for uneven stages, and "make_vocab_size_divisible_by", which is 128 in Megatron-LM, and the least
        that is possible in models of this bridge. `names` are those of layers "local" or "transformer_engine". With `model`,
        the map is that of a live model; all its processes call this.
        """
        if model is not None:
            from ..live.model import live_model

            with live_model(model, self.hf_pretrained.spec) as live:
                return map_of(self.hf_pretrained, live.layout)
        return map_of(self.hf_pretrained, planned(self.hf_pretrained.spec, parallel or {}, names))

    def get_conversion_tasks(self, model: Any, hf_path: str | None = None) -> list[ConversionTask]:
        """Parameters of this process's models, and the tensors of Hugging Face that each is part of."""
        return tasks(self.shard_map(model=model))

    @property
    def _model_bridge(self) -> ModelBridge:
        return ModelBridge(self.hf_pretrained.spec)
