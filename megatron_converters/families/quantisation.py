"""Quantised weights as config.json and the names of tensors describe them, and programs whose weights cannot be read.

A way to store weights is a row of `quantisation_schemes`; what config.json says of it is one here, or of `compressed_tensors`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from ..basics.errors import ConversionError, one_line
from ..basics.quantities import count
from . import compressed_tensors
from .quantisation_schemes import EXPONENTS, FLOATS, Scheme, micro_scaled_stack, scaled_blocks, unadmitted

#: Key of config.json for it, and those of other programs: MLX, and compressed-tensors before 0.6.
KEY = "quantization_config"
_MLX_KEY, _EARLY_KEY = "quantization", "compression_config"
KEYS = (KEY, _MLX_KEY, _EARLY_KEY)


_BLOCKS, _FP8_CODES = "weight_block_size", ("float8_e4m3fn",)
_WEIGHT, _NESTED = ".weight", "text_config"


class Quantiser(NamedTuple):
    """A program that quantises in a way that cannot be read: its name, and what makes its weights readable again."""

    name: str
    remedy: str = "convert the unquantised model instead"


_MLX = Quantiser("MLX", "convert the unquantised model, or what mlx_lm.convert --dequantize makes of this one")
_BITSANDBYTES = Quantiser(
    "bitsandbytes", "convert the unquantised model, or what model.dequantize() of transformers makes of this one"
)
_GPTQ = Quantiser("GPTQ")
_MODELOPT = Quantiser("NVIDIA ModelOpt")
#: Quantisers by `quant_method`, lower case (transformers 5.23, utils/quantization_config.py, QuantizationMethod; vLLM).
_UNREADABLE = {
    "gptq": _GPTQ,
    "awq": Quantiser("AWQ"),
    "bitsandbytes": _BITSANDBYTES,
    "bitnet": Quantiser("BitNet"),
    "modelopt": _MODELOPT,
    "mlx": _MLX,
}
#: Files by which programs say it where config.json does not (AutoGPTQ, AutoAWQ, ModelOpt).
FILES = {
    "quantize_config.json": _GPTQ,
    "quant_config.json": _UNREADABLE["awq"],
    "hf_quant_config.json": _MODELOPT,
}
#: Ends of tensors' names that only quantised files have, and who writes them.
_SUFFIXES = {
    ".qweight": Quantiser("GPTQ or AWQ"),
    ".weight.absmax": _BITSANDBYTES,
    ".SCB": _BITSANDBYTES,
    ".biases": _MLX,
}
#: Those of files that can be read if config.json says how.
_UNDESCRIBED = {
    ".weight_packed": "compressed-tensors (LLM Compressor)",
    ".weight_scale": "LLM Compressor or NVIDIA ModelOpt",
    "_scale_inv": "FP8 with scales",
    "_proj_blocks": "MXFP4",
}


class Method(NamedTuple):
    """Method that can be read: the values that each key may have, and the scheme that they mean.

    Any value is right where None is listed. A key that is absent or null means the same as the first value.
    """

    admitted: Mapping[str, tuple[Any, ...] | None]
    scheme: Callable[[Mapping[str, Any]], Scheme]


def _fp8(described: Mapping[str, Any]) -> Scheme:
    """FP8 as DeepSeek-V3's config.json says it, with a scale for each block; without the size of blocks one for each matrix.

    So transformers 5.23 reads it (integrations/finegrained_fp8.py, FP8Linear); vLLM and AutoFP8 call the one scale `weight_scale`.
    """
    block = described.get(_BLOCKS)
    if block is None:
        return Scheme(
            _WEIGHT, _WEIGHT, _FP8_CODES, (".weight_scale_inv", ".weight_scale"), FLOATS, scaled_blocks((0, 0))
        )
    if not isinstance(block, list) or len(block) != 2 or not all(type(side) is int and side > 0 for side in block):
        raise ConversionError(
            f"config.json has a {KEY} with {_BLOCKS}={one_line(block)} instead of the rows and columns of a block; convert the "
            "unquantised model instead"
        )
    return Scheme("", "", _FP8_CODES, ("_scale_inv",), (*FLOATS[:2], *EXPONENTS), scaled_blocks((block[0], block[1])))


def _fbgemm(_: Mapping[str, Any]) -> Scheme:
    """FP8 with a scale for each row, as Meta publishes Llama-3.1-405B (transformers 5.23, integrations/fbgemm_fp8.py)."""
    return Scheme(_WEIGHT, _WEIGHT, _FP8_CODES, (".weight_scale",), FLOATS, scaled_blocks((1, 0)))


def _mxfp4(_: Mapping[str, Any]) -> Scheme:
    """MXFP4 of experts, as GPT-OSS is published (transformers 5.23, integrations/mxfp4.py)."""
    return Scheme("", "_blocks", ("uint8",), ("_scales",), ("uint8",), micro_scaled_stack)


#: Which weights are quantised, which the tensors themselves tell, and what transformers does when it loads them.
_WHICH: Mapping[str, None] = dict.fromkeys(
    ("modules_to_not_convert", "modules_to_convert", "ignored_layers", "dequantize")
)
#: Methods by `quant_method` (DeepSeek-V3's config.json; transformers 5.23, utils/quantization_config.py).
_METHODS: Mapping[str, Method] = {
    "fp8": Method(
        {
            "fmt": ("e4m3", "float8_e4m3fn"),
            _BLOCKS: None,
            "activation_scheme": ("dynamic", "static"),  # of a forward pass; its scales are left out
            "scale_fmt": ("float", "ue8m0"),  # each scale tensor's dtype says so, too
            "expert_dtype": ("fp8",),
            "kv_cache_scheme": None,  # of a forward pass
            **_WHICH,
        },
        _fp8,
    ),
    "fbgemm_fp8": Method({"activation_scale_ub": None, **_WHICH}, _fbgemm),
    "mxfp4": Method(_WHICH, _mxfp4),
    compressed_tensors.METHOD: Method(compressed_tensors.ADMITTED, compressed_tensors.scheme),
}


def unquantised(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the model once its weights are decoded."""
    plain = {key: value for key, value in config.items() if key not in KEYS}
    return {key: unquantised(value) if _is_nested(key, value) else value for key, value in plain.items()}


