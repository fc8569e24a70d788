"""Loader plugin: Mixtral and other mixtures of experts in Hugging Face format."""

from functools import partial

from megatron_converters.cli.plugins import add_hf_loader_arguments, load_hf_checkpoint

add_arguments = partial(add_hf_loader_arguments, title="Mixtral loader")
load_checkpoint = load_hf_checkpoint
