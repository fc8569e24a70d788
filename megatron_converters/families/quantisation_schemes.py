"""Ways in which weights are stored in few bits: names, element types and shapes of the tensors of one, and what decodes it.

How config.json says which one is in `quantisation`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from ..basics.errors import one_line
from ..storage.decoding import Quantised, Transposed
from ..storage.decoding_4bit import MX_GROUP, MicroScaled, PackedIntegers, numbers_in
from ..storage.decoding_8bit import Block, ScaledBlocks, block_counts, block_words
from ..storage.tensor import StoredTensor

#: Weight that is decoded as it is read, or a stack of such.
Decoded = Quantised | Transposed
_SHAPE_TYPES = ("int64", "int32")
#: Element types of scales: floats, and exponents of 2 as ue8m0 has them, which some files call uint8.
FLOATS, EXPONENTS = ("float32", "bfloat16", "float16"), ("float8_e8m0fnu", "uint8")


class Named(NamedTuple):
    """Stored tensor and its name."""

    name: str
    tensor: StoredTensor


class Make(Protocol):
    """How a weight is made of its codes, scales and shape, all of which have the right types; or words for why it cannot be."""

    def __call__(self, codes: Named, scale: Named, shape: Named | None) -> Decoded | str: ...


@dataclass(frozen=True)
class Scheme:
    """Way in which a weight is stored. Of its tensors' names, which begin alike, these are the ends.

    `weight` is that of the weight itself, `codes` that of its codes, `scales` the spellings for its scales, and `shape` for its
    shape, if that is stored. Where `weight` is `codes`, the type tells them apart. Types are names of element types.
    """

    weight: str
    codes: str
    code_types: tuple[str, ...]
    scales: tuple[str, ...]
    scale_types: tuple[str, ...]
    make: Make
    shape: str = ""

    def is_codes(self, name: str, tensor: StoredTensor) -> bool:
        """Whether a tensor holds the codes of a weight."""
        return name.endswith(self.codes) and (self.codes != self.weight or tensor.dtype.name in self.code_types)

    def beside(self, name: str) -> str | None:
        """Name without the end by which it says that it is a scale or a shape; None for any other."""
        ends = (*self.scales, *self._shapes)
        return next((name.removesuffix(end) for end in ends if name.endswith(end)), None)

    def weight_name(self, codes: str) -> str:
        """Name of the weight by that of its codes."""
        return codes.removesuffix(self.codes) + self.weight

    def decoded(self, name: str, tensors: Mapping[str, StoredTensor]) -> tuple[Decoded | None, list[str]]:
        """Weight of the codes `name`, or all reasons why there is none."""
        stem, codes = name.removesuffix(self.codes), Named(name, tensors[name])
        scales = [Named(stem + end, tensors[stem + end]) for end in self.scales if stem + end in tensors]
        shapes = [Named(stem + end, tensors[stem + end]) for end in self._shapes if stem + end in tensors]
        faults = [
            f"{name} is {codes.tensor.dtype}, but there is no {stem}{ends[0]}"
            for ends, found in ((self.scales, scales), (self._shapes, shapes))
            if ends and not found
        ]
        faults += [
            f"{each.name} is {each.tensor.dtype} instead of one of {', '.join(types)}"
            for found, types in (([codes], self.code_types), (scales, self.scale_types), (shapes, _SHAPE_TYPES))
            for each in found
            if each.tensor.dtype.name not in types
        ]
        if len(scales) > 1:
            faults.append(f"{name} has scales under two names, {scales[0].name} and {scales[1].name}")
        if faults:
            return None, faults
        made = self.make(codes, scales[0], next(iter(shapes), None))
        return (None, [made]) if isinstance(made, str) else (made, [])

    @property
    def _shapes(self) -> tuple[str, ...]:
        """Ends of the name of a stored shape: one, or none."""
        return (self.shape,) if self.shape else ()


#: Ends of names of tensors that belong to activations and to the cache of keys and values, which are quantised as a model runs.
ACTIVATIONS = tuple(
    ".input_scale .activation_scale .output_scale .input_global_scale .q_scale .k_scale .v_scale .kv_scale".split()
)


#: Ends of names of tensors without which codes cannot be read, and what they say.
UNREADABLE = {
    ".weight_zero_point": "the weights are asymmetric, which cannot be read",
    ".weight_g_idx": "columns are in the order of activations, which cannot be read",
}


def scaled_blocks(block: Block) -> Make:
    """Codes of one byte with a scale for each block of these sizes, where 0 is the whole matrix's."""

    def make(codes: Named, scale: Named, shape: Named | None) -> Decoded | str:
        if len(codes.tensor.shape) not in (2, 3):
            only = "only a matrix can have scales for blocks"
            return f"{codes.name} is {codes.tensor.dtype} of shape {list(codes.tensor.shape)}; {only}"
        wanted = block_counts(codes.tensor.shape, block)
        found = scale.tensor
        if math.prod(found.shape) == math.prod(wanted) == 1:
            found = found.reshaped(wanted)  # one number may be stored as [], [1] or [1, 1]
        if found.shape != wanted:
            return _misshapen(codes, scale, wanted, block_words(block))
        return ScaledBlocks(codes.name, codes.tensor, scale.name, found, block)

    return make


