"""Networks of mindspore's cells whose parameters have given names; imported by mindspore's own Python alone."""

from __future__ import annotations

from collections.abc import Mapping

from mindspore import Parameter, Tensor, nn


def cells(tensors: Mapping[str, Tensor]) -> nn.Cell:
    """Tree of cells with a parameter for each dotted name; numbers are places in a `CellList`."""
    inner: dict[str, dict[str, Tensor]] = {}
    parameters: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        first, dot, rest = name.partition(".")
        if dot:
            inner.setdefault(first, {})[rest] = tensor
        else:
            parameters[first] = tensor
    if inner and all(name.isdigit() for name in inner):
        return nn.CellList([cells(inner[str(number)]) for number in range(len(inner))])
    cell = nn.Cell()
    for name, tensor in parameters.items():
        setattr(cell, name, Parameter(tensor))  # named by its attribute and those of the cells around it
    for name, below in inner.items():
        setattr(cell, name, cells(below))
    return cell


def parameters_of(network: nn.Cell, names: set[str]) -> dict[str, Parameter]:
    """Parameters of a network by the names that mindspore gave them, which must be exactly these."""
    found = {parameter.name: parameter for parameter in network.get_parameters()}
    if set(found) != names:
        raise ValueError(f"mindspore names the parameters {sorted(found)}, expected {sorted(names)}")
    return found
