"""What a folder holds: counted, in words, as JSON, as flags, and as a picture."""
