"""Text form of a survey: sections of labelled rows, and a table of files."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from ..assets import capacity_bins
from ..basics.quantities import count, size
from ..conversion.dry_run import Forecast
from ..families import FAMILIES
from ..formats.kinds import HF, MEGATRON, META, MINDSPORE, WEIGHTS
from ..formats.megatron.distributed_folder import LOADED_AT_ANY_SIZES
from ..formats.megatron.options import FLAGS, FOLD, RAW
from ..model.layers import (
    ALL_HEADS,
    BEFORE,
    EACH_HEAD,
    RMS_NORM,
    SILU,
    SOFTMAX,
    Attention,
    Latent,
    Mixer,
    Mixture,
)
from ..model.sparse_latent import SparseLatent
from ..model.spec import ModelSpec, Multipliers, PerLayer
from ..sharding.ranks import Parallel
from .inventory import Holding, Survey, count_parameters

Rows = list[tuple[str, str]]
_FORMATS = {
    HF: "Hugging Face",
    WEIGHTS: "Hugging Face weights",
    META: "Meta",
    MEGATRON: "Megatron-LM",
    MINDSPORE: "MindSpore",
}
_MULTIPLIERS = {
    FLAGS: "in flags of muP",
    FOLD: "folded into weights",
    RAW: "in arguments of MindSpeed-LLM, or left to the training program",
}
_NAMES = {"local": "Megatron-LM's local layers", "transformer_engine": "Transformer Engine"}


@dataclass(frozen=True)
class Section:
    """Heading and its rows of label and value."""

    title: str
    rows: Rows


def headline(found: Survey) -> str:
    """One line that names the folder, its format and its model."""
    total, active = count_parameters(found.spec)
    active_part = f" ({active:,} active)" if active != total else ""
    return f"{found.origin.described}: {_FORMATS[found.kind]}, {found.spec.family}, {total:,} parameters{active_part}"


def sections(found: Survey) -> list[Section]:
    """Sections on everything but the files."""
    return [
        Section("model", list(_model(found.spec))),
        *([Section("experts", list(_experts(found.spec)))] if found.spec.num_experts else []),
        Section("weights", list(_weights(found))),
        Section("layout", list(_layout(found))),
        Section("beside the weights", list(_other_contents(found))),
    ]


def conversion_section(result: Forecast) -> Section:
    """Section on what a planned conversion reads, writes and needs."""
    return Section("conversion", list(_conversion(result)))


def _conversion(result: Forecast) -> Iterator[tuple[str, str]]:
    yield "tensors read", f"{result.source_tensors:,}"
    yield "tensors written", f"{result.target_tensors:,} in {count(len(result.files), 'file')}"
    yield from (("cast", f"{number:,} from {cast}") for cast, number in result.casts.items())
    yield from (("computed", f"{number:,} are {computed}") for computed, number in result.computed.items())
    if result.padding_rows:
        yield "vocabulary padding", f"{count(result.padding_rows, 'row')}, in all tensors together"
    if result.copies:
        yield "copies", f"{result.copies:,} B ({size(result.copies)}), which several ranks hold"
    yield "disk", f"{size(result.left)} needed, {size(result.free)} free"
    if result.left > result.free:
        yield "obstacle", "there is not enough room on the disk"
    if result.obstacle:
        yield "obstacle", result.obstacle
    yield from (("left out", what) for what in result.ignored)
    yield from (("note", note) for note in result.notes)


def lines(found: Survey) -> Iterator[str]:
    """Lines of the whole survey, aligned."""
    yield headline(found)
    for section in sections(found):
        yield ""
        yield section.title
        width = max(len(label) for label, _ in section.rows)
        yield from (f"  {label:<{width}}  {value}" for label, value in section.rows)
    yield ""
    yield "files"
    rows = [("", "tensors", "weights", "on the disk"), *file_rows(found)]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for name, *numbers in rows:
        columns = (f"{number:>{width}}" for number, width in zip(numbers, widths[1:], strict=True))
        yield f"  {name:<{widths[0]}}  {'  '.join(columns)}".rstrip()


def file_rows(found: Survey) -> Iterator[tuple[str, str, str, str]]:
    """Name, tensors, bytes of weights and bytes on disk of each file; neighbouring files of a stage that are alike share a row."""

    def group_key(item: tuple[str, list[Holding]]) -> tuple[Any, ...]:
        file, holdings = item
        return (
            found.stage(file),
            count_tensors(holdings),
            sum_nbytes(holdings),
            found.files[file] if found.cut else file,
        )

    for (stage, tensors, nbytes, _), group in groupby(found.by_file.items(), group_key):
        files = [file for file, _ in group]
        first, last = short_name(files[0]), short_name(files[-1])
        name = first if len(files) == 1 else f"{first} to {last}"
        remarks = [
            *([f"{len(files)} alike"] if len(files) > 1 else []),
            *([stage_layers(found, stage)] if found.cut is not None and found.cut.pp > 1 else []),
        ]
        label = f"{name} ({', '.join(remarks)})" if remarks else name
        yield label, f"{tensors:,}", size(nbytes), f"{found.files[files[0]]:,} B"


def short_name(file: str) -> str:
    """File name; for a file in a rank's folder, the name of that folder."""
    path = Path(file)
    return path.name if path.parent == Path() else str(path.parent)


