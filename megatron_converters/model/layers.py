"""Records of a model's layers: what mixes positions, what feeds forward, norms and rotary embeddings. Each checks itself.

Field names are Megatron-LM's argument names where it has one.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..basics.errors import ConversionError
from .checks import TOO_LARGE, check_cap, check_choice, check_sizes, check_switches, is_whole, number
from .rotary import RopeScaling

RMS_NORM, LAYER_NORM = "RMSNorm", "LayerNorm"
#: Spans of query and key norms: each head by itself, or all heads together (OLMoE).
EACH_HEAD, ALL_HEADS = "each head", "all heads"
#: Where a layer has norms: before attention and MLP, after both, or both before and after each.
BEFORE, AFTER, AROUND = "before", "after", "before and after"
#: Activations of an MLP. GELU has two forms, which differ by 1e-4 of a logit.
SILU, GELU, GELU_TANH, SQUARED_RELU, RELU = "silu", "gelu", "gelu_tanh", "squared_relu", "relu"
#: x * sigmoid(1.702 x).
QUICK_GELU = "quick_gelu"
ACTIVATIONS = (SILU, GELU, GELU_TANH, SQUARED_RELU, RELU, QUICK_GELU)
#: Whose biases a family's files may lack, where others have some.
OF_ATTENTION, OF_MLP = "attention", "mlp"
SOFTMAX, SIGMOID = "softmax", "sigmoid"


@dataclass(frozen=True)
class Norm:
    """Norm before each block and at the end. A LayerNorm has a bias; weights that are `zero_centred` are stored minus 1."""

    norm_epsilon: float
    normalization: str = RMS_NORM
    zero_centred: bool = False

    def __post_init__(self) -> None:
        """Refuse values that no norm has."""
        number(self.norm_epsilon, "norm_epsilon")
        check_choice(self, "normalization", (RMS_NORM, LAYER_NORM))
        check_switches(self, ("zero_centred",))


@dataclass(frozen=True)
class Rope:
    """Rotary embeddings of the first `rotary_percent` of each head; interleaved ones rotate neighbouring pairs."""

    rotary_base: float
    rotary_percent: float = 1.0
    rotary_interleaved: bool = False
    rope_scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        """Refuse values that no embedding has."""
        number(self.rotary_base, "rotary_base")
        if not 0 < number(self.rotary_percent, "rotary_percent") <= 1:
            raise ConversionError(f"rotary_percent is {self.rotary_percent!r}; it must be above 0 and at most 1")
        check_switches(self, ("rotary_interleaved",))


@dataclass(frozen=True)
class Attention:
    """Attention with query groups. `sliding_window` counts positions, the token's own among them.

    With `attention_output_gate`, queries come with as many gates, which scale the output. `sinks` are scores of no position, one
    for each head, which the softmax counts. Scores are capped softly, by a tanh, at `attn_logit_softcapping`.
    """

    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    rope: Rope | None = None
    sliding_window: int | None = None
    qkv_bias: bool = False
    proj_bias: bool = False
    qk_norm: str = ""
    attention_output_gate: bool = False
    sinks: bool = False
    attn_logit_softcapping: float | None = None

    def __post_init__(self) -> None:
        """Refuse sizes that no model can have."""
        heads, groups, window = self.num_attention_heads, self.num_query_groups, self.sliding_window
        check_sizes(self, ("num_attention_heads", "num_query_groups", "kv_channels"))
        if heads * self.kv_channels >= TOO_LARGE:
            raise ConversionError(f"{heads} attention heads of {self.kv_channels} are more than any model has")
        check_switches(self, ("qkv_bias", "proj_bias", "attention_output_gate", "sinks"))
        check_choice(self, "qk_norm", ("", EACH_HEAD, ALL_HEADS))
        check_cap(self, "attn_logit_softcapping")
        if window is not None and (not is_whole(window) or window < 1):
            raise ConversionError(f"sliding_window is {window!r}; it must be a whole number above 0, or null for none")
        if heads % groups:
            raise ConversionError(f"{heads} attention heads cannot share {groups} query groups evenly")

    @property
    def sizes(self) -> str:
        """Sizes in words."""
        heads, groups = self.num_attention_heads, self.num_query_groups
        return f"{heads} attention heads of {self.kv_channels} in {groups} query groups"


#: Epsilon of the norms of latents in transformers' classes, whatever config.json says (models/deepseek_v3, minicpm3).
LATENT_EPSILON = 1e-6


@dataclass(frozen=True)
class Latent:
    """Multi-latent attention: queries (if `q_lora_rank`), keys and values come from normed latents; rotated keys are shared."""

    num_attention_heads: int
    kv_lora_rank: int
    qk_head_dim: int
    qk_pos_emb_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None
    rope: Rope | None = None

    def __post_init__(self) -> None:
        """Refuse sizes that no model can have."""
        names = ["num_attention_heads", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim"]
        check_sizes(self, [*names, *(["q_lora_rank"] if self.q_lora_rank is not None else [])])

    @property
    def sizes(self) -> str:
        """Sizes in words."""
        return f"{self.num_attention_heads} attention heads"


@dataclass(frozen=True)
class GatedDelta:
    """Gated DeltaNet: linear attention with a state, after a short convolution over queries, keys and values."""

    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int

    def __post_init__(self) -> None:
        """Refuse sizes that no model can have."""
        check_sizes(self, self.__dataclass_fields__)
        if self.linear_num_value_heads % self.linear_num_key_heads:
            raise ConversionError(
                f"linear_num_value_heads is {self.linear_num_value_heads}, which is no multiple of linear_num_key_heads, "
                f"{self.linear_num_key_heads}"
            )

    @property
    def keys(self) -> int:
        """Rows of all keys together, and of all queries."""
        return self.linear_num_key_heads * self.linear_key_head_dim

    @property
    def values(self) -> int:
        """Rows of all values together."""
        return self.linear_num_value_heads * self.linear_value_head_dim

    @property
    def sizes(self) -> str:
        """Sizes in words."""
        return f"{self.linear_num_key_heads} linear-attention key heads and {self.linear_num_value_heads} value heads"


@dataclass(frozen=True)
class Mlp:
    """Dense MLP; a gated one has twice as many rows in its first linear: gate, then up.

    `glu_linear_offset` is added to up. `activation_func_clamp_value` is the greatest value of gate and up, and its negative the
    least of up.
    """

    ffn_hidden_size: int
    activation: str = SILU
    gated: bool = True
    mlp_bias: bool = False
    glu_linear_offset: float = 0.0
    activation_func_clamp_value: float | None = None

    def __post_init__(self) -> None:
        """Refuse sizes that no model can have."""
        check_sizes(self, ("ffn_hidden_size",))
        check_choice(self, "activation", ACTIVATIONS)
        check_switches(self, ("gated", "mlp_bias"))
        _check_glu(self)

    @property
    def sizes(self) -> str:
        """Sizes in words."""
        return f"an MLP of {self.ffn_hidden_size}"


def _check_glu(feed: Mlp | Mixture) -> None:
    """Refuse values of a gated activation that are no numbers."""
    number(feed.glu_linear_offset, "glu_linear_offset")
    if feed.activation_func_clamp_value is not None:
        number(feed.activation_func_clamp_value, "activation_func_clamp_value")


@dataclass(frozen=True)
class Mixture:
    """Mixture of experts, and its shared expert if `shared_ffn_hidden_size` is not 0.

    `moe_router_pre_softmax` is the softmax over all experts before the choice, instead of over the chosen ones after it.
    `moe_router_enable_expert_bias` is a bias that counts for the choice only. `mlp_bias` are biases of the router and of experts.
    """

    num_experts: int
    moe_ffn_hidden_size: int
    moe_router_topk: int
    moe_router_pre_softmax: bool = False
    moe_router_score_function: str = SOFTMAX
    moe_router_enable_expert_bias: bool = False
    moe_router_topk_scaling_factor: float = 1.0
    moe_router_num_groups: int | None = None
    moe_router_group_topk: int | None = None
    moe_aux_loss_coeff: float = 0.0
    shared_ffn_hidden_size: int = 0
    shared_gate: bool = False
    activation: str = SILU
    gated: bool = True
    mlp_bias: bool = False
    glu_linear_offset: float = 0.0
    activation_func_clamp_value: float | None = None

    def __post_init__(self) -> None:
        """Refuse sizes that no model can have."""
        if not is_whole(self.num_experts):
            raise ConversionError(f"num_experts is {self.num_experts!r}; it must be a whole number, 0 for none")
        groups = [
            name for name in ("moe_router_num_groups", "moe_router_group_topk") if getattr(self, name) is not None
        ]
        check_sizes(self, ("num_experts", "moe_ffn_hidden_size", "moe_router_topk", *groups))
        number(self.moe_aux_loss_coeff, "moe_aux_loss_coeff")
        number(self.moe_router_topk_scaling_factor, "moe_router_topk_scaling_factor")
        check_switches(
            self, ("moe_router_pre_softmax", "moe_router_enable_expert_bias", "shared_gate", "gated", "mlp_bias")
        )
        _check_glu(self)
        check_choice(self, "moe_router_score_function", (SOFTMAX, SIGMOID))
        check_choice(self, "activation", ACTIVATIONS)
        shared = self.shared_ffn_hidden_size
        if not is_whole(shared) or shared < 0:
            raise ConversionError(
                f"shared_ffn_hidden_size is {shared!r}; it must be a whole number above 0, or 0 for none"
            )
        if self.moe_router_topk > self.num_experts:
            raise ConversionError(
                f"moe_router_topk is {self.moe_router_topk}, but there are {self.num_experts} experts"
            )
        if len(groups) == 1 or (groups and self.num_experts % (self.moe_router_num_groups or 1)):
            raise ConversionError(
                f"moe_router_num_groups is {self.moe_router_num_groups!r} and moe_router_group_topk "
                f"{self.moe_router_group_topk!r}; {self.num_experts} experts cannot be grouped so"
            )


@dataclass(frozen=True)
class BlockExperts:
    """Experts of BlockFFN, ungated and chosen by a ReLU of a normed router. No release of Megatron-LM has them."""

    block_experts: int
    block_expert_size: int
    router_norm: bool = True

    def __post_init__(self) -> None:
        """Refuse sizes that no model can have."""
        check_sizes(self, ("block_experts", "block_expert_size"))
        check_switches(self, ("router_norm",))

    @property
    def sizes(self) -> str:
        """Sizes in words."""
        return f"{self.block_experts} block experts of {self.block_expert_size}, which stay whole"


Mixer = Attention | Latent | GatedDelta
Feed = Mlp | Mixture | BlockExperts


@dataclass(frozen=True)
class Layer:
    """Kind of layer: what mixes positions, and what follows it. Norms are the model's.

    `block_norms` says where they are: before both of these blocks, after both, on what is added to the layer's input, or both.
    In a `parallel_block` both read the layer's input, and their outputs are added to it. They share one norm there, and there is no
    second one, unless `parallel_norms`.
    """

    mixer: Mixer
    feed: Feed
    parallel_block: bool = False
    parallel_norms: bool = False
    block_norms: str = BEFORE

    def __post_init__(self) -> None:
        """Refuse switches that are neither on nor off, or exclude each other."""
        check_switches(self, ("parallel_block", "parallel_norms"))
        check_choice(self, "block_norms", (BEFORE, AFTER, AROUND))
        if self.parallel_norms and not self.parallel_block:
            raise ConversionError(
                "parallel_norms is true, but parallel_block is false: only parallel blocks can share a norm"
            )

    @property
    def shares_norm(self) -> bool:
        """Whether both of its blocks read the same norm."""
        return self.parallel_block and not self.parallel_norms

    @property
    def norms_over_heads(self) -> bool:
        """Whether its attention norms queries, and keys, over all heads."""
        return isinstance(self.mixer, Attention) and self.mixer.qk_norm == ALL_HEADS

    @property
    def window(self) -> int | None:
        """Sliding window of its attention, None for none."""
        return self.mixer.sliding_window if isinstance(self.mixer, Attention) else None

    @property
    def without_rope(self) -> bool:
        """Whether it has attention without rotary embeddings."""
        return isinstance(self.mixer, (Attention, Latent)) and self.mixer.rope is None

    @property
    def is_moe(self) -> bool:
        """Whether it has experts instead of a dense MLP."""
        return isinstance(self.feed, Mixture)