def _is_nested(key: str, value: Any) -> bool:
    """Whether a value of config.json is the configuration of a wrapper's text part, which may be quantised alone (Kimi-K2.5)."""
    return key == _NESTED and isinstance(value, Mapping)


def scheme_of(config: Mapping[str, Any]) -> Scheme | None:
    """How config.json says that weights are stored; None for a model that is not quantised.

    Raises `ConversionError` for what cannot be read.
    """
    inner = [value for key, value in config.items() if _is_nested(key, value) and any(map(value.get, KEYS))]
    if inner and any(map(config.get, KEYS)) and any(config.get(key) != inner[0].get(key) for key in KEYS):
        raise ConversionError(f"config.json describes two quantisations, itself and in {_NESTED}; remove the wrong one")
    config = inner[0] if inner else config
    if config.get(_MLX_KEY):
        raise refusal(_MLX, f"config.json ({_MLX_KEY})", config[_MLX_KEY])
    key = KEY if config.get(KEY) else _EARLY_KEY
    described = config.get(key)
    if not described:
        return None
    if not isinstance(described, Mapping):
        raise ConversionError(f"config.json has {key}={one_line(described)}; it must be an object")
    if all(value is None for value in described.values()):
        return None
    name = described.get("quant_method") or (compressed_tensors.METHOD if key == _EARLY_KEY else None)
    method = _METHODS.get(str(name).lower())
    if method is None:
        raise refusal(_unreadable(name, described), f"config.json ({key})", described)
    others = list(unadmitted(described, {"quant_method": None, **method.admitted}))
    if others:
        raise ConversionError(
            f"config.json has a {key} of {name} with {', '.join(others)}, which cannot be read; convert the unquantised model "
            "instead"
        )
    return method.scheme(described)


def _unreadable(name: Any, described: Mapping[str, Any]) -> Quantiser:
    """Program by the `quant_method` that it writes; MLX writes its settings under the same key without one."""
    if name is None and "bits" in described:
        return _MLX
    return _UNREADABLE.get(str(name).lower(), Quantiser(f"{one_line(name)!r}" if name else "an unnamed method"))


def refusal(quantiser: Quantiser, where: str, described: Any = None) -> ConversionError:
    """Error for weights that cannot be read; `described` are settings that name bits and groups."""
    settings = described if isinstance(described, Mapping) else {}
    sizes = [f"{one_line(settings[key])} {words}" for key, words in _SHOWN.items() if settings.get(key) is not None]
    shown = f" ({', '.join(sizes)})" if sizes else ""
    return ConversionError(
        f"{where} says that the weights are quantised by {quantiser.name}{shown}, which cannot be read; {quantiser.remedy}"
    )


#: Settings that a message shows, and their words.
_SHOWN = {"bits": "bits", "group_size": "to a group"}


def refuse_packed(folder: str, names: Iterable[str], files: Iterable[str] = ()) -> None:
    """Raise `ConversionError` if tensors have names that only quantised files have, whatever config.json says.

    `files` are names of files beside them, which may say by which program.
    """
    ends = tuple(_SUFFIXES)
    packed = next((name for name in names if name.endswith(ends)), None)
    if packed is None:
        return
    said = next((FILES[file] for file in files if file in FILES), None)
    by_name = next(quantiser for suffix, quantiser in _SUFFIXES.items() if packed.endswith(suffix))
    raise refusal(said or by_name, f"{folder}: the tensor {one_line(packed)}")


def refuse_undescribed(folder: str, names: Iterable[str]) -> None:
    """Raise `ConversionError` if tensors have names of a quantisation that can be read, of which config.json says nothing."""
    found = [name for name in names if name.endswith(tuple(_UNDESCRIBED))]
    if found:
        written = next(words for end, words in _UNDESCRIBED.items() if found[0].endswith(end))
        raise ConversionError(
            f"{folder}: {count(len(found), 'tensor')} such as {one_line(found[0])} say that the weights are quantised ({written}), "
            f"but config.json has no {KEY}, which says how; copy config.json of the published model"
        )
