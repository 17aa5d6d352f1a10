"""Tests of README and pages."""
