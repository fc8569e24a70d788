"""How parallelism cuts a model: ranks and pipeline stages."""
