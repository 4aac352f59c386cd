"""Random choices that are the same on every machine and with every version of every library."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Draw:
    """A stream of random choices that depends only on its key.

    Python and torch do not guarantee the same stream across versions, but `verify` must make the same pairs years
    later; SHA-256 of the key and a counter guarantees it.

    >>> Draw("0/train/7").below(1000) == Draw("0/train/7").below(1000)
    True
    """

    def __init__(self, key: str) -> None:
        self._key = key
        self._count = 0

    def below(self, n: int) -> int:
        """A whole number in 0..n-1 (uniform up to a bias below n / 2**64)."""
        digest = hashlib.sha256(f"{self._key}#{self._count}".encode()).digest()
        self._count += 1
        return int.from_bytes(digest[:8], "little") % n

    def choice(self, items: Sequence[T]) -> T:
        """One of `items`."""
        return items[self.below(len(items))]

    def sample(self, items: Sequence[T], k: int) -> list[T]:
        """`k` of `items` in random order, without replacement."""
        pool = list(items)
        for place in range(k):
            other = place + self.below(len(pool) - place)
            pool[place], pool[other] = pool[other], pool[place]
        return pool[:k]
