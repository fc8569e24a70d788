"""Exception of the oracle."""

from __future__ import annotations

from megatron_converters.basics.errors import ConversionError


class OracleError(ConversionError):
    """Error for a checkpoint that the real megatron-core does not accept; it names the file and the key or argument."""
