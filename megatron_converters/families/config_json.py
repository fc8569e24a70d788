"""config.json ↔ `ModelSpec`, by the rules of the family's table."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from ..basics.dtypes import DType, dtype_named
from ..basics.errors import ConversionError, UnknownArchitecture, one_line
from ..model.spec import ModelSpec, PerLayer
from . import FAMILIES, quantisation
from .rules_attention import FULL, layer_types
from .table import Family

#: Keys of config.json that change neither weights nor the arithmetic of a forward pass (transformers PretrainedConfig;
#: marks left by transformers, nanotron, transformers.js, Unsloth and the converter of the first Llamas).
HARMLESS = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _name_or_path add_cross_attention architectures auto_map
    bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward classifier_dropout
    cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype early_stopping
    encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id id2label is_decoder is_encoder_decoder is_llama_config is_qwen2_config label2id length_penalty
    max_length max_sequence_length min_length model_type no_repeat_ngram_size num_beam_groups num_beams num_return_sequences
    output_attentions output_hidden_states output_router_logits output_scores pad_token_id prefix pretraining_tp
    problem_type pruned_heads remove_invalid_values repetition_penalty return_dict return_dict_in_generate
    router_jitter_noise sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss
    tie_encoder_decoder tokenizer_class top_k top_p torch_dtype torchscript transformers.js_config
    transformers_version typical_p unsloth_fixed unsloth_version use_bfloat16 use_cache
    """.split()
)


_SPARSE_HYBRID = "whose layers of lightning attention no GPTModel of Megatron-LM has, so that it cannot be converted"
#: Architectures and model types that Megatron-LM cannot hold at all, and why.
_REFUSED = dict.fromkeys(("MiniCPMSALAForCausalLM", "minicpm_sala"), _SPARSE_HYBRID)


def family_from_config(config: Mapping[str, Any]) -> Family:
    """Family that config.json names by `architectures` or, without it, `model_type`; if both are there, they must agree."""
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise ConversionError(f"config.json has architectures={architectures!r}; it must be a list of names")
    model_type = config.get("model_type")
    candidates = [family for family in FAMILIES.values() if family.architecture in architectures or not architectures]
    agreed = [
        family
        for family in candidates
        if model_type in (family.model_type, *family.aliases) or (architectures and model_type is None)
    ]
    if len(agreed) == 1:
        return agreed[0]
    if architectures and candidates:  # transformers goes by model_type, other programs by architectures
        raise ConversionError(
            f"config.json has architectures={architectures!r} and model_type={model_type!r}, which name different "
            "models; correct the one that is wrong"
        )
    reasons = [reason for name, reason in _REFUSED.items() if name in architectures or name == model_type]
    if reasons:
        raise ConversionError(f"config.json names {one_line(', '.join(architectures) or model_type)}, {reasons[0]}")
    named = one_line(", ".join(architectures) or model_type or "no architecture")
    known = ", ".join(family.architecture for family in FAMILIES.values())
    raise UnknownArchitecture(
        f"config.json names {named}, which is not supported; supported are {known}, and those of a family file, which "
        "--family-file FILE names, or of an installed plug-in"
    )


def spec_from_config(config: Mapping[str, Any], ignored: Iterable[str] = ()) -> ModelSpec:
    """Spec of a model by its config.json. `ignored` names keys that the user says are harmless.

    The dtype is config.json's, or float32 without one; readers of weight files replace it with the files' dtype.
    """
    family = family_from_config(config)
    _refuse_unclaimed(config, family, ignored)
    fields: dict[str, Any] = {}
    for rule in family.rules:
        fields.update(rule.read(config))
    dtype = dtype_named(config.get("torch_dtype") or config.get("dtype") or "float32")
    return ModelSpec.of(family=family.name, dtype=dtype, **fields)


def _refuse_unclaimed(config: Mapping[str, Any], family: Family, ignored: Iterable[str]) -> None:
    quantisation.block_size(config)  # refuses what cannot be read
    claimed = HARMLESS.union([quantisation.KEY], ignored, *(rule.keys for rule in family.rules))
    unknown = sorted(key for key, value in config.items() if key not in claimed and value not in (None, False))
    # transformers 5 writes layer_types for every architecture; full attention in all layers is what others leave out.
    if all(kind == FULL for kind in layer_types(config)):
        unknown = [key for key in unknown if key != "layer_types"]
    if unknown:
        names = [one_line(key) for key in unknown]
        raise ConversionError(
            f"config.json has fields that the {family.name} family does not know: {', '.join(names)}; "
            "they may change what the model computes. If they do not, pass "
            f"--ignore-config-fields {','.join(names)}"
        )


