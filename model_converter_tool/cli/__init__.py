"""The command line `modelconvert`: one module for each command, with `add_arguments(parser)` and `run(args) -> exit code`."""