def count_tensors(holdings: Iterable[Holding]) -> int:
    """Number of stored tensors; one that holds several slots counts once."""
    return len({(holding.file, holding.name) for holding in holdings})


def stage_layers(found: Survey, stage: int) -> str:
    """Layers of a pipeline stage in words, numbered over the whole model."""
    layers = found.layers[stage]
    return runs("layer", layers) if layers else "no layers"


def runs(noun: str, numbers: Sequence[int]) -> str:
    """Ascending numbers in words, such as "layers 0 to 3, 8"."""
    parts = [[number for _, number in run] for _, run in groupby(enumerate(numbers), lambda item: item[1] - item[0])]
    words = [str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in parts]
    return f"{noun}{'' if len(numbers) == 1 else 's'} {', '.join(words)}"


def sum_nbytes(holdings: Iterable[Holding]) -> int:
    """Bytes of weights, summed."""
    return sum(holding.nbytes for holding in holdings)


def _model(spec: ModelSpec) -> Iterator[tuple[str, str]]:
    total, active = count_parameters(spec)
    yield "architecture", f"{spec.family} ({FAMILIES[spec.family].architecture})"
    yield "parameters", f"{total:,}"
    if active != total:
        yield "active for a token", f"{active:,}"
    yield "layers", str(spec.num_layers)
    if spec.mtp:
        yield "layers of multi-token prediction", str(len(spec.mtp))
    yield "hidden size", str(spec.hidden_size)
    yield "MLP size", _value(spec, "ffn_hidden_size")
    yield "attention", "; ".join(dict.fromkeys(_mixer(kind.mixer) for kind in spec.used))
    yield (
        "query and key norms",
        {ALL_HEADS: "over all heads together", EACH_HEAD: "for each head"}.get(spec.values.get("qk_norm", ""), "none"),
    )
    yield "biases", _biases(spec)
    yield "vocabulary", str(spec.vocab_size)
    yield "output layer", _head(spec)
    yield "positions", str(spec.max_position_embeddings)
    if spec.values.get("rope"):
        yield "rotary base", _value(spec, "rotary_base", "{:.15g}".format)
        yield "rotary scaling", _value(spec, "rope_scaling") if spec.values["rope_scaling"] else "none"
        if plain := [layer for layer, has in enumerate(spec.in_layers("rope")) if has is False]:
            yield "without rotary embeddings", runs("layer", plain)
    yield "sliding window", _window(spec)
    yield "norm epsilon", f"{spec.norm.norm_epsilon:g}"
    yield from _unusual(spec)
    yield "dtype", str(spec.dtype)


def _unusual(spec: ModelSpec) -> Iterator[tuple[str, str]]:
    """Properties that are only said where they are not as in a Llama."""
    usual = {**_USUAL, **{field.name: field.default for field in dataclasses.fields(Multipliers)}}
    for name, value in usual.items():
        if spec.values.get(name, value) != value:
            yield name.replace("_", " "), _value(spec, name)


