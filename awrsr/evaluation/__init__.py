"""Evaluation: ranks and metrics, and whether runs differ by more than chance."""
