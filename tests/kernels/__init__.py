"""Tests of the operator, its backends and its module."""
