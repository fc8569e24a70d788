"""Sizes of models by name, used only where neither args, shapes nor a configuration say them."""

from __future__ import annotations

from typing import NamedTuple

from ..basics.errors import UsageError

MINICPM, LLAMA = "minicpm", "llama"


class Preset(NamedTuple):
    """Numbers that a size's name stands for; `tp` and `pp` are those to write a checkpoint at."""

    layers: int
    tp: int
    pp: int
    kv_heads: int
    query_heads: int


class Release(NamedTuple):
    """Released model, by the shapes that name it: heads and their size follow from these."""

    model_type: str
    size: str
    layers: int
    hidden: int
    query_heads: int
    kv_heads: int
    head_dim: int
    #: Variant of the type, where that is not its name.
    variant: str = ""


#: By type and size, the tables of docs/tensor-parallel.md; then the released models of these names that they leave out.
PRESETS: dict[str, dict[str, Preset]] = {
    MINICPM: {
        "0.5b": Preset(12, 1, 1, 8, 32),
        "1.5b": Preset(18, 1, 1, 8, 32),
        "3b": Preset(24, 1, 1, 8, 32),
        "8b": Preset(32, 2, 1, 8, 32),
        "14b": Preset(40, 4, 1, 8, 32),
        "1b": Preset(52, 1, 1, 8, 24),
        "2b": Preset(40, 1, 1, 36, 36),
        "4b": Preset(62, 1, 1, 40, 40),
    },
    LLAMA: {
        "7b": Preset(32, 1, 1, 8, 32),
        "13b": Preset(40, 2, 1, 8, 40),
        "30b": Preset(60, 4, 1, 8, 52),
        "65b": Preset(80, 8, 1, 8, 64),
    },
}
#: Configurations of the published models (config.json of each).
RELEASES = (
    Release(MINICPM, "0.5b", 24, 1024, 16, 2, 64, "minicpm4"),
    Release(MINICPM, "8b", 32, 4096, 32, 2, 128, "minicpm4"),
    Release(MINICPM, "1b", 52, 1536, 24, 8, 64),
    Release(MINICPM, "2b", 40, 2304, 36, 36, 64),
    Release(MINICPM, "4b", 62, 2560, 40, 40, 64),
    Release(LLAMA, "7b", 32, 4096, 32, 32, 128),
    Release(LLAMA, "13b", 40, 5120, 40, 40, 128),
    Release(LLAMA, "30b", 60, 6656, 52, 52, 128),
    Release(LLAMA, "65b", 80, 8192, 64, 64, 128),
    Release(LLAMA, "65b", 80, 8192, 64, 8, 128),
)
#: Vocabularies that tell the types apart.
VOCABULARIES = {MINICPM: (73440, 73448, 122753, 127660), LLAMA: (32000, 128256)}


def preset_of(model_type: str | None, size: str) -> Preset:
    """Preset of a size; of the first type that has it where none is given. Raises `UsageError` naming the sizes that there are."""
    if model_type is not None:
        check_type(model_type)
    types = [model_type] if model_type is not None else list(PRESETS)
    for name in types:
        if size.lower() in PRESETS[name]:
            return PRESETS[name][size.lower()]
    known = "; ".join(f"{name}: {', '.join(PRESETS[name])}" for name in types)
    raise UsageError(f"--model_size {size} is no known size ({known}); give the numbers themselves instead")


def check_type(model_type: str) -> None:
    """Raise `UsageError` unless the type is known."""
    if model_type not in PRESETS:
        raise UsageError(f"--model_type {model_type} is not one of {', '.join(PRESETS)}")
