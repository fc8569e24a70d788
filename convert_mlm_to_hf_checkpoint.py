"""Convert a Megatron-LM checkpoint to Hugging Face format: `python convert_mlm_to_hf_checkpoint.py --load-path …`."""

from megatron_converters.cli.mlm_to_hf import main

if __name__ == "__main__":
    main()
