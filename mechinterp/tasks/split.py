"""Which split a combination of words belongs to; it depends only on the words, not on a seed or order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Literal

Split = Literal["train", "test"]


def split_of(words: Iterable[str], test_fraction: float) -> Split:
    """The split of an unordered combination of words.

    The first 8 hex digits of the SHA-256 of the sorted words, joined by `|`, as a number in [0, 1); if it is
    below `test_fraction`, the split is "test". So a pair of names is always in the same split.

    >>> split_of(["Mary", "John"], 0.2) == split_of(["John", "Mary"], 0.2)
    True
    """
    digest = hashlib.sha256("|".join(sorted(words)).encode("utf-8")).hexdigest()
    return "test" if int(digest[:8], 16) / 16**8 < test_fraction else "train"
