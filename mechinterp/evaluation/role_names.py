"""Names of roles by where heads attend, in plain words."""

from __future__ import annotations

import re

LIKE = {
    ("end", "IO"): "name-mover-like",
    ("end", "S2"): "S-inhibition-like",
    ("S2", "S1"): "duplicate-token-like",
    ("S2", "S1+1"): "induction-like",
    ("S1+1", "S1"): "previous-token-like",
}
"""Which heads of the IOI paper attend from and to these positions (Wang et al. 2022, arXiv 2211.00593, section 3)."""
_EARLIER = re.compile(r"heads from (\S+|'.+') to (\S+|'.+')")


def attends(query: str, key: str) -> str:
    """The name of the role of heads that attend from one named position to another.

    `-like`: they attend as those heads of the IOI paper do; that they do what those heads do was not measured.

    >>> attends("end", "S2")
    'attends end -> S2 (S-inhibition-like)'
    >>> attends("end", "A to B")
    "attends end -> 'A to B'"
    """
    like = LIKE.get((query, key))
    return f"attends {_quoted(query)} -> {_quoted(key)}" + (f" ({like})" if like else "")


def plain_role(label: str) -> str:
    """The name of a role as it is shown; files of earlier versions say "heads from end to S2".

    >>> plain_role("heads from end to S2"), plain_role("induction heads")
    ('attends end -> S2 (S-inhibition-like)', 'induction heads')
    """
    earlier = _EARLIER.fullmatch(label)
    return attends(earlier[1].strip("'"), earlier[2].strip("'")) if earlier else label


def _quoted(position: str) -> str:
    """The name of a position, in quotes if it contains spaces or an arrow."""
    return repr(position) if " " in position or "->" in position else position
