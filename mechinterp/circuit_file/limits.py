"""What a circuit file may hold at most, so that a small one takes little memory and time, whoever made it."""

from __future__ import annotations

MAX_GRAPH_CELLS = 2**23
"""Readers x writers of the largest graph that a file may describe; an 8B model has 1.7 million."""
MAX_TOKEN_IDS = 2**21
"""Token ids that a file may hold for pairs that no task makes."""
MAX_PADDED = 2**22
"""Rows x longest row of one table of such ids: what it takes once the rows are padded."""
MAX_EXAMPLES = 20_000
"""Examples of one set of pairs that a task makes again."""
MAX_NODES = 2**17
MAX_PREDICTIONS = 10_000
MAX_PAIRS = 100
"""Sets of examples; each is made again."""
MAX_NAMED = 1000
"""Entries of what is named by people: positions, sets of pairs, authors, parameters."""
MAX_ROLES = 10_000
MAX_EVALUATIONS = MAX_POINTS = 1000
MAX_RANDOM = 100
"""Random circuits of one evaluation; each is run again on every example."""
MAX_WORDS = 100_000
"""Words of a list that a task draws from."""