def config_from_spec(spec: ModelSpec) -> dict[str, Any]:
    """Complete config.json object for the spec. Raises `ConversionError` naming the fields that the family cannot express."""
    family = FAMILIES[spec.family]
    config: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type}
    for rule in family.rules:
        for key, value in rule.write(spec).items():
            config.setdefault(key, _of_all(value))
    config = {**config, "torch_dtype": spec.dtype.name, "use_cache": True}
    inexpressible = differences(spec, spec_from_config(config))
    if inexpressible:
        raise ConversionError(f"the {family.name} architecture cannot express {'; '.join(inexpressible)}")
    return config


def _of_all(value: Any) -> Any:
    """Value of a config key; where layers differ in it that of the first that has it, which then reads back as another model."""
    return next((each for each in value if each is not None), None) if isinstance(value, PerLayer) else value


def infer_family(fields: Mapping[str, Any], among: Collection[str] = ()) -> ModelSpec:
    """Spec with the first family whose config.json can express these fields (all of `ModelSpec` except `family`).

    `among` names the families to choose from, in this order; all where it is empty.
    """
    reasons = []
    choices = [fields]
    if fields.get("feed") == "moe":  # no layer then has a dense MLP, whatever its size
        choices.append({**fields, "ffn_hidden_size": fields["moe_ffn_hidden_size"]})
    for choice, name in itertools.product(choices, among or FAMILIES):
        spec = ModelSpec.of(family=name, **choice)
        try:
            config_from_spec(spec)
        except ConversionError as error:
            reasons.append(str(error))
        else:
            return spec
    raise UnknownArchitecture("no supported architecture has this model's shape: " + "; ".join(reasons))


def differences(one: ModelSpec, other: ModelSpec, among: Iterable[str] | None = None) -> list[str]:
    """Properties, all or those `among`, in which two specs differ, as `name: value, not value`."""
    names = dict.fromkeys((*one.values, *other.values)) if among is None else among
    return [
        f"{name}: {_show(one.values.get(name))}, not {_show(other.values.get(name))}"
        for name in names
        if one.values.get(name) != other.values.get(name)
    ]


def _show(value: Any) -> str:
    if isinstance(value, PerLayer):
        return f"{', '.join(map(str, value))} in the layers"
    return value.name if isinstance(value, DType) else str(value) or "none"


def missing_code(config: Mapping[str, Any], code: Collection[str]) -> list[str]:
    """Python files that `auto_map` takes the model's classes from and that are not among `code`.

    Code of another repository (`repository--module.Class`) is not a file of this one, and that of a tokenizer belongs to it.
    """
    auto_map = config.get("auto_map")
    listed = auto_map.items() if isinstance(auto_map, Mapping) else ()
    names = {
        f"{one_line(value).partition('.')[0]}.py"
        for key, value in listed
        if key != "AutoTokenizer"
        if "--" not in str(value)
    }
    return sorted(names - set(code))


def config_for(
    spec: ModelSpec, base: Mapping[str, Any] | None, code: Collection[str] = ()
) -> tuple[dict[str, Any], list[str]]:
    """config.json to write, and the keys of `base` that had to change, as `key: old -> new`.

    `base` is the configuration of the source or of a reference model; its keys that the spec does not decide are kept. `code`
    are names of Python files that will be beside it: where they are all that `auto_map` names, it stays, and so do the names of
    a model that transformers does not have itself.
    """
    written = config_from_spec(spec)
    if base is None:
        return written, []
    family = FAMILIES[spec.family]
    config = dict(base)
    for rule in family.rules:
        if rule.read(base) != {name: spec.values.get(name) for name in rule.read(base)}:
            config = {key: value for key, value in config.items() if key not in rule.keys}
            config.update({key: written[key] for key in rule.write(spec)})
    complete = "auto_map" in base and not missing_code(base, code)
    if not (complete and family_from_config(base).name == family.name):
        config.pop("auto_map", None)  # names code that does not travel; the class is transformers' own
        config.update(architectures=[family.architecture], model_type=family.model_type)
    config = quantisation.unquantised(config)  # weights are written as they are
    dtype_key = "dtype" if "dtype" in base else "torch_dtype"
    config[dtype_key] = spec.dtype.name
    changed = [
        f"{key}: {base.get(key, 'absent')} -> {config.get(key, 'absent')}"
        for key in sorted({*base, *config})
        if base.get(key, "absent") != config.get(key, "absent")
    ]
    return config, changed
