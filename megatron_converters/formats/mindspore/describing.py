"""The model that MindSpore's weights hold: by a configuration beside them, or by shapes, MindFormers' YAML and typed options."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...basics.dtypes import DType
from ...basics.errors import ConversionError, UsageError
from ...basics.json_files import read_json
from ...conversion.zero_bias import SLOT as OUTPUT_BIAS
from ...conversion.zero_bias import without_absent
from ...families.config_json import config_notes, infer_family, spec_from_config
from ...model.spec import ModelSpec
from .options import CONTIGUOUS, GROUPED, INTERLEAVED
from .shapes import Shapes
from .typed import ASSUMED, check_sizes, switch_notes
from .yaml_reading import layouts_of, properties_of

#: Names of Hugging Face's configuration beside the weights: of this project's writer, and of Hugging Face itself.
CONFIGS = ("hf_config.json", "config.json")
_YAML_SUFFIXES = (".yaml", ".yml")
#: First release in which gate and up are interleaved and queries, keys and values grouped unless the YAML says otherwise.
_INTERLEAVES = (1, 7)


@dataclass(frozen=True)
class MindSporeReadOptions:
    """Options for reading: orders of rows, MindFormers' release or YAML, a reference folder, and what the user has typed.

    `typed` has properties of the model by name. `true_vocab_size` is the vocabulary without padding.
    `ignore_tensors` are patterns of names of tensors that are left out.
    """

    mlp_layout: str | None = None
    qkv_layout: str | None = None
    version: str | None = None
    yaml: Path | None = None
    reference: Path | None = None
    true_vocab_size: int | None = None
    typed: Mapping[str, Any] = field(default_factory=dict)
    #: Unknown fields of config.json that do not matter.
    ignored_config: tuple[str, ...] = ()
    ignore_tensors: tuple[str, ...] = ()


@dataclass(frozen=True)
class Described:
    """Model, with the orders of rows in its weights; notes for the user, and warnings that come before the conversion, too."""

    spec: ModelSpec
    mlp_layout: str
    qkv_layout: str
    notes: tuple[str, ...]
    urgent: tuple[str, ...]
    config: dict[str, Any] | None = None


def describe(root: Path, shapes: Shapes, dtype: DType, options: MindSporeReadOptions) -> Described:
    """Describe the model; raises `UsageError` where typed sizes contradict the weights, or where nothing says a number."""
    yaml = _yaml(root, options)
    config = _configuration(root, options)
    if config is not None:
        spec, notes = _by_configuration(config, shapes, options)
    else:
        spec, notes = _by_shapes(root, shapes, yaml, dtype, options)
    said = {} if yaml is None else layouts_of(yaml)
    mlp, mlp_warnings = _mlp_layout(shapes, said.get("mlp_layout"), options)
    qkv, qkv_warnings = _qkv_layout(shapes, said.get("qkv_layout"), options)
    urgent = (*mlp_warnings, *qkv_warnings)
    return Described(dataclasses.replace(spec, dtype=dtype), mlp, qkv, (*notes, *urgent), urgent, config)


def _configuration(root: Path, options: MindSporeReadOptions) -> dict[str, Any] | None:
    """Configuration of the reference, or the one beside the weights."""
    folders = [root] if options.reference is None else [options.reference]
    found = [folder / name for folder in folders for name in CONFIGS if (folder / name).is_file()]
    if options.reference is not None and not found:
        raise UsageError(f"{options.reference} has no config.json; give the folder of a reference model")
    return read_json(found[0]) if found else None


def _yaml(root: Path, options: MindSporeReadOptions) -> dict[str, Any] | None:
    """MindFormers' YAML: the one that the user names, or the only one beside the weights."""
    from ...basics.yaml_files import read_yaml  # which imports yaml

    if options.yaml is not None:
        return read_yaml(options.yaml, aliases=True)
    beside = sorted(path for path in root.iterdir() if path.suffix in _YAML_SUFFIXES)
    if len(beside) > 1:
        raise UsageError(
            f"{root} has several YAML files ({', '.join(path.name for path in beside)}); name the model's with --mf-config"
        )
    return read_yaml(beside[0], aliases=True) if beside else None


def _by_configuration(
    config: Mapping[str, Any], shapes: Shapes, options: MindSporeReadOptions
) -> tuple[ModelSpec, list[str]]:
    whole = spec_from_config(config, options.ignored_config)
    spec, notes = without_absent(whole, stored=bool(shapes.switches().get(OUTPUT_BIAS)))
    rows = shapes.embeddings[0]
    if not spec.vocab_size <= rows:
        raise ConversionError(
            f"the configuration has a vocabulary of {spec.vocab_size}, but there are {rows} rows of embeddings; give the "
            "configuration of this model"
        )
    check_sizes(options.typed, spec.values, "the configuration")
    if options.true_vocab_size not in (None, spec.vocab_size):
        raise UsageError(
            f"--true-vocab-size {options.true_vocab_size} contradicts {spec.vocab_size} of the configuration; leave it out"
        )
    notes += [*config_notes(config), *switch_notes(options.typed, spec.values)]
    if not spec.mtp or "mtp_num_layers" in shapes.sizes():
        return spec, notes
    return dataclasses.replace(spec, mtp=()), notes


