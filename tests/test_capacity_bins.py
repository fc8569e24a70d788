"""Capacity bins of Habana's routers: `capacity_bins.pt` as Habana's converter writes it, and back into each rank's file."""

from __future__ import annotations

import itertools
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_converters.assets import capacity_bins
from megatron_converters.basics.errors import ConversionError, UsageError
from megatron_converters.basics.handover import receive_own_types, receives_own_types
from megatron_converters.conversion.progress import Silent
from megatron_converters.conversion.run import convert as endpoints_convert
from megatron_converters.formats.huggingface.source import HFSource
from megatron_converters.formats.huggingface.target import HFOptions, HFTarget
from megatron_converters.formats.megatron.rank_files_source import MegatronSource
from megatron_converters.formats.megatron.rank_files_target import MegatronTarget
from megatron_converters.formats.megatron.reading import MegatronReadOptions
from megatron_converters.formats.megatron.writing import MegatronOptions
from megatron_converters.sharding.stages import PipelineSplit
from tests.conversions import hf_to_megatron, run
from tests.helpers import (
    RANK_FILE,
    args_of,
    convert,
    convert_back,
    edit_rank,
    hf_tensors,
    nothing_complete,
    rank_content,
    refused,
    same_tensors,
    succeeded,
)

HFModel = Callable[..., Path]
Sizes = tuple[int, int, int, int]
Stages = tuple[tuple[int, ...], ...]
SMALL: dict[str, Any] = {"num_hidden_layers": 2, "num_local_experts": 4}
FILE = "capacity_bins.pt"
#: The buffers of Habana 1.24.0, megatron/core/transformer/moe/capacity_bins.py, and their lengths with five bins.
NAMES = {
    "bins_usage": 5,
    "total_requested_capacity": 1,
    "optimize_moe_bins_usage_last": 5,
    "optimize_moe_total_requested_capacity_last": 1,
    "capacity_bins": 5,
}
#: Tensor-, pipeline-, expert- and expert-tensor-parallel sizes, and the layers of each stage.
GRIDS: tuple[tuple[Sizes, Stages], ...] = (
    ((1, 1, 1, 1), ((0, 1),)),
    ((2, 2, 2, 2), ((0,), (1,))),
    ((2, 1, 2, 1), ((0, 1),)),
    ((1, 2, 1, 1), ((0,), (1,))),
)


def key(layer: int, name: str) -> str:
    return f"decoder.layers.{layer}.mlp.router.capacity_bins.{name}"


def directory(sizes: Sizes, p: int, e: int, t: int) -> str:
    _, pp, ep, _ = sizes
    return f"mp_rank_{t:02d}" + (f"_{p:03d}" if pp > 1 else "") + (f"_{e:03d}" if ep > 1 else "")


def add_bins(meg: Path, sizes: Sizes, stages: Stages, dense: tuple[int, ...] = ()) -> dict[str, Any]:
    """Give a checkpoint's routers bins; returns the dictionary that Habana's converter makes of them (`convert_layers`)."""
    tp, pp, ep, _ = sizes
    layers = sum(map(len, stages))
    nested: dict[str, Any] = {
        name: {n: {p: {e: {t: {} for t in range(tp)} for e in range(ep)} for p in range(pp)} for n in range(layers)}
        for name in NAMES
    }
    generator = torch.Generator().manual_seed(7)
    for p, e, t in itertools.product(range(pp), range(ep), range(tp)):
        rank = directory(sizes, p, e, t)
        if not (meg / "iter_0000001" / rank).is_dir():
            continue
        model = rank_content(meg, rank)["model"]
        for local, layer in enumerate(stages[p]):
            for name, size in NAMES.items() if layer not in dense else ():
                tensor = torch.randint(1, 2**40, (size,), generator=generator)
                model[key(local, name)] = nested[name][layer][p][e][t] = tensor
        edit_rank(meg, rank, model=model)
    return nested


def checkpoint(source: Path, meg: Path, sizes: Sizes, **options: Any) -> Path:
    tp, pp, ep, etp = sizes
    return hf_to_megatron(source, meg, tp=tp, pp=pp, ep=ep, etp=etp, impl="local", **options)


def save(meg: Path, folder: Path, **options: Any) -> list[str]:
    return run(MegatronSource(meg), HFTarget(folder, HFOptions(save_capacity_bins=True, **options)))


