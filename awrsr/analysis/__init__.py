"""Looking inside: what a trained model attends to, in one history and in many."""
