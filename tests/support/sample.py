"""Which cases of the slow tests `make test` runs: about a quarter of those with many. `make test-all` runs every one.

A slow test with five cases or more stands for a product of shapes, methods and settings. Its cases are drawn by a hash
of their names, so that over the tests of a file every shape is met; of a product, those come first that show a value
which none before them has shown. What is left out is marked `exhaustive`.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import pytest

FEW, SHARE = 5, 4
"""Tests with fewer cases than `FEW` keep all of them, the others one in `SHARE`."""


def mark_exhaustive(items: Iterable[pytest.Item]) -> None:
    """Mark the cases that only `make test-all` runs; a test marked `every_case` keeps all."""
    tests = defaultdict[str, list[Any]](list)
    for item in items:
        if hasattr(item, "callspec") and item.get_closest_marker("slow") and not item.get_closest_marker("every_case"):
            tests[item.nodeid.partition("[")[0]].append(item)
    for cases in tests.values():
        if len(cases) >= FEW:
            kept = chosen({case.nodeid: case.callspec.params for case in cases})
            for case in cases:
                if case.nodeid not in kept:
                    case.add_marker("exhaustive")


def chosen(cases: dict[str, dict[str, Any]]) -> set[str]:
    """The names of a quarter of the cases (names to parameters), those that show a new value first."""
    left = sorted(cases, key=lambda name: hashlib.sha256(name.encode()).digest())
    kept, seen = list[str](), set[tuple[str, str]]()
    for _ in range(-(-len(left) // SHARE)):
        name = max(left, key=lambda one: len(_values(cases[one]) - seen))  # the first of the best
        left.remove(name)
        kept.append(name)
        seen |= _values(cases[name])
    return set(kept)


def _values(params: dict[str, Any]) -> set[tuple[str, str]]:
    plain: Sequence[type] = (str, int, float, bool, type(None))
    return {(name, str(value)) for name, value in params.items() if isinstance(value, tuple(plain))}
