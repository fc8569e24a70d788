"""Debug output: each step, and tracebacks of errors, where MODELCONVERT_DEBUG is set."""

from __future__ import annotations

import logging
import os

_OFF = ("", "0", "false", "no", "off")


def show_steps() -> None:
    """Show debug messages of this package on standard error if the environment asks for it."""
    if os.environ.get("MODELCONVERT_DEBUG", "").lower() not in _OFF:
        logging.basicConfig(format="%(asctime)s %(name)s: %(message)s")
        logging.getLogger(__package__).setLevel(logging.DEBUG)
        logging.getLogger("megatron_converters").setLevel(logging.DEBUG)
