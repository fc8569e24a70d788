"""Independent judges of a conversion: tiny real transformers models, and the real megatron-core on a CPU.

Of megatron_converters nothing is used here but what builds and runs megatron-core (`logits/cpu.py`, `gpt.py`, `pool.py`): no name,
layout or sharding rule of it, so a mistake there cannot hide by being made twice.
"""
