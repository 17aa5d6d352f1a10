"""Shared code of the benchmarks: clock, arguments, machine, tables, files."""
