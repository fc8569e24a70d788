"""Keys of MindSpore Transformers' `model_config`: sizes, norms, activation, attention, positions, and layouts of weights.

Source: mindformers 1.6.0 to 2.1.0, parallel_core/transformer_config.py and transformer_config_utils.py (synonyms), and
parallel_core/training_graph (what is computed). A row may be read, too; what a model's class presets is not its business.
"""

from __future__ import annotations

from typing import Any

from ...basics.errors import ConversionError, one_line
from ...families.rules_attention import DYNAMIC, LINEAR, LLAMA3, LONGROPE, YARN, Rope, written_scaling
from ...model.checks import is_whole, number
from ...model.layers import EACH_HEAD, GELU, GELU_TANH, LAYER_NORM, SILU
from ...model.rotary import RopeScaling
from ...model.spec import ModelSpec, PerLayer
from .names import Dialect
from .options import CONTIGUOUS, GROUPED, INTERLEAVED
from .row import Config, Properties, Row, same
from .yaml_rows_experts import EXPERTS, has_experts

# -- sizes of attention and MLP


def is_latent(spec: ModelSpec) -> bool:
    """Whether any layer has multi-latent attention."""
    return "latent" in spec.in_layers("mixer")


def _read_groups(config: Config) -> Properties:
    if config["multi_latent_attention"]:
        return {}
    return {"num_query_groups": config["num_query_groups"] or config["num_attention_heads"]}


