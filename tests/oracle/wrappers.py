"""Tiny models of images and text by transformers' own classes, and what they compute of text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from .families.gemma import MODELS as GEMMA
from .hf import _randomise
from .hf_kinds import KINDS

TEXT: dict[str, Any] = dict(
    **dict(vocab_size=199, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4),
    **dict(num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=None, rms_norm_eps=1e-3),
)
_TOKENS = dict(image_token_id=190, video_token_id=191, vision_start_token_id=192, vision_end_token_id=193)
_VISION: dict[str, Any] = dict(
    **dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    ),
)
_CLIP = dict(_VISION, model_type="clip_vision_model", projection_dim=8)
_SIGLIP = dict(_VISION, model_type="siglip_vision_model")
_PIXTRAL = dict(_VISION, model_type="pixtral", head_dim=8)
_QWEN2_VISION = dict(depth=1, embed_dim=16, num_heads=2, hidden_size=32, patch_size=4, mlp_ratio=2)
_QWEN25_VISION = dict(
    depth=1,
    hidden_size=16,
    num_heads=2,
    intermediate_size=16,
    out_hidden_size=32,
    patch_size=4,
    fullatt_block_indexes=[0],
)
_QWEN3_VISION: dict[str, Any] = dict(
    **dict(depth=1, hidden_size=16, num_heads=2, intermediate_size=16, out_hidden_size=32, patch_size=4),
    **dict(deepstack_visual_indexes=[0], num_position_embeddings=16),
)


_KIMI_VISION: dict[str, Any] = dict(
    **dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, patch_size=4),
    **dict(pos_emb_height=4, pos_emb_width=4),
)
#: A text part of DeepSeek's kind, with the sizes of the others.
_LATENT = {
    **{key: value for key, value in KINDS["deepseek-v3"].items() if key != "tie_word_embeddings"},
    **dict(hidden_size=32, num_hidden_layers=2, first_k_dense_replace=1),
}


def _rope(**more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, **more}}


_MROPE = _rope(mrope_section=[1, 1, 2])
_ALTERNATING = dict(_rope(mrope_section=[2, 3, 3], mrope_interleaved=True), head_dim=16)
_QWEN3_5_VISION = {key: value for key, value in _QWEN3_VISION.items() if key != "deepstack_visual_indexes"}
_DELTA: dict[str, Any] = dict(
    **dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=6),
    **dict(layer_types=["linear_attention", "full_attention"], head_dim=16),
    **_rope(mrope_section=[2, 1, 1], mrope_interleaved=True, partial_rotary_factor=0.5),
)
_EXPERTS = dict(moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2, decoder_sparse_step=1)


def _model(model_type: str, vision: Mapping[str, Any], text: Mapping[str, Any] = {}, **more: Any) -> dict[str, Any]:
    return {"model_type": model_type, "text_config": {**TEXT, **text}, "vision_config": dict(vision), **more}


#: config.json of each model; the first word of a name is its model_type.
MODELS: Mapping[str, dict[str, Any]] = {
    "qwen2_vl": _model("qwen2_vl", _QWEN2_VISION, _MROPE, **_TOKENS),
    "qwen2_vl tied": _model("qwen2_vl", _QWEN2_VISION, _MROPE, tie_word_embeddings=True, **_TOKENS),
    "qwen2_5_vl": _model("qwen2_5_vl", _QWEN25_VISION, _MROPE, **_TOKENS),
    "qwen3_vl": _model("qwen3_vl", _QWEN3_VISION, _ALTERNATING, **_TOKENS),
    "qwen3_vl_moe": _model("qwen3_vl_moe", _QWEN3_VISION, {**_ALTERNATING, **_EXPERTS}, **_TOKENS),
    "qwen3_5": _model("qwen3_5", _QWEN3_5_VISION, _DELTA, **_TOKENS),
    "qwen3_5_moe": _model(
        "qwen3_5_moe",
        _QWEN3_5_VISION,
        {key: value for key, value in {**_DELTA, **_EXPERTS}.items() if key != "decoder_sparse_step"},
        **_TOKENS,
    ),
    "llava": _model("llava", _CLIP, {"model_type": "llama"}, image_token_index=190),
    "llava_next": _model("llava_next", _CLIP, {"model_type": "mistral", "sliding_window": 7}, image_token_index=190),
    "llava_onevision": _model(
        "llava_onevision", _SIGLIP, {"model_type": "qwen2"}, image_token_index=190, video_token_index=191
    ),
    "internvl": _model(
        "internvl",
        {**_VISION, "image_size": [8, 8], "patch_size": [4, 4]},
        {"model_type": "qwen3", "head_dim": 16},
        image_token_id=190,
    ),
    "mistral3": _model(
        "mistral3",
        _PIXTRAL,
        {"model_type": "mistral", "head_dim": 16, "sliding_window": None},
        image_token_index=10,
        tie_word_embeddings=False,
    ),
    "gemma3": _model(
        "gemma3",
        {**_SIGLIP, "image_size": 16},
        {key: value for key, value in GEMMA["gemma3"].fields.items() if key != "tie_word_embeddings"},
        **dict(image_token_index=190, boi_token_index=191, eoi_token_index=192, mm_tokens_per_image=4),
    ),
    "kimi_k25": _model("kimi_k25", _KIMI_VISION, _LATENT, image_token_id=190, tie_word_embeddings=False),
    "mistral3 ministral3": _model(
        "mistral3", _PIXTRAL, {"model_type": "ministral3", "head_dim": 16}, image_token_index=10
    ),
}


def make_wrapper(name: str, folder: Path, *, in_memory_names: bool = False, **options: Any) -> Path:
    """Write a random model, under the names of published files or those in memory; `options` are those of `save_pretrained`."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(**MODELS[name]), dtype=torch.float32)
    _randomise(model, 0)
    model.save_pretrained(folder, save_original_format=not in_memory_names, **options)
    if name == "kimi_k25" and not in_memory_names:
        _mend_kimi(folder)
    (folder / "preprocessor_config.json").write_text('{"size": 8}')
    return folder


