"""MiniCPM checkpoint to one file of weights: `python megatron_converters/ckpt_to_hf_minicpm_with_tp_pp.py …` from a checkout."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # Python looks first in this file's folder, whose folders would hide other packages; the checkout's root takes its place.
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(path for path in sys.path if Path(path).resolve() != here)]

    from megatron_converters.cli.tensor_parallel import main_direct

    main_direct()
