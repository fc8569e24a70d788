"""Logger of live models. What it records also goes to `megatron.bridge.models`, whose level holds where it has none of its own."""

from __future__ import annotations

import logging

LOG = logging.getLogger("megatron_converters.bridge")
# Programs written for Megatron-Bridge configure that logger; as the parent, it is heeded without a second record.
LOG.parent = logging.getLogger("megatron.bridge.models")
