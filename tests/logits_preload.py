"""Import this module to prepare a process from which those that compute logits are forked: it holds all that they import."""

from __future__ import annotations

import sys

from megatron_converters.logits import cpu

for package in cpu._GPU_PACKAGES:
    sys.modules[package] = None  # type: ignore[assignment] # as `cpu.join` does, before megatron is imported
cpu.prepare()

from transformers import AutoModelForCausalLM  # noqa: E402, F401 - after prepare(), with megatron

from megatron_converters.logits import rank  # noqa: E402, F401
