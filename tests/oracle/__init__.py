"""Independent judges of a conversion: tiny real transformers models, and the real megatron-core on a CPU.

Nothing here uses megatron_converters, so a mistake there cannot hide by being made twice.
"""
