"""The verbs of the `megatron-converters` command, one module each: `add_arguments(parser)` and `run(args) -> exit code`."""
