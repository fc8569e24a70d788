"""Import this module to prepare a process for megatron-core on a CPU."""

from . import cpu

cpu.prepare()

from . import megatron  # noqa: E402, F401 - after prepare(), else megatron finds no Transformer Engine
