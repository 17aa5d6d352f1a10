"""What needs a GPU, in one go, and a prediction where there is none."""
