"""Write tiny checkpoints with the real mindspore, as MindSpore Transformers writes its own.

    $(scripts/setup_mindspore.sh) scripts/make_mindspore_fixtures.py tests/fixtures/mindspore
    $(scripts/setup_mindspore.sh) scripts/make_mindspore_fixtures.py --all FOLDER

Without --all only those that are kept in the repository. mindspore names the parameters, casts them, saves them, cuts them for
the ranks of a distributed run and joins the ranks. Only the strategy files of such a run are written here, with mindspore's
protobuf classes and its `Layout`: to compile a parallel network mindspore needs an accelerator.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mindspore
import numpy as np
from mindspore import nn, parallel
from mindspore.train import node_strategy_pb2

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
if TYPE_CHECKING:
    from tests.oracle.mindspore_fixtures import Cut, Fixture


def make(fixture: Fixture, folder: Path) -> None:
    """Write a fixture into a new folder."""
    folder.mkdir(parents=True)
    if fixture.cut is not None:
        _save_distributed(fixture, fixture.cut, folder)
    elif fixture.parts > 1:
        _save_parts(fixture, folder)
    else:
        _save_file(fixture, folder)


def _network(fixture: Fixture) -> nn.Cell:
    """Network with the fixture's weights; mindspore names them by the modules' attributes."""
    from tests.oracle.mindspore_cells import cells, parameters_of

    weights = fixture.weights()
    # MindSpore Transformers' outermost class holds the model as `model` and adds no prefix; older classes add it.
    network = nn.Cell(auto_prefix=bool(fixture.prefix))
    network.model = cells(
        {name.removeprefix(fixture.prefix): _cast(array, fixture.dtype_of(name)) for name, array in weights.items()}
    )
    parameters_of(network, set(weights))
    return network


def _cast(array: np.ndarray, dtype: str) -> mindspore.Tensor:
    return mindspore.Tensor(array).astype(getattr(mindspore, dtype))


def _saved(fixture: Fixture, network: nn.Cell) -> list[dict[str, Any]]:
    """What a training step saves: the network's parameters, then those of its optimizer, each name once."""
    found = {parameter.name: parameter for parameter in network.get_parameters()}
    if fixture.optimizer:
        norms = [parameter for parameter in network.trainable_params() if "norm" in parameter.name]
        optimizer = getattr(nn, fixture.optimizer)(norms, learning_rate=1e-3)
        found |= {parameter.name: parameter for parameter in optimizer.get_parameters()}
    return [{"name": name, "data": parameter} for name, parameter in found.items()]


def _run_state() -> dict[str, Any]:
    from tests.oracle.mindspore_fixtures import RUN_STATE

    return dict(RUN_STATE)


def _save_file(fixture: Fixture, folder: Path) -> None:
    saved = _saved(fixture, _network(fixture))
    state = _run_state() if fixture.optimizer else None
    path = folder / f"network_rank_0-1_4.{fixture.format}"
    mindspore.save_checkpoint(saved, str(path), append_dict=state, format=fixture.format, crc_check=fixture.crc)


