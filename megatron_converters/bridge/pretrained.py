"""Hugging Face's side of a bridge: a folder or a name on the Hub, opened as far as is needed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..assets.origin import Origin
from ..basics.dtypes import DType, dtype_named
from ..basics.errors import ConversionError, raise_all
from ..basics.json_files import read_json
from ..comparison.tensors import model_differences
from ..conversion.endpoint import Source
from ..families import FAMILIES
from ..families.config_json import spec_from_config
from ..families.heads import class_of
from ..families.wrappers import WRAPPERS
from ..formats.hub import resolve
from ..formats.huggingface.options import FUSED, SEPARATE
from ..formats.huggingface.source import HFSource
from ..live.log import LOG
from ..model.slots import refs
from ..model.spec import ModelSpec

#: Options of transformers' `from_pretrained` that concern how transformers would hold or run a model.
_NEEDLESS = frozenset(
    """
    attn_implementation device_map load_in_4bit load_in_8bit low_cpu_mem_usage max_memory offload_folder offload_state_dict
    quantization_config tp_plan use_safetensors variant_dtype
    """.split()
)
_CONFIG = "config.json"


class UnsupportedModel(ConversionError, ValueError):
    """A model that no bridge supports, or that cannot be reached."""


def supported_models() -> list[str]:
    """Architectures of all supported models, sorted."""
    return sorted({*(family.architecture for family in FAMILIES.values()), *(row.architecture for row in WRAPPERS)})


@dataclass(frozen=True)
class Location:
    """Model as a user names it: a folder, or a name on the Hub with what the Hub is asked with."""

    name: str
    revision: str | None = None
    token: str | None = None
    cache_dir: str | None = None
    local_files_only: bool = False

    def folder(self, *, config_only: bool) -> Path:
        """Folder with the model's files, or at least its config.json; what is missing of a model on the Hub is downloaded."""
        name = self.name if self.revision is None or Path(self.name).is_dir() else f"{self.name}@{self.revision}"
        snapshot = resolve(
            name,
            config_only=config_only,
            token=self.token,
            cache_dir=self.cache_dir,
            local_files_only=self.local_files_only,
        )
        for note in snapshot.notes:
            LOG.warning(note)
        return snapshot.folder