def _by_shapes(
    root: Path, shapes: Shapes, yaml: Mapping[str, Any] | None, dtype: DType, options: MindSporeReadOptions
) -> tuple[ModelSpec, list[str]]:
    """Spec by shapes, names, YAML and typed options, in this order of trust; notes on what was assumed."""
    typed = {name: value for name, value in options.typed.items() if value is not None}
    known = {**shapes.sizes(), **shapes.switches()}
    check_sizes(typed, known, "the shapes")
    said = {} if yaml is None else properties_of(yaml, shapes)
    contradictions = [
        f"{name} {said[name]}, but shapes {known[name]}"
        for name in shapes.sizes()
        if said.get(name) not in (None, known[name])
    ]
    if contradictions:
        raise ConversionError(
            f"the YAML says {'; '.join(contradictions)}; give the YAML of this model with --mf-config"
        )
    if yaml is None and (shapes.is_moe or shapes.is_latent):
        kind = "experts" if shapes.is_moe else "multi-latent attention"
        raise UsageError(
            f"{root} holds a model with {kind}, of which shapes do not tell enough; give MindFormers' YAML with --mf-config FILE, "
            "or the folder of a reference model with --hf-config DIR"
        )
    found = {**said, **{name: value for name, value in typed.items() if name not in known}, **known}
    found |= {} if shapes.is_latent else _heads(shapes, found, typed)
    vocab = options.true_vocab_size or said.get("vocab_size") or shapes.embeddings[0]
    if not 0 < vocab <= shapes.embeddings[0]:
        raise UsageError(
            f"--true-vocab-size {vocab} is more than the {shapes.embeddings[0]} rows of embeddings; correct it"
        )
    assumed = {name: value for name, value in ASSUMED.items() if found.get(name) is None}
    if shapes.switches()["learned_positions"]:
        assumed.pop("rotary_base", None)
        found["max_position_embeddings"] = shapes.shapes["embedding.position_embeddings.weight"][0]
        assumed.pop("max_position_embeddings", None)
    notes = [
        f"warning: neither weights nor options say {name}; {value:g} is assumed" for name, value in assumed.items()
    ]
    fields = {**found, **assumed, "vocab_size": vocab, "dtype": dtype}
    spec = infer_family({name: value for name, value in fields.items() if value is not None})
    return spec, [*notes, *switch_notes(typed, known), f"the {spec.family} family fits shapes and options"]


def _heads(shapes: Shapes, found: Mapping[str, Any], typed: Mapping[str, Any]) -> dict[str, int]:
    """Number of query heads, of groups, and size of a head; the first is in no shape."""
    heads, queries, keys = found.get("num_attention_heads"), shapes.query_rows, shapes.key_rows
    if queries is None or keys is None:
        raise ConversionError("no layer has the output projection of attention, or its queries; copy the weights again")
    if heads is None:
        raise UsageError(
            f"nothing says the number of attention heads, which the shapes ({queries} rows of queries) do not tell; give "
            "--num-attention-heads N, MindFormers' YAML with --mf-config FILE, or a reference with --hf-config DIR"
        )
    size = shapes.head_dim or found.get("kv_channels") or queries // heads
    if heads * size != queries or keys % size:
        raise UsageError(
            f"{heads} attention heads of {size} do not fit the shapes, {queries} rows of queries and {keys} of keys; correct "
            "--num-attention-heads or --kv-channels"
        )
    groups = found.get("num_query_groups")
    if groups not in (None, keys // size):
        whose = "--num-query-groups" if typed.get("num_query_groups") else "the YAML's num_query_groups"
        raise UsageError(f"{whose} {groups} contradicts {keys // size} of the shapes; correct it")
    return {"num_attention_heads": heads, "num_query_groups": keys // size, "kv_channels": size}


#: What is said where an order of rows is only assumed.
_MLP_WARNING = (
    "warning: rows of the MLP's first linear are taken for gate above up (--mf-mlp-layout contiguous); MindSpore Transformers "
    "from 1.7 on interleaves them unless its YAML says use_interleaved_weight_layout_mlp: False, and the wrong order is a "
    "model that loads and computes nonsense. Give --mf-mlp-layout, --mf-version or --mf-config, and compare logits"
)
_QKV_WARNING = (
    "warning: rows of queries, keys and values are taken for grouped (--mf-qkv-layout grouped), as MindSpore Transformers has "
    "them from 1.7 on unless its YAML says use_contiguous_weight_layout_attention: True; give --mf-qkv-layout, --mf-version or "
    "--mf-config if yours has"
)


def _mlp_layout(shapes: Shapes, said: str | None, options: MindSporeReadOptions) -> tuple[str, list[str]]:
    """Order of rows of gated MLPs."""
    known = _known_layout(options.mlp_layout, said, INTERLEAVED, options)
    matters = not shapes.is_legacy and shapes.switches()["gated"]
    return (known, []) if known is not None else (CONTIGUOUS, [_MLP_WARNING] if matters else [])


def _qkv_layout(shapes: Shapes, said: str | None, options: MindSporeReadOptions) -> tuple[str, list[str]]:
    """Order of rows of queries, keys and values."""
    known = _known_layout(options.qkv_layout, said, GROUPED, options)
    matters = not shapes.is_latent and shapes.has("self_attention.linear_qkv.weight", "attention.w_qkv.weight")
    return (known, []) if known is not None else (GROUPED, [_QKV_WARNING] if matters else [])


def _known_layout(given: str | None, said: str | None, modern: str, options: MindSporeReadOptions) -> str | None:
    """Order of rows by option, by the YAML, or by the release, which has `modern` or else contiguous; None if nothing tells."""
    if given is not None or said is not None:
        return given or said or ""
    is_modern = _is_modern(options)
    if is_modern is None:
        return None
    return modern if is_modern else CONTIGUOUS


def _is_modern(options: MindSporeReadOptions) -> bool | None:
    """Whether the release that wrote the weights has today's defaults; None where it is not said."""
    if options.version is None:
        return None
    parts = options.version.split(".")
    if not all(part.isdecimal() for part in parts[:2]) or len(parts) < 2:
        raise UsageError(f"--mf-version {options.version} is no release, such as 1.7")
    return (int(parts[0]), int(parts[1])) >= _INTERLEAVES
