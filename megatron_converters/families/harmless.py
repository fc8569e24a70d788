"""Fields of configurations that decide nothing of a model, each with where it is from, and the judge of unknown ones.

A field that no rule claims may change what the model computes, and so may its being false or 0: programs read fields whose
default is true (`is_causal`). So a value is passed over only where a row here knows it. Null is no value: no class of transformers
5.23 that a family describes reads a field that it may lack with a default other than none or false, except `is_causal`, which has
a rule.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..basics.errors import ConversionError, one_line


@dataclass(frozen=True)
class Harmless:
    """Fields that decide nothing with any value, or with these `values` alone, and the source of that.

    `warning` is what a user should know where one is set.
    """

    keys: str
    source: str
    values: tuple[Any, ...] | None = None
    warning: str = ""

    def admits(self, key: str, value: Any) -> bool:
        """Whether a field with this value decides nothing."""
        return key in self.keys.split() and (self.values is None or value in self.values)


_OFF, _NONE, _ONE = (False,), (0,), (1,)
#: Fields of config.json.
CONFIG = (
    Harmless(
        "_name_or_path name_or_path _commit_hash architectures model_type transformers_version torch_dtype dtype auto_map "
        "custom_pipelines",
        "transformers 5.23, configuration_utils.py: where the model is from, and which class it is",
    ),
    Harmless(
        "bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id tokenizer_class prefix",
        "transformers 5.23, configuration_utils.py: tokens",
    ),
    Harmless(
        "bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size "
        "exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length min_length "
        "no_repeat_ngram_size num_beam_groups num_beams num_return_sequences remove_invalid_values repetition_penalty "
        "return_dict_in_generate suppress_tokens temperature top_k top_p typical_p",
        "transformers 4, GenerationConfig's fields in a config.json: how tokens are chosen",
    ),
    Harmless(
        "output_attentions output_hidden_states output_router_logits output_scores return_dict use_cache output_past "
        "chunk_size_feed_forward torchscript use_bfloat16 tf_legacy_loss keys_to_ignore_at_inference tie_last_hidden_states",
        "transformers 4 and 5.23, configuration_utils.py: what a call returns, and how",
    ),
    Harmless(
        "classifier_dropout finetuning_task id2label label2id num_labels _num_labels problem_type task_specific_params "
        "add_cross_attention cross_attention_hidden_size is_decoder is_encoder_decoder tie_encoder_decoder pruned_heads",
        "transformers 4, configuration_utils.py: heads and encoders that no causal model has",
    ),
    Harmless(
        "_attn_implementation _attn_implementation_autoset _attn_implementation_internal attn_implementation "
        "_flash_attn_2_enabled use_flash_attention use_flash_attention_2 use_flash_attn _experts_implementation "
        "_experts_implementation_internal",
        "transformers 4.31 to 5.23, modeling_utils.py, and configs saved by trainers: which kernel computes the same",
    ),
    Harmless(
        "base_model_tp_plan base_model_pp_plan base_model_ep_plan base_model_fsdp_plan distributed_config pretraining_tp",
        "transformers 5.23, configuration_utils.py: how ranks share the work",
    ),
    Harmless(
        "gradient_checkpointing loss_type router_jitter_noise neftune_noise_alpha hidden_dropout resid_pdrop embd_pdrop "
        "attn_pdrop embedding_dropout residual_dropout",
        "transformers 5.23, modeling_utils.py (`gradient_checkpointing`, `loss_type`) and trainer: training alone",
    ),
    Harmless(
        "max_sequence_length max_seq_length model_max_length seq_length tokenizer_model_max_length tokenizer_padding_side",
        "FastChat's, LLaVA's and Unsloth's configs: how long the sequences were that a run fed",
    ),
    Harmless(
        "is_llama_config is_qwen2_config transformers.js_config unsloth_fixed unsloth_fixed_mtp unsloth_version",
        "configs of SmolLM (nanotron), transformers.js and Unsloth: marks of programs",
    ),
    Harmless(
        "dual_chunk_attention_config",
        "Qwen2.5-7B-Instruct-1M's config.json; read by vLLM, by no class of transformers",
        warning="vLLM then attends in chunks beyond the original positions; transformers and Megatron-LM attend to all tokens, "
        "which is the same up to there and another model beyond",
    ),
    Harmless(
        "attention_bias mlp_bias qkv_bias use_bias lm_head_bias",
        "configs of Phi-4-mini, Qwen3-Coder and many fine-tunes: a bias that files have is an error, whatever this says",
        _OFF,
    ),
    Harmless("use_qk_norm qk_norm qk_layernorm", "the same of norms of queries and keys", _OFF),
    Harmless(
        "num_experts num_local_experts n_routed_experts n_shared_experts num_experts_per_tok moe_intermediate_size "
        "shared_expert_intermediate_size num_nextn_predict_layers",
        "config of Qwen3-Coder (shared_expert_intermediate_size): parts whose tensors are an error where files have them",
        _NONE,
    ),
    Harmless(
        "rope_interleaved use_mrope use_sliding_window",
        "configs of SmolLM, Qwen2.5 and Qwen3-Next: what the class does not do anyway",
        _OFF,
    ),
    Harmless("full_attn_mod interpolate_factor", "Phi-4-mini's config.json; 1 in its own code changes nothing", _ONE),
)


def unknown_fields(values: Mapping[str, Any], claimed: Collection[str], rows: Iterable[Harmless]) -> list[str]:
    """Names of fields that are neither `claimed`, nor null, nor harmless by one of the rows."""
    known = list(rows)
    return sorted(
        key
        for key, value in values.items()
        if key not in claimed and value is not None and not any(row.admits(key, value) for row in known)
    )


def refuse_unknown(file: str, family: str, unknown: Iterable[str]) -> None:
    """Raise `ConversionError` if there are unknown fields, with the option that passes them over."""
    names = [one_line(key) for key in unknown]
    if names:
        raise ConversionError(
            f"{file} has fields that the {family} family does not know: {', '.join(names)}; "
            "they may change what the model computes. If they do not, pass "
            f"--ignore-config-fields {','.join(names)}"
        )


def harmless_warnings(file: str, values: Mapping[str, Any], rows: Iterable[Harmless]) -> Iterator[str]:
    """Warnings of rows whose fields are set."""
    for row in rows:
        for key in row.keys.split() if row.warning else ():
            if values.get(key):
                yield f"warning: {file} has {key}={one_line(values[key])}: {row.warning}"