def load(folder: Path, meg: Path, sizes: Sizes, **options: Any) -> list[str]:
    source = HFSource(folder)
    source.origin.capacity_bins = capacity_bins.read(folder / FILE)
    tp, pp, ep, etp = sizes
    more = MegatronOptions(tp=tp, pp=pp, ep=ep, etp=etp, impl="local", load_capacity_bins=True, **options)
    return run(source, MegatronTarget(meg, more))


def same_nested(ours: Any, theirs: Any) -> None:
    """The same keys in the same order, and below them the same tensors or empty dictionaries."""
    if isinstance(theirs, torch.Tensor):
        assert isinstance(ours, torch.Tensor)
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
        return
    assert type(ours) is dict
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        same_nested(ours[name], value)


def same_checkpoints(ours: Path, theirs: Path) -> None:
    files = sorted(path.relative_to(theirs) for path in theirs.glob(f"*/*/{RANK_FILE}"))
    assert sorted(path.relative_to(ours) for path in ours.glob(f"*/*/{RANK_FILE}")) == files
    for file in files:
        models = [rank_content(meg, file.parent.name)["model"] for meg in (ours, theirs)]
        assert models[0].keys() == models[1].keys()
        same_tensors(*({name: value for name, value in model.items() if value is not None} for model in models))


@pytest.fixture
def small(hf_model: HFModel) -> Path:
    return hf_model("mixtral", **SMALL)


# --- there and back


@pytest.mark.parametrize(("sizes", "stages"), GRIDS, ids=str)
def test_bins_are_saved_as_habana_saves_them_and_come_back(
    sizes: Sizes, stages: Stages, small: Path, tmp_path: Path
) -> None:
    meg, hf, again = checkpoint(small, tmp_path / "meg", sizes), tmp_path / "hf", tmp_path / "again"
    expected = add_bins(meg, sizes, stages)
    told = save(meg, hf)
    same_nested(torch.load(hf / FILE, weights_only=True), expected)
    same_tensors(hf_tensors(hf), hf_tensors(small))
    ranks = len(list(meg.glob(f"*/*/{RANK_FILE}")))
    count = len(NAMES) * 2 * ranks // len(stages)
    assert f"{count} capacity-bin buffers are in {FILE}" in told
    told = load(hf, again, sizes)
    assert f"{count} capacity-bin buffers of {hf / FILE} are kept" in told
    assert any(line.endswith("--moe-capacity-bins-num 5") for line in told)
    assert args_of(again).moe_capacity_bins_num == 5
    same_checkpoints(again, meg)


class Counted(Silent):
    """Counts the bytes that were announced less those that were filled."""

    left = 0

    def start(self, total: int) -> None:
        self.left += total

    def __call__(self, count: int) -> None:
        self.left -= count


def test_progress_counts_the_bytes_of_weights_alone(small: Path, tmp_path: Path) -> None:
    meg = checkpoint(small, tmp_path / "meg", (1, 1, 1, 1))
    add_bins(meg, (1, 1, 1, 1), ((0, 1),))
    for target in (
        MegatronTarget(tmp_path / "again", MegatronOptions(load_capacity_bins=True)),
        HFTarget(tmp_path / "hf", HFOptions(save_capacity_bins=True)),
    ):
        counted = Counted()
        endpoints_convert(MegatronSource(meg), target, None, counted)
        assert counted.left == 0


def test_a_file_by_torch_save_is_read(small: Path, tmp_path: Path) -> None:
    """As Habana's converter ends: `torch.save(capacity_bins_state_dict, ...)`, tensors as they came, views included."""
    sizes: Sizes = (2, 2, 2, 2)
    meg = checkpoint(small, tmp_path / "meg", sizes)
    expected = add_bins(meg, sizes, ((0,), (1,)))
    hf = shutil.copytree(small, tmp_path / "hf")
    usage = expected["bins_usage"]
    usage[0][0][0][0] = torch.stack([usage[0][0][0][0], usage[0][0][0][0]], dim=1)[:, 0]  # every second of a storage
    torch.save(expected, hf / FILE)
    load(hf, tmp_path / "again", sizes)
    same_checkpoints(tmp_path / "again", meg)


