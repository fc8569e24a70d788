"""GPTModel of megatron-core whose output layer has a bias, as Phi's has; megatron-core's own has none.

Written for megatron-core 0.16.1 (core/models/gpt/gpt_model.py).
"""

from __future__ import annotations

import torch
from megatron.core import tensor_parallel
from megatron.core.models.gpt import GPTModel


class GPTModelWithHeadBias(GPTModel):  # type: ignore[misc] # megatron is untyped
    """GPTModel whose output layer has a bias, cut like the vocabulary."""

    output_layer: torch.nn.Module

    def setup_embeddings_and_output_layer(self) -> None:
        """Replace the output layer, which has just been built, by one with a bias; then mark parameters as megatron-core does."""
        if self.post_process:
            config, tied = self.config, self.pre_process and self.share_embeddings_and_output_weights
            del self.output_layer  # so that there are not two at a time
            self.output_layer = tensor_parallel.ColumnParallelLinear(
                config.hidden_size,
                self.vocab_size,
                config=config,
                init_method=config.init_method,
                bias=True,
                skip_bias_add=False,
                gather_output=not self.parallel_output,
                skip_weight_param_allocation=tied,
                embedding_activation_buffer=self.embedding_activation_buffer,
                grad_output_buffer=self.grad_output_buffer,
                tp_group=self.pg_collection.tp,
            )
        super().setup_embeddings_and_output_layer()
