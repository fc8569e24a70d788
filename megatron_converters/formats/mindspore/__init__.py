"""MindSpore's weight files, as mindspore and MindSpore Transformers (mindformers) save them."""
