"""The "torch" backend: plain torch in O(L) memory with its own backward, the path on a CPU."""
