"""Parameters of the models of this process, checked against a layout, and as places that weights are written to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..basics.dtypes import BY_NAME, DType
from ..basics.errors import ConversionError
from ..conversion.accounting import gaps_and_overlaps
from ..formats.megatron.names import EXTRA_STATE_SUFFIX
from ..formats.megatron.options import SINGLE, STACKED
from ..formats.megatron.shared_tensors import SINGLE_SUFFIXES, STACKED_SUFFIXES
from ..model.slots import refs
from .layout import Key, LiveLayout, Naming

#: Parameters and buffers that hold weights, by model and name.
Parameters = dict[Key, torch.Tensor]
#: Marks of Transformer Engine's layers: norms that are part of the next linear layer.
_FUSED_NORM = ".layer_norm_weight"
_GROUPED_EXPERT = ".experts.linear_fc1.weight0"
#: Layouts of experts in one tensor, the ends of its names, and the argument that makes a model have it.
_IN_ONE_TENSOR = (
    (STACKED, STACKED_SUFFIXES, "moe_use_legacy_grouped_gemm"),
    (SINGLE, SINGLE_SUFFIXES, "moe_single_grouped_weight"),
)


def unwrapped(model: Any) -> list[torch.nn.Module]:
    """Models in a list, or a single one, without the wrappers of data parallelism and half precision."""
    models = list(model) if isinstance(model, (list, tuple)) else [model]
    return [_inner(each) for each in models]


def _inner(model: Any) -> torch.nn.Module:
    while isinstance(getattr(model, "module", None), torch.nn.Module):
        model = model.module
    if not isinstance(model, torch.nn.Module):
        raise ConversionError(
            f"a {type(model).__name__} is no model; give what the provider returned, a list of models"
        )
    return model


def parameters_of(models: Sequence[torch.nn.Module]) -> Parameters:
    """Parameters and persistent buffers of the models."""
    found: Parameters = {}
    for number, model in enumerate(models):
        for name, value in model.state_dict(keep_vars=True).items():
            if isinstance(value, torch.Tensor) and not name.endswith(EXTRA_STATE_SUFFIX):
                found[Key(number, name)] = value
    return found


def naming_of(parameters: Parameters) -> Naming:
    """Names that these parameters have."""
    names = [key.parameter for key in parameters]
    for layout, suffixes, argument in _IN_ONE_TENSOR:
        if any(name.endswith(suffixes) for name in names):
            raise ConversionError(
                f"the model holds {layout} experts ({argument}), which is not supported live; build it with {argument}=False"
            )
    engine = any(name.endswith(_FUSED_NORM) for name in names)
    grouped = any(name.endswith(_GROUPED_EXPERT) for name in names)
    return Naming("transformer_engine" if engine else Naming.impl, "grouped" if grouped else Naming.expert_layout)


def common_naming(namings: Sequence[Naming]) -> Naming:
    """Names of a model whose processes have these: each is as usual where a process has nothing that is named otherwise."""
    usual = Naming()
    return Naming(
        next((each.impl for each in namings if each.impl != usual.impl), usual.impl),
        next(
            (each.expert_layout for each in namings if each.expert_layout != usual.expert_layout), usual.expert_layout
        ),
    )


def mismatches(parameters: Parameters, layout: LiveLayout, process: int) -> Iterator[tuple[Key, str]]:
    """Differences between the parameters of a process and those that the layout gives it, each with a text."""
    expected = {
        holding.key: holding.cut.shape
        for ref in refs(layout.spec)
        for place in layout.holdings(ref)
        for holding in place
        if process in holding.holders
    }
    for key, shape in expected.items():
        where = f"rank {process}: {shown(key)}"
        if key not in parameters:
            yield key, f"{where} is missing"
        elif tuple(parameters[key].shape) != shape:
            yield key, f"{where} has shape {list(parameters[key].shape)}, not {list(shape)}"
    yield from (
        (key, f"rank {process}: {shown(key)} is no tensor of this model") for key in parameters if key not in expected
    )


def shown(key: Key) -> str:
    """Name of a parameter for messages."""
    return f"model {key.model}, {key.parameter}" if key.model else key.parameter


def dtype_of(dtype: torch.dtype) -> DType:
    """Dtype that torch calls so; raises `ConversionError` where no weight can have it."""
    name = str(dtype).removeprefix("torch.")
    if name not in BY_NAME:
        raise ConversionError(f"a parameter of the model is {name}, which is no dtype of weights here")
    return BY_NAME[name]


def as_array(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """Elements of a contiguous tensor on the CPU, in their dtype's carrier type; the memory is shared."""
    dtype = dtype_of(tensor.dtype)
    found: npt.NDArray[Any] = (
        tensor.detach().view(getattr(torch, f"int{8 * dtype.itemsize}")).numpy().view(dtype.carrier)
    )
    return found


class ParameterSink:
    """Parameters as a place to write to, by a text for each; the account of what was written is kept."""

    def __init__(self, parameters: Mapping[str, torch.Tensor]) -> None:
        self._bytes = {name: _flat(name, tensor) for name, tensor in parameters.items()}
        #: Written byte ranges (start, stop) by parameter.
        self._written: dict[str, list[tuple[int, int]]] = {name: [] for name in parameters}

    def write(self, name: str, start: int, data: npt.NDArray[Any]) -> None:
        """Write C-contiguous `data`, a part of a parameter that begins at its byte `start`."""
        flat = data.reshape(-1).view(np.uint8)
        stop = start + flat.size
        target = self._bytes[name][start:stop]
        if target.device.type == "cpu":
            target.numpy()[:] = flat
        else:
            target.copy_(torch.from_numpy(flat.copy()))  # copied, since torch warns of memory that must not be written
        self._written[name].append((start, stop))

    def writeback(self) -> None:
        """None: no disk is written to."""

    def claim(self) -> bool:
        """Whether the caller must complete the sink, which needs nothing."""
        return False

    def faults(self) -> Iterator[str]:
        """Texts for bytes of parameters that were written not at all, or twice."""
        for name, spans in self._written.items():
            nbytes = self._bytes[name].numel()
            yield from (f"{name}: {fault}" for fault in gaps_and_overlaps(spans, nbytes))


def _flat(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Bytes of a tensor, of which the memory is shared."""
    data = tensor.detach()
    if not data.is_contiguous():
        raise ConversionError(
            f"{name} is not contiguous in memory; make it so (parameter.data = parameter.data.contiguous())"
        )
    return data.reshape(-1).view(torch.uint8)
