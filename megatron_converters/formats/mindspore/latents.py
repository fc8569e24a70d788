"""Tensors of multi-latent attention that MindSpore Transformers joins (`mla_qkv_concat: True`), under their usual names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ...basics.errors import ConversionError
from ...storage.tensor import StoredTensor
from .files import Slice, Tensor

#: Ends of names in this form, and the usual ones.
_RENAMED = {
    "self_attention.linear_qb.weight": "self_attention.linear_q_up_proj.weight",
    "self_attention.linear_kvb.weight": "self_attention.linear_kv_up_proj.weight",
    "self_attention.k_layernorm.weight": "self_attention.kv_layernorm.weight",
    "self_attention.k_layernorm.gamma": "self_attention.kv_layernorm.gamma",
}
_JOINED = "self_attention.linear_qkv.weight"
_QUERY_UP, _KEY_UP = "self_attention.linear_qb.weight", "self_attention.linear_kvb.weight"
_QUERY_DOWN = "self_attention.linear_q_down_proj.weight"
_KEY_DOWN = "self_attention.linear_kv_down_proj.weight"


def separated(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names of separate down projections; all others as they are."""
    layers = {name.removesuffix(_KEY_UP) for name in tensors if name.endswith(_KEY_UP)}
    found = {}
    for name, tensor in tensors.items():
        layer, _, rest = name.partition("self_attention.")
        if layer not in layers or not rest:
            found[name] = tensor
        elif name == layer + _JOINED:
            found.update(_parts(layer, tensor, tensors))
        else:
            found[layer + _RENAMED.get(f"self_attention.{rest}", f"self_attention.{rest}")] = tensor
    return found


def _parts(layer: str, joined: Tensor, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Rows of queries, or of their latents, and rows of the latents of keys and values."""
    up = tensors.get(layer + _QUERY_UP)
    if up is None:
        raise ConversionError(
            f"{layer}{_JOINED} joins queries without latents with the latents of keys and values, and no shape tells where these "
            "begin; that is not supported: save the weights with mla_qkv_concat: False"
        )
    yield layer + _QUERY_DOWN, _rows(joined, 0, up.shape[1])
    yield layer + _KEY_DOWN, _rows(joined, up.shape[1], joined.shape[0])


def _rows(tensor: Tensor, start: int, stop: int) -> Tensor:
    """Rows of a tensor."""
    slices, copies = (
        tuple(filter(None, (_cut(each, start, stop) for each in held))) for held in (tensor.slices, tensor.copies)
    )
    return Tensor((stop - start, *tensor.shape[1:]), tensor.dtype, slices, copies)


def _cut(stored: Slice, start: int, stop: int) -> Slice | None:
    """Rows of a slice that lie in a range of the whole tensor's rows."""
    data, first = stored.data, stored.offset[0]
    begin, end = max(start, first), min(stop, first + data.shape[0])
    if begin >= end:
        return None
    offset = data.offset + (begin - first) * data.strides[0] * data.dtype.itemsize
    view = StoredTensor(data.path, offset, data.dtype, (end - begin, *data.shape[1:]), data.strides)
    return Slice(view, (begin - start, *stored.offset[1:]))
