"""Fast tokenizers (tokenizer.json) made from the files that models were trained with: sentencepiece and tiktoken.

They encode as the original library does. Only the packages `tokenizers` and, for sentencepiece files,
`sentencepiece` and `protobuf` are needed; they are imported when a file needs them.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..basics.errors import ConversionError

_SPACE = "▁"  # what sentencepiece writes for a space
_BPE = 2  # sentencepiece_model.proto, TrainerSpec.ModelType
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6  # ModelProto.SentencePiece.Type

#: How Llama 3 splits text before it merges bytes (meta-llama/llama3, llama/tokenizer.py, `pat_str`).
_LLAMA3_SPLIT = "|".join(
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
_RANK_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\s*")


@dataclass(frozen=True)
class Rebuilt:
    """A `tokenizers.Tokenizer`, the object for tokenizer_config.json, and a description for the user."""

    tokenizer: Any
    config: dict[str, Any]
    description: str


@dataclass(frozen=True)
class _Llama3:
    """Differences between Llama 3 and 3.1: the special tokens after the ranks, in order, and the context length."""

    title: str
    special_tokens: tuple[str, ...]
    context: int


def _special_tokens(template: str, size: int = 256) -> tuple[str, ...]:
    """Special tokens named by `template`, in which `_` is the next reserved one; padded with reserved ones to `size`."""
    words = [*template.split(), *["_"] * size][:size]
    reserved = iter(range(size))
    return tuple(f"<|reserved_special_token_{next(reserved)}|>" if word == "_" else f"<|{word}|>" for word in words)


#: meta-llama/llama3 llama/tokenizer.py; meta-llama/llama-models models/llama3/tokenizer.py.
_LLAMA_3 = _Llama3(
    "Llama 3",
    _special_tokens("begin_of_text end_of_text _ _ _ _ start_header_id end_header_id _ eot_id"),
    8192,
)
_LLAMA_3_1 = _Llama3(
    "Llama 3.1",
    _special_tokens(
        "begin_of_text end_of_text _ _ finetune_right_pad_id _ start_header_id end_header_id eom_id eot_id python_tag"
    ),
    131072,
)

#: A conversation in Llama 3's format: a header and an end-of-turn token around each message.
_LLAMA3_CHAT = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{- message['content'] | trim + '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
    "{%- endif %}"
)


def is_tiktoken(first_bytes: bytes) -> bool:
    """Whether a file that starts with `first_bytes` has tiktoken's lines: a token in base64, a space, its rank."""
    return _RANK_LINE.fullmatch(first_bytes.split(b"\n", 1)[0]) is not None


def from_tiktoken(path: Path, model_type: str | None, instruct: bool) -> Rebuilt:
    """Llama 3's tokenizer from its rank file, with Llama 3's special tokens if `model_type` is "llama3", else with 3.1's.

    `instruct` makes `<|eot_id|>` the end token and adds a chat template.
    Raises `ConversionError` for a broken file and `ImportError` without `tokenizers`.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    ranks = _read_ranks(path)
    variant = _LLAMA_3 if model_type == "llama3" else _LLAMA_3_1
    names = {token: _printable(token) for token in ranks}
    merges = [(names[left], names[right]) for left, right in _merges(ranks)]
    vocab = {names[token]: rank for token, rank in ranks.items()}
    # tiktoken looks up a whole piece as a token before it merges.
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in variant.special_tokens]
    )
    bos, eos = "<|begin_of_text|>", "<|eot_id|>" if instruct else "<|end_of_text|>"
    tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), _prepend_bos(bos, tokenizer.token_to_id(bos))]
    )
    config = _config(bos_token=bos, eos_token=eos, model_max_length=variant.context)
    if instruct:
        config["chat_template"] = _LLAMA3_CHAT
    return Rebuilt(tokenizer, config, f"tiktoken ranks with {variant.title}'s special tokens")


def _read_ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise ConversionError(
                f"{path}: line {number} is not a base64 token and its rank; the file is damaged, so copy it again"
            ) from None
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ConversionError(f"{path}: the ranks are not 0 to {len(ranks) - 1}; the file is damaged, so copy it again")
    return ranks


def _byte_names() -> list[str]:
    """GPT-2's printable stand-in for each byte: itself where it is visible Latin-1, else the next from U+0100 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    stand_ins = iter(range(0x100, 0x200))
    return [chr(byte if byte in visible else next(stand_ins)) for byte in range(256)]


