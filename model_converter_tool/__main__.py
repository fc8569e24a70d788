"""`python -m model_converter_tool` is the `modelconvert` command."""

from .cli.main import main

if __name__ == "__main__":  # worker processes import this module, too
    main()
