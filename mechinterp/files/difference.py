"""`CircuitDiff`: how two circuit files differ in edges, nodes, roles, scores, and in all else they state.

Imports no torch; `mechinterp.files.compare_files` makes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from mechinterp.files.fields import FieldDifference

Where = Literal["both", "only A", "only B"]


@dataclass(frozen=True)
class Compared:
    """An edge or node of either circuit: which of them has it, its score and its rank in each file.

    Positive scores help the task. The score of a node is that of its edges out (of its own, where nodes were chosen).
    Rank 1 has the largest score of either sign; equal scores share a rank. None: the file does not say.
    """

    kind: Literal["edge", "node"]
    name: str
    where: Where
    score_a: float | None = None
    score_b: float | None = None
    rank_a: int | None = None
    rank_b: int | None = None

    @property
    def flipped(self) -> bool | None:
        """Whether the scores are of opposite signs; None where one of them is not known."""
        if self.score_a is None or self.score_b is None:
            return None
        return min(self.score_a, self.score_b) < 0 < max(self.score_a, self.score_b)


@dataclass(frozen=True)
class Overlap:
    """How many edges or nodes are in both circuits and in one only; `jaccard` is those in both over those in either."""

    kind: Literal["edges", "nodes"]
    both: int
    only_a: int
    only_b: int
    jaccard: float


@dataclass(frozen=True)
class Agreement:
    """How well scores agree `over` some edges (or nodes): n of them, correlations, and how many changed their sign.

    A correlation is None where it is not defined: fewer than 3 scores, or one file has the same score for all.
    """

    over: str
    n: int
    spearman: float | None
    pearson: float | None
    n_flipped: int


@dataclass(frozen=True)
class RoleDifference:
    """A node whose role differs, by the roles' labels; "" is none."""

    node: str
    a: str
    b: str
    change: Literal["moved", "gained", "lost", "only A", "only B"]
    """`gained` and `lost`: a node of both circuits that has a role in one file only. `only A`: B lacks the node."""


@dataclass(frozen=True)
class CircuitDiff:
    """What differs between the circuit files `a` and `b`; read `notes` first: they say what cannot be compared."""

    a: Path
    b: Path
    circuit_sha256: tuple[str, str]
    notes: tuple[str, ...]
    edges: tuple[Compared, ...]
    """All edges of either circuit, those with the best ranks first."""
    nodes: tuple[Compared, ...]
    roles: tuple[RoleDifference, ...]
    roles_removed: tuple[str, ...]
    """Labels that only A has."""
    roles_added: tuple[str, ...]
    scores: tuple[Agreement, ...]
    scored_alike: bool
    """Whether method, parameters, metric and replacement are the same, so that sizes of scores can be compared."""
    fields: tuple[FieldDifference, ...]

    @property
    def same_circuit(self) -> bool:
        """Whether the hash to cite is the same: model, graph, nodes, edges and positions."""
        return self.circuit_sha256[0] == self.circuit_sha256[1]

    @property
    def differs(self) -> bool:
        """Whether an edge or a node is in one of the circuits only."""
        return any(entry.where != "both" for entry in (*self.edges, *self.nodes))

    def changes(self) -> tuple[Compared, ...]:
        """The edges in both circuits with two scores, the largest changes first.

        A change is a difference of scores where they were made alike, a difference of ranks otherwise.
        """
        scored = [entry for entry in self.edges if entry.where == "both" and entry.flipped is not None]

        def size(entry: Compared) -> float:
            a, b = (entry.score_a, entry.score_b) if self.scored_alike else (entry.rank_a, entry.rank_b)
            return float(abs((b or 0) - (a or 0)))

        return tuple(sorted((entry for entry in scored if size(entry) > 0), key=lambda entry: -size(entry)))

    def to_frame(self) -> pd.DataFrame:
        """A tidy table of all edges and nodes: kind, name, where, score_a, score_b, rank_a, rank_b, flipped."""
        rows = [{**asdict(entry), "flipped": entry.flipped} for entry in (*self.edges, *self.nodes)]
        frame = _frame(rows, (*Compared.__dataclass_fields__, "flipped"))
        types = {"score_a": "float64", "score_b": "float64", "rank_a": "Int64", "rank_b": "Int64", "flipped": "boolean"}
        return frame.astype(types)

    def overlaps(self) -> tuple[Overlap, Overlap]:
        """How many edges, and how many nodes, the circuits share."""
        return _overlap("edges", self.edges), _overlap("nodes", self.nodes)

    def overlap_frame(self) -> pd.DataFrame:
        """kind, both, only_a, only_b, jaccard: edges or nodes in both over those in either."""
        return _frame([asdict(entry) for entry in self.overlaps()], tuple(Overlap.__dataclass_fields__))

    def scores_frame(self) -> pd.DataFrame:
        """over, n, spearman, pearson, n_flipped."""
        frame = _frame([asdict(entry) for entry in self.scores], tuple(Agreement.__dataclass_fields__))
        return frame.astype({"spearman": "float64", "pearson": "float64"})

    def roles_frame(self) -> pd.DataFrame:
        """node, a, b, change."""
        return _frame([asdict(entry) for entry in self.roles], tuple(RoleDifference.__dataclass_fields__))

    def fields_frame(self) -> pd.DataFrame:
        """field, a, b: what the files state differently."""
        return _frame([asdict(entry) for entry in self.fields], tuple(FieldDifference.__dataclass_fields__))


def _overlap(kind: Literal["edges", "nodes"], entries: Sequence[Compared]) -> Overlap:
    both, only_a, only_b = (sum(entry.where == where for entry in entries) for where in ("both", "only A", "only B"))
    return Overlap(kind, both, only_a, only_b, both / len(entries))


def _frame(rows: Sequence[dict[str, Any]], columns: tuple[str, ...]) -> pd.DataFrame:
    return pd.DataFrame(list(rows), columns=list(columns))
