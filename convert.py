"""Convert a model between Hugging Face and Megatron-LM: `python convert.py --loader NAME --saver NAME …`."""

from megatron_converters.cli.queue_convert import main

if __name__ == "__main__":
    main()
