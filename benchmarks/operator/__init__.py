"""The operator compared with its rivals: time, memory, and the distance to the limits of the device."""
