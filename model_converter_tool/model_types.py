"""Model types by the names that users give them (`--model-type`), and the families that each stands for.

What is converted, and how, is said by the model itself; the type is a check that it is the model that the user means.
"""

from __future__ import annotations

from megatron_converters.basics.errors import ConversionError, UsageError, one_line

AUTO = "auto"
MINICPM = "minicpm"
#: Families of a type; every other family of the library is a type of its own.
_FAMILIES = {
    MINICPM: ("minicpm", "minicpm3"),
    "llama": ("llama", "mistral", "qwen2", "qwen3", "phi3"),
    "mistral": ("mistral",),
}
_PREFIX = "Model type not supported"


def model_types() -> list[str]:
    """Every type that can be asked for."""
    from megatron_converters.families import FAMILIES

    return list(dict.fromkeys((AUTO, *_FAMILIES, *FAMILIES)))


def check_name(model_type: str) -> None:
    """Raise `UsageError` for a type that is not known."""
    if model_type in (AUTO, *_FAMILIES):  # without importing the families
        return
    known = model_types()
    if model_type not in known:
        raise UsageError(f"{_PREFIX}: {one_line(repr(model_type))} is none of the model types {', '.join(known)}")


def check_family(model_type: str, family: str, where: object) -> None:
    """Raise `ConversionError` if the model in `where`, which is of this family, is not of the type."""
    accepted = _FAMILIES.get(model_type, (model_type,))
    if model_type != AUTO and family not in accepted:
        fitting = [name for name, families in _FAMILIES.items() if family in families] or [family]
        raise ConversionError(
            f"{_PREFIX}: {where} holds a {family} model, and the model type {model_type} stands for {', '.join(accepted)}; pass "
            f"--model-type {fitting[0]}, or leave it out"
        )


def unsupported(error: ConversionError, where: object) -> ConversionError:
    """The library's error about an architecture that it does not know, in the words of this tool."""
    return ConversionError(f"{_PREFIX}: {where}: {error}")
