"""Make a small random Llama 3.1 with a real tokenizer, by transformers itself, to try the converters on.

    python scripts/make_tiny_llama.py FOLDER [--layers 4] [--seed 0]

About 19 MB in bfloat16: grouped-query attention, untied embeddings, Llama 3's RoPE scaling, a byte-level BPE tokenizer.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB_SIZE = 4000  # not a multiple of 128, so that Megatron-LM pads it
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
SYLLABLES = (
    "ba ce di fo gu la me ni or pu ra se ti vo xu an el is ot um qua tri sta gle pho ché ñor über ж я 你 世".split()
)


def sentences(count: int, seed: int) -> list[str]:
    """Sentences to train a tokenizer on: invented words with Zipf frequencies, numbers and punctuation marks."""
    rng = random.Random(seed)
    words = ["".join(rng.choices(SYLLABLES, k=rng.randint(1, 4))) for _ in range(6000)]
    weights = [1 / rank for rank in range(1, len(words) + 1)]

    def sentence() -> str:
        chosen = rng.choices(words, weights, k=rng.randint(4, 14))
        chosen.insert(rng.randrange(len(chosen)), str(rng.randrange(10 ** rng.randint(1, 5))))
        return " ".join(chosen).capitalize() + rng.choice([".", "!", "?", ", isn't it?", ":\n"])

    return [sentence() for _ in range(count)]


def make_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE tokenizer of `VOCAB_SIZE` tokens that adds a begin token, as Llama 3's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences(8000, seed), trainer)
    start = [(BOS, tokenizer.token_to_id(BOS))]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=start)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS)


def make_model(tokenizer: PreTrainedTokenizerFast, layers: int, seed: int) -> LlamaForCausalLM:
    """Model with random bfloat16 weights, including the norms: with norms of 1, mistakes in them would go unnoticed."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=layers,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=131072,
        rope_theta=500000.0,
        rope_scaling={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(*((0.0, 0.05) if parameter.ndim == 2 else (1.0, 0.2)))
    return model.to(torch.bfloat16)


def main() -> None:
    """Write the model and its tokenizer into the folder that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tokenizer = make_tokenizer(args.seed)
    model = make_model(tokenizer, args.layers, args.seed)
    model.save_pretrained(args.folder)
    tokenizer.save_pretrained(args.folder)
    print(
        f"{args.folder}: {model.num_parameters() / 1e6:.1f} M parameters, {args.layers} layers, {len(tokenizer)} tokens"
    )


if __name__ == "__main__":
    main()
