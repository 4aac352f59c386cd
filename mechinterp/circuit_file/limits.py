"""Upper limits on what a circuit file may hold, so that an untrusted file cannot use much memory or time."""

from __future__ import annotations

MAX_GRAPH_CELLS = 2**26
"""Readers x writers of the largest graph that a file may describe; those of an 8B model are 1.7 million, of a 70B model
33.7 million. It is a table of booleans before anything else is read, and of float32 if there are scores: 256 MiB."""
MAX_EDGES = 2**23
"""Edges that a file may list."""
MAX_TOKEN_IDS = 2**21
"""Token ids in a file, for pairs that are not made by a task."""
MAX_PADDED = 2**22
"""Rows x longest row of one table of such ids: its size after padding."""
MAX_EXAMPLES = 20_000
"""Examples in one set of pairs that a task makes."""
MAX_NODES = 2**17
MAX_PREDICTIONS = 10_000
MAX_PAIRS = 100
"""Sets of examples; `verify` makes each of them again."""
MAX_NAMED = 1000
"""Entries of lists that people write: positions, sets of pairs, authors, parameters."""
MAX_ROLES = 10_000
MAX_EVALUATIONS = MAX_POINTS = 1000
MAX_RANDOM = 100
"""Random circuits of one evaluation; `verify` runs each again on every example."""
MAX_WORDS = 100_000
"""Words in a list that a task draws from."""
FEW = 20
"""Fewer examples than this say little about others: a warning says so."""
