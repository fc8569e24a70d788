"""Strategy files: how MindSpore has cut each parameter over the ranks of a pipeline stage.

Source: mindspore 2.8.0, train/node_strategy_pb2.py (package mindspore.straspb), parallel/_parallel_serialization.py (JSON form,
merged files) and parallel/_tensor.py; frontend/parallel/ops_info/operator_info.cc for the order of an optimizer shard.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ...basics.errors import ConversionError, one_line
from ...basics.json_files import read_json
from ...storage.opening import file_size, open_source
from ...storage.tensor import mapped
from .protobuf import Message

#: Name in a merged file: the pipeline stage, then the parameter.
_MERGED = re.compile(r"([0-9]{1,6})-(.+)")
_MOST_DEVICES = 1 << 20


class Layout(NamedTuple):
    """Cut of one parameter: the device matrix, and for each axis the matrix's dimensions (from its end) that cut it, major first.

    `shard_size` ranks that would hold the same slice share it instead, cut along axis 0 (optimizer parallelism).
    """

    devices: tuple[int, ...]
    axes: tuple[tuple[int, ...], ...]
    shard_step: int
    shard_size: int

    @property
    def ranks(self) -> int:
        """Ranks of the stage."""
        return math.prod(self.devices)

    def cuts(self) -> tuple[int, ...]:
        """Number of slices along each axis."""
        counts = [math.prod(self.devices[-1 - dim] for dim in dims) for dims in self.axes]
        if counts:
            counts[0] *= self.shards()
        return tuple(counts)

    def shards(self) -> int:
        """Parts into which optimizer parallelism cuts a slice."""
        if not self.shard_step or not self.shard_size:
            return 1
        return math.prod(self._repeated_sizes()) if self.shard_size == -1 else self.shard_size

    def place(self, rank: int) -> tuple[int, ...]:
        """Index of a rank's slice along each axis; `rank` counts within the stage."""
        coordinates = []
        for size in reversed(self.devices):
            rank, coordinate = divmod(rank, size)
            coordinates.append(coordinate)  # by dimension from the matrix's end, as axes count
        place = []
        for dims in self.axes:
            index = 0
            for dim in dims:
                index = index * self.devices[-1 - dim] + coordinates[dim]
            place.append(index)
        if place:
            repeat = 0
            for dim in self._repeated():
                repeat = repeat * self.devices[-1 - dim] + coordinates[dim]
            place[0] = place[0] * self.shards() + repeat % self.shards()
        return tuple(place)

    def fault(self) -> str | None:
        """What contradicts itself in the layout; None if nothing does."""
        dims = [dim for axis in self.axes for dim in axis]
        if not self.devices or min(self.devices) < 1 or self.ranks > _MOST_DEVICES:
            return f"the device matrix {one_line(self.devices)}"
        if any(not 0 <= dim < len(self.devices) for dim in dims) or len({*dims}) != len(dims):
            return f"the tensor map {one_line(self.axes)} for the device matrix {one_line(self.devices)}"
        repeats, shards = math.prod(self._repeated_sizes()), self.shards()
        if shards < 1 or repeats % shards or (shards > 1 and (not self.axes or self.shard_step != self._step())):
            return (
                f"an optimizer shard of size {self.shard_size} and step {self.shard_step} "
                f"for the device matrix {one_line(self.devices)}"
            )
        if shards > 1 and self._is_disputed():
            return f"an optimizer shard under the tensor map {one_line(self.axes)}, which MindSpore itself reads in two ways,"
        return None

    def _is_disputed(self) -> bool:
        """Whether `_construct_tensor_layout_for_opt_shard` takes the axes' order for the devices' although they differ."""
        repeated = [dim for dim, size in zip(self._repeated(), self._repeated_sizes(), strict=True) if size > 1]
        cutting = [dim for axis in self.axes for dim in axis if self.devices[-1 - dim] > 1]
        return repeated == [len(self.devices) - 1] and cutting != sorted(cutting, reverse=True)

    def _repeated(self) -> list[int]:
        """Dimensions (from the end, major first) along which ranks hold the same slice."""
        used = {dim for axis in self.axes for dim in axis}
        return [dim for dim in range(len(self.devices) - 1, -1, -1) if dim not in used]

    def _repeated_sizes(self) -> list[int]:
        return [self.devices[-1 - dim] for dim in self._repeated()]

    def _step(self) -> int:
        """Mean distance of the ranks that would hold the same slice, which is what MindSpore stores as the step."""
        sizes = self._repeated_sizes()
        strides = [math.prod(self.devices[len(self.devices) - dim :]) for dim in self._repeated()]
        span = sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
        return span // max(math.prod(sizes) - 1, 1)


#: Layouts of a stage's parameters by name.
Stage = Mapping[str, Layout]


