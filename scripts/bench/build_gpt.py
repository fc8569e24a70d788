"""The model that a Llama becomes, built by megatron-core alone without weights: what an import cannot do without.

    python scripts/bench/build_gpt.py HF_FOLDER

Prints seconds and memory by phase as JSON (see `watch.py`). Nothing is initialised, so parameters take no memory yet.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from watch import Watch


def _build(config: dict[str, Any]) -> Any:
    """megatron-core's GPTModel of its own layers, in bfloat16, for a Llama's config.json."""
    import torch
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    made = TransformerConfig(
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"],
        num_attention_heads=config["num_attention_heads"],
        num_query_groups=config["num_key_value_heads"],
        layernorm_epsilon=config["rms_norm_eps"],
        normalization="RMSNorm",
        activation_func=torch.nn.functional.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        params_dtype=torch.bfloat16,
        bf16=True,
        use_cpu_initialization=True,
        perform_initialization=False,
    )
    return GPTModel(
        made,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=config["vocab_size"],
        max_sequence_length=config["max_position_embeddings"],
        position_embedding_type="rope",
        rotary_base=config["rope_theta"],
        share_embeddings_and_output_weights=False,
    )


def main() -> None:
    """Build the model and print what it took."""
    watch = Watch()
    warnings.filterwarnings("ignore")  # about every fusion that a CPU lacks
    config = json.loads((Path(sys.argv[1]) / "config.json").read_text(encoding="utf-8"))
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel  # noqa: F401

    watch.done("imports")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # gloo then need not resolve the host's name
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    parallel_state.initialize_model_parallel()
    watch.done("set-up")
    model = _build(config)
    watch.done("build")
    print(watch.report())
    del model


if __name__ == "__main__":
    main()
