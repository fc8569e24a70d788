"""Independent checks of a conversion: tiny real transformers models, and the real megatron-core on a CPU.

The only parts of megatron_converters used here build and run megatron-core (`logits/cpu.py`, `gpt.py`, `pool.py`). None of its
names, layouts or sharding rules is used, so a mistake in them cannot cancel out.
"""