class Pretrained:
    """Model of Hugging Face: its configuration, and its weights once they are asked for.

    `location` is None where only the configuration is known; the tokenizer is then that of `beside`, if there is one.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        location: Location | None,
        dtype: DType | None = None,
        beside: Location | None = None,
        ignored_tensors: Sequence[str] = (),
    ) -> None:
        self._ignored_tensors = tuple(ignored_tensors)
        self.config, self.location, self._beside = dict(config), location, beside
        self.dtype = dtype
        self._spec = _language_model(spec_from_config(self.config))
        self._source: HFSource | None = None

    @classmethod
    def at(
        cls,
        location: Location,
        dtype: DType | None = None,
        *,
        config_only: bool = False,
        ignored_tensors: Sequence[str] = (),
    ) -> Pretrained:
        """Model at a location. A local folder is opened, unless `config_only`; of one on the Hub only config.json is downloaded.

        `ignored_tensors` are patterns of names of tensors that are left out.

        Raises `UnsupportedModel`, with the supported models, for one that is none of these or cannot be reached.
        """
        try:
            folder = location.folder(config_only=True)
            found = cls(read_json(folder / _CONFIG), location, dtype, ignored_tensors=ignored_tensors)
            if not config_only and Path(location.name).is_dir():
                found.source()
        except ConversionError as error:
            raise UnsupportedModel(f"{error}\nsupported models: {', '.join(supported_models())}") from error
        return found

    @classmethod
    def of_config(cls, config: Any) -> Pretrained:
        """Model with this configuration of transformers, or dictionary, and without weights."""
        values = json.loads(config.to_json_string()) if hasattr(config, "to_json_string") else config
        if not isinstance(values, Mapping):
            raise TypeError(f"a {type(config).__name__} is no configuration; give one of transformers, or a dictionary")
        try:
            return cls(values, None)
        except ConversionError as error:
            raise UnsupportedModel(f"{error}\nsupported models: {', '.join(supported_models())}") from error

    @property
    def model_name_or_path(self) -> str | None:
        """Name of the model as the user gave it."""
        return None if self.location is None else self.location.name

    @property
    def spec(self) -> ModelSpec:
        """Spec of the model, in the dtype in which it is to be loaded."""
        spec = self._spec if self._source is None else self._source.spec
        return spec if self.dtype is None else spec.replaced(dtype=self.dtype)

    @property
    def expert_layout(self) -> str:
        """Whether the files have experts as separate tensors, or fused ones."""
        return FUSED if self._source is not None and self._source.fused else SEPARATE

    def source(self) -> HFSource:
        """Weights, of which the headers are read now. Raises `ConversionError` where there are none."""
        if self._source is None:
            if self.location is None:
                raise ConversionError(
                    "this bridge was made of a configuration, which has no weights; make it with from_hf_pretrained, or give "
                    "hf_path"
                )
            self._source = HFSource(self.location.folder(config_only=False), ignored_tensors=self._ignored_tensors)
            _language_model(self._source.spec)
            for note in self._source.origin.notes:
                LOG.info(note)
        return self._source

    def origin(self) -> Origin:
        """What goes beside the weights of a live model: configuration, tokenizer, code files."""
        if self.location is None:
            beside = None if self._beside is None else str(self._beside.folder(config_only=False))
            return Origin(described="a live model", hf_config=self.config, tokenizer=beside)
        found = self.source().origin
        return Origin(
            described="a live model",
            hf_config=found.hf_config,
            generation_config=found.generation_config,
            tokenizer=found.tokenizer,
            code_files=found.code_files,
            carried=found.carried,
        )


def other_source(hf_path: str | os.PathLike[str], spec: ModelSpec) -> Source:
    """Weights of another folder or name on the Hub, for a model of this spec; other settings of theirs are said.

    Raises `ConversionError` for weights of a model whose tensors are others.
    """
    source = Pretrained.at(Location(os.fspath(hf_path))).source()
    own, other = ({ref: ref.shape(each) for ref in refs(each)} for each in (spec, source.spec))
    differing = model_differences(spec, source.spec, ("this model", os.fspath(hf_path)))
    if own != other:
        raise_all(f"{hf_path} holds the weights of another model:", differing)
    if differing:
        LOG.warning("%s has settings that are not heeded: %s", hf_path, "; ".join(differing))
    return source


def weights_dtype(value: Any, option: str) -> DType | None:
    """Dtype of weights that an option names, as torch's or as text; None for None. Raises `ConversionError` for other ones."""
    dtype = None if value is None else dtype_named(str(value))
    if dtype is not None and not dtype.floating:
        raise ConversionError(f"{option} is {dtype}, which weights cannot have; use bfloat16, float16 or float32")
    return dtype


def loading_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], DType | None]:
    """Fields of `Location` and the dtype that options of transformers' `from_pretrained` mean; what is not heeded is said once.

    Raises `TypeError` for options that it does not have.
    """
    known = {name: options[name] for name in ("revision", "token", "cache_dir", "local_files_only") if name in options}
    dtype = options.get("dtype", options.get("torch_dtype"))
    needless = sorted(name for name in options if name in _NEEDLESS)
    heeded = {*known, *needless, "dtype", "torch_dtype", "trust_remote_code"}
    unknown = sorted(options.keys() - heeded)
    if unknown:
        raise TypeError(f"from_hf_pretrained takes no {', '.join(unknown)}; leave it out")
    if needless:
        LOG.warning("%s: not heeded, since no model of transformers is built", ", ".join(needless))
    return known, None if dtype == "auto" else weights_dtype(dtype, "torch_dtype")


def _language_model(spec: ModelSpec) -> ModelSpec:
    """The spec; raises `ConversionError` for a model with another head than logits of tokens."""
    if spec.num_labels is not None:
        named = class_of(FAMILIES[spec.family], spec.num_labels)
        raise ConversionError(f"a bridge is for language models, and this is of {named}; convert its files instead")
    return spec