def test_dense_layers_and_uneven_stages(hf_model: HFModel, tmp_path: Path) -> None:
    """Layer 2 of 4 is dense; the first stage has three."""
    source, sizes = hf_model("qwen3-moe-dense-layers"), (1, 2, 2, 1)
    meg = checkpoint(source, tmp_path / "meg", sizes, split=PipelineSplit(first=3))
    expected = add_bins(meg, sizes, ((0, 1, 2), (3,)), dense=(2,))
    save(meg, tmp_path / "hf")
    same_nested(torch.load(tmp_path / "hf" / FILE, weights_only=True), expected)
    load(tmp_path / "hf", tmp_path / "again", sizes, split=PipelineSplit(first=3))
    same_checkpoints(tmp_path / "again", meg)
    with pytest.raises(
        ConversionError,
        match=r"capacity_bins of layer 1 on pp=0, ep=0, tp=0 is there, but the model has no such router",
    ):
        load(tmp_path / "hf", tmp_path / "no", sizes, split=PipelineSplit(first=1))
    nothing_complete(tmp_path / "no")


def test_habana_s_command_lines(small: Path, tmp_path: Path) -> None:
    sizes: Sizes = (2, 2, 2, 2)
    meg = checkpoint(small, tmp_path / "meg", sizes)
    expected = add_bins(meg, sizes, ((0,), (1,)))
    hf, queued, again = tmp_path / "hf", tmp_path / "queued", tmp_path / "again"
    run_back = (
        "--load-path",
        meg,
        "--save-path",
        hf,
        "--source-model-type",
        "mixtral",
        "--target-params-dtype",
        "fp32",
    )
    out = succeeded(convert_back(*run_back, "--save-capacity-bins")).out
    assert "are in capacity_bins.pt" in out
    same_nested(torch.load(hf / FILE, weights_only=True), expected)
    succeeded(
        convert("--loader", "core", "--saver", "hf", "--load-dir", meg, "--save-dir", queued, "--save-capacity-bins")
    )
    same_nested(torch.load(queued / FILE, weights_only=True), expected)
    target = "--target-tensor-parallel-size 2 --target-pipeline-parallel-size 2 --target-expert-parallel-size 2"
    forward = f"--loader mixtral_hf --saver mcore --load-dir {hf} --saver-transformer-impl local --load-capacity-bins"
    succeeded(convert(*forward.split(), "--save-dir", again, *target.split()))
    same_checkpoints(again, meg)
    flags = (again / "iter_0000001" / "pretrain_gpt_flags.txt").read_text()
    assert "--moe-capacity-bins-num 5" in flags
    refused(
        convert(*forward.split(), "--save-dir", tmp_path / "no", "--target-tensor-parallel-size", 2),
        "capacity bins of tp=2, pp=2 and ep=2",
        "not for tp=2, pp=1 and ep=1",
        code=2,
    )
    nothing_complete(tmp_path / "no")
    bare = ("--loader", "mixtral_hf", "--load-dir", small, "--save-dir", tmp_path / "no", "--load-capacity-bins")
    refused(convert(*bare), small / FILE, "is missing", "--save-capacity-bins")


def test_resharding_keeps_them_at_the_same_sizes_if_asked(small: Path, tmp_path: Path) -> None:
    sizes: Sizes = (2, 1, 2, 1)
    meg = checkpoint(small, tmp_path / "meg", sizes)
    add_bins(meg, sizes, ((0, 1),))
    options = ("--loader", "core", "--saver", "mcore", "--load-dir", meg, "--saver-transformer-impl", "local")
    succeeded(convert(*options, "--save-dir", tmp_path / "same", "--load-capacity-bins"))
    same_checkpoints(tmp_path / "same", meg)
    other = ("--save-dir", tmp_path / "other", "--target-expert-parallel-size", 1)
    refused(convert(*options, *other, "--load-capacity-bins"), "which are valid for these sizes only", code=2)
    out = succeeded(convert(*options, *other)).out
    assert "40 capacity-bin buffers of" not in out  # two ranks have two layers with five buffers each
    assert "20 capacity-bin buffers of" in out
    assert "are left out" in out
    assert not any("capacity_bins" in name for name in rank_content(tmp_path / "other")["model"])


# --- left out