def packed_integers(group: int) -> Make:
    """Integers of 4 bits, eight to an int32, with a scale for each `group` columns of a row; 0 for the whole row."""

    def make(codes: Named, scale: Named, shape: Named | None) -> Decoded | str:
        if len(codes.tensor.shape) != 2 or shape is None:
            return f"{codes.name} has shape {list(codes.tensor.shape)}; only a matrix can be unpacked"
        rows, words = codes.tensor.shape
        size: tuple[int, ...] = (rows, words * 8)
        if not group or scale.tensor.shape != (rows, size[1] // group):  # how many columns there are is not clear
            size = numbers_in(shape.tensor)
            if len(size) != 2 or size[0] != rows or -(-size[1] // 8) != words:
                return f"{shape.name} says {list(size)}, but {codes.name} has {rows} rows of {words} × 8 elements"
        wanted = block_counts(size, (1, group))
        if scale.tensor.shape != wanted:
            return _misshapen(codes, scale, wanted, block_words((1, group)))
        return PackedIntegers(codes.name, codes.tensor, scale.name, scale.tensor, shape.name, shape.tensor, size, group)

    return make


def micro_scaled_stack(codes: Named, scale: Named, shape: Named | None) -> Decoded | str:
    """MXFP4 of experts: codes [experts, rows, groups, 16]. The plain weights of such a model are stored transposed."""
    if len(codes.tensor.shape) != 4 or codes.tensor.shape[-1] != MX_GROUP // 2:
        return f"{codes.name} has shape {list(codes.tensor.shape)} instead of [experts, rows, groups, {MX_GROUP // 2}]"
    if scale.tensor.shape != (wanted := codes.tensor.shape[:-1]):
        return _misshapen(codes, scale, wanted, f"in groups of {MX_GROUP}")
    return MicroScaled(codes.name, codes.tensor, scale.name, scale.tensor).transposed()


def micro_scaled(codes: Named, scale: Named, shape: Named | None) -> Decoded | str:
    """MXFP4 of one matrix: codes [rows, columns / 2]."""
    if len(codes.tensor.shape) != 2 or codes.tensor.shape[1] % (MX_GROUP // 2):
        return f"{codes.name} has shape {list(codes.tensor.shape)} instead of [rows, groups × {MX_GROUP // 2}]"
    rows, width = codes.tensor.shape
    if scale.tensor.shape != (wanted := (rows, width // (MX_GROUP // 2))):
        return _misshapen(codes, scale, wanted, f"in groups of {MX_GROUP}")
    tensor = codes.tensor.reshaped((*wanted, MX_GROUP // 2))
    return MicroScaled(codes.name, tensor, scale.name, scale.tensor)


def _misshapen(codes: Named, scale: Named, wanted: tuple[int, ...], words: str) -> str:
    return (
        f"{scale.name} has shape {list(scale.tensor.shape)}; {codes.name} of shape {list(codes.tensor.shape)}, {words}, has scales "
        f"of shape {list(wanted)}"
    )


def unadmitted(described: Mapping[str, Any], admitted: Mapping[str, tuple[Any, ...] | None]) -> Iterator[str]:
    """Settings, as `key=value`, that are not among the admitted values; any is where these are None. Null says nothing."""
    for key, value in described.items():
        known = admitted.get(key, ())
        if known is not None and value not in (None, [], {}) and value not in known:
            yield f"{key}={one_line(value)}"
