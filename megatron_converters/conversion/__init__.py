"""Planning and copying from any source to any target, all or nothing, and going on after an interruption."""
