"""Assets beside the weights: training arguments, tokenizers, capacity bins."""