def _read_channels(config: Config) -> Properties:
    if config["multi_latent_attention"]:
        return {}
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    known = is_whole(hidden) and is_whole(heads) and heads > 0
    return {"kv_channels": config["kv_channels"] or (hidden // heads if known else None)}


def _read_ffn(config: Config) -> Properties:
    if config["ffn_hidden_size"] is not None:
        return {"ffn_hidden_size": config["ffn_hidden_size"]}
    hidden = config["hidden_size"]
    return {"ffn_hidden_size": 4 * hidden} if is_whole(hidden) and not has_experts(config) else {}


# -- norms, biases, activation

_ACTIVATIONS = {"silu": SILU, "swiglu": SILU, "fusedswiglu": SILU, "gelu": GELU_TANH}


def _activation(dialect: Dialect) -> Any:
    """Name of the activation; its GELU is the tanh form."""
    activation = dialect.spec.values.get("activation", SILU)
    return "gelu" if activation in (GELU, GELU_TANH) else activation


def _read_activation(config: Config) -> Properties:
    name = config["hidden_act"]
    if name not in _ACTIVATIONS:
        raise ConversionError(
            f"hidden_act is {one_line(name)}; the activations that can be converted are {', '.join(_ACTIVATIONS)}"
        )
    return {"activation": _ACTIVATIONS[name]}


def _activation_limit(spec: ModelSpec) -> str:
    activation = spec.values.get("activation", SILU)
    if activation == GELU:
        return "the exact GELU: its gelu is the tanh form"
    return "" if activation in (SILU, GELU_TANH) else f"the activation {activation}, which it does not have"


def _linear_bias(dialect: Dialect) -> bool:
    values = dialect.spec.values
    return bool(values.get("proj_bias")) or bool(values.get("mlp_bias"))


def _read_linear_bias(config: Config) -> Properties:
    linear = bool(config["add_bias_linear"])
    mlp = {} if has_experts(config) else {"mlp_bias": linear}
    return mlp if config["multi_latent_attention"] else {"proj_bias": linear, **mlp}


def _bias_limit(spec: ModelSpec) -> str:
    proj, mlp = spec.values.get("proj_bias", False), spec.values.get("mlp_bias")
    if mlp is not None and proj != mlp:
        return "a bias on only one of the attention output and the MLP: its add_bias_linear means both"
    return "biases of linear layers in a mixture of experts" if proj and spec.num_experts else ""


def _read_qkv_bias(config: Config) -> Properties:
    if config["multi_latent_attention"]:
        return {}
    return {"qkv_bias": bool(config["add_qkv_bias"]) or bool(config["add_bias_linear"])}


def _read_head_norms(config: Config) -> Properties:
    if config["multi_latent_attention"]:
        return {}
    return {"qk_norm": EACH_HEAD if config["qk_layernorm"] else ""}


def _read_untied(config: Config) -> Properties:
    """Property of the older key, which matters where the other is not there."""
    untied = config["untie_embeddings_and_output_weights"]
    return {"tied": not untied} if config["tie_word_embeddings"] is None and untied is not None else {}


# -- positions

_PLAIN, _LEARNED, _NONE = "rope", "learned_absolute", "none"


def _scaling(spec: ModelSpec) -> RopeScaling | None:
    found = spec.values.get("rope_scaling")
    return found if isinstance(found, RopeScaling) else None


def _positions(dialect: Dialect) -> str:
    spec, scaling = dialect.spec, _scaling(dialect.spec)
    if spec.learned_positions:
        return _LEARNED
    if not any(spec.in_layers("rope")):
        return _NONE
    return YARN if scaling is not None and scaling.kind == YARN else _PLAIN


def _read_positions(config: Config) -> Properties:
    kind = config["position_embedding_type"]
    if kind not in (_PLAIN, YARN, _LEARNED, _NONE):
        raise ConversionError(
            f"position_embedding_type is {one_line(kind)}; those that can be converted are rope, yarn, learned_absolute and none"
        )
    rope: Any = kind in (_PLAIN, YARN)
    layers, interval = config["num_layers"], config["nope_layer_interval"]
    if rope and is_whole(interval) and interval > 0 and is_whole(layers):
        rope = PerLayer(bool((layer + 1) % interval) for layer in range(layers))
    return {"learned_positions": kind == _LEARNED, "rope": rope}


def _scaling_table(dialect: Dialect) -> dict[str, Any] | None:
    """Rotary scaling as Hugging Face's configurations have it; linear scaling has a key of its own."""
    scaling = _scaling(dialect.spec)
    return None if scaling is None or scaling.kind == LINEAR else written_scaling(scaling)


def _read_scaling(config: Config) -> Properties:
    table, linear = config["rope_scaling"], config["rotary_seq_len_interpolation_factor"]
    if table is not None:
        rope = Rope(scalings=(LINEAR, LLAMA3, YARN, LONGROPE, DYNAMIC))
        longest = {"max_position_embeddings": config["max_position_embeddings"]}
        return {"rope_scaling": rope.read({"rope_scaling": table, **longest})["rope_scaling"]}
    if linear is not None:
        return {"rope_scaling": RopeScaling(LINEAR, number(linear, "rotary_seq_len_interpolation_factor"))}
    return {"rope_scaling": _read_yarn(config) if config["position_embedding_type"] == YARN else None}


#: Defaults of the keys of YaRN that stand on their own, by key (MLATransformerConfig).
_YARN = {"rotary_scaling_factor": 40.0, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 0.707, "mscale_all_dim": 0.707}


def _read_yarn(config: Config) -> RopeScaling:
    """YaRN without a table of its own: its original positions are those of the model (training_graph's rope_utils.py)."""
    given: dict[str, Any] = {
        key: number(default if config[key] is None else config[key], key) for key, default in _YARN.items()
    }
    original = config["max_position_embeddings"]
    factor = given.pop("rotary_scaling_factor")
    return RopeScaling(YARN, factor, original_max_position_embeddings=4096 if original is None else original, **given)


def _scaling_limit(spec: ModelSpec) -> str:
    scaling = _scaling(spec)
    if scaling is None or (scaling.kind == YARN and is_latent(spec)):
        return ""
    return f"{scaling.kind} scaling of rotary embeddings: for this attention no key of model_config sets it"


def _nope_interval(dialect: Dialect) -> int | None:
    """N where every N-th layer, and no other, has no rotary embeddings."""
    rope = dialect.spec.in_layers("rope")
    skipped = [layer for layer, has in enumerate(rope, 1) if has is False]
    if not skipped or not any(rope):
        return None
    regular = list(range(skipped[0], len(rope) + 1, skipped[0]))
    return skipped[0] if skipped == regular else None


def _nope_limit(spec: ModelSpec) -> str:
    rope = spec.in_layers("rope")
    irregular = any(rope) and False in rope and _nope_interval(Dialect(spec)) is None
    return "rotary embeddings on layers without a regular interval" if irregular else ""


def _rotary_base(dialect: Dialect) -> Any:
    """Base of the first layer that has one; `_base_limit` says where layers differ."""
    value = dialect.spec.values.get("rotary_base")
    return next((each for each in value if each is not None), None) if isinstance(value, PerLayer) else value


def _base_limit(spec: ModelSpec) -> str:
    differ = isinstance(spec.values.get("rotary_base"), PerLayer)
    return "a rotary base of its own for some layers" if differ else ""


def _percent_limit(spec: ModelSpec) -> str:
    percent = spec.values.get("rotary_percent", 1.0)
    return "" if percent == 1 else f"rotary embeddings on {percent} of each head: its models rotate whole heads"


# -- windows


def _window(dialect: Dialect) -> list[int] | None:
    """Window as it is counted here: positions to the left, without the token's own, and to the right."""
    sizes = [window for window in dialect.spec.in_layers("sliding_window") if window is not None]
    return [max(sizes) - 1, 0] if sizes else None


def _window_pattern(dialect: Dialect) -> list[int] | None:
    """List of 1 for each layer with the window; None where all layers have it, or none."""
    on = [int(window is not None) for window in dialect.spec.in_layers("sliding_window")]
    return on if any(on) and not all(on) else None


def _read_window(config: Config) -> Properties:
    value, layers = config["window_size"], config["num_layers"]
    if config["multi_latent_attention"]:
        return {}
    if not value:
        return {"sliding_window": None}
    if not (isinstance(value, (list, tuple)) and len(value) == 2 and is_whole(value[0]) and value[0] >= 0 == value[1]):
        raise ConversionError(f"window_size is {one_line(value)}; only a causal window [N, 0] can be converted")
    freq = config["window_attn_skip_freq"]
    if freq is None:
        return {"sliding_window": value[0] + 1}
    every = is_whole(freq) and freq > 0
    on = [(layer + 1) % freq != 0 for layer in range(layers)] if every else freq
    if not isinstance(on, list) or len(on) != layers:
        raise ConversionError(
            f"window_attn_skip_freq is {one_line(freq)}; it must be a number or a list of {layers} values, one per layer"
        )
    return {"sliding_window": PerLayer(value[0] + 1 if each else None for each in on)}


def _window_limit(spec: ModelSpec) -> str:
    sizes = {window for window in spec.in_layers("sliding_window") if window is not None}
    return f"sliding windows of {sorted(sizes)} positions: its window_size is one number" if len(sizes) > 1 else ""


def _latent(name: str, *synonyms: str, absent: int) -> Row:
    """Size of multi-latent attention, which only such models have."""

    def read(config: Config) -> Properties:
        if not config["multi_latent_attention"]:
            return {}
        return {name: absent if config[name] is None else config[name]}

    return Row((name, *synonyms), lambda dialect: dialect.spec.values.get(name), read)


def _read_query_rank(config: Config) -> Properties:
    """Rank of queries' latents; 0 and no value mean queries without latents."""
    return {"q_lora_rank": config["q_lora_rank"] or None} if config["multi_latent_attention"] else {}


SIZES = (
    same("num_layers", "num_hidden_layers", "n_layer"),
    same("hidden_size"),
    same("num_attention_heads", "num_heads", "n_head"),
    Row(
        ("num_query_groups", "num_key_value_heads", "n_kv_heads"),
        lambda dialect: dialect.spec.values.get("num_query_groups"),
        _read_groups,
    ),
    Row(("kv_channels", "head_dim"), lambda dialect: dialect.spec.values.get("kv_channels"), _read_channels),
    Row(
        ("ffn_hidden_size", "intermediate_size"), lambda dialect: dialect.spec.values.get("ffn_hidden_size"), _read_ffn
    ),
    same("vocab_size"),
    same("max_position_embeddings"),
)
BLOCKS = (
    same("normalization", absent=LAYER_NORM),
    same("layernorm_epsilon", "rms_norm_eps", "layer_norm_epsilon", field="norm_epsilon", absent=1e-5),
    Row(("add_bias_linear",), _linear_bias, _read_linear_bias, absent=True, limit=_bias_limit),
    Row(
        ("add_qkv_bias", "qkv_has_bias", "attention_bias"),
        lambda dialect: bool(dialect.spec.values.get("qkv_bias")),
        _read_qkv_bias,
        absent=False,
    ),
    Row(
        ("qk_layernorm", "use_qk_norm"),
        lambda dialect: bool(dialect.spec.values.get("qk_norm")) or is_latent(dialect.spec),
        _read_head_norms,
        absent=False,
    ),
    same("gated_linear_unit", field="gated", absent=False),
    Row(("hidden_act",), _activation, _read_activation, absent="gelu", limit=_activation_limit),
    same("tie_word_embeddings", field="tied"),
    Row(("untie_embeddings_and_output_weights",), read=_read_untied),
)
POSITIONS = (
    Row(("position_embedding_type", "extend_method"), _positions, _read_positions, _PLAIN),
    Row(
        ("rotary_base", "rope_theta", "theta"),
        _rotary_base,
        lambda config: {"rotary_base": config["rotary_base"]},
        absent=10000.0,
        limit=_base_limit,
    ),
    Row(
        ("rotary_percent", "partial_rotary_factor"),
        lambda dialect: dialect.spec.values.get("rotary_percent"),
        lambda config: {"rotary_percent": config["rotary_percent"]},
        absent=1.0,
        limit=_percent_limit,
    ),
    same("rotary_interleaved", absent=False),
    Row(("rope_scaling",), _scaling_table, _read_scaling, limit=_scaling_limit),
    Row(
        ("rotary_seq_len_interpolation_factor",),
        lambda dialect: (
            scaling.factor if (scaling := _scaling(dialect.spec)) is not None and scaling.kind == LINEAR else None
        ),
    ),
    Row(("rotary_scaling_factor", "scaling_factor", "factor")),
    *(Row((key,)) for key in _YARN if key != "rotary_scaling_factor"),
    Row(("nope_layer_interval",), _nope_interval, limit=_nope_limit),
    Row(("window_size",), _window, _read_window, limit=_window_limit),
    Row(("window_attn_skip_freq",), _window_pattern),
)
LATENT = (
    Row(
        ("multi_latent_attention",),
        lambda dialect: is_latent(dialect.spec),
        lambda config: {"mixer": "latent" if config["multi_latent_attention"] else "attention"},
        absent=False,
    ),
    Row(("q_lora_rank",), lambda dialect: dialect.spec.values.get("q_lora_rank"), _read_query_rank),
    _latent("kv_lora_rank", absent=512),
    _latent("qk_head_dim", "qk_nope_head_dim", absent=128),
    _latent("qk_pos_emb_head_dim", "qk_rope_head_dim", absent=64),
    _latent("v_head_dim", absent=128),
)
TRAINING = (
    Row(
        ("mtp_num_layers", "num_nextn_predict_layers", "mtp_depth"),
        lambda dialect: len(dialect.spec.mtp),
        lambda config: {"mtp_num_layers": config["mtp_num_layers"] or 0},
        absent=0,
    ),
    same("init_method_std", "initializer_range", field="initializer_range", absent=0.02),
    same("attention_dropout", absent=0.0),
    Row(("params_dtype", "param_init_type"), lambda dialect: dialect.spec.dtype.name),
)
#: All that describes the model. What they read are properties of `ModelSpec`.
ROWS = (*SIZES, *BLOCKS, *POSITIONS, *LATENT, *EXPERTS, *TRAINING)


def _read_qkv(config: Config) -> Properties:
    given = [
        config[key]
        for key in ("use_contiguous_weight_layout_attention", "use_contiguous_weight_layout")
        if config[key] is not None
    ]
    return {"qkv_layout": CONTIGUOUS if given[0] else GROUPED} if given else {}


def _read_mlp(config: Config) -> Properties:
    interleaved = config["use_interleaved_weight_layout_mlp"]
    return {} if interleaved is None else {"mlp_layout": INTERLEAVED if interleaved else CONTIGUOUS}


#: How the weights are laid out. What they read are fields of `Dialect`; nothing where a configuration does not say it.
LAYOUTS = (
    Row(("use_interleaved_weight_layout_mlp",), lambda dialect: dialect.mlp_layout == INTERLEAVED, _read_mlp),
    Row(("use_contiguous_weight_layout_attention",), lambda dialect: dialect.qkv_layout == CONTIGUOUS, _read_qkv),
    # As mindformers 1.6.0 calls it.
    Row(("use_contiguous_weight_layout",)),
    # Whether attention with latents has fewer, joined tensors.
    Row(("mla_qkv_concat",), lambda _: False),
)