def _mend_kimi(folder: Path) -> None:
    """Give tensors their published names where transformers 5.23 does not: it takes all layers for those of the tower."""

    def published(name: str) -> str:
        text = name.replace("language_model.model.blocks.", "language_model.model.layers.")
        return text.replace("model.mm_projector.", "mm_projector.")

    for path in folder.glob("*.safetensors"):
        save_file({published(name): data for name, data in load_file(path).items()}, path, {"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.exists():
        content = json.loads(index.read_text())
        files = {published(name): file for name, file in content["weight_map"].items()}
        index.write_text(json.dumps({**content, "weight_map": files}))


def loaded(folder: Path) -> Any:
    """Model that the wrapper's class loads; fails if a key is missing, unexpected or of the wrong shape."""
    from transformers import AutoModelForImageTextToText

    model, report = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    problems = {kind: keys for kind, keys in report.items() if keys}
    assert not problems, f"{folder} does not load cleanly: {problems}"
    return model.eval()


def text_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of tokens of text, float32 [B, S, V]."""
    with torch.inference_mode():
        found: torch.Tensor = loaded(folder)(input_ids=tokens, use_cache=False).logits
    return found.float().clone()


def as_published(folder: Path) -> Path:
    """Turn the experts of a Qwen3-VL-MoE, which transformers 5 has saved, into the orientation of published files."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    experts = {name for name in tensors if ".experts." in name}
    turned = {name: data.transpose(1, 2).contiguous() if name in experts else data for name, data in tensors.items()}
    save_file(turned, path, {"format": "pt"})
    return folder


def as_older_config(folder: Path) -> Path:
    """Rewrite config.json as transformers 4.45 wrote it of Qwen2-VL: the text part at the top, and M-RoPE as a kind of scaling."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    scaling = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    config["torch_dtype"] = config.pop("dtype")
    dropped = ("model_type", "layer_types")
    text = {key: value for key, value in text.items() if key not in dropped}
    path.write_text(json.dumps({**text, **config, "rope_theta": rope["rope_theta"], "rope_scaling": scaling}))
    return folder
