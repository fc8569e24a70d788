"""Other names of options, and what those of other programs mean here: rows, which every command line reads."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

from ...basics.errors import ConversionError, one_line


class Names(NamedTuple):
    """Names of one option in this project's commands and in other programs, and where those stand."""

    names: str
    source: str


#: A command that has one of a row's names takes all of them.
SAME = (
    Names(
        "--target-tensor-parallel-size --tp --tensor-model-parallel-size --tensor-parallel-size --tp-size",
        "Megatron-LM core_v0.8.0 to 0.19, training/arguments.py; its examples/multimodal, vLLM and SGLang",
    ),
    Names(
        "--target-pipeline-parallel-size --pp --pipeline-model-parallel-size --pipeline-parallel-size --pp-size",
        "Megatron-LM, vLLM and SGLang, as above",
    ),
    Names(
        "--target-expert-parallel-size --ep --expert-model-parallel-size --expert-parallel-size --ep-size",
        "Megatron-LM and SGLang, as above",
    ),
    Names("--target-expert-tensor-parallel-size --etp --expert-tensor-parallel-size", "Megatron-LM, as above"),
    Names(
        "--target-num-layers-per-virtual-pipeline-stage --num-layers-per-virtual-pipeline-stage",
        "Megatron-LM, as above",
    ),
    Names(
        "--target-num-virtual-stages-per-pipeline-rank --num-virtual-stages-per-pipeline-rank", "Megatron-LM from 0.11"
    ),
    Names("--saver-transformer-impl --transformer-impl", "Megatron-LM, as above"),
    Names(
        "--dtype --target-params-dtype --torch-dtype",
        "the verbs; Habana's convert_mlm_to_hf_checkpoint.py; Megatron-Bridge, examples/conversion/convert_checkpoints.py",
    ),
    Names(
        "--load-dir --load-path", "Megatron-LM's tools/checkpoint/convert.py; Habana's convert_mlm_to_hf_checkpoint.py"
    ),
    Names("--save-dir --save-path", "the same"),
)
#: Switch of another program: the option and the value that it stands for, in a command that lacks the switch.
SWITCHES = {
    "--bf16": ("--dtype", "bf16"),  # Megatron-LM, training/arguments.py
    "--fp16": ("--dtype", "fp16"),
}


class Instead(NamedTuple):
    """What to do instead of using an option, in a command that has the option `beside` (in any, where that is empty)."""

    beside: str
    words: str


#: Options of other programs, or of other commands, that have no counterpart.
INSTEAD = {
    "--dry-run": Instead("--overwrite", "`megatron-converters plan SRC DST` says what a conversion would write"),
    "--trust-remote-code": Instead("", "a model's own code is never run, so there is nothing to trust; leave it out"),
    "--force": Instead("--overwrite", "--overwrite replaces what is there"),
    "--resume": Instead("--restart", "the same command goes on from an interrupted run by itself; leave it out"),
}
#: Names of a folder, for a command that takes its folders without an option, and for one that names them.
_FOLDERS = frozenset(
    """
    --load-dir --load-path --load --save-dir --save-path --save --src --source --dst --target --input --output --output-dir --model
    --hf-model --hf-path --in_dir --in-dir --save_path
    """.split()
)
_NAMED = ("--load-dir", "--load-path", "--in_dir")
#: Words for a value that other programs use, and the one that is meant.
VALUES = {
    "huggingface": "hf",
    "transformers": "hf",
    "safetensors": "hf",
    "mcore": "megatron",
    "megatron-lm": "megatron",
    "mindformers": "mindspore",
    "te": "transformer_engine",
    "dist": "torch_dist",
}
#: Words for a verb.
VERBS = {
    "import": "convert",
    "export": "convert",
    "reshard": "convert",
    "dry-run": "plan",
    "check": "verify",
    "compare": "verify",
    "info": "inspect",
    "show": "inspect",
    "ls": "inspect",
    "flags": "args",
}
_CUTOFF = 0.6


def did_you_mean(word: str, known: Iterable[str], table: dict[str, str] | None = None) -> str:
    """End of a message that suggests what is meant by a word; empty where nothing is like it."""
    from difflib import get_close_matches

    words = list(known)
    meant = (table or {}).get(word.lower())
    found = [meant] if meant in words else get_close_matches(word, words, n=2, cutoff=_CUTOFF)
    return f"; did you mean {' or '.join(found)}?" if found else ""


def unknown_option(option: str, known: Collection[str]) -> str:
    """Message on an option that a command does not have."""
    shown = one_line(option)
    instead = INSTEAD.get(option)
    if instead is not None and instead.beside in ("", *known):
        return f"there is no option {shown}: {instead.words}"
    if option in _FOLDERS and not any(name in known for name in _NAMED):
        return f"there is no option {shown}: folders are named without one, such as SRC DST"
    named = f"--{option.lstrip('-')}"
    return f"there is no option {shown}{did_you_mean(named, known) or '; --help shows all options'}"


def respelled(arguments: Sequence[str], known: dict[str, argparse.Action]) -> list[str]:
    """Arguments with each option under a name that the command knows; raises `ValueError` where two names contradict.

    `known` are the command's options. An underscore is as good as a dash.
    """
    result: list[str] = []
    given: dict[argparse.Action, dict[str, str]] = {}
    for position, argument in enumerate(arguments):
        if argument == "--":
            result += arguments[position:]
            break
        typed, equals, value = argument.partition("=")
        option = typed if typed in known else _known_name(typed, known)
        implied = SWITCHES[typed][1] if typed in SWITCHES and option != typed else None
        if option is None or (implied and equals):
            result.append(argument)
            continue
        result += [option, implied] if implied else [option + equals + value]
        action = known[option]
        if isinstance(action, argparse._StoreAction):
            following = arguments[position + 1] if position + 1 < len(arguments) else ""
            said = implied or (value if equals else following)
            given.setdefault(action, {})[typed] = _meant(action, said)
    for names in given.values():
        _check_agreement(names)
    return result


def _known_name(typed: str, known: Collection[str]) -> str | None:
    """Name under which a command has an option; None if it has none like it."""
    if not typed.startswith("--"):
        return None
    with_dashes = {name.replace("_", "-"): name for name in known}
    plain = typed.replace("_", "-")
    wanted = SWITCHES[plain][0] if plain in SWITCHES else plain
    candidates = (wanted, *(name for row in SAME if wanted in row.names.split() for name in row.names.split()))
    return next((with_dashes[name] for name in candidates if name in with_dashes), None)


def _meant(action: argparse.Action, said: str) -> str:
    """Value that an option's text stands for, as text; the text itself where it is none."""
    try:
        return str(action.type(said)) if callable(action.type) else said
    except (ValueError, argparse.ArgumentTypeError, ConversionError):
        return said


def _check_agreement(names: dict[str, str]) -> None:
    """Raise `ValueError` if one option is given by two names and different values."""
    if len(set(names.values())) > 1:
        listed = " and ".join(_shown(name, value) for name, value in names.items())
        raise ValueError(f"{listed} say the same thing differently; give only one of them")


def _shown(name: str, value: str) -> str:
    return name if name in SWITCHES else f"{name} {one_line(value)}"


def other_names(known: Collection[str]) -> Iterator[tuple[str, list[str]]]:
    """For help: each option of a command, and the further names that it takes."""
    for row in SAME:
        names = row.names.split()
        own = [name for name in names if name in known]
        if own:
            yield own[-1], [name for name in names if name not in own]
    for switch, (option, value) in SWITCHES.items():
        if option in known and switch not in known:
            yield f"{option} {value}", [switch]
