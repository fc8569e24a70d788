"""A Llama to a live megatron-core model, and back, by our AutoBridge: the same commands and JSON as `peer_mbridge.py`.

python scripts/bench/ours_bridge.py import HF_FOLDER
python scripts/bench/ours_bridge.py export HF_FOLDER OUT
python scripts/bench/ours_bridge.py stream HF_FOLDER
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from watch import Watch

_ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    """Run a command and print what it took."""
    watch = Watch()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["import", "export", "stream"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path, nargs="?")
    args = parser.parse_args()
    if (args.command == "export") != (args.output is not None):
        parser.error("export takes a folder and an output, the others a folder")
    sys.path.insert(0, str(_ROOT))  # this checkout, installed or not
    import megatron.core.models.gpt.gpt_layer_specs  # noqa: F401 # else imported while the model is built, not among imports

    from megatron_converters.bridge import AutoBridge

    watch.done("imports")
    bridge = AutoBridge.from_hf_pretrained(str(args.folder))
    watch.done("set-up")
    model = bridge.to_megatron_model(wrap_with_ddp=False)
    watch.done("build and load")
    if args.command == "export":
        bridge.save_hf_pretrained(model, str(args.output), show_progress=False)
        watch.done("export")
    elif args.command == "stream":
        for _name, _tensor in bridge.export_hf_weights(model, show_progress=False):
            pass
        watch.done("stream")
    print(watch.report())


if __name__ == "__main__":
    main()
