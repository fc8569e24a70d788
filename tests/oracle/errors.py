"""The one exception of the oracle."""

from __future__ import annotations


class OracleError(AssertionError):
    """The checkpoint is not what the real megatron-core accepts; the message names the file and the key or argument."""
