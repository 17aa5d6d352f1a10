"""The operator against its rivals: time, memory, and how far from the possible."""
