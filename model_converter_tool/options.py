"""Options of a conversion: rows, from which command-line options, keys of a batch file and arguments in Python follow."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from megatron_converters.basics.errors import UsageError, one_line

from . import kinds
from .formats import HF, MEGATRON, output_format
from .model_types import AUTO, check_name

_BOTH = ""


class Option(NamedTuple):
    """Option: how its value is checked, a word for it (empty for a switch), help, and the format that alone heeds it."""

    kind: kinds.Kind
    metavar: str
    words: str
    only: str = _BOTH


#: By their names in Python and in batch files; on a command line they have dashes.
OPTIONS = {
    "dtype": Option(kinds.dtype, "fp16|bf16|fp32", "Type to write; the source's by default."),
    "tokenizer_model": Option(kinds.text, "PATH", "Tokenizer to record or to write; by default the source's."),
    "overwrite": Option(kinds.switch, "", "Replace a model or checkpoint in the output folder."),
    "workers": Option(kinds.at_least(1), "N", "Processes that share one conversion; 1 by default."),
    "source_format": Option(
        kinds.choice("hf", "meta", "megatron"), "NAME", "Format of the input (hf, meta, megatron), which is recognised."
    ),
    "hf_config": Option(
        kinds.text, "DIR", "Reference model folder beside a checkpoint that does not say all of its configuration."
    ),
    "ignore_config_fields": Option(
        kinds.text, "NAMES", "Comma-separated unknown fields to ignore, of config.json or of the reference's."
    ),
    "mup": Option(
        kinds.choice("flags", "fold", "raw"),
        "flags|fold|raw",
        "How a checkpoint holds a model's multipliers: as flags, folded into weights, or with weights unscaled.",
    ),
    "ignore_tensors": Option(
        kinds.texts,
        "PATTERN,…",
        "Leave out tensors of these names (* and ? as in a shell), which the model must not need.",
    ),
    "tp": Option(kinds.at_least(1), "N", "Tensor-parallel size; with a size, the ranks are written.", MEGATRON),
    "pp": Option(kinds.at_least(1), "N", "Pipeline-parallel size.", MEGATRON),
    "ep": Option(kinds.at_least(1), "N", "Expert-parallel size.", MEGATRON),
    "etp": Option(kinds.at_least(1), "N", "Tensor-parallel size of experts.", MEGATRON),
    "transformer_impl": Option(
        kinds.choice("local", "transformer_engine"),
        "local|transformer_engine",
        "Whose parameter names to write: by default local in model.pt, transformer_engine in ranks.",
        MEGATRON,
    ),
    "as_family": Option(
        kinds.choice("llama"), "llama", "Write the model as a plain Llama, with its multipliers folded in.", HF
    ),
    "max_shard_size": Option(kinds.size, "SIZE", "Largest file of weights, such as 500MB; 5GB by default.", HF),
    "mup2llama": Option(kinds.switch, "", "The same as --as llama, or for a checkpoint as --mup fold."),
}
#: Parallel sizes, which ask for the ranks of a checkpoint.
SIZES = ("tp", "pp", "ep", "etp")
#: Other names of options and operands.
ALIASES = {"as": "as_family", "from": "source_format", "model_name": "model_path"}
DEVICES = ("auto", "cpu", "cuda", "mps")


class Refused(NamedTuple):
    """Option of the Model Converter Tool that is not offered: its name on a command line, and whether a value follows; why."""

    flag: str
    has_value: bool
    why: str


_QUANTISED = "quantised formats are not written; convert without it, and quantise the result with a tool for that"
_RANDOM = (
    "weights are moved here, and never made up; to try a conversion without writing anything, call validate_conversion"
)
REFUSED = {
    "quantization": Refused("--quant", True, _QUANTISED),
    "quantization_config": Refused("--quant-config", True, _QUANTISED),
    "use_large_calibration": Refused("--use-large-calibration", False, _QUANTISED),
    "fake_weight": Refused("--fake-weight", False, _RANDOM),
    "fake_weight_shape_dict": Refused("--fake-weight-config", True, _RANDOM),
}
_OPERANDS = ("model_path", "model_name", "output_format", "output_path", "model_type", "device")
KEYS = (*_OPERANDS, *OPTIONS, *ALIASES, *REFUSED)


@dataclass(frozen=True)
class Task:
    """Conversion as it is asked for: `model` is a folder or a name on the Hub, `options` are those of `OPTIONS` that are given."""

    model: str
    output_format: str
    output_path: str | None = None
    model_type: str = AUTO
    device: str = DEVICES[0]
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, given: Mapping[str, Any], where: str = "") -> Task:
        """Task of keys, of which None stands for "not given". `where` begins the message of the `UsageError`."""
        found = {key: value for key, value in given.items() if value is not None}
        unknown = unknown_keys(found)
        if unknown:
            raise UsageError(
                f"{where}there is no option {', '.join(map(one_line, unknown))}; known are {', '.join(KEYS)}"
            )
        try:
            return cls._of(_without_aliases(found))
        except UsageError as error:
            raise UsageError(f"{where}{error}") from error

    @classmethod
    def _of(cls, found: dict[str, Any]) -> Task:
        for name, refused in REFUSED.items():
            if found.pop(name, None):
                raise UsageError(f"{name} ({refused.flag}): {refused.why}")
        for name in ("model_path", "output_format"):
            if name not in found:
                raise UsageError(f"{name} is missing; say what to convert, and into which format")
        operands = {name: checked(name, kinds.text, found.pop(name)) for name in _OPERANDS if name in found}
        checked("device", kinds.choice(*DEVICES), operands.get("device", DEVICES[0]))
        options = {name: checked(name, OPTIONS[name].kind, value) for name, value in found.items()}
        task = cls(operands.pop("model_path"), operands.pop("output_format"), options=options, **operands)
        check_name(task.model_type)
        _refuse_unheeded(task)
        return task


def unknown_keys(given: Collection[str]) -> list[str]:
    """Keys that no task has."""
    return [key for key in given if key not in KEYS]


def checked(name: str, kind: kinds.Kind, value: Any) -> Any:
    """Value of this kind; raises `UsageError` with the name of what it is for."""
    try:
        return kind(value)
    except ValueError as error:
        raise UsageError(f"{name}: {one_line(repr(value))} {error}") from None


def _without_aliases(found: dict[str, Any]) -> dict[str, Any]:
    for alias, name in ALIASES.items():
        if alias in found:
            value = found.pop(alias)
            if str(found.setdefault(name, value)) != str(value):
                raise UsageError(
                    f"{name} is {found[name]}, and {alias}, which means the same, is {value}; give one of them"
                )
    return found


def _refuse_unheeded(task: Task) -> None:
    written = output_format(task.output_format).writes
    unheeded = [name for name in task.options if OPTIONS[name].only not in (_BOTH, written)]
    if unheeded:
        raise UsageError(f"{', '.join(unheeded)}: not heeded where {task.output_format} is written; leave it out")
    if task.options.get("mup2llama") and task.options.get("mup", "fold") != "fold" and written == MEGATRON:
        raise UsageError(f"mup2llama means mup fold, and mup is {task.options['mup']}; give one of them")
