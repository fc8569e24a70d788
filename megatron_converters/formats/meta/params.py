"""params.json of Meta's and Mistral AI's releases: what it says of a model, and what has to be assumed.

Sources: meta-llama/llama-models, models/llama3/args.py; mistralai/mistral-inference, args.py and transformer.py; vLLM,
transformers_utils/configs/mistral.py (newer fields of Mistral AI); transformers' convert_llama_weights_to_hf.py (positions).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ...basics.errors import ConversionError
from ...families.harmless import Harmless, refuse_unknown, unknown_fields
from ...families.quantisation import Quantiser, refusal
from ...model.checks import check_size, number
from ...model.rotary import RopeScaling

FILE = "params.json"
LLAMA, MISTRAL = "llama", "mistral"
#: Fields that Meta's releases have, and Mistral AI's have not, which say `hidden_dim` instead.
_OF_META = ("multiple_of", "ffn_dim_multiplier", "use_scaled_rope")
_REQUIRED = ("dim", "n_layers", "n_heads", "norm_eps")
_READ = (
    *(*_REQUIRED, "n_kv_heads", "head_dim", "rope_theta", "sliding_window"),
    *("use_scaled_rope", "rope_scaling_factor", "high_freq_factor", "max_position_embeddings", "max_seq_len"),
)
_OFF, _ABSENT = (False,), (-1,)
_HARMLESS = (
    Harmless("vocab_size hidden_dim multiple_of ffn_dim_multiplier dtype", "what tensors say themselves"),
    Harmless("max_batch_size model_parallel_size", "llama-models, args.py, and its loader: how a run divides its work"),
    Harmless("model_type", "mistral-inference, args.py", ("transformer",)),
    Harmless("activation", "vLLM, configs/mistral.py", ("silu",)),
    Harmless("causal", "vLLM, configs/mistral.py", (True,)),
    Harmless("use_biases tied_embeddings use_qk_norm", "vLLM, configs/mistral.py", _OFF),
    Harmless("vision_chunk_size vision_num_cross_attention_layers", "llama-models, args.py", _ABSENT),
    Harmless("vision_max_num_chunks", "llama-models, args.py: nothing without the fields above"),
)
_QUANTISERS = {
    "quantization_args": Quantiser("SpinQuant or QLoRA"),
    "quantization": Quantiser("Mistral AI's FP8"),
}
#: Factor of RoPE scaling by hidden size and layers: Llama 3.1 and 3.3, and the smaller ones of 3.2 (config.json of each).
_FACTORS = {(4096, 32): 8.0, (8192, 80): 8.0, (16384, 126): 8.0, (2048, 16): 32.0, (3072, 28): 32.0}
_USUAL_FACTOR = 8.0
#: Rotary base where none is written (llama/model.py; mistral-inference, where a model has no window).
_BASE, _BASE_WITHOUT_WINDOW = 10000.0, 1e6
_LLAMA3_BASE, _LLAMA1_EPSILON = 500000.0, 1e-6


class Described(NamedTuple):
    """Properties of a model that params.json says or leads to assume, and notes on the latter."""

    properties: dict[str, Any]
    notes: list[str]


def read_params(params: Mapping[str, Any], ignored: Iterable[str] = ()) -> Described:
    """Read params.json. `ignored` names fields that the user says are harmless; raises `ConversionError` for other unknown ones."""
    missing = [name for name in _REQUIRED if params.get(name) is None]
    if missing:
        raise ConversionError(f"{FILE} has no {', '.join(missing)}; copy it again")
    for name in ("dim", "n_layers", "n_heads"):
        check_size(params[name], name)
    for key, quantiser in _QUANTISERS.items():
        if params.get(key):
            raise refusal(quantiser, f"{FILE} ({key})", params[key])
    family = _family(params)
    refuse_unknown(FILE, family, unknown_fields(params, {*_READ, *ignored}, _HARMLESS))
    base = _rotary_base(params, family)
    scaling, notes = _scaling(params)
    positions, assumed = _positions(params, family, base, scaled=scaling is not None)
    window = {"sliding_window": params.get("sliding_window")} if family == MISTRAL else {}
    size, heads = params["dim"], params["n_heads"]
    properties = {
        "family": family,
        "num_layers": params["n_layers"],
        "hidden_size": size,
        "num_attention_heads": heads,
        "num_query_groups": params.get("n_kv_heads") or heads,
        "kv_channels": params.get("head_dim") or size // heads,
        "max_position_embeddings": positions,
        "norm_epsilon": params["norm_eps"],
        "rotary_base": base,
        "rope_scaling": scaling,
        **window,
    }
    return Described(properties, [*notes, *assumed])


def _family(params: Mapping[str, Any]) -> str:
    """Family by fields that only the releases of one have."""
    given = {name for name, value in params.items() if value is not None}
    is_mistral = "sliding_window" in given or ("hidden_dim" in given and given.isdisjoint(_OF_META))
    return MISTRAL if is_mistral else LLAMA


def _rotary_base(params: Mapping[str, Any], family: str) -> float:
    given = params.get("rope_theta")
    if given is not None:
        return number(given, "rope_theta")
    return _BASE_WITHOUT_WINDOW if family == MISTRAL and params.get("sliding_window") is None else _BASE


def _scaling(params: Mapping[str, Any]) -> tuple[RopeScaling | None, list[str]]:
    """Scaling of rotary embeddings, and a note where its factor is assumed."""
    if not params.get("use_scaled_rope"):
        return None, []
    high = params.get("high_freq_factor")
    more: dict[str, Any] = {} if high is None else {"high_freq_factor": number(high, "high_freq_factor")}
    factor = params.get("rope_scaling_factor")
    if factor is not None:
        return RopeScaling("llama3", number(factor, "rope_scaling_factor"), **more), []
    size, layers = params["dim"], params["n_layers"]
    known = _FACTORS.get((size, layers))
    unsaid = f"{FILE} scales rotary embeddings (use_scaled_rope) and does not say by what factor"
    if known is not None:
        note = f"{unsaid}: {known:g}, which Llama's release of this size has, is taken"
    else:
        note = (
            f"warning: {unsaid}: {_USUAL_FACTOR:g} is assumed, as Llama 3.1 has; Llama 3.2 has 32. If the model has another, add "
            f"rope_scaling_factor to {FILE}"
        )
    return RopeScaling("llama3", known or _USUAL_FACTOR, **more), [note]


def _positions(params: Mapping[str, Any], family: str, base: float, *, scaled: bool) -> tuple[int, list[str]]:
    """Number of positions, and a note where it is assumed. Meta's `max_seq_len` is the size of a run's cache."""
    for key in ("max_position_embeddings", *(["max_seq_len"] if family == MISTRAL else [])):
        if params.get(key) is not None:
            return params[key], []
    if family == MISTRAL:
        assumed, whose = 32768, "Mistral 7B"
    elif scaled:
        assumed, whose = 131072, "Llama 3.1"
    elif base == _LLAMA3_BASE:
        assumed, whose = 8192, "Llama 3"
    elif base > _BASE:
        assumed, whose = 16384, "Code Llama"
    elif params["norm_eps"] == _LLAMA1_EPSILON:
        assumed, whose = 2048, "Llama 1"
    else:
        assumed, whose = 4096, "Llama 2"
    return assumed, [
        f"{FILE} does not say how many positions the model has: {assumed} are assumed, as {whose} has; if it has others, add "
        f"max_position_embeddings to {FILE}"
    ]
