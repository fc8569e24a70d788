"""Providers: configs of megatron-core from which its models are built, with every attribute settable before (0.16).

They have the names of Megatron-Bridge's, so that programs written for these run.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.activations import squared_relu
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import MLATransformerConfig, TransformerConfig

from ..basics.errors import ConversionError
from ..formats.megatron.rows_layers import name_of_layer
from ..sharding.ranks import padded_vocab
from . import buildable_args
from .head_bias import GPTModelWithHeadBias
from .layer_specs import layer_spec, prediction_spec
from .on_cpu import where_it_runs
from .process_group import ensure_parallel

#: Kinds of position embeddings that are built here. Latent attention has a rotary one of its own, whatever the kind.
_POSITIONS = ("rope", "yarn", "learned_absolute", "none")
#: Config fields for a CPU; none of them changes what the model computes.
ON_CPU: dict[str, Any] = dict(
    use_cpu_initialization=True,
    gradient_accumulation_fusion=False,
    bias_activation_fusion=False,
    bias_dropout_fusion=False,
    masked_softmax_fusion=False,
    apply_rope_fusion=False,
    persist_layer_norm=False,
    moe_token_dispatcher_type="allgather",  # the other dispatchers need CUDA streams
)


def gelu_tanh(values: torch.Tensor) -> torch.Tensor:
    """GELU in its tanh form, which is also what megatron-core's kernel of bias and GELU computes."""
    return F.gelu(values, approximate="tanh")


_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "squared_relu": squared_relu,
    "relu": F.relu,
    "quick_gelu": quick_gelu,
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
}


@contextmanager
def _only_next_token(model: GPTModel) -> Iterator[None]:
    """Context without the layers that predict further tokens: they do not change the logits, and run only with labels."""
    config, process, layers = model.config, model.mtp_process, model.config.mtp_num_layers
    model.mtp_process, config.mtp_num_layers = False, None
    try:
        yield
    finally:
        model.mtp_process, config.mtp_num_layers = process, layers


class LiveGPTModel(GPTModel):  # type: ignore[misc]
    """GPTModel that is built without any collective operation, and computes logits whatever it predicts in training."""

    #: Whether the model is being built; megatron-core would then add up the embeddings of first and last stage.
    _building = False

    def _is_in_embd_group(self) -> bool:
        return not self._building and bool(super()._is_in_embd_group())

    def forward(
        self,
        input_ids: Any,
        position_ids: Any,
        attention_mask: Any,
        decoder_input: Any = None,
        labels: Any = None,
        *args: Any,
        **options: Any,
    ) -> torch.Tensor:
        """Logits, or losses where there are `labels`, without which megatron-core cannot predict further tokens."""
        with _only_next_token(self) if self.post_process and labels is None else nullcontext():
            found: torch.Tensor = super().forward(
                input_ids, position_ids, attention_mask, decoder_input, labels, *args, **options
            )
            return found


class LiveGPTModelWithHeadBias(GPTModelWithHeadBias, LiveGPTModel):
    """The same with a bias of the output layer."""


class _Building(LiveGPTModel):
    """Model while it is built."""

    _building = True


class _BuildingWithHeadBias(LiveGPTModelWithHeadBias):
    """The same with a bias of the output layer."""

    _building = True


