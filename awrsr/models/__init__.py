"""The network, top to bottom, and its layers."""
