"""Quantised weights as config.json and the names of tensors describe them: FP8 in blocks with a scale each can be read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ..basics.errors import ConversionError, one_line

#: Key of config.json for it, and those of other programs: MLX, and compressed-tensors before 0.6.
KEY = "quantization_config"
KEYS = (KEY, "quantization", "compression_config")


class Quantiser(NamedTuple):
    """A program that quantises in a way that cannot be read: its name, and what makes its weights readable again."""

    name: str
    remedy: str = "convert the unquantised model instead"


_MLX = Quantiser("MLX", "convert the unquantised model, or what mlx_lm.convert --dequantize makes of this one")
_BITSANDBYTES = Quantiser(
    "bitsandbytes", "convert the unquantised model, or what model.dequantize() of transformers makes of this one"
)
_GPTQ, _TENSORS = Quantiser("GPTQ"), Quantiser("compressed-tensors (LLM Compressor)")
_MODELOPT = Quantiser("NVIDIA ModelOpt")
#: Quantisers by `quant_method`, lower case (transformers 5.23, utils/quantization_config.py, QuantizationMethod; vLLM).
_METHODS = {
    "gptq": _GPTQ,
    "awq": Quantiser("AWQ"),
    "bitsandbytes": _BITSANDBYTES,
    "bitnet": Quantiser("BitNet"),
    "compressed-tensors": _TENSORS,
    "modelopt": _MODELOPT,
    "mxfp4": Quantiser("MXFP4"),
    "mlx": _MLX,
}
#: Files by which programs say it where config.json does not (AutoGPTQ, AutoAWQ, ModelOpt).
FILES = {
    "quantize_config.json": _GPTQ,
    "quant_config.json": _METHODS["awq"],
    "hf_quant_config.json": _MODELOPT,
}
#: Ends of tensors' names that only quantised files have.
_SUFFIXES = {
    ".qweight": Quantiser("GPTQ or AWQ"),
    ".weight_packed": _TENSORS,
    ".weight_scale": Quantiser("LLM Compressor or NVIDIA ModelOpt"),
    ".weight.absmax": _BITSANDBYTES,
    ".SCB": _BITSANDBYTES,
    ".biases": _MLX,
    "_proj_blocks": _METHODS["mxfp4"],
}
_BLOCKS, _READABLE = "weight_block_size", "fp8"
#: Values that each key may have; any value where None is listed. A key that is absent or null means the same as the first value
#: (DeepSeek-V3's config.json; transformers 5.23, utils/quantization_config.py, FineGrainedFP8Config).
_ADMITTED: Mapping[str, tuple[Any, ...] | None] = {
    "quant_method": (_READABLE,),
    "fmt": ("e4m3", "float8_e4m3fn"),
    _BLOCKS: None,
    "activation_scheme": ("dynamic",),  # of a forward pass; "static" comes with tensors of its own
    "scale_fmt": ("float", "ue8m0"),  # each scale tensor's dtype says so, too
    "expert_dtype": ("fp8",),
    "modules_to_not_convert": None,  # the tensors themselves tell
    "modules_to_convert": None,
    "ignored_layers": None,
    "dequantize": None,  # what transformers does when it loads the weights
}


def unquantised(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the model once its weights are decoded."""
    return {key: value for key, value in config.items() if key not in KEYS}


def block_size(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of a block of FP8 weights with one scale; None for a model that is not quantised.

    Raises `ConversionError` for any other quantisation.
    """
    for key in KEYS[1:]:
        if config.get(key):
            raise refusal(_MLX if key == "quantization" else _TENSORS, f"config.json ({key})", config[key])
    described = config.get(KEY)
    if not described:
        return None
    if not isinstance(described, Mapping):
        raise ConversionError(f"config.json has {KEY}={one_line(described)}; it must be an object")
    if all(value is None for value in described.values()):
        return None
    method = described.get("quant_method")
    if method is None and "bits" in described:  # MLX writes its settings under this key, too
        raise refusal(_MLX, f"config.json ({KEY})", described)
    if method != _READABLE:
        known = _METHODS.get(str(method).lower(), Quantiser(f"{one_line(method)!r}" if method else "an unnamed method"))
        raise refusal(known, f"config.json ({KEY})", described)
    others = [
        f"{key}={one_line(value)}"
        for key, value in described.items()
        if key not in _ADMITTED or not _is_admitted(value, _ADMITTED[key])
    ]
    if others:
        raise ConversionError(
            f"config.json has a {KEY} with {', '.join(others)}; only FP8 with block scales can be read (quant_method fp8, fmt "
            "e4m3, weight_block_size): convert the unquantised model instead"
        )
    block = described.get(_BLOCKS)
    if not isinstance(block, list) or len(block) != 2 or not all(type(side) is int and side > 0 for side in block):
        raise ConversionError(
            f"config.json has a {KEY} with {_BLOCKS}={one_line(block)} instead of the rows and columns of a block; FP8 with one "
            "scale for a tensor or a channel cannot be read: convert the unquantised model instead"
        )
    return block[0], block[1]


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


def _is_admitted(value: Any, known: tuple[Any, ...] | None) -> bool:
    return known is None or value is None or value in known
