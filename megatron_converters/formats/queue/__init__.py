"""Queue between a loader and a saver, with the messages of Megatron-LM's tools/checkpoint."""
