"""config.json of wrappers: the configuration of the text part as its family has it, and that put back in its place."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from ..basics.errors import ConversionError, one_line
from . import FAMILIES, quantisation
from .harmless import CONFIG, Harmless, refuse_unknown, unknown_fields
from .table import Family
from .wrappers import BASE, Wrapper, wrapper_of

_NESTED, TIE = "text_config", "tie_word_embeddings"
_DTYPES = ("dtype", "torch_dtype")
_TABLES = ("rope_parameters", "rope_scaling")
_SECTIONS, _INTERLEAVED, _MROPE = "mrope_section", "mrope_interleaved", "mrope"
_ABSENT = object()
#: Older spellings of keys, by those in defaults.
_SPELLINGS = {"num_local_experts": "num_experts"}
#: Fields beside the text part, none of which decides what it computes of text.
OUTER = (
    Harmless(
        "vision_config image_token_id image_token_index video_token_id video_token_index vision_start_token_id "
        "vision_end_token_id vision_token_id vision_feature_layer vision_feature_select_strategy projector_hidden_act "
        "multimodal_projector_bias image_seq_length ignore_index is_composition",
        "transformers 4.36 to 5.23, configurations of wrappers: how images become embeddings, and where these go",
    ),
    Harmless(
        "image_grid_pinpoints use_image_newline_parameter vision_aspect_ratio spatial_merge_size downsample_ratio",
        "the same, of LLaVA-NeXT, LLaVA-OneVision, Mistral 3 and InternVL",
    ),
    Harmless("mm_tokens_per_image boi_token_index eoi_token_index", "the same, of Gemma 3"),
    Harmless(
        "media_placeholder_token_id use_unified_vision_chunk video_placeholder projection_hidden_size "
        "projection_layer_norm_eps",
        "Kimi-K2.5's config.json and configuration_kimi_k25.py, and transformers 5.23",
    ),
)


class TextType(NamedTuple):
    """Family of the text part of this model_type, and defaults of its configuration that are not the family's."""

    family: str
    defaults: Mapping[str, Any] = {}


def _sizes(layers: int, hidden: int, ffn: int, heads: int, vocab: int, **more: Any) -> dict[str, Any]:
    return {
        **dict(num_hidden_layers=layers, hidden_size=hidden, intermediate_size=ffn, num_attention_heads=heads),
        **dict(vocab_size=vocab),
        **more,
    }


_QWEN2_VL = _sizes(
    80, 8192, 29568, 64, 152064, num_key_value_heads=8, rms_norm_eps=1e-5, max_window_layers=80, rope_theta=1e6
)
#: Published wrappers leave out sizes that are defaults of the class of their text part.
TEXT_TYPES: Mapping[str, TextType] = {
    "deepseek_v3": TextType("deepseek_v3", _sizes(61, 7168, 18432, 128, 129280)),
    "gemma3_text": TextType("gemma3_text", _sizes(26, 2304, 9216, 8, 262208)),
    "llama": TextType("llama", _sizes(32, 4096, 11008, 32, 32000)),
    "mistral": TextType("mistral", _sizes(32, 4096, 14336, 32, 32000)),
    "ministral3": TextType("ministral3", _sizes(34, 4096, 14336, 32, 131072)),
    "qwen2": TextType("qwen2", _sizes(32, 4096, 22016, 32, 151936)),
    "qwen3": TextType("qwen3", _sizes(32, 4096, 22016, 32, 151936)),
    "qwen2_vl_text": TextType("qwen2", _QWEN2_VL),
    "qwen2_5_vl_text": TextType("qwen2", _QWEN2_VL),
    "qwen3_vl_text": TextType(
        "qwen3", _sizes(32, 4096, 22016, 32, 151936, max_position_embeddings=128000, rope_theta=5e5)
    ),
    "qwen3_vl_moe_text": TextType(
        "qwen3_moe",
        {
            **_sizes(24, 2048, 5632, 16, 151936, num_key_value_heads=16, head_dim=128),
            **dict(max_position_embeddings=128000, rope_theta=5e5, num_experts_per_tok=4),
            **dict(num_local_experts=60, moe_intermediate_size=1408, norm_topk_prob=True),
        },
    ),
    "qwen3_5_text": TextType("qwen3_5_text", _sizes(32, 4096, 12288, 16, 248320)),
    "qwen3_5_moe_text": TextType(
        "qwen3_5_moe_text",
        dict(num_hidden_layers=40, hidden_size=2048, num_attention_heads=16, vocab_size=248320),
    ),
}


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Configuration of a wrapper's text part, as its family has it; any other configuration as it is."""
    wrapper = wrapper_of(config)
    if wrapper is None:
        return config
    own, kind = _own(wrapper, config), _text_type(wrapper, config)
    family = _family(wrapper, kind)
    defaults = TEXT_TYPES.get(kind, TextType("")).defaults
    plain = {key: value for key, value in defaults.items() if _SPELLINGS.get(key) not in own} | dict(own)
    plain |= {name: _without_sections(plain[name]) for name in _TABLES if isinstance(plain.get(name), Mapping)}
    if not config.keys().isdisjoint(_DTYPES):
        plain = {key: value for key, value in plain.items() if key not in _DTYPES}
    plain |= {key: config[key] for key in (TIE, *_DTYPES) if key in config}
    return {**plain, "architectures": [family.architecture], "model_type": family.model_type}


