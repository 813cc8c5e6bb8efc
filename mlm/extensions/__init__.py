"""Optional parts of the memory, plugged in by name."""
