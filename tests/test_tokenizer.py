"""The rebuilt tokenizers against the libraries whose files they come from, and every way in which none can be had."""

from __future__ import annotations

import base64
import json
import random
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from megatron_converters.assets.tokenizer import generation_config, token_ids, tokenizer_token_ids, write_tokenizer
from megatron_converters.basics.errors import ConversionError
from tests.helpers import file_bytes

WORDS = (
    "the quick brown fox jumps over lazy dogs It's we're I'LL don't 12345 678 99 naïve façade Straße über 你好 世界 "
    "こんにちは Привет мир 🙂 café e=mc^2 foo_bar(x) == 3.14 <0x41>"
).split()
#: Never in the training text: unknown characters, odd spaces, digits of other scripts, combining marks, control bytes.
ODD = (
    "\u017f \u212a '\u017f ﬁ ½ \u00a0 \u3000 \u200b ' '' \r \r\n ▁ ▁▁ 0 00 0000 ١٢٣ क्षि \U0001d4b3 "
    "👩\u200d👧 \u0301 \x00 \x7f"
).split(" ")
SPACES = ["", "", " ", "  ", "   ", "\n", "\n\n", "\t", " \n "]


def _texts(seed: int, count: int, words: list[str]) -> list[str]:
    rng = random.Random(seed)
    made = [
        rng.choice(SPACES) + "".join(rng.choice(words) + rng.choice(SPACES) for _ in range(rng.randint(0, 10)))
        for _ in range(count)
    ]
    return ["", " ", "  ", " a", "a ", "a  b", *made]


CORPUS = _texts(0, 1500, WORDS)
SAMPLES = _texts(1, 800, WORDS + ODD)


