"""Layers that Megatron-LM lacks, for its option `--spec`: `pretrain_gpt.py --spec megatron_layers.NAME spec`.

| NAME | layer |
|---|---|
| `parallel` | x + attention(norm(x)) + mlp(other norm(x)) |
| `parallel_shared_norm` | x + attention(norm(x)) + mlp(norm(x)), with the same norm |
| `norms_over_heads` | Megatron-LM's own, with norms of queries and of keys over all heads together |
| `post_norms` | x + norm(attention(x)), then x + norm(mlp(x)) |
| `post_norms_over_heads` | the same, with norms of queries and of keys over all heads together |
| `sandwich_norms` | x + norm(attention(norm(x))), then x + norm(mlp(norm(x))) |

A layer is built for the config of the model: of Transformer Engine's modules or of megatron-core's own, with LayerNorms or RMS
norms. `norms_over_heads` may have experts, which Megatron-LM takes beside `--spec` from 0.16 on. Written for megatron-core 0.12 to
0.19, and needs nothing else.
"""