def _save_parts(fixture: Fixture, folder: Path) -> None:
    """Several files and a flat `param_name_map.json`, as the conversion toolkit of MindSpore Transformers leaves them."""
    saved = _saved(fixture, _network(fixture))
    files: dict[str, str] = {}
    for part in range(fixture.parts):
        mine = saved[part * len(saved) // fixture.parts : (part + 1) * len(saved) // fixture.parts]
        name = f"ms-model-{part + 1:05}-of-{fixture.parts:05}.safetensors"
        mindspore.save_checkpoint(mine, str(folder / name), format="safetensors")
        files |= {entry["name"]: name for entry in mine}
    (folder / "param_name_map.json").write_text(json.dumps(files, indent=4))


def _save_distributed(fixture: Fixture, cut: Cut, folder: Path) -> None:
    """A whole file, the ranks that mindspore cuts from it, and `unified/`, which it joins from the ranks."""
    whole, strategy = folder / "whole", folder / "strategy"
    for inner in (whole, strategy):
        inner.mkdir()
    mindspore.save_checkpoint(_saved(fixture, _network(fixture)), str(whole / "net.safetensors"), format="safetensors")
    for stage in range(cut.pp):
        content = _strategy(fixture, cut, stage)
        for rank in range(stage * cut.dp * cut.tp, (stage + 1) * cut.dp * cut.tp):
            (strategy / f"ckpt_strategy_rank_{rank}.ckpt").write_bytes(content)
    used = strategy / "ckpt_strategy_rank_0.ckpt"
    if cut.pp > 1:
        used = folder / "merged_ckpt_strategy.ckpt"
        parallel.merge_pipeline_strategys(str(strategy), str(used))
    _cut(whole, used, cut, folder / "checkpoint")
    parallel.unified_safetensors(str(folder / "checkpoint"), str(used), str(folder / "unified"), max_process_num=1)
    for path in [*whole.iterdir(), whole]:
        path.unlink() if path.is_file() else path.rmdir()


def _cut(whole: Path, strategy: Path, cut: Cut, target: Path) -> None:
    """The ranks' files, with the state of the run in each."""
    for rank in range(cut.ranks):
        parallel.load_distributed_checkpoint(
            None,
            predict_strategy=str(strategy),
            format="safetensors",
            unified_safetensors_dir=str(whole),
            dst_safetensors_dir=str(target),
            rank_id=rank,
        )
        (written,) = (target / f"rank_{rank}").iterdir()
        tensors = mindspore.load_checkpoint(str(written), format="safetensors")
        written.unlink()
        path = target / f"rank_{rank}" / f"checkpoint_rank_{rank}-1_4.safetensors"
        mindspore.save_checkpoint(tensors, str(path), append_dict=_run_state(), format="safetensors")


def _strategy(fixture: Fixture, cut: Cut, stage: int) -> bytes:
    """Strategy file of a pipeline stage: how each of its weights is cut."""
    content = node_strategy_pb2.ParallelStrategyMap(current_stage=stage)
    item = content.parallel_strategy_item.add(node_name="Cast-op0")
    item.parallel_strategys.stage = stage
    for name, array in fixture.weights().items():
        if _stage_of(name, fixture, cut) == stage:
            layouts = content.parallel_layout_item.add(param_name=name).parallel_layouts
            _fill(layouts, name, array.shape, cut)
    return content.SerializeToString(deterministic=True)


def _fill(layouts: Any, name: str, shape: tuple[int, ...], cut: Cut) -> None:
    axes = _axes(name, len(shape))
    known = parallel.Layout((cut.dp, cut.tp), ("dp", "tp"))(*axes).to_dict()
    layouts.dev_matrix.add(dim=known["device_matrix"])
    layouts.tensor_map.add(dim=known["tensor_map"])
    layouts.param_split_shape.add()
    layouts.indices_offset.add()
    layouts.field = 0
    # The parallel optimizer cuts a weight's rows over all ranks that otherwise hold the same ones.
    step, size, rows = (cut.tp, cut.dp, shape[0]) if "tp" in axes else (1, cut.dp * cut.tp, shape[0])
    rows //= cut.tp if axes[0] == "tp" else 1
    sharded = cut.optimizer_shard and rows % size == 0
    layouts.opt_weight_shard_step = step if sharded else 0
    layouts.opt_weight_shard_size = size if sharded else 0


def _axes(name: str, dimensions: int) -> tuple[str, ...]:
    """Which axis of a weight is cut over the tensor-parallel ranks: the vocabulary of 61 rows is not."""
    across = ("linear_proj.weight", "linear_fc2.weight")
    along = ("linear_qkv.weight", "linear_qkv.bias", "linear_fc1.weight", "experts.weight1", "experts.weight2")
    axes = ["None"] * dimensions
    if name.endswith(across):
        axes[1] = "tp"
    elif name.endswith(along):
        axes[0] = "tp"
    return tuple(axes)


def _stage_of(name: str, fixture: Fixture, cut: Cut) -> int:
    """Pipeline stage of a weight; the last one has the final norm and the head."""
    parts = name.removeprefix(fixture.prefix).split(".")
    if parts[:2] == ["decoder", "layers"]:
        return int(parts[2]) * cut.pp // fixture.model.layers
    return 0 if parts[0] == "embedding" else cut.pp - 1


def main() -> None:
    """Make the fixtures that the command line asks for."""
    from tests.oracle.mindspore_fixtures import FIXTURES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folder", type=Path, help="one folder is made in it for each fixture; it must have none of them"
    )
    parser.add_argument("--all", action="store_true", help="also those that are not kept in the repository")
    options = parser.parse_args()
    np.seterr(over="ignore")  # the values' hash multiplies modulo 2 to the 64
    for name, fixture in FIXTURES.items():
        if fixture.committed or options.all:
            with (
                open(os.devnull, "w", encoding="utf-8") as nowhere,
                redirect_stdout(nowhere),
            ):  # mindspore's progress bars
                make(fixture, options.folder / name)


if __name__ == "__main__":
    main()
