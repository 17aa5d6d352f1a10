"""What every benchmark shares: clock, arguments, machine, tables, files."""