_USUAL = {
    "normalization": RMS_NORM,
    "zero_centred": False,
    "activation": SILU,
    "gated": True,
    "learned_positions": False,
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "attention_output_gate": False,
    "sinks": False,
    "glu_linear_offset": 0.0,
    "activation_func_clamp_value": None,
    "parallel_block": False,
    "parallel_norms": False,
    "block_norms": BEFORE,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}


def _mixer(mixer: Mixer) -> str:
    if isinstance(mixer, Attention):
        groups = count(mixer.num_query_groups, "query group")
        return f"{mixer.num_attention_heads} heads of {mixer.kv_channels} in {groups}"
    if isinstance(mixer, Latent):
        latents = f"{mixer.kv_lora_rank}" + (f" and of {mixer.q_lora_rank} for queries" if mixer.q_lora_rank else "")
        heads = f"{mixer.num_attention_heads} heads from latents of {latents}"
        return f"{heads}, {_indexer(mixer)}" if isinstance(mixer, SparseLatent) else heads
    return f"gated DeltaNet with {mixer.sizes}"


def _indexer(mixer: SparseLatent) -> str:
    """Which positions a sparse attention attends to."""
    topk = f"to {mixer.dsa_indexer_topk} positions of"
    if mixer.shared_indexer:
        return f"{topk} an earlier layer's indexer"
    return f"{topk} an indexer of {count(mixer.dsa_indexer_n_heads, 'head')} of {mixer.dsa_indexer_head_dim}"


def _value(spec: ModelSpec, name: str, shown: Callable[[Any], str] = str) -> str:
    """Value of a property, with the numbers of the layers that have each where they differ."""
    value = spec.values.get(name)
    if not isinstance(value, PerLayer):
        return shown(value)
    layers: dict[Any, list[str]] = {}
    for layer, one in enumerate(value):
        layers.setdefault(one, []).append(str(layer))
    return "; ".join(f"{shown(one)} in layers {', '.join(held)}" for one, held in layers.items() if one is not None)


def _head(spec: ModelSpec) -> str:
    if spec.num_labels is not None:
        return f"a classifier of {count(spec.num_labels, 'label')}" if spec.num_labels else "none"
    return "tied to the embeddings" if spec.tied else "weights of its own"


def _biases(spec: ModelSpec) -> str:
    biases = {"query, key and value": "qkv_bias", "attention output": "proj_bias", "MLP": "mlp_bias"}
    biases |= {"output layer": "head_bias"}
    return ", ".join(words for words, name in biases.items() if spec.values.get(name)) or "none"


def _window(spec: ModelSpec) -> str:
    window = spec.values.get("sliding_window")
    if isinstance(window, PerLayer):
        return f"positions: {_value(spec, 'sliding_window')}"
    return "none" if window is None else f"{window} positions"


def _experts(spec: ModelSpec) -> Iterator[tuple[str, str]]:
    feed = next(kind.feed for kind in spec.used if isinstance(kind.feed, Mixture))
    yield "experts", f"{feed.num_experts}, of which {feed.moe_router_topk} for a token"
    yield "MLP size of each", str(feed.moe_ffn_hidden_size)
    shared = feed.shared_ffn_hidden_size
    yield "shared expert", f"MLP size {shared}{', with a gate' if feed.shared_gate else ''}" if shared else "none"
    if feed.moe_router_score_function == SOFTMAX:
        yield "router's softmax", "over all experts" if feed.moe_router_pre_softmax else "over the chosen experts"
    else:
        yield "router's scores", f"{feed.moe_router_score_function}, scaled by {feed.moe_router_topk_scaling_factor:g}"
    yield "auxiliary loss", f"{feed.moe_aux_loss_coeff:g}"
    dense = [str(layer) for layer in range(spec.num_layers) if not spec.layer(layer).is_moe]
    yield "layers without experts", ", ".join(dense) or "none"


