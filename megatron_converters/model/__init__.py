"""The hub's vocabulary: the sizes of a model, its slots, and the layouts in which formats store them."""
