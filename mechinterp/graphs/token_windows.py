"""Windows of tokens: what takes much memory per token is computed for a few tokens of a batch at a time.

A window is a pair of slices (examples, positions), which indexes tensors `[batch, pos, ...]`: several whole examples
where they fit, otherwise neighbouring positions of one example. So a long prompt needs no more memory than many short
ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

from torch import Tensor

Window: TypeAlias = "tuple[slice, slice]"
"""(examples, positions)."""


def token_windows(n_examples: int, n_pos: int, most: int) -> Iterator[Window]:
    """Every token once, in windows of at most `most` tokens (at least one).

    >>> [(rows.stop, columns.stop) for rows, columns in token_windows(3, 4, 8)]
    [(2, 4), (3, 4)]
    >>> [(columns.start, columns.stop) for _, columns in token_windows(1, 10, 4)]
    [(0, 4), (4, 8), (8, 10)]
    """
    rows, width = max(1, most // n_pos), min(n_pos, max(1, most))
    for row in range(0, n_examples, rows):
        for first in range(0, n_pos, width):
            yield slice(row, min(row + rows, n_examples)), slice(first, min(first + width, n_pos))


def tokens_inside(places: Sequence[Tensor], window: Window, n_pos: int) -> list[Tensor]:
    """The tokens of every place (`row * n_pos + pos` in the batch) that are in the window, by their number in it."""
    rows, columns = window
    found: list[Tensor] = []
    for tokens in places:
        row, column = tokens // n_pos - rows.start, tokens % n_pos - columns.start
        n_rows, width = rows.stop - rows.start, columns.stop - columns.start
        inside = (row >= 0) & (row < n_rows) & (column >= 0) & (column < width)
        found.append((row * width + column)[inside])
    return found