def _load(folder: Path, model_type: str):
    """What a user gets: transformers looks at config.json too."""
    from transformers import AutoTokenizer

    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory):
    """Train a BPE model as Llama's was, with further options of the trainer."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("sentencepiece")
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(CORPUS), encoding="utf-8")

    def train(name: str, **options) -> Path:
        as_llama = {"model_type": "bpe", "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
        sentencepiece.SentencePieceTrainer.train(
            input=str(corpus),
            model_prefix=str(folder / name),
            vocab_size=640,
            hard_vocab_limit=False,
            minloglevel=2,
            **{**as_llama, **options},
        )
        return folder / f"{name}.model"

    return train


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    """Byte-pair ranks as tiktoken has them: the 256 bytes, then the most frequent pair each time."""
    pieces = Counter(word.encode() for text in CORPUS for word in text.replace(" ", "  ").split(" ") if word)
    parts = {piece: [bytes([byte]) for byte in piece] for piece in pieces}
    found = {bytes([byte]): byte for byte in range(256)}
    while len(found) < 700:
        pairs: Counter[bytes] = Counter()
        for piece, tokens in parts.items():
            for left, right in pairwise(tokens):
                pairs[left + right] += pieces[piece]
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        found.setdefault(best, len(found))
        parts = {piece: _merged(tokens, best) for piece, tokens in parts.items()}
    return found


def _merged(tokens: list[bytes], pair: bytes) -> list[bytes]:
    result: list[bytes] = []
    for token in tokens:
        if result and result[-1] + token == pair and result[-1] != pair:
            result[-1] = pair
        else:
            result.append(token)
    return result


def _write_ranks(path: Path, ranks: dict[bytes, int]) -> Path:
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))
    return path


# --- sentencepiece ---


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama2", {"byte_fallback": True, "split_digits": True, "allow_whitespace_only_pieces": True}),
        ("no_byte_fallback", {}),
        ("no_dummy_prefix", {"byte_fallback": True, "add_dummy_prefix": False}),
        ("extra_whitespace_removed", {"byte_fallback": True, "remove_extra_whitespaces": True}),
        ("user_defined", {"byte_fallback": True, "user_defined_symbols": ["[X] ", "▁<PRE>", "fox", "fo"]}),
    ],
)
def test_sentencepiece_encodes_as_the_original(sentencepiece_model, tmp_path, name, options):
    import sentencepiece

    original = sentencepiece.SentencePieceProcessor(model_file=str(model := sentencepiece_model(name, **options)))
    notes = write_tokenizer(model, tmp_path, vocab_size=original.vocab_size(), explicit=True)
    assert notes == [f"made the tokenizer of {model}, a sentencepiece BPE model ({original.vocab_size()} tokens)"]
    made = _load(tmp_path, "llama")
    assert (made.bos_token_id, made.eos_token_id, made.unk_token_id, len(made)) == (1, 2, 0, original.vocab_size())
    samples = [*SAMPLES, *(f"{a}[X] {b} <PRE>{a}" for a, b in zip(SAMPLES[:100], SAMPLES[100:], strict=False))]
    if name == "user_defined":  # a byte token's name right beside such a symbol is taken for the byte
        samples = [text.replace("<0x41>", "A") for text in samples]
    for text in samples:
        expected = original.encode(text)
        assert made(text).input_ids == [1, *expected], text
        if 0 not in expected and "▁" not in text:  # the unknown token and sentencepiece's space mark are not the text's
            assert made.decode(expected) == original.decode(expected), text


def test_special_tokens_in_a_text_are_tokens(sentencepiece_model, tmp_path):
    write_tokenizer(sentencepiece_model("special", byte_fallback=True), tmp_path, vocab_size=640, explicit=True)
    assert _load(tmp_path, "llama").tokenize("fox</s>") == ["▁fox", "</s>"]


def test_a_character_map_is_kept_and_its_limit_named(sentencepiece_model, tmp_path):
    model = sentencepiece_model("nfkc", normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True)
    (note,) = write_tokenizer(model, tmp_path, vocab_size=640, explicit=True)
    assert "combining marks" in note
    import sentencepiece

    text = " ﬁ  fox\t½ "
    original = sentencepiece.SentencePieceProcessor(model_file=str(model))
    assert _load(tmp_path, "llama")(text, add_special_tokens=False).input_ids == original.encode(text)


def test_a_unigram_model_is_refused(sentencepiece_model, tmp_path):
    model = sentencepiece_model("unigram", model_type="unigram")
    with pytest.raises(ConversionError, match="but not of type BPE"):
        write_tokenizer(model, tmp_path, vocab_size=640, explicit=True)


# --- tiktoken ---


@pytest.mark.parametrize("model_type", ["llama3", "llama3.1", None])
def test_tiktoken_encodes_as_the_original(ranks, tmp_path, model_type):
    import tiktoken

    # Written out once more, as Meta publishes it, so that a slip in the library's table shows.
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    original = tiktoken.Encoding("llama", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    path = _write_ranks(tmp_path / "ranks", ranks)
    write_tokenizer(path, tmp_path, vocab_size=len(ranks) + 256, source_model_type=model_type, explicit=True)
    made = _load(tmp_path, "llama")
    assert len(made) == len(ranks) + 256
    for text in SAMPLES:
        expected = original.encode(text, disallowed_special=())
        assert made(text).input_ids == [len(ranks), *expected], text
        assert made.decode(expected) == text


#: The number behind the ranks of the tokens that have a meaning; what remains is reserved.
NAMED = {
    "llama3": {"begin_of_text": 0, "end_of_text": 1, "start_header_id": 6, "end_header_id": 7, "eot_id": 9},
    "llama3.1": {
        **{"begin_of_text": 0, "end_of_text": 1, "finetune_right_pad_id": 4, "start_header_id": 6},
        **{"end_header_id": 7, "eom_id": 8, "eot_id": 9, "python_tag": 10},
    },
}
RESERVED = {
    "llama3": {2: 0, 3: 1, 4: 2, 5: 3, 8: 4, 10: 5, 255: 250},
    "llama3.1": {2: 0, 3: 1, 5: 2, 11: 3, 255: 247},
}


@pytest.mark.parametrize("model_type", ["llama3", "llama3.1"])
@pytest.mark.parametrize("instruct", [False, True])
def test_llama3_special_tokens(ranks, tmp_path, model_type, instruct):
    path = _write_ranks(tmp_path / "ranks", ranks)
    write_tokenizer(path, tmp_path, vocab_size=10**6, source_model_type=model_type, instruct=instruct, explicit=True)
    made = _load(tmp_path, "llama")
    expected = {f"<|{name}|>": number for name, number in NAMED[model_type].items()}
    expected |= {f"<|reserved_special_token_{name}|>": number for number, name in RESERVED[model_type].items()}
    assert {name: made.convert_tokens_to_ids(name) - len(ranks) for name in expected} == expected
    assert made.eos_token == ("<|eot_id|>" if instruct else "<|end_of_text|>")
    assert made.model_max_length == {"llama3": 8192, "llama3.1": 131072}[model_type]
    assert (made.chat_template is not None) == instruct
    # Special tokens are cut out of a text and left out when decoding.
    assert made.decode(made("fox<|eot_id|>").input_ids, skip_special_tokens=True) == "fox"


def test_llama3_chat(ranks, tmp_path):
    path = _write_ranks(tmp_path / "ranks", ranks)
    write_tokenizer(path, tmp_path, vocab_size=10**6, instruct=True, explicit=True)
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " Hi\n"}]
    text = _load(tmp_path, "llama").apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )


# --- folders and tokenizer.json ---


def _folder(folder: Path, size: int = 7) -> Path:
    (folder / "additional_chat_templates").mkdir(parents=True)
    vocab = {f"t{index}": index for index in range(size - 1)}
    content = {"model": {"type": "BPE", "vocab": vocab, "merges": []}, "added_tokens": [{"id": size - 1}]}
    (folder / "tokenizer.json").write_text(json.dumps(content, indent=7))
    (folder / "tokenizer_config.json").write_bytes(b'{"odd":   "spacing"}\r\n')
    (folder / "tokenizer.model").write_bytes(b"\n\x01")
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ x }}")
    (folder / "model.safetensors").write_bytes(b"no")
    (folder / "config.json").write_text("{}")
    return folder


@pytest.mark.parametrize("named", ["", "tokenizer.model", "tokenizer.json"])
def test_a_folder_is_copied_byte_for_byte(tmp_path, named):
    source, out = _folder(tmp_path / "hf"), tmp_path / "out"
    out.mkdir()
    (note,) = write_tokenizer(source / named, out, vocab_size=7)
    kept = {name: data for name, data in file_bytes(source).items() if name not in ("model.safetensors", "config.json")}
    assert file_bytes(out) == kept
    assert str(source) in note and "tokenizer.json" in note


def test_a_bare_tokenizer_json(tmp_path):
    source = _folder(tmp_path / "hf") / "tokenizer.json"
    bare = source.rename(tmp_path / "some.json")
    out = tmp_path / "out"
    out.mkdir()
    write_tokenizer(bare, out, vocab_size=7, explicit=True)
    assert (out / "tokenizer.json").read_bytes() == bare.read_bytes()
    assert json.loads((out / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_a_name_is_looked_up_in_the_local_cache(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--some--model"
    _folder(repo / "snapshots" / "0123")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0123")
    out = tmp_path / "out"
    out.mkdir()
    (note,) = write_tokenizer("some/model", out, vocab_size=7, explicit=True)
    assert note.startswith("copied the tokenizer of") and (out / "tokenizer.json").exists()
    with pytest.raises(
        ConversionError, match=r"--tokenizer-model other/model is neither .* nor in the cache .* hf download"
    ):
        write_tokenizer("other/model", tmp_path, vocab_size=7, explicit=True)


# --- none to be had ---


def _cases(tmp_path: Path) -> dict[str, tuple[Path, str]]:
    (tmp_path / "damaged_ranks").write_bytes(b"IQ== 0\nIg== 1\nIw=\n")
    (tmp_path / "gap").write_bytes(b"IQ== 0\nIg== 2\n")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "noise").write_bytes(bytes(range(128, 256)))
    (tmp_path / "cut.json").write_text('{"model": {"vocab": ')
    (tmp_path / "other.json").write_text('{"model_type": "llama"}')
    large = _folder(tmp_path / "large", size=9)
    return {
        "damaged_ranks": (tmp_path / "damaged_ranks", "line 3 is not a base64 token and its rank"),
        "gap": (tmp_path / "gap", "ranks are not 0 to 1"),
        "empty": (tmp_path / "empty", "neither a sentencepiece model nor a tiktoken file"),
        "noise": (tmp_path / "noise", "neither a sentencepiece model nor a tiktoken file"),
        "cut": (tmp_path / "cut.json", "cannot read"),
        "other": (tmp_path / "other.json", "no model with a vocabulary"),
        "large": (large, "9 tokens, but the model has 8 rows"),
        "absent": (tmp_path / "nowhere" / "tokenizer.model", "does not exist"),
    }


@pytest.mark.parametrize("name", ["damaged_ranks", "gap", "empty", "noise", "cut", "other", "large", "absent"])
def test_a_bad_tokenizer_fails_if_named_and_else_warns(tmp_path, name):
    source, reason = _cases(tmp_path)[name]
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(ConversionError, match=reason):
        write_tokenizer(source, out, vocab_size=8, explicit=True)
    (note,) = write_tokenizer(source, out, vocab_size=8)
    assert note.startswith("warning: wrote no tokenizer: ") and reason in note
    assert not list(out.iterdir())


def test_a_rebuilt_tokenizer_that_is_too_large(ranks, tmp_path):
    path = _write_ranks(tmp_path / "ranks", ranks)
    with pytest.raises(ConversionError, match=f"{len(ranks) + 256} tokens, but the model has 700 rows"):
        write_tokenizer(path, tmp_path, vocab_size=700, explicit=True)


@pytest.mark.parametrize(("source", "reason"), [(None, "names none"), ("", "names none"), (".", "holds none")])
def test_no_tokenizer_is_a_warning(tmp_path, monkeypatch, source, reason):
    monkeypatch.chdir(tmp_path)
    (note,) = write_tokenizer(source, tmp_path, vocab_size=8)
    assert note.startswith("warning: ") and reason in note and "--tokenizer-model" in note
    if source:
        with pytest.raises(ConversionError, match=reason):
            write_tokenizer(source, tmp_path, vocab_size=8, explicit=True)


@pytest.mark.parametrize(
    ("module", "source", "package"),
    [
        ("tokenizers", "ranks", "tokenizers"),
        ("google.protobuf.message", "piece", "protobuf"),
        ("sentencepiece", "piece", "sentencepiece"),
    ],
)
def test_a_missing_package_is_named(ranks, tmp_path, monkeypatch, module, source, package):
    _write_ranks(tmp_path / "ranks", ranks)
    (tmp_path / "piece").write_bytes(b"\n\x00")
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.chdir(tmp_path)
    (note,) = write_tokenizer(source, tmp_path, vocab_size=10**6)
    assert note.startswith("warning: ") and f"run pip install {package}." in note
    with pytest.raises(ConversionError, match=f"run pip install {package}"):
        write_tokenizer(source, tmp_path, vocab_size=10**6, explicit=True)


def test_a_name_needs_the_package_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConversionError, match=r"some/model is no folder here, and .* run pip install huggingface_hub"):
        write_tokenizer("some/model", tmp_path, vocab_size=8, explicit=True)
    (note,) = write_tokenizer("some/model", tmp_path, vocab_size=8)
    assert note.startswith("warning: wrote no tokenizer: ") and "run pip install huggingface_hub" in note


# --- settings ---


def test_generation_config():
    sampling = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
    llama31 = {"bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009]}
    assert generation_config("llama3.1") == {**llama31, **sampling}
    assert generation_config("llama3")["eos_token_id"] == [128001, 128009]
    assert generation_config("llama2") == {"bos_token_id": 1, "eos_token_id": 2, **sampling}
    assert generation_config(None) == sampling


def test_token_ids_of_a_base_model():
    assert token_ids("llama3.1", instruct=False) == {"bos_token_id": 128000, "eos_token_id": 128001}
    assert token_ids(None, instruct=False) == {}


_VOCAB = {"model": {"vocab": {"a": 0, "<s>": 1, "</s>": 2}}, "added_tokens": [{"id": 7, "content": "<end>"}]}
TOKENS_OF_FILES = {
    "texts": (_VOCAB, {"bos_token": "<s>", "eos_token": "<end>"}, {"bos_token_id": 1, "eos_token_id": 7}),
    "objects": (_VOCAB, {"bos_token": {"content": "<s>"}, "eos_token": None}, {"bos_token_id": 1}),
    "added": ({}, {"eos_token": "<x>", "added_tokens_decoder": {"9": {"content": "<x>"}}}, {"eos_token_id": 9}),
    "unigram": ({"model": {"vocab": [["<s>", 0.0], ["</s>", -1.0]]}}, {"eos_token": "</s>"}, {"eos_token_id": 1}),
    "unknown": (_VOCAB, {"bos_token": "<other>"}, {}),
    "nothing": (_VOCAB, {}, {}),
    "another form": ({"model": []}, {"bos_token": ["<s>"]}, {}),
}


@pytest.mark.parametrize(("content", "settings", "expected"), TOKENS_OF_FILES.values(), ids=TOKENS_OF_FILES)
def test_token_ids_of_a_tokenizer(tmp_path, content, settings, expected):
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert tokenizer_token_ids(tmp_path) == expected


def test_token_ids_of_older_and_of_broken_files(tmp_path):
    assert tokenizer_token_ids(tmp_path) == {}
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": "<s>", "eos_token": "<s>"}')
    (tmp_path / "tokenizer.json").write_text(json.dumps(_VOCAB))
    assert tokenizer_token_ids(tmp_path) == {"bos_token_id": 1, "eos_token_id": 1}
    (tmp_path / "tokenizer_config.json").write_text("{")
    assert tokenizer_token_ids(tmp_path) == {}


def test_importing_needs_no_heavy_package():
    code = (
        "import sys, megatron_converters.assets.tokenizer;"
        "print({'torch', 'transformers', 'tokenizers', 'sentencepiece'} & {*sys.modules})"
    )
    root = Path(__file__).parent.parent
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert result.stdout == "set()\n"
