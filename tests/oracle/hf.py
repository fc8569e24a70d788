"""Tiny random models written by transformers itself, and logits that transformers computes from a folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from . import hf_kinds

SIZES: dict[str, Any] = dict(
    vocab_size=199,  # a prime, so that vocabulary padding is needed
    hidden_size=64,
    intermediate_size=112,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=512,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=None,
)


def _rope(theta: float, **scaling: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta, **scaling}


def _llama3_rope(factor: float) -> dict[str, Any]:
    """Llama 3.1's scaling; all constants but the factor are fixed in Megatron-LM (RotaryEmbedding._apply_scaling)."""
    constants = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return _rope(5e5, **{"rope_type": "llama3", "factor": factor, **constants})


_LLAMA = dict(model_type="llama", rms_norm_eps=1e-5, rope_parameters=_rope(1e4), tie_word_embeddings=False)
_LLAMA3 = _LLAMA | dict(rope_parameters=_rope(5e5))
_MISTRAL = _LLAMA | dict(model_type="mistral", sliding_window=None)
_QWEN2 = _LLAMA | dict(model_type="qwen2", rms_norm_eps=1e-6, rope_parameters=_rope(1e6))
_QWEN3 = _QWEN2 | dict(model_type="qwen3", head_dim=16)
_MIXTRAL = _MISTRAL | dict(model_type="mixtral", num_local_experts=8, num_experts_per_tok=2)
_QWEN2_MOE = _QWEN2 | dict(
    model_type="qwen2_moe",
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=48,
    shared_expert_intermediate_size=80,
    norm_topk_prob=False,
)
_QWEN3_MOE = _QWEN3 | dict(
    model_type="qwen3_moe", num_experts=8, num_experts_per_tok=2, moe_intermediate_size=48, norm_topk_prob=True
)
_OLMOE = _LLAMA | dict(
    model_type="olmoe", num_experts=8, num_experts_per_tok=2, intermediate_size=48, norm_topk_prob=False
)
_LONG = dict(max_position_embeddings=131072, head_dim=32)  # long wavelengths, so that a scaled RoPE makes a difference

FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "llama2": _LLAMA,
    "llama3": _LLAMA3,
    "llama3.1": _LLAMA3 | _LONG | dict(rope_parameters=_llama3_rope(8.0)),
    "llama3.2-tied": _LLAMA3 | _LONG | dict(rope_parameters=_llama3_rope(32.0), tie_word_embeddings=True),
    "llama-head_dim": _LLAMA | dict(head_dim=24),
    "llama-bias": _LLAMA | dict(attention_bias=True, mlp_bias=True),
    "mistral": _MISTRAL,
    "mistral-window": _MISTRAL | dict(sliding_window=7),
    "qwen2": _QWEN2,
    "qwen2-tied": _QWEN2 | dict(tie_word_embeddings=True),
    "qwen3": _QWEN3,
    "qwen3-tied": _QWEN3 | dict(tie_word_embeddings=True),
}
"""Dense families: config.json fields of each (transformers 5)."""

KINDS_OF_TENSORS = ("llama3", "llama3.2-tied", "llama-head_dim", "llama-bias", "qwen2-tied", "qwen3")
"""Families that differ in which tensors they have and how these are cut: enough for tests of sizes. `families.MODELS` has all."""

MOE_FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "mixtral": _MIXTRAL,
    "qwen2-moe": _QWEN2_MOE,
    "qwen3-moe": _QWEN3_MOE,
    "qwen3-moe-dense-layers": _QWEN3_MOE | dict(mlp_only_layers=[2]),
    "qwen3-moe-sparse-step": _QWEN3_MOE | dict(decoder_sparse_step=2),
    "olmoe": _OLMOE,
}
"""Families with a mixture of experts: config.json fields of each."""


