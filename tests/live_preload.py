"""Import this module to prepare a process from which those with live models are forked: it holds all that they import.

Nothing is patched or set, so that they are as a user's process is.
"""

from __future__ import annotations

from transformers import AutoModelForCausalLM  # noqa: F401

from megatron_converters.bridge import AutoBridge  # noqa: F401
from megatron_converters.live import distributed_model, providing  # noqa: F401
