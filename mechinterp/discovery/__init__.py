"""Discovery: scores for every edge, and the selection of a circuit. `methods` lists the methods without torch."""
