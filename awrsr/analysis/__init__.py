"""Looks inside the attention of a trained model."""
