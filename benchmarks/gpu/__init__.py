"""Everything that needs a GPU, in one command, and predictions for use without one."""
