"""Saver plugins for Megatron-LM's tools/checkpoint/convert.py and for our convert.py."""
