"""Two models, or a model and the manifest of its conversion, compared."""
