"""Quantised Llamas of a few kilobytes: random codes and scales as each program stores them, and what they mean by definition."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tests.plain_llama import LAYERS, Tensors, write_llama

HIDDEN, HEADS, GROUPS, DIM, MLP, VOCABULARY = 96, 6, 2, 16, 160, 16
FP8, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu


class Stored(NamedTuple):
    """Tensors of one weight by the ends of their names, what they mean in float32, and the dtype of the weight."""

    tensors: Tensors
    product: torch.Tensor
    dtype: torch.dtype = torch.bfloat16

    @property
    def meaning(self) -> torch.Tensor:
        """The weight, rounded once."""
        return self.product.to(self.dtype)


class Scheme(NamedTuple):
    """What config.json says, how a weight of these rows and columns is stored, and words for it."""

    config: dict[str, Any]
    store: Callable[[torch.Generator, int, int], Stored]
    words: str


def product(codes: torch.Tensor, scales: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Codes times the scale of their blocks, in float32."""
    rows, cols = codes.shape
    whole = scales.float().repeat_interleave(height, 0).repeat_interleave(width, 1)[:rows, :cols]
    return codes.float() * whole


def model_dtype(scales: torch.dtype) -> torch.dtype:
    """Dtype of a weight by that of its scales."""
    return torch.float16 if scales == torch.float16 else torch.bfloat16


def _codes(generator: torch.Generator, rows: int, cols: int) -> torch.Tensor:
    """Codes of FP8, all but those of NaN."""
    codes = torch.randint(0, 256, (rows, cols), generator=generator, dtype=torch.uint8)
    codes[codes & 0x7F == 0x7F] = 0x31
    return codes.view(FP8)


