"""config.json ↔ `ModelSpec`, by the rules of the family's table."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ..basics.dtypes import DType, dtype_named
from ..basics.errors import ConversionError, UnknownArchitecture, one_line
from ..model.spec import ModelSpec, Multipliers, PerLayer
from . import FAMILIES, quantisation, refused
from .harmless import CONFIG, harmless_warnings, refuse_unknown, unknown_fields
from .heads import BASE_NOTE, class_names, class_of, num_labels_of, refused_head, relabelled, with_head, written_labels
from .rules import Nested, Rule
from .rules_attention import FULL, Causal, layer_types
from .table import Family

if TYPE_CHECKING:
    from .wrappers import Wrapper

#: Rules of every family, which its own may override.
_COMMON: tuple[Rule, ...] = (Causal(),)
#: Names that wrappers of a model leave in `architectures`, and the prefix of FSDP2, which renames the model's class.
_WRAPPERS = (
    *("OptimizedModule", "PeftModel", "PeftModelForCausalLM"),
    *("DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine"),
)
_WRAPPER_PREFIX = "FSDP"
#: Key of every model of images and text.
_IMAGES = "vision_config"


def text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Configuration of the text part of a model of images and text; any other configuration as it is."""
    if wrapper_in(config) is None:
        return config
    from .text_parts import text_config

    return text_config(config)


def wrapper_in(config: Mapping[str, Any] | None) -> Wrapper | None:
    """Row of the model of images and text that config.json describes; None for a model of text alone."""
    if config is None or _IMAGES not in config:
        return None
    from .wrappers import wrapper_of  # which other models do not need

    return wrapper_of(config)


def family_from_config(config: Mapping[str, Any]) -> Family:
    """Family that config.json names by `architectures` or, without it, `model_type`; if both are there, they must agree.

    A wrapper's name counts as none. A class of another family may be that of a model_type, too (InternLM3 is a Llama there).
    Of a model of images and text it is the family of the text part.
    """
    config = text_part(config)
    model_type, architectures = config.get("model_type"), _architectures(config)
    agreed = [] if len(architectures) > 1 else _named(model_type, architectures, FAMILIES.likely(model_type))
    agreed = agreed or _named(model_type, architectures, FAMILIES.values())
    if len(agreed) == 1:
        return agreed[0]
    if agreed and not architectures:
        classes = " or ".join(family.architecture for family in agreed)
        raise ConversionError(
            f"config.json has model_type={model_type!r} and no architectures; add which class it is: {classes}"
        )
    # transformers goes by model_type, other programs by architectures
    if any(not {*class_names(family)}.isdisjoint(architectures) for family in FAMILIES.values()):
        raise ConversionError(
            f"config.json has architectures={architectures!r} and model_type={model_type!r}, which name different "
            "models; correct the one that is wrong"
        )
    reasons = [
        *(f"{reason}, so that it cannot be converted" for reason in refused.reasons(model_type, architectures)),
        *filter(None, (refused_head(family, architectures) for family in FAMILIES.values())),
    ]
    if reasons:
        raise ConversionError(f"config.json names {one_line(', '.join(architectures) or model_type)}, {reasons[0]}")
    own = refused.own_forms(config) if model_type is None and not architectures else []
    if own:
        raise ConversionError(f"config.json describes {own[0]}")
    named = one_line(", ".join(architectures) or model_type or "no architecture")
    known = ", ".join(family.architecture for family in FAMILIES.values())
    raise UnknownArchitecture(
        f"config.json names {named}, which is not supported; supported are {known}, and those of a family file, which "
        "--family-file FILE names, or of an installed plug-in"
    )


def _named(model_type: Any, architectures: list[str], families: Iterable[Family]) -> list[Family]:
    """Families that both names are of; a name that is not there is any family's, a class alone that of its own family."""
    given = {*architectures}
    return [
        family
        for family in families
        if (model_type in family.model_types and (not given or {*class_names(family), family.computed_by} & given))
        or (model_type is None and {*class_names(family)} & given)
    ]


def _architectures(config: Mapping[str, Any]) -> list[str]:
    """Architectures that config.json names, without those of wrappers around a model."""
    found = config.get("architectures") or []
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise ConversionError(f"config.json has architectures={found!r}; it must be a list of names")
    return [name for name in (each.removeprefix(_WRAPPER_PREFIX) for each in found) if name not in _WRAPPERS]


def spec_from_config(config: Mapping[str, Any], ignored: Iterable[str] = ()) -> ModelSpec:
    """Spec of a model by its config.json. `ignored` names keys that the user says are harmless, `key.inner` one within another.

    The dtype is config.json's, or float32 without one; readers of weight files replace it with the files' dtype.
    """
    quantisation.scheme_of(config)  # refuses what cannot be read
    ignored = {*ignored}
    config = _checked_text_part(config, ignored)
    family = family_from_config(config)
    _refuse_unclaimed(config, family, ignored)
    fields: dict[str, Any] = {}
    for rule in _rules(family):
        fields.update(rule.read(config))
    dtype = dtype_named(config.get("torch_dtype") or config.get("dtype") or "float32")
    labels = num_labels_of(config, family, _architectures(config))
    spec = ModelSpec.of(family=family.name, dtype=dtype, **with_head(fields, labels), num_labels=labels)
    if labels is not None and spec.multipliers != Multipliers():
        raise ConversionError(
            f"config.json names {class_of(family, labels)}, and multipliers are converted for language models alone; of this "
            f"family, only {family.architecture} is converted"
        )
    return spec


