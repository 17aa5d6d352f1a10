"""Benchmarks, a folder per question; README.md says which."""
