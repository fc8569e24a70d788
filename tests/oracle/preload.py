"""Importing this makes a process ready for megatron-core on a CPU."""

from . import cpu

cpu.prepare()

from . import megatron  # noqa: E402, F401 - after prepare(), or megatron finds no Transformer Engine