def _weights(found: Survey) -> Iterator[tuple[str, str]]:
    total = sum_nbytes(found.holdings)
    yield "weights", f"{total:,} B ({size(total)}) in {count(count_tensors(found.holdings), 'tensor')}"
    for dtype, held in by_dtype(found).items():
        yield (
            f"of {dtype}",
            f"{sum_nbytes(held):,} B ({size(sum_nbytes(held))}) in {count(count_tensors(held), 'tensor')}",
        )
    copies = [holding for holding in found.holdings if holding.copy]
    if copies:
        yield (
            "of these, copies",
            f"{sum_nbytes(copies):,} B ({size(sum_nbytes(copies))}) in {count(count_tensors(copies), 'tensor')}",
        )
    padding = found.padded_vocab - found.spec.vocab_size
    yield "vocabulary padding", f"{padding} rows (embeddings have {found.padded_vocab})" if padding else "none"


def by_dtype(found: Survey) -> dict[str, list[Holding]]:
    """Holdings by the name of their dtype."""
    held: dict[str, list[Holding]] = {}
    for holding in found.holdings:
        held.setdefault(str(holding.dtype), []).append(holding)
    return held


def _layout(found: Survey) -> Iterator[tuple[str, str]]:
    parallel, names, experts = found.origin.parallel, found.names, found.expert_layout
    checkpoint_format = found.origin.checkpoint_format
    written = ", when written" if checkpoint_format in LOADED_AT_ANY_SIZES else ""
    yield "format", ", ".join(filter(None, (_FORMATS[found.kind], checkpoint_format)))
    if parallel is not None:
        yield "tensor parallel", f"{parallel.tp}{written}"
        yield "pipeline parallel", f"{_stages(parallel)}{written}"
        if found.spec.num_experts:
            yield "expert parallel", f"{parallel.ep}{written}"
            yield "expert tensor parallel", f"{parallel.etp}{written}"
    if found.origin.mup is not None:
        yield "multipliers", _MULTIPLIERS[found.origin.mup]
    if names is not None:
        yield "names", f"{_NAMES[names]} ({names})"
    if experts is not None:
        yield "experts stored", experts
    with_weights = len(found.by_file)
    on_disk = sum(found.files[file] for file in found.by_file)
    yield "files with weights", f"{with_weights:,}, {on_disk:,} B ({size(on_disk)})"


def _stages(parallel: Parallel) -> str:
    if parallel.pp == 1:
        return "1"
    layers_by_rank = [sum(parallel.stages[rank :: parallel.pp]) for rank in range(parallel.pp)]
    runs = [(layers, len(list(group))) for layers, group in groupby(layers_by_rank)]
    shown = " + ".join(str(layers) if times == 1 else f"{times} x {layers}" for layers, times in runs)
    details = [f"layers {shown}"]
    if parallel.vpp > 1:
        details.append(f"{parallel.vpp} virtual stages on each")
    counted = {"embedding": parallel.split.embedding, "loss": parallel.split.loss}
    if any(counted.values()):
        details.append(f"counting the {' and the '.join(name for name, on in counted.items() if on)}")
    return f"{parallel.pp} ({', '.join(details)})"


def _other_contents(found: Survey) -> Iterator[tuple[str, str]]:
    origin = found.origin
    if origin.hub is not None:
        yield "model on the Hub", origin.hub
    yield "iteration", "none" if origin.iteration is None else str(origin.iteration)
    yield "tokenizer", origin.tokenizer or "none"
    if origin.code_files:
        yield "code of the model", ", ".join(origin.code_files)
    if found.kind == MEGATRON:
        yield "Hugging Face configuration", "recorded" if origin.hf_config else "none is recorded"
    yield from (("note", note) for note in origin.notes)
    yield from (("left out", what) for what in left_out(found))


def left_out(found: Survey) -> list[str]:
    """Tensors that conversions leave out by default, in words."""
    bins = found.origin.capacity_bins
    return [
        *found.origin.ignored,
        *([] if bins is None else [capacity_bins.left_out_note(bins, "--save-capacity-bins")]),
    ]
