"""Training: batches, losses, an epoch, and the run around it."""
