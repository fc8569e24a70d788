"""Rules for config.json of models whose code is published with them, where a key or a name means several things.

Sources: modeling_chatglm.py of THUDM/chatglm2-6b-32k, chatglm3-6b-32k and glm-4-9b-chat (`RotaryEmbedding.forward_impl`);
modeling_baichuan.py and config.json of baichuan-inc/Baichuan-7B, Baichuan2-7B-Base and Baichuan2-13B-Base.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..basics.errors import ConversionError
from ..model.checks import number
from ..model.spec import ModelSpec
from .rules import Config

#: Rotary base of ChatGLM's code, and the positions that ChatGLM2 and 3 were trained for before they were extended.
_BASE, _TRAINED = 10000, 8192


@dataclass(frozen=True)
class RopeRatio:
    """Multiplier of the rotary base, 10000. The code of ChatGLM2-6B-32k divides positions by a key of the same name."""

    keys: tuple[str, ...] = ("rope_ratio",)

    def read(self, config: Config) -> dict[str, Any]:
        given = config.get("rope_ratio")
        ratio = 1.0 if given is None else number(given, "rope_ratio")
        named = str(config.get("_name_or_path", "")).lower()
        extended = ratio != 1 and config.get("seq_length") == ratio * _TRAINED
        if ratio != 1 and ("chatglm2" in named or (extended and "chatglm3" not in named)):
            raise ConversionError(
                f"config.json has rope_ratio={given!r} and looks like ChatGLM2-6B-32k's, whose code divides positions by it, which "
                "is not supported; if the model's code multiplies the rotary base, as that of ChatGLM3 and GLM-4 does, let "
                "_name_or_path say chatglm3"
            )
        return {"rotary_base": _BASE * ratio}

    def write(self, spec: ModelSpec) -> dict[str, Any]:
        ratio = number(spec.values.get("rotary_base"), "rotary_base") / _BASE
        return {"rope_ratio": int(ratio) if ratio.is_integer() else ratio}


#: Vocabulary of every Baichuan2, and a key that only its configuration class has, which tools write when they save a model.
_VOCABULARY, _OWN_KEY = 125696, "z_loss_weight"


@dataclass(frozen=True)
class BaichuanRelease:
    """Release of a Baichuan: the head of Baichuan2 is normed as the model runs, and models of 13B have ALiBi.

    All have one model_type; BaichuanForCausalLM is the class of Baichuan2 and of Baichuan-13B, BaiChuanForCausalLM that of
    Baichuan-7B.
    """

    normed_head: bool
    keys: tuple[str, ...] = (_OWN_KEY,)

    @property
    def required(self) -> dict[str, Any]:
        """Keys by which a config.json tells that it is of this release."""
        return {_OWN_KEY: 0, "max_position_embeddings": 4096} if self.normed_head else {}

    def read(self, config: Config) -> dict[str, Any]:
        """Refuse what is, or may be, another release."""
        second = config.get("vocab_size") == _VOCABULARY or _OWN_KEY in config
        if self.normed_head and ("max_position_embeddings" not in config or config.get("hidden_size") == 5120):
            raise ConversionError(
                "config.json is that of a Baichuan-13B or Baichuan2-13B (hidden_size 5120, or no max_position_embeddings), whose "
                "attention has ALiBi instead of rotary embeddings; no release of Megatron-LM has that"
            )
        if self.normed_head and not second:
            raise ConversionError(
                f"config.json names BaichuanForCausalLM, but has neither Baichuan2's vocab_size, {_VOCABULARY}, nor its "
                f"{_OWN_KEY}, so that it is unclear whether the head is normed; write {_OWN_KEY}: 0 if it is, and "
                "BaiChuanForCausalLM if it is a Baichuan-7B"
            )
        if second and not self.normed_head:
            raise ConversionError(
                f"config.json names BaiChuanForCausalLM, Baichuan-7B's class, but has Baichuan2's vocab_size, {_VOCABULARY}, or "
                f"{_OWN_KEY}; write BaichuanForCausalLM, whose head is normed, which changes nothing where it is already"
            )
        return {}

    def write(self, _: ModelSpec) -> dict[str, Any]:
        return {_OWN_KEY: 0} if self.normed_head else {}
