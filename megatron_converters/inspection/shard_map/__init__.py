"""A picture of where a model's weights lie: layers by ranks or files, as one page that stands alone."""