def refuse_unknown_beside(config: Mapping[str, Any], ignored: Iterable[str]) -> None:
    """Raise `ConversionError` for fields beside the text part that nothing is known of, or that say something else than it.

    Files of transformers 4 may have fields of the text part twice.
    """
    wrapper = wrapper_of(config)
    if wrapper is None or not isinstance(config.get(_NESTED), Mapping):
        return
    nested = config[_NESTED]
    repeated = {key for key, value in config.items() if key in nested and nested[key] == value}
    claimed = {
        _NESTED,
        TIE,
        "initializer_range",
        *quantisation.KEYS,
        *ignored,
        *repeated,
    }  # the range is of the projector
    refuse_unknown("config.json", wrapper.model_type, unknown_fields(config, claimed, (*CONFIG, *OUTER)))


def with_text_config(
    config: Mapping[str, Any], plain: Mapping[str, Any], new: Mapping[str, Any], code: Collection[str] = ()
) -> dict[str, Any]:
    """Configuration of a wrapper in which the text part changes from `plain`, which is that of `config`, to `new`."""
    outer = dict(config)
    inner = dict(config[_NESTED]) if isinstance(config.get(_NESTED), Mapping) else None
    for key in (*plain.keys() | new.keys(),):
        if plain.get(key, _ABSENT) != new.get(key, _ABSENT):
            for place in _places(key, outer, inner):
                if key in new:
                    place[key] = new[key]
                else:
                    place.pop(key, None)
    return outer if inner is None else {**outer, _NESTED: inner}


def _places(key: str, outer: dict[str, Any], inner: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Where a changed field of the text part is written: within it, and beside it where it stands there, too."""
    if inner is None:
        return [outer]
    found = [place for place in (outer, inner) if key in place]
    if key == TIE and key not in outer:  # which transformers 5 reads there alone
        return [outer, *found]
    return found or [outer if key in _DTYPES else inner]


def image_notes(config: Mapping[str, Any]) -> Iterator[str]:
    """Notes on what the text part computes of images, of which Megatron-LM's arguments as they are written say nothing."""
    wrapper = wrapper_of(config)
    own = {} if wrapper is None else _own(wrapper, config)
    for name in _TABLES:
        table = own.get(name)
        if not isinstance(table, Mapping) or table.get(_SECTIONS) is None:
            continue
        sections = " ".join(map(one_line, table[_SECTIONS])) if isinstance(table[_SECTIONS], list) else ""
        plain = "tokens of text have plain rotary embeddings, as the flags say; those of images have M-RoPE,"
        if table.get(_INTERLEAVED):
            yield f"{plain} with sections ({sections}) that alternate, which no release of Megatron-LM computes"
        else:
            yield (
                f"{plain} for which training needs --position-embedding-type mrope --mrope-section {sections}, and three "
                "positions for each token"
            )
        return


def tie_note(config: Mapping[str, Any], *, tied: bool) -> list[str]:
    """Note that files and config.json disagree about the head: whether it is `tied` is for the files to say."""
    wrapper = wrapper_of(config)
    if wrapper is None or (stated := config.get(TIE, wrapper.ties)) == tied:
        return []
    said = f"{TIE} is {str(stated).lower()} in config.json"
    if TIE not in config:
        said = f"config.json has no {TIE}, which transformers takes for {str(stated).lower()}"
    held = "no head of their own: it is tied to the embeddings" if tied else "a head of their own, which is kept"
    return [f"{'warning: ' if tied else ''}{said}, but the files have {held}"]


def _own(wrapper: Wrapper, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Fields of the text part, where config.json has them."""
    own = config if wrapper.flat and config.get(_NESTED) is None else config.get(_NESTED)
    if not isinstance(own, Mapping):
        raise ConversionError(
            f"config.json names {wrapper.architecture}, but its {_NESTED} is {one_line(own)}; it must be an object"
        )
    return {key: value for key, value in own.items() if not any(row.admits(key, value) for row in OUTER)}


def _text_type(wrapper: Wrapper, config: Mapping[str, Any]) -> str:
    nested = config.get(_NESTED)
    stated = nested.get("model_type") if isinstance(nested, Mapping) and wrapper.any_text else None
    return wrapper.text_type if stated is None else str(stated)


def _family(wrapper: Wrapper, kind: str) -> Family:
    """Family of a text part of this model_type."""
    name = TEXT_TYPES[kind].family if kind in TEXT_TYPES else kind
    family = next((family for family in FAMILIES.likely(name) if name in family.model_types), None)
    if family is None:
        raise ConversionError(
            f"config.json names {wrapper.architecture} with a text part of model_type {one_line(kind)}, which is not supported"
        )
    if family.base_prefix != BASE:
        raise ConversionError(
            f"config.json names {wrapper.architecture} with a text part of the {family.name} family, whose names in such a "
            "model are not known; it cannot be converted"
        )
    return family


def _without_sections(table: Mapping[str, Any]) -> dict[str, Any]:
    """Table of rotary embeddings for text, of which all three positions are the same."""
    kept = {key: value for key, value in table.items() if key not in (_SECTIONS, _INTERLEAVED)}
    return {
        key: "default" if value == _MROPE and key in ("rope_type", "type") else value for key, value in kept.items()
    }
