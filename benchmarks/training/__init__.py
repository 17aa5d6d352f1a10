"""Training and evaluation of the recommender: time and memory."""
