"""What no later change may lose: quality, time, registers, tests and size, measured here and at an earlier commit."""
