"""Contents of a folder: counted, as text, as JSON, as Megatron-LM flags, and as a picture."""
