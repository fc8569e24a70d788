"""Models of megatron-core in a running process: how they are built."""
