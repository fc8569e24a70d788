"""The one exception of the oracle."""

from __future__ import annotations

from megatron_converters.basics.errors import ConversionError


class OracleError(ConversionError):
    """The checkpoint is not what the real megatron-core accepts; the message names the file and the key or argument."""
