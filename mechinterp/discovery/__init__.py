"""Discovery: methods that score edges, and the selection of a circuit from scores."""
