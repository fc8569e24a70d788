"""`modelconvert config show|get K|set K V|list-presets`."""

from __future__ import annotations

import argparse
from typing import Any

from megatron_converters.basics.errors import UsageError
from megatron_converters.cli.console import put

from .. import settings
from ..workspace import workspace

#: Actions, and the number of operands that each takes.
_ACTIONS = {"show": 0, "get": 1, "set": 2, "list-presets": 0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    known = "; ".join(f"{name}: {setting.words}" for name, setting in settings.SETTINGS.items())
    parser.add_argument(
        "action", metavar="ACTION", choices=_ACTIONS, help="show, get KEY, set KEY VALUE, or list-presets."
    )
    parser.add_argument(
        "operands", metavar="KEY VALUE", nargs="*", help=f"{known}; {settings.PRESET}: sets all values of one."
    )


def run(args: argparse.Namespace) -> int:
    """Show or change settings."""
    if len(args.operands) != _ACTIONS[args.action]:
        raise UsageError(
            f"config {args.action} takes {_ACTIONS[args.action]} operands, not {len(args.operands)}; see --help"
        )
    place = workspace(args.workspace)
    if args.action == "get":
        put(str(settings.value_of(place, args.operands[0])))
    elif args.action == "list-presets":
        put("\n".join(f"{name}: {_assignments(values)}" for name, values in settings.PRESETS.items()))
    else:
        values = settings.read(place) if args.action == "show" else settings.change(place, *args.operands)
        put("\n".join(f"{name} = {value}  ({settings.SETTINGS[name].words})" for name, value in values.items()))
    return 0


def _assignments(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} = {value}" for name, value in values.items())