def in_bytes(
    height: int, width: int, *, scale: str, dtype: torch.dtype, shape: list[int] | None = None, integers: bool = False
) -> Any:
    """How codes of one byte are stored with a scale, named `scale`, for each block of these sizes."""

    def store(generator: torch.Generator, rows: int, cols: int) -> Stored:
        high, wide = min(height, rows), min(width, cols)
        counts = -(-rows // high), -(-cols // wide)
        codes = _codes(generator, rows, cols)
        if integers:
            codes = torch.randint(-128, 128, (rows, cols), generator=generator, dtype=torch.int8)
        if dtype in (torch.uint8, E8M0):
            exponents = torch.randint(100, 140, counts, generator=generator, dtype=torch.uint8)
            scales, stored = torch.exp2(exponents.double() - 127), exponents.view(dtype)
        else:
            scales = stored = (0.01 + torch.rand(counts, generator=generator)).to(dtype)
        if shape is not None:
            stored = stored.reshape(shape)
        return Stored({".weight": codes, scale: stored}, product(codes, scales, high, wide), model_dtype(dtype))

    return store


def packed(group: int, dtype: torch.dtype) -> Any:
    """How integers of 4 bits are stored, eight to an int32, the first in its lowest bits, each with 8 added."""

    def store(generator: torch.Generator, rows: int, cols: int) -> Stored:
        numbers = torch.randint(-8, 8, (rows, cols), generator=generator)
        size = group or cols
        scales = (0.01 + torch.rand(rows, -(-cols // size), generator=generator)).to(dtype)
        words = torch.zeros(rows, -(-cols // 8), dtype=torch.int64)
        for col in range(cols):
            words[:, col // 8] += (numbers[:, col] + 8) << (4 * (col % 8))
        words = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
        tensors = {".weight_packed": words, ".weight_scale": scales, ".weight_shape": torch.tensor([rows, cols])}
        return Stored(tensors, product(numbers, scales, 1, size), model_dtype(dtype))

    return store


#: Numbers of E2M1: by sign, two bits of exponent with bias 1, and one of mantissa.
E2M1 = [
    (-1) ** sign * (mantissa / 2 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + mantissa / 2))
    for sign in (0, 1)
    for exponent in range(4)
    for mantissa in (0, 1)
]


def micro_scaled(generator: torch.Generator, rows: int, cols: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Bytes of two FP4 codes, the first in the lower half, exponents of 32 elements, and what they mean."""
    codes = torch.randint(0, 16, (rows, cols), generator=generator)
    exponents = torch.randint(0, 250, (rows, cols // 32), generator=generator, dtype=torch.uint8)
    pairs = (codes[:, 0::2] + 16 * codes[:, 1::2]).to(torch.uint8)
    scales = torch.exp2(exponents.double() - 127).repeat_interleave(32, 1)
    exact = torch.tensor(E2M1, dtype=torch.float64)[codes] * scales
    assert torch.equal(exact.to(torch.bfloat16).double(), exact)
    return pairs, exponents, exact.float()


def _micro_packed(generator: torch.Generator, rows: int, cols: int) -> Stored:
    pairs, exponents, exact = micro_scaled(generator, rows, cols)
    return Stored({".weight_packed": pairs, ".weight_scale": exponents}, exact)


def compressed(form: str, **weights: Any) -> dict[str, Any]:
    """What LLM Compressor writes into config.json."""
    settings = {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "group_size": None,
        "strategy": None,
        "block_structure": None,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
        "observer_kwargs": {},
        **weights,
    }
    activations = {**settings, "num_bits": 8, "dynamic": True, "strategy": "token"}
    group = {
        "targets": ["Linear"],
        "weights": settings,
        "input_activations": activations,
        "output_activations": None,
        "format": form,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
        "global_compression_ratio": 1.5,
        "version": "0.12.2",
        "sparsity_config": {},
        "transform_config": {},
    }


_WHOLE = 1 << 20
_INV, _SCALE = ".weight_scale_inv", ".weight_scale"
_BLOCKS = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [64, 48]}
_ONE = {"quant_method": "fp8", "activation_scheme": "static"}
_INT4 = {"num_bits": 4, "type": "int"}
SINGLE, HALF = torch.float32, torch.bfloat16
SCHEMES: dict[str, Scheme] = {
    "blocks": Scheme(_BLOCKS, in_bytes(64, 48, scale=_INV, dtype=SINGLE), "float8_e4m3fn in blocks of 64×48"),
    "blocks, ue8m0": Scheme(
        {**_BLOCKS, "scale_fmt": "ue8m0", "modules_to_not_convert": ["lm_head"]},
        in_bytes(64, 48, scale=_INV, dtype=E8M0),
        "float8_e4m3fn in blocks of 64×48",
    ),
    "one scale, transformers": Scheme(
        {**_ONE, "weight_block_size": None, "dequantize": False, "modules_to_not_convert": ["lm_head"]},
        in_bytes(_WHOLE, _WHOLE, scale=_INV, dtype=HALF, shape=[]),
        "float8_e4m3fn with one scale",
    ),
    "one scale, vLLM": Scheme(
        {**_ONE, "ignored_layers": ["lm_head"]},
        in_bytes(_WHOLE, _WHOLE, scale=_SCALE, dtype=SINGLE, shape=[1]),
        "float8_e4m3fn with one scale",
    ),
    "rows, FBGEMM": Scheme(
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": []},
        in_bytes(1, _WHOLE, scale=_SCALE, dtype=SINGLE),
        "float8_e4m3fn with a scale for each row",
    ),
    "one scale, compressed": Scheme(
        compressed("naive-quantized", strategy="tensor"),
        in_bytes(_WHOLE, _WHOLE, scale=_SCALE, dtype=torch.float16, shape=[1]),
        "float8_e4m3fn with one scale",
    ),
    "rows, compressed": Scheme(
        compressed("float-quantized", strategy="channel"),
        in_bytes(1, _WHOLE, scale=_SCALE, dtype=HALF),
        "float8_e4m3fn with a scale for each row",
    ),
    "blocks, compressed": Scheme(
        compressed("float-quantized", strategy="block", block_structure=[64, 48]),
        in_bytes(64, 48, scale=_SCALE, dtype=HALF),
        "float8_e4m3fn in blocks of 64×48",
    ),
    "int8": Scheme(
        compressed("int-quantized", type="int", strategy="channel"),
        in_bytes(1, _WHOLE, scale=_SCALE, dtype=HALF, integers=True),
        "int8 with a scale for each row",
    ),
    "mxfp8": Scheme(
        compressed("mxfp8-quantized", strategy="group", group_size=32, scale_dtype="torch.uint8"),
        in_bytes(1, 32, scale=_SCALE, dtype=torch.uint8),
        "float8_e4m3fn in groups of 32",
    ),
    "int4, groups": Scheme(
        compressed("pack-quantized", **_INT4, strategy="group", group_size=32),
        packed(32, HALF),
        "4-bit integers in groups of 32",
    ),
    "int4, float32 scales": Scheme(
        compressed("pack-quantized", **_INT4, strategy="group", group_size=64, actorder="weight"),
        packed(64, SINGLE),
        "4-bit integers in groups of 64",
    ),
    "int4, rows": Scheme(
        compressed("pack-quantized", **_INT4, strategy="channel"),
        packed(0, HALF),
        "4-bit integers with a scale for each row",
    ),
    "mxfp4": Scheme(
        compressed("mxfp4-pack-quantized", num_bits=4, strategy="group", group_size=32), _micro_packed, "MXFP4"
    ),
}


def write(folder: Path, scheme: Scheme, mlp: int = MLP, **fields: Any) -> Tensors:
    """Write a Llama whose linear layers are quantised; returns what its tensors mean. `fields` are further ones of config.json."""
    generator = torch.Generator().manual_seed(0)
    heads = {"q": HEADS, "k": GROUPS, "v": GROUPS}
    linear = {f"self_attn.{name}_proj": (DIM * number, HIDDEN) for name, number in heads.items()}
    linear |= {"self_attn.o_proj": (HIDDEN, DIM * HEADS), "mlp.down_proj": (HIDDEN, mlp)}
    linear |= {f"mlp.{name}_proj": (mlp, HIDDEN) for name in ("gate", "up")}
    plain: dict[str, tuple[int, ...]] = {"model.norm": (HIDDEN,)}
    plain |= dict.fromkeys(("model.embed_tokens", "lm_head"), (VOCABULARY, HIDDEN))
    for layer in range(LAYERS):
        plain |= {f"model.layers.{layer}.{name}_layernorm": (HIDDEN,) for name in ("input", "post_attention")}
    dtype = scheme.store(generator, 2, 32).dtype
    meaning = {f"{name}.weight": torch.randn(shape, generator=generator).to(dtype) for name, shape in plain.items()}
    stored = dict(meaning)
    for layer in range(LAYERS):
        for name, (rows, cols) in linear.items():
            made = scheme.store(generator, rows, cols)
            stored |= {f"model.layers.{layer}.{name}{end}": tensor.contiguous() for end, tensor in made.tensors.items()}
            meaning[f"model.layers.{layer}.{name}.weight"] = made.meaning
    sizes = {"num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "head_dim": DIM, "intermediate_size": mlp}
    write_llama(folder, stored, **sizes, quantization_config=copy.deepcopy(scheme.config), **fields)
    return meaning
