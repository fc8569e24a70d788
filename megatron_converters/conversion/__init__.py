"""Planning and copying from any source to any target: all or nothing, and resumable after an interruption."""
