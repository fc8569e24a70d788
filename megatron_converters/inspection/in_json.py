"""JSON form of a survey, for programs."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ..model.slots import DECODER
from .in_words import by_dtype, count_tensors, left_out, sum_nbytes
from .inventory import Holding, Survey, count_parameters


def as_json(found: Survey) -> dict[str, Any]:
    """JSON values of the whole survey: sizes in bytes, model fields named as in `ModelSpec`."""
    total, active = count_parameters(found.spec)
    parallel, origin = found.origin.parallel, found.origin
    return {
        "path": origin.described,
        "hub": origin.hub,
        "format": found.kind,
        "checkpoint_format": origin.checkpoint_format,
        "model": found.spec.to_dict(),
        "parameters": {"total": total, "active": active},
        "weights": {
            "bytes": sum_nbytes(found.holdings),
            "tensors": count_tensors(found.holdings),
            "copied_bytes": sum_nbytes(holding for holding in found.holdings if holding.copy),
            "dtypes": {
                dtype: {"bytes": sum_nbytes(held), "tensors": count_tensors(held)}
                for dtype, held in by_dtype(found).items()
            },
        },
        "vocabulary": {"size": found.spec.vocab_size, "rows": found.padded_vocab},
        "parallel": None
        if parallel is None
        else {
            "tensor": parallel.tp,
            "pipeline": parallel.pp,
            "virtual_stages": parallel.vpp,
            "layers_of_stages": list(parallel.stages),
            "expert": parallel.ep,
            "expert_tensor": parallel.etp,
        },
        "mup": origin.mup,
        "names": found.names,
        "expert_layout": found.expert_layout,
        "iteration": origin.iteration,
        "tokenizer": origin.tokenizer,
        "notes": origin.notes,
        "left_out": left_out(found),
        "files": [_file_json(found, file, held) for file, held in found.by_file.items()],
    }


def _file_json(found: Survey, file: str, held: list[Holding]) -> dict[str, Any]:
    of_decoder = (holding.ref.layer for holding in held if holding.ref.stack == DECODER)
    layers = sorted({layer for layer in of_decoder if layer is not None})
    slots = Counter[str]()
    for holding in held:
        slots[holding.slot] += holding.nbytes
    return {
        "file": file,
        "bytes": found.files[file],
        "tensors": count_tensors(held),
        "weight_bytes": sum_nbytes(held),
        "layers": layers,
        "slot_bytes": dict(slots),
    }