def make_model(
    family: str,
    directory: Path,
    *,
    dtype: str = "float32",
    seed: int = 0,
    max_shard_size: int | str = "5GB",
    weights: str = "safetensors",
    legacy_config: bool = False,
    fused_experts: bool = False,
    **config_overrides: Any,
) -> Path:
    """Write a random model of `family` into `directory`, and return it; the seed determines the bytes.

    `family` is a key of `FAMILIES`, `MOE_FAMILIES`, a table of `hf_kinds` or `families.MODELS`.
    `max_shard_size` is bytes or text such as "100KB". `weights` is "safetensors" or "bin" (`pytorch_model*.bin`).
    `legacy_config` rewrites `config.json` as transformers 4 wrote it (`rope_theta`, `rope_scaling`, `torch_dtype`).
    `fused_experts` keeps each layer's experts as the two 3-D tensors that transformers 5 holds in memory; without it the
    files have the per-expert names of the published models.
    `config_overrides` are fields of the model's config.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = _fields(family)
    config = AutoConfig.for_model(**{**fields, "dtype": dtype, **config_overrides})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _randomise(model, seed)
    model.to(getattr(torch, dtype))
    model.save_pretrained(directory, max_shard_size=max_shard_size, save_original_format=not fused_experts)
    if weights == "bin":
        _safetensors_to_bin(directory)
    if legacy_config:
        _rewrite_for_transformers_4(directory / "config.json")
    return directory


def _fields(family: str) -> Mapping[str, Any]:
    from .families import MODELS  # whose modules take their fields from here
    from .families.sparse import SPARSE

    others = {**hf_kinds.FOLDED, **hf_kinds.LIVE, **SPARSE}
    if family in MODELS:
        return MODELS[family].fields
    return others.get(family) or {**SIZES, **{**FAMILIES, **MOE_FAMILIES}[family]}


def sample_tokens(batch: int = 2, length: int = 64, *, vocab_size: int = 199, seed: int = 0) -> torch.Tensor:
    """Random tokens, int64 [batch, length]; long enough that a wrong window or RoPE changes the logits."""
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


#: Tokens for which the fixture `logits` has what transformers computes.
TOKENS = sample_tokens(length=40)


def difference(ours: Any, theirs: torch.Tensor) -> float:
    """Largest difference between logits, relative to the largest of `theirs`; `ours` may have padding rows of a vocabulary, too."""
    return exact_difference(torch.as_tensor(ours)[..., : theirs.shape[-1]], theirs)


def exact_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The same, of logits without padding rows."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return float((ours - theirs).abs().max() / theirs.abs().max())


def hf_logits(directory: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Logits by transformers, float32 [B, S, V], of the model in `directory` for int64 tokens [B, S] (eager attention).

    Fails if loading reports any key that is missing, unexpected or of the wrong shape.
    """
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    problems = {name: keys for name, keys in report.items() if keys}
    assert not problems, f"{directory} does not load cleanly: {problems}"
    with torch.inference_mode():
        logits: torch.Tensor = model.eval()(tokens, use_cache=False).logits
    return logits.float().clone()


def _randomise(model: torch.nn.Module, seed: int) -> None:
    """Set every parameter to random values: norms that stay 1 and biases that stay 0 would hide mistakes.

    Queries and keys are larger than the rest, so that attention is far from uniform and a wrong RoPE or window changes the
    logits. Routers and gates are larger, too, so that the choice of experts is clear, and so are biases. The order and scale of the
    draws of a family must stay: recorded outputs are compared byte for byte.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if hf_kinds.is_norm(name):
                centre = parameter.mean().item()  # as the class initialises it: 0 where it adds 1, else 1
                parameter.copy_(centre + 0.3 * noise)
            elif scale := hf_kinds.scale(name):
                parameter.copy_(scale * noise)
            elif name.endswith((".bias", "gate.weight")):
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_((0.2 if "q_proj" in name or "k_proj" in name else 0.05) * noise)
        hf_kinds.randomise_buffers(model, generator)


def _safetensors_to_bin(directory: Path) -> None:
    from safetensors.torch import load_file

    renamed = {}
    for path in sorted(directory.glob("model*.safetensors")):
        renamed[path.name] = path.with_suffix(".bin").name.replace("model", "pytorch_model", 1)
        torch.save(load_file(path), directory / renamed[path.name])
        path.unlink()
    index = directory / "model.safetensors.index.json"
    if index.exists():
        content = json.loads(index.read_text())
        content["weight_map"] = {key: renamed[name] for key, name in content["weight_map"].items()}
        (directory / "pytorch_model.bin.index.json").write_text(json.dumps(content, indent=2))
        index.unlink()


def _rewrite_for_transformers_4(path: Path) -> None:
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters", None)
    if rope is not None:
        config["rope_theta"] = rope.pop("rope_theta")
        if "partial_rotary_factor" in rope:
            config["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
        config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    config["torch_dtype"] = config.pop("dtype")
    if config["model_type"] == "qwen3_moe":
        config["num_experts"] = config.pop("num_local_experts")
    config["transformers_version"] = "4.51.0"
    path.write_text(json.dumps(config, indent=2))