def read(paths: list[Path]) -> dict[int, Stage]:
    """Read strategy files into the layouts of each pipeline stage; files of one stage must agree."""
    stages: dict[int, dict[str, Layout]] = {}
    for path in paths:
        found: dict[int, dict[str, Layout]] = {}
        for stage, name, layout in _json_items(path) if path.suffix == ".json" else _protobuf_items(path):
            fault = layout.fault()
            if fault:
                raise ConversionError(f"{path}: {one_line(name)} has {fault}; that cannot be joined")
            found.setdefault(stage, {})[name] = layout
        for stage, layouts in found.items():
            if len({layout.ranks for layout in layouts.values()}) > 1:
                raise ConversionError(f"{path}: the layouts of stage {stage} are for different numbers of ranks")
            if stages.setdefault(stage, layouts) != layouts:
                raise ConversionError(
                    f"{path} contradicts the other strategy files of stage {stage}; leave those of one run there"
                )
    if not stages:
        raise ConversionError(f"{', '.join(str(path) for path in paths)} holds no layouts of parameters")
    if len({next(iter(layouts.values())).ranks for layouts in stages.values()}) > 1:
        raise ConversionError(f"the strategy files in {paths[0].parent} are for stages of different numbers of ranks")
    return dict(stages)


def _named(name: str, stage: int) -> tuple[int, str]:
    """Stage and parameter of an item; in a merged file the name holds both."""
    merged = _MERGED.fullmatch(name)
    return (int(merged[1]), merged[2]) if merged else (stage, name)


def _protobuf_items(path: Path) -> Iterator[tuple[int, str, Layout]]:
    with open_source(str(path)) as file:
        message = Message(str(path), mapped(str(path)), 0, file_size(file))
    stage = next(_protobuf_stages(message), 0)
    for field in message.fields():
        if field.number == 3:
            item = message.inner(field)
            parts = {part.number: part for part in item.fields() if part.number in (1, 2)}
            if len(parts) < 2:
                raise ConversionError(f"{path} is damaged or no strategy file: a layout lacks its name; copy it again")
            name = item.text(parts[1])
            yield *_named(name, stage), _protobuf_layout(f"{path}: {name}", item.inner(parts[2]))


def _protobuf_stages(message: Message) -> Iterator[int]:
    """Stage that each operator's strategy states."""
    for item in (message.inner(field) for field in message.fields() if field.number == 2):
        for strategy in (item.inner(field) for field in item.fields() if field.number == 2):
            yield from (strategy.number(field) for field in strategy.fields() if field.number == 1)


def _protobuf_layout(where: str, layouts: Message) -> Layout:
    lists: dict[int, list[tuple[int, ...]]] = {number: [] for number in (1, 2, 3, 4)}
    numbers = dict.fromkeys((5, 6, 7), 0)
    for field in layouts.fields():
        if field.number in lists:
            lists[field.number].append(layouts.inner(field).numbers(1))
        elif field.number in numbers:
            numbers[field.number] = layouts.number(field)
    # One map lists a dimension for each axis. Several are one for each axis; an empty one marks that there is a single axis.
    maps: list[Any] = list(lists[2][0]) if len(lists[2]) == 1 else [dims for dims in lists[2] if dims]
    devices = lists[1][0] if lists[1] else ()
    return _layout(where, devices, maps, [*lists[3], *lists[4]], (numbers[5], numbers[6], numbers[7]))


def _json_items(path: Path) -> Iterator[tuple[int, str, Layout]]:
    content = read_json(path)
    try:
        stage = next((item["stage"] for item in content.get("parallel_strategy_item", {}).values()), 0)
        for name, item in content.get("parallel_layout_item", {}).items():
            numbers = tuple(item[key] for key in ("field", "opt_weight_shard_step", "opt_weight_shard_size"))
            uneven = [item.get("param_split_shape") or (), item.get("indices_offset") or ()]
            where = f"{path}: {one_line(name)}"
            yield *_named(name, int(stage)), _layout(where, item["dev_matrix"], item["tensor_map"], uneven, numbers)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConversionError(
            f"{path} is not a strategy file of MindSpore: {one_line(error)} is missing or wrong"
        ) from error


def _layout(where: str, devices: Any, maps: list[Any], uneven: list[Any], numbers: tuple[int, ...]) -> Layout:
    """Layout from the lists and numbers that both kinds of file hold."""
    axes = tuple(
        tuple(dim for dim in (axis if isinstance(axis, (list, tuple)) else (axis,)) if dim != -1) for axis in maps
    )
    field, step, size = numbers
    if not all(type(number) is int for number in (*devices, *(dim for axis in axes for dim in axis), *numbers)):
        raise ConversionError(f"{where}: the layout is not made of whole numbers; copy the strategy file again")
    if field or any(uneven):
        raise ConversionError(
            f"{where} is cut into uneven slices (field {field}), which cannot be read; merge it with mindspore.unified_safetensors"
        )
    return Layout(tuple(devices), axes, step, size)
