"""`python -m megatron_converters` is the `megatron-converters` command."""

from .cli import main

main()
