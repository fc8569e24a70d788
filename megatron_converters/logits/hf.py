"""Logits of a Hugging Face folder, computed by transformers in a separate process."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..basics.errors import ConversionError, raise_all
from ..basics.json_files import read_json
from ..basics.packages import need
from ..conversion.left_out import LeftOut
from ..families import FAMILIES, quantisation
from ..families.table import Proof
from ..formats.huggingface.weight_files import read_weights
from .pool import Pool

_REMEDY = "convert it first (convert SRC DST --to hf) and compare the result"


class HFModel:
    """Hugging Face folder that was checked to be readable; the model is not built yet."""

    def __init__(self, path: Path, ignored: Sequence[str] = ()) -> None:
        """`ignored` are patterns of names of tensors that the model does not have.

        Raises `ConversionError` if the folder is damaged or transformers is missing.
        """
        need("torch", "torch", "computing logits")
        need("transformers", "transformers", "computing logits")
        self.path, self._ignored = path, tuple(ignored)
        config = read_json(path / "config.json")
        _refuse_foreign(path, config)
        if quantisation.scheme_of(
            config
        ):  # transformers 5.23 takes the last block of an axis for as long as the others
            raise ConversionError(
                f"{path} is quantised, and transformers decodes short blocks otherwise than they are meant, and most formats not "
                f"without their library; {_REMEDY}"
            )
        vocab_size, window = config.get("vocab_size"), config.get("sliding_window")
        if not isinstance(vocab_size, int) or vocab_size < 1:
            raise ConversionError(f"{path / 'config.json'} has vocab_size={vocab_size!r}; it must be a number above 0")
        self.vocab_size = vocab_size
        self.window = window if isinstance(window, int) and config.get("use_sliding_window", True) else None
        weights = read_weights(path)
        raise_all(f"{path} is no model that transformers reads as it is:", weights.notes, remedy=_REMEDY)
        self.parameters = sum(math.prod(tensor.shape) for tensor in weights.tensors.values())
        self.processes = 1

    def logits(self, tokens: npt.NDArray[np.int64], time_limit: float) -> npt.NDArray[np.float32]:
        """Logits, float32 [B, S, vocabulary], for tokens [B, S]. Raises `ConversionError` if transformers cannot load it."""
        with Pool(1, _setup, time_limit) as pool:
            result: npt.NDArray[np.float32] = pool.run(_logits, self.path, self._ignored, tokens)[0]
        return result


def _refuse_foreign(path: Path, config: Mapping[str, Any]) -> None:
    """Raise for a family whose class transformers does not have: code that comes with a model is not run."""
    named = config.get("model_type")
    found = [family for family in FAMILIES.values() if family.proof is Proof.EQUIVALENT and named in family.model_types]
    if found:
        raise ConversionError(
            f"{path} is a {named} model, whose class transformers does not have itself, and code that comes with a model is not "
            "run here; compare checkpoints of Megatron-LM, whose logits can be computed"
        )


def _setup(rank: int, size: int, folder: Path) -> None:
    os.environ.update(HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="")


def _logits(folder: Path, ignored: Sequence[str], tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    import torch
    import transformers

    dtype = "dtype" if _version(transformers) >= (4, 56) else "torch_dtype"
    try:
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            attn_implementation="eager",
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=False,
            **{dtype: torch.float32},
        )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise ConversionError(f"transformers does not load {folder}: {error}") from error
    raise_all(f"transformers does not load {folder}:", _problems(report, ignored), remedy=_REMEDY)
    with torch.inference_mode():
        out: npt.NDArray[np.float32] = model.eval()(torch.from_numpy(tokens), use_cache=False).logits.float().numpy()
    return out


def _version(module: Any) -> tuple[int, ...]:
    return tuple(int(part) for part in module.__version__.split(".")[:2])


def _problems(report: dict[str, Any], ignored: Sequence[str]) -> list[str]:
    """Lines for what transformers reports: by kind of fault, names of tensors or tuples that start with one."""
    suffixes = tuple({suffix for family in FAMILIES.values() for suffix in family.ignored_suffixes})
    named = {kind: [str(key[0] if isinstance(key, tuple) else key) for key in keys] for kind, keys in report.items()}
    return [
        f"{kind.replace('_', ' ')}: {name}"
        for kind, names in named.items()
        for name in LeftOut(ignored).kept(dict.fromkeys(sorted(names)))
        if not name.endswith(suffixes)
    ]
