"""Numbers that must not move: everything read and trained once, held against a stored file."""
