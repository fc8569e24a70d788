"""Models that no release of Megatron-LM's GPTModel can compute, and why, by names that config.json has for them.

Sources: the classes of transformers 5.23 (models/<model_type>), or code published with the model, and megatron-core up to 0.19.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

_ALIBI = "whose attention has ALiBi instead of rotary embeddings, which Megatron-LM has not"
_NORMED_LATE = "which norms queries and keys after their rotation; Megatron-LM norms them before"
_NO_ATTENTION = "whose layers are state-space models; no GPTModel of Megatron-LM has these"
_UNEVEN = "whose layers differ in their numbers of heads, which no GPTModel of Megatron-LM has"
_LINEAR = "whose layers of linear attention no GPTModel of Megatron-LM has"

#: Why a model is refused, by the values of `model_type` and the classes that it has, as the end of a sentence.
_ROWS: Mapping[str, str] = {
    "minicpm_sala MiniCPMSALAForCausalLM": "whose layers of lightning attention no GPTModel of Megatron-LM has",
    "gemma4 gemma4_text": "whose heads differ in size between layers, which have embeddings of their own; Megatron-LM has neither",
    "gemma3n gemma3n_text": "whose layers have embeddings of their own and several streams; Megatron-LM has neither",
    "recurrent_gemma": "some of whose layers are linear recurrences, which no GPTModel of Megatron-LM has",
    "t5gemma t5gemma2": "which has an encoder, and whose decoder attends to that; no GPTModel of Megatron-LM does",
    "hunyuan hunyuan_v1_dense hunyuan_v1_moe": _NORMED_LATE,
    "apertus": "whose activation, xIELU, has parameters of its own; Megatron-LM has no such activation",
    "bloom mpt": _ALIBI,
    "gptj": "whose head has a bias, and whose MLP has biases beside an attention without; Megatron-LM has neither",
    "phi3small": "whose attention is sparse in blocks, which Megatron-LM has not",
    "phi4mm phi4_multimodal": "which adds low-rank matrices for each kind of input; Megatron-LM has no such layers",
    "phimoe": "whose router chooses one expert after the other by thresholds (sparsemixer), which Megatron-LM has not",
    "mllama mllama_text_model": (
        "some of whose text layers attend to images alone, so that the text part is no model of its own; Megatron-LM has no such "
        "layers"
    ),
    "nanochat": "whose norms have no weights and whose logits are capped; Megatron-LM has no such norms, and no cap",
    "nemotron-nas": _UNEVEN,
    "openelm": _UNEVEN,
    "xglm": "whose positions are sines that are added to embeddings, which Megatron-LM has not",
    "diffllama": "whose attention is the difference of two, which Megatron-LM has not",
    "bitnet": "which quantises weights and activations as it runs, and has norms within its blocks; Megatron-LM has not",
    "mamba mamba2 falcon_mamba": _NO_ATTENTION,
    "ernie4_5_moe": (
        "whose router adds a bias to probabilities of a softmax; Megatron-LM has such a bias with scores by a sigmoid alone"
    ),
    "llama4 llama4_text": (
        "whose layers without rotary embeddings have no norm of queries and keys, and scale queries by position; Megatron-LM has "
        "one kind of attention for all layers"
    ),
    "dbrx": "which clips queries, keys and values, which Megatron-LM has not",
    "afmoe": "which has norms after its blocks and a gate of attention with a matrix of its own; Megatron-LM has not",
    "mimo_v2_flash": "whose layers differ in query groups and rotary bases, and whose values are scaled; Megatron-LM has not",
    "step3p5 step3p7": "whose layers differ in heads and rotary embeddings, and have a gate for each head; Megatron-LM has not",
    "lfm2 lfm2_moe": "some of whose layers are short convolutions, which no GPTModel of Megatron-LM has",
    "jamba": _NO_ATTENTION,
    "falcon_h1": "whose layers compute attention and a state-space model side by side, which Megatron-LM has not",
    "kimi_linear bailing_moe_linear bailing_hybrid": _LINEAR,
    "longcat_flash": "whose layers have two attentions, and experts that compute nothing; Megatron-LM has neither",
    "deepseek_v4": "whose layers are joined by hyper-connections and attend to compressed positions; no release has these",
}
#: Files of a supported model in the form of its authors' program, by keys of their config.json, which names no class.
#: Source: github.com/openai/gpt-oss, gpt_oss/torch/model.py, `ModelConfig`.
_OWN_FORMS: Mapping[str, str] = {
    "swiglu_limit rope_ntk_alpha rope_ntk_beta": (
        "GPT-OSS as OpenAI's own program has it (the folder original/ of a repository), with other names of tensors; convert the "
        "folder above it, whose config.json names GptOssForCausalLM"
    ),
}
_REASONS = {name: reason for names, reason in _ROWS.items() for name in names.split()}


def own_forms(config: Mapping[str, Any]) -> list[str]:
    """What a config.json without a class describes, if it is a model in the form of its authors' program; mostly nothing."""
    return [words for keys, words in _OWN_FORMS.items() if {*keys.split()} <= config.keys()]


def reasons(model_type: Any, architectures: Collection[str]) -> Iterable[str]:
    """Why models of these names cannot be converted, as ends of sentences; none where nothing is known of them."""
    names = [*architectures, *([model_type] if isinstance(model_type, str) else [])]
    return [_REASONS[name] for name in names if name in _REASONS]
