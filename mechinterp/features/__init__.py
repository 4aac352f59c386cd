"""Feature bases: dictionaries, subspaces, concepts; readers of other tools' files, checks and edits."""
