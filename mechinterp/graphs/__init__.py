"""The graph of a model (what is possible), scores, and circuits (what is chosen)."""