@dataclass
class ProviderFields:
    """What a GPTModel needs besides its config. `seq_length` is the greatest number of positions."""

    vocab_size: int = 0
    seq_length: int = 0
    share_embeddings_and_output_weights: bool = True
    position_embedding_type: str = "rope"
    rotary_percent: float = 1.0
    rotary_base: float = 10000
    rope_scaling: bool = False
    rope_scaling_factor: float = 8.0
    seq_len_interpolation_factor: float | None = None
    #: YaRN outside multi-latent attention (`position_embedding_type` yarn); a factor of 1 is none.
    yarn_rotary_scaling_factor: float = 1.0
    yarn_original_max_position_embeddings: int = 4096
    yarn_beta_fast: float = 32.0
    yarn_beta_slow: float = 1.0
    yarn_mscale: float = 1.0
    yarn_mscale_all_dim: float = 0.0
    yarn_correction_range_round_to_int: bool = True
    #: Rows of the embedding are padded to a multiple of this times the tensor-parallel size, unless `should_pad_vocab` is False.
    make_vocab_size_divisible_by: int = 128
    should_pad_vocab: bool = True
    parallel_output: bool = True
    fp16_lm_cross_entropy: bool = False
    scatter_embedding_sequence_parallel: bool = True
    #: Name of the model in Hugging Face's form, which checkpoints record.
    hf_model_id: str | None = None
    #: Whether local layers cut the down projections of multi-latent attention over tensor-parallel ranks, as before 0.14.
    cut_down_projections: bool = False
    #: Name of the layer in `megatron_layers`, empty for megatron-core's own, and whether the output layer has a bias, which
    #: megatron-core's has not.
    own_layer: str = ""
    head_bias: bool = False
    #: Spec of the layers, or a function of the provider that gives it; None is megatron-core's for `transformer_impl`.
    transformer_layer_spec: Any = None

    def __post_init__(self) -> None:
        """Nothing yet: megatron-core's checks and derived values come with `finalize`."""

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding on all tensor-parallel ranks."""
        size: int = cast(Any, self).tensor_model_parallel_size
        return padded_vocab(self.vocab_size, self.make_vocab_size_divisible_by if self.should_pad_vocab else 1, size)

    def finalize(self) -> None:
        """Check the settings and derive what follows from them, as megatron-core does when a config is made."""
        config = cast(Any, self)
        if config.activation_func is gelu_tanh:
            self._tanh = True
        elif config.activation_func is not F.gelu:
            self._tanh = False
        if config.activation_func is F.gelu and config.bias_activation_fusion and not self._tanh:
            raise ConversionError(
                "bias_activation_fusion computes the tanh form of GELU, but this model has the exact form; leave it False"
            )
        if self._tanh:  # the kernel knows it by the name of the exact form
            config.activation_func = F.gelu if config.bias_activation_fusion else gelu_tanh
        super().__post_init__()  # type: ignore[misc]

    # Without annotations, so that they are no fields: whether GELU is in its tanh form, what checks the settings and fills the
    # models, and hooks.
    _tanh = False
    _load = None
    _check = None
    _hooks = ()

    def provide(
        self, pre_process: bool | None = None, post_process: bool | None = None, vp_stage: int | None = None
    ) -> GPTModel:
        """Model of one (virtual) pipeline stage of this rank, megatron-core's parallel state being initialised."""
        config = copy.copy(self)
        config.finalize()
        if config.position_embedding_type not in _POSITIONS:
            raise ConversionError(
                f"position_embedding_type is {config.position_embedding_type!r}, not {' or '.join(map(repr, _POSITIONS))}"
            )
        first = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
        last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
        as_config = cast(TransformerConfig, config)
        with where_it_runs():
            model = (_BuildingWithHeadBias if config.head_bias else _Building)(
                as_config,
                config._layers(as_config, vp_stage),
                vocab_size=config.padded_vocab_size,
                max_sequence_length=config.seq_length,
                pre_process=first if pre_process is None else pre_process,
                post_process=last if post_process is None else post_process,
                fp16_lm_cross_entropy=config.fp16_lm_cross_entropy,
                parallel_output=config.parallel_output,
                share_embeddings_and_output_weights=config.share_embeddings_and_output_weights,
                position_embedding_type=config.position_embedding_type,
                rotary_percent=config.rotary_percent,
                rotary_base=config.rotary_base,
                rope_scaling=config.rope_scaling,
                rope_scaling_factor=config.rope_scaling_factor,
                scatter_embedding_sequence_parallel=config.scatter_embedding_sequence_parallel,
                seq_len_interpolation_factor=config.seq_len_interpolation_factor,
                mtp_block_spec=prediction_spec(as_config, vp_stage),
                vp_stage=vp_stage,
            )
        model.__class__ = LiveGPTModelWithHeadBias if config.head_bias else LiveGPTModel
        return model

    def register_pre_wrap_hook(self, hook: Any, prepend: bool = False) -> None:
        """Call `hook` with the list of models once they are loaded, before they are wrapped for data parallelism."""
        cast(Any, self)._hooks = (hook, *self._hooks) if prepend else (*self._hooks, hook)

    def initialize_model_parallel(self, seed: int | None = None) -> None:
        """Initialise megatron-core's parallel state with these sizes, and its generators on GPUs with `seed`."""
        ensure_parallel(self)
        if seed is not None and torch.cuda.is_available():
            model_parallel_cuda_manual_seed(seed)

    def provide_distributed_model(
        self,
        ddp_config: Any = None,
        *,
        wrap_with_ddp: bool | None = None,
        overlap_param_gather_with_optimizer_step: bool = False,
        fp16: bool | None = None,
        bf16: bool | None = None,
        use_cpu_initialization: bool | None = None,
        pre_wrap_hook: Any = None,
        post_wrap_hook: Any = None,
    ) -> list[torch.nn.Module]:
        """This process's models, one for each of its virtual stages, with the weights of the bridge if it gave this provider so.

        A process group and megatron-core's parallel state are made where there are none. `wrap_with_ddp` None wraps where there is
        a GPU. Raises `ConversionError` for sizes that the processes or the model cannot have.
        """
        from .distributed_model import provide

        changed = {"fp16": fp16, "bf16": bf16, "use_cpu_initialization": use_cpu_initialization}
        for name, value in changed.items():
            if value is not None:
                setattr(self, name, value)
        return provide(
            self,
            self._load,
            wrap_with_ddp=wrap_with_ddp,
            ddp_config=ddp_config,
            overlap_param_gather_with_optimizer_step=overlap_param_gather_with_optimizer_step,
            pre_wrap_hooks=[*self._hooks, *([pre_wrap_hook] if pre_wrap_hook is not None else [])],
            post_wrap_hook=post_wrap_hook,
        )

    def __call__(self, wrap_with_ddp: bool | None = None, **options: Any) -> list[torch.nn.Module]:
        """Same as `provide_distributed_model`."""
        return self.provide_distributed_model(wrap_with_ddp=wrap_with_ddp, **options)

    def checking(self, check: Any) -> None:
        """Let `check` be called with this provider before models are built."""
        self._check = check

    def check(self) -> None:
        """Raise `ConversionError` for parallel sizes that the model cannot have, with those that it can."""
        if self._check is not None:
            self._check(self)

    def loading(self, load: Any) -> None:
        """Let `load` fill the models that are built."""
        self._load = load

    def _layers(self, config: TransformerConfig, stage: int | None) -> Any:
        given = self.transformer_layer_spec
        if given is None:
            return layer_spec(config, stage)
        return given(self) if callable(given) else given


@dataclass
class GPTModelProvider(ProviderFields, TransformerConfig):  # type: ignore[misc]
    """Config of a model, and what else it is built from."""


@dataclass
class MLAModelProvider(ProviderFields, MLATransformerConfig):  # type: ignore[misc]
    """The same for models with multi-latent attention."""


def provider_of(args: Mapping[str, Any], **settings: Any) -> GPTModelProvider | MLAModelProvider:
    """Provider of the model that Megatron-LM's args describe; `settings` are further fields, which take precedence.

    Raises `ConversionError` if args are missing.
    """
    missing = [name for name in buildable_args.required(args) if name not in args]
    if missing:
        raise ConversionError(f"args lack {', '.join(missing)}")
    fields = buildable_args.provider_fields(args) | dict(
        activation_func=_ACTIVATIONS[buildable_args.activation(args)],
        deterministic_mode=args.get("experimental_attention_variant") is not None,  # megatron then has code of its own
        own_layer=name_of_layer(args),
        head_bias=args.get("head_bias", False),
    )
    kind = MLAModelProvider if args.get("multi_latent_attention") else GPTModelProvider
    return kind(**{**fields, **settings})
