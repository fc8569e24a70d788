"""Picture of where a model's weights are stored, layers by ranks or files, as one self-contained page."""