def _checked_text_part(config: Mapping[str, Any], ignored: Iterable[str]) -> Mapping[str, Any]:
    """The same as `text_part`; raises `ConversionError` for unknown fields beside it."""
    if wrapper_in(config) is not None:
        from .text_parts import refuse_unknown_beside

        refuse_unknown_beside(config, ignored)
    return text_part(config)


def _rules(family: Family) -> tuple[Rule, ...]:
    return (*_COMMON, *family.rules)


def _refuse_unclaimed(config: Mapping[str, Any], family: Family, ignored: Iterable[str]) -> None:
    accepted = {*ignored}
    claimed = {*quantisation.KEYS, *accepted, *(key for rule in _rules(family) for key in rule.keys)}
    # transformers 5 writes layer_types for every architecture; full attention in all layers is what others leave out.
    if all(kind == FULL for kind in layer_types(config)):
        claimed.add("layer_types")
    nested = [name for rule in _rules(family) if isinstance(rule, Nested) for name in rule.unread(config)]
    unknown = [name for name in nested if accepted.isdisjoint((name, name.partition(".")[0]))]
    refuse_unknown("config.json", family.name, [*unknown_fields(config, claimed, CONFIG), *unknown])


def config_notes(config: Mapping[str, Any]) -> list[str]:
    """What a user should know of a config.json that is read: fields that other programs heed, and code that is not looked at."""
    notes = _image_notes(config)
    config = text_part(config)
    family = family_from_config(config)
    notes += harmless_warnings("config.json", config, CONFIG)
    notes += [note for key, note in family.remarks.items() if config.get(key)]
    notes += [BASE_NOTE] if num_labels_of(config, family, _architectures(config)) == 0 else []
    auto_map = config.get("auto_map")
    listed = auto_map.items() if isinstance(auto_map, Mapping) else ()
    code = dict.fromkeys(one_line(value) for key, value in listed if key.startswith("AutoModel"))
    if code:
        notes.append(
            f"config.json names code of its own for the model ({', '.join(code)}), which was not looked at: it is taken for a "
            f"{family.name} model"
        )
    return notes


def _image_notes(config: Mapping[str, Any]) -> list[str]:
    """Notes on what a model of images and text computes of images."""
    if wrapper_in(config) is None:
        return []
    from .text_parts import image_notes

    return [*image_notes(config)]


def config_from_spec(spec: ModelSpec) -> dict[str, Any]:
    """Complete config.json object for the spec. Raises `ConversionError` naming the fields that the family cannot express."""
    family = FAMILIES[spec.family]
    config: dict[str, Any] = {
        "architectures": [class_of(family, spec.num_labels)],
        "model_type": family.model_type,
        **written_labels(spec.num_labels),
    }
    for rule in _rules(family):
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
    if base is None:
        return config_from_spec(spec), []
    plain = text_part(base)
    config = _updated(spec, plain, code)
    if plain is not base:
        from .text_parts import with_text_config

        config = with_text_config(base, plain, config)
        if missing_code(base, code):
            config.pop("auto_map", None)
    config = quantisation.unquantised(config)  # weights are written as they are
    return config, _changes(base, config)


def _updated(spec: ModelSpec, base: Mapping[str, Any], code: Collection[str]) -> dict[str, Any]:
    """Configuration of a text model in which what the spec decides is as the spec has it."""
    written = config_from_spec(spec)
    family = FAMILIES[spec.family]
    config = dict(base)
    for rule in _rules(family):
        read = with_head(rule.read(base), spec.num_labels)
        if read != {name: spec.values.get(name) for name in read}:
            config = {key: value for key, value in config.items() if key not in rule.keys}
            config.update({key: written[key] for key in rule.write(spec)})
    complete = "auto_map" in base and not missing_code(base, code)
    if not (complete and family_from_config(base).name == family.name):
        config.pop("auto_map", None)  # names code that does not travel; the class is transformers' own
        config.update(architectures=[class_of(family, spec.num_labels)], model_type=family.model_type)
    config = relabelled(config, spec.num_labels)
    dtype_key = "dtype" if "dtype" in base else "torch_dtype"
    config[dtype_key] = spec.dtype.name
    return config


def _changes(base: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """Keys in which two configurations differ, as `key: old -> new`, those within the text part one by one."""
    changed = []
    for key in sorted({*base, *config}):
        old, new = base.get(key, "absent"), config.get(key, "absent")
        if key == "text_config" and isinstance(old, Mapping) and isinstance(new, Mapping):
            changed += [f"{key}.{change}" for change in _changes(old, new)]
        elif old != new:
            changed.append(f"{key}: {old} -> {new}")
    return changed
