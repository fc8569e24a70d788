"""Facts of a family as users are told them: its names, what it is, and how it was proven."""

from __future__ import annotations

from typing import NamedTuple

from .table import Proof

#: Proof of a family whose table says none, and of those from outside this package, which may have copied another's table.
NOT_STATED = "not stated"
#: Proofs by what they are in words: their names in tables.
PROOFS = {**{proof.value: proof.name.lower() for proof in Proof}, NOT_STATED: NOT_STATED}


class Family(NamedTuple):
    """Model family, by the names that Hugging Face's config.json has for it.

    `aliases` are further values of model_type. `kind` is dense, MoE, MLA or hybrid, or several of these, after VL where it is the
    text part of a model of images and text. `formats` are values of
    `--from`; "meta" is only read. `since` is the least release of Megatron-LM that has arguments for such a model, None if no
    release has, or nobody has said it. `proof` says how the table was proven, `models` which published models are of this class,
    and `covers` what is converted of them.
    """

    name: str
    model_type: str
    architecture: str
    aliases: tuple[str, ...]
    kind: str
    formats: tuple[str, ...]
    since: str | None
    proof: str
    models: str
    covers: str
