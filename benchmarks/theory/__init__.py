"""What one refined layer can do that one plain layer cannot: constructions and trained models."""