def test_bins_are_left_out_and_listed_unless_asked_for(small: Path, tmp_path: Path) -> None:
    sizes: Sizes = (1, 1, 2, 1)
    meg = checkpoint(small, tmp_path / "meg", sizes)
    add_bins(meg, sizes, ((0, 1),))
    told = run(MegatronSource(meg), HFTarget(tmp_path / "hf", HFOptions()))
    left_out = (
        f"20 capacity-bin buffers of {meg / 'iter_0000001'} are left out; they belong to one run at tp=1, pp=1 and ep=2 "
        "(--{}-capacity-bins keeps them)"
    )
    assert left_out.format("save") in told
    assert not (tmp_path / "hf" / FILE).exists()
    told = run(MegatronSource(meg), MegatronTarget(tmp_path / "again", MegatronOptions()))
    assert left_out.format("load") in told
    assert not any("capacity_bins" in name for name in rank_content(tmp_path / "again", "mp_rank_00_000")["model"])
    assert not hasattr(args_of(tmp_path / "again"), "moe_capacity_bins_num")


def test_a_file_that_is_not_asked_for_is_named(small: Path, tmp_path: Path) -> None:
    hf = shutil.copytree(small, tmp_path / "hf")
    (hf / FILE).write_bytes(b"never read")
    run_forth = succeeded(convert("--loader", "hf", "--load-dir", hf, "--save-dir", tmp_path / "meg"))
    assert f"{hf / FILE} is left out" in run_forth.out


def test_saving_where_there_are_none_is_warned_of(small: Path, tmp_path: Path) -> None:
    meg = checkpoint(small, tmp_path / "meg", (1, 1, 1, 1))
    assert "warning: there are no capacity bins to save" in save(meg, tmp_path / "hf")
    assert not (tmp_path / "hf" / FILE).exists()


def test_an_older_model_s_bins_do_not_stay(small: Path, tmp_path: Path) -> None:
    sizes: Sizes = (1, 1, 1, 1)
    meg, hf = checkpoint(small, tmp_path / "meg", sizes), tmp_path / "hf"
    add_bins(meg, sizes, ((0, 1),))
    save(meg, hf)
    assert (hf / FILE).exists()
    run(MegatronSource(meg), HFTarget(hf, HFOptions(overwrite=True)))
    assert not (hf / FILE).exists()


def test_loading_from_a_source_without_bins_is_refused(small: Path, tmp_path: Path) -> None:
    target = MegatronTarget(tmp_path / "meg", MegatronOptions(load_capacity_bins=True))
    with pytest.raises(UsageError, match=r"^--load-capacity-bins: .* gives no capacity bins; leave it out$"):
        run(HFSource(small), target)
    nothing_complete(tmp_path / "meg")


# --- faults


def test_a_rank_without_its_bins_is_named_on_the_way_out(small: Path, tmp_path: Path) -> None:
    sizes: Sizes = (1, 1, 2, 1)
    meg = checkpoint(small, tmp_path / "meg", sizes)
    add_bins(meg, sizes, ((0, 1),))
    model = rank_content(meg, "mp_rank_00_001")["model"]
    del model[key(1, "bins_usage")]
    edit_rank(meg, "mp_rank_00_001", model=model)
    message = r"not those of this model's routers:\n  - bins_usage of layer 1 on pp=0, ep=1, tp=0 is missing$"
    with pytest.raises(ConversionError, match=message):
        save(meg, tmp_path / "hf")
    nothing_complete(tmp_path / "hf")


def test_a_key_that_is_no_buffer_of_a_router_is_no_tensor_of_the_model(small: Path, tmp_path: Path) -> None:
    meg = checkpoint(small, tmp_path / "meg", (1, 1, 1, 1))
    model = rank_content(meg)["model"]
    model["decoder.layers.0.attention.router.capacity_bins.bins_usage"] = torch.ones(5)
    edit_rank(meg, "mp_rank_00", model=model)
    with pytest.raises(
        ConversionError, match=r"attention\.router\.capacity_bins\.bins_usage is not a tensor of this model"
    ):
        MegatronSource(meg)


def drop_layer(nested: dict[str, Any]) -> None:
    for levels in nested.values():
        del levels[1]


def add_layer(nested: dict[str, Any]) -> None:
    for levels in nested.values():
        levels[2] = {0: {0: {0: {}}}}


def empty_out(nested: dict[str, Any]) -> None:
    for levels in nested.values():
        levels[0][0][0][0] = levels[1][0][0][0] = {}