_BYTE_NAMES = _byte_names()


def _printable(token: bytes) -> str:
    return "".join(_BYTE_NAMES[byte] for byte in token)


def _merges(ranked: Mapping[Any, int]) -> Iterator[tuple[Any, Any]]:
    """Every pair of tokens that makes a token, lowest rank of the result first; only this order matters."""
    for token in sorted(ranked, key=ranked.__getitem__):
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ranked and right in ranked:
                yield left, right


def from_sentencepiece(path: Path) -> Rebuilt:
    """The tokenizer of a sentencepiece BPE model (Llama 2, Mistral 0.1).

    Raises `ConversionError` for a broken file or a model that is not BPE, `ImportError` without the packages.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models

    proto = _read_sentencepiece(path)
    pieces = list(proto.pieces)
    symbols = [piece.piece for piece in pieces if piece.type == _USER_DEFINED]
    unk = pieces[proto.trainer_spec.unk_id].piece
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece.piece: index for index, piece in enumerate(pieces)},
            merges=list(_merges(_merge_order(pieces))),
            unk_token=unk,
            fuse_unk=True,
            byte_fallback=any(piece.type == _BYTE for piece in pieces),
            # A user-defined symbol, split off beforehand, is one token; so is the name of a byte token right beside one.
            ignore_merges=bool(symbols),
        )
    )
    dummy_prefix = proto.normalizer_spec.add_dummy_prefix
    tokenizer.normalizer = _normalizer(proto.normalizer_spec)
    if symbols:
        tokenizer.pre_tokenizer = _split_off(symbols)
    strip = [decoders.Strip(" ", 1, 0)] if dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    special = [piece.piece for piece in pieces if piece.type in (_UNKNOWN, _CONTROL)]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    role_tokens = {
        f"{role}_token": _piece(pieces, getattr(proto.trainer_spec, f"{role}_id")) for role in ("bos", "eos", "pad")
    }
    if role_tokens["bos_token"]:
        tokenizer.post_processor = _prepend_bos(role_tokens["bos_token"], proto.trainer_spec.bos_id)
    config = _config(unk_token=unk, **{role: token for role, token in role_tokens.items() if token})
    # `tokenizers` maps whole graphemes, sentencepiece the longest match.
    caveat = ", in which combining marks may encode differently" if proto.normalizer_spec.precompiled_charsmap else ""
    return Rebuilt(tokenizer, config, f"a sentencepiece BPE model{caveat}")


def _read_sentencepiece(path: Path) -> Any:
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except DecodeError:
        proto.Clear()
    if not proto.pieces:
        raise ConversionError(f"{path} is neither a sentencepiece model nor a tiktoken file nor a tokenizer.json")
    if proto.trainer_spec.model_type != _BPE or proto.trainer_spec.treat_whitespace_as_suffix:
        raise ConversionError(
            f"{path} is a sentencepiece model, but not of type BPE with leading spaces, so no fast tokenizer can be "
            "made of it; give a Hugging Face folder with its tokenizer instead"
        )
    return proto


def _merge_order(pieces: Collection[Any]) -> dict[str, int]:
    """Rank of each piece that merging can make or start from: by score, the highest first."""
    mergeable = [piece for piece in pieces if piece.type == _NORMAL]
    return {piece.piece: rank for rank, piece in enumerate(sorted(mergeable, key=lambda piece: -piece.score))}


def _normalizer(spec: Any) -> Any:
    """sentencepiece's normalization (NormalizerSpec): map characters, drop extra spaces, prepend one, replace all by ▁."""
    from tokenizers import Regex, normalizers

    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(rf"\A +|[ {_SPACE}]+\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])


def _split_off(symbols: Collection[str]) -> Any:
    from tokenizers import Regex, pre_tokenizers

    longest_first = sorted(symbols, key=len, reverse=True)
    return pre_tokenizers.Split(Regex("|".join(re.escape(symbol) for symbol in longest_first)), "isolated")


def _piece(pieces: list[Any], index: int) -> str | None:
    return pieces[index].piece if 0 <= index < len(pieces) else None


def _prepend_bos(bos: str, index: int | None) -> Any:
    from tokenizers import processors

    return processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, index)]
    )


def _config(**fields: Any) -> dict[str, Any]:
    """tokenizer_config.json for a complete tokenizer.json, which the generic class uses unchanged."""
    return {**fields, "clean_up_tokenization_spaces": False, "tokenizer_class": "PreTrainedTokenizerFast"}
