"""`python -m megatron_converters` is the `megatron-converters` command."""

from .cli.main import main

if __name__ == "__main__":  # worker processes import this module, too
    main()