SPOILT: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "nothing": (lambda nested: nested.clear(), r"holds no capacity bins; leave out --load-capacity-bins"),
    "empty": (empty_out, r"holds no capacity bins, bins_usage, "),
    "one name empty": (
        lambda nested: nested.update(more={0: {0: {0: {0: {}}}}, 1: {0: {0: {0: {}}}}}),
        "holds no capacity bins, more;",
    ),
    "fewer layers": (drop_layer, "there are 1 layers, but the model has 2"),
    "more layers": (add_layer, "there are 3 layers, but the model has 2"),
    "a hole": (lambda nested: nested["bins_usage"].pop(0), "same layers, pipeline ranks, .* under every name"),
    "numbers as text": (lambda nested: nested["bins_usage"].update({"0": nested["bins_usage"].pop(0)}), "same layers"),
    "a name that is none": (lambda nested: nested.update({5: nested.pop("bins_usage")}), "same layers"),
    "a leaf missing": (
        lambda nested: nested["bins_usage"][1][0][0].update({0: {}}),
        "bins_usage of layer 1 on pp=0, ep=0, tp=0 is missing",
    ),
    "no tensor": (
        lambda nested: nested["bins_usage"][1][0][0].update({0: [1]}),
        r"there is a list at \['bins_usage'\]\[1\]\[0\]\[0\]\[0\] instead of a tensor",
    ),
    "too shallow": (
        lambda nested: nested.update(bins_usage=torch.ones(5)),
        r"there is a StoredTensor at \['bins_usage'\] instead of layers; it is not a file of capacity bins",
    ),
    "too deep": (
        lambda nested: nested["bins_usage"][1][0][0].update({0: {0: torch.ones(5)}}),
        r"there is a dict at \['bins_usage'\]\[1\]\[0\]\[0\]\[0\] instead of a tensor",
    ),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_file_of_another_form_is_refused(case: str, small: Path, tmp_path: Path) -> None:
    spoil, message = SPOILT[case]
    nested: dict[str, Any] = {name: {n: {0: {0: {0: torch.arange(5)}}} for n in range(2)} for name in NAMES}
    spoil(nested)
    hf = shutil.copytree(small, tmp_path / "hf")
    torch.save(nested, hf / FILE)
    with pytest.raises(ConversionError, match=message):
        load(hf, tmp_path / "meg", (1, 1, 1, 1))
    nothing_complete(tmp_path / "meg")


def test_a_file_that_holds_no_dictionary_or_code_is_refused(small: Path, tmp_path: Path) -> None:
    torch.save(torch.ones(5), tmp_path / FILE)
    with pytest.raises(ConversionError, match="there is a StoredTensor at the top instead of names"):
        capacity_bins.read(tmp_path / FILE)
    torch.save({"bins_usage": print}, tmp_path / FILE)
    with pytest.raises(ConversionError, match=r"asks for builtins\.print"):
        capacity_bins.read(tmp_path / FILE)


def test_a_dense_model_has_no_bins(hf_model: HFModel, tmp_path: Path) -> None:
    hf = shutil.copytree(hf_model("llama2"), tmp_path / "hf")
    nested = {"bins_usage": {n: {0: {0: {0: torch.arange(5)}}} for n in range(4)}}
    torch.save(nested, hf / FILE)
    with pytest.raises(
        ConversionError, match="bins_usage of layer 0 on pp=0, ep=0, tp=0 is there, but the model has no such router"
    ):
        load(hf, tmp_path / "meg", (1, 1, 1, 1))


# --- the queue


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "another's"])
def test_bins_cross_as_directions_to_files(ours: bool, small: Path, tmp_path: Path) -> None:
    """Whatever process unpickles the metadata, nothing fails, and no element has been read."""
    meg = checkpoint(small, tmp_path / "meg", (1, 1, 1, 1))
    add_bins(meg, (1, 1, 1, 1), ((0, 1),))
    bins = MegatronSource(meg, MegatronReadOptions()).origin.capacity_bins
    assert bins is not None
    before = receives_own_types()
    receive_own_types(ours)
    try:
        found = pickle.loads(pickle.dumps(bins))
    finally:
        receive_own_types(before)
    assert (found.names, found.layers, len(found.tensors)) == (tuple(NAMES), 2, 10)
    assert (found == bins) == ours  # elsewhere dtypes are torch's
