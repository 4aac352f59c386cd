"""`diff_circuits`: how two circuit files differ in edges, nodes, roles, scores and every other field; no model runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from scipy.stats import pearsonr, rankdata, spearmanr

from mechinterp.base.errors import InputError
from mechinterp.circuit_file.circuit_file import circuit_of
from mechinterp.circuit_file.field_differences import FieldDifference, different_fields
from mechinterp.circuit_file.named_files import find_file
from mechinterp.circuit_file.records import score_table
from mechinterp.circuit_file.schema import CircuitFile
from mechinterp.circuit_file.store import OpenedFile, open_circuit_file
from mechinterp.circuit_file.summary import ranked_nodes
from mechinterp.graphs.circuit import Circuit
from mechinterp.graphs.graph import Graph

Where = Literal["both", "only A", "only B"]


@dataclass(frozen=True)
class Compared:
    """An edge or node of either circuit: which circuits have it, and its score and rank in each file.

    Positive scores help the task. The score of a node is the sum over the edges that leave it (if nodes were chosen,
    its own score). Rank 1 has the largest absolute score; equal scores share a rank. The frequency of an edge is the
    share of resamples whose circuit has it; it is known for the edges of a file's own circuit. None: the file does not
    say.
    """

    kind: Literal["edge", "node"]
    name: str
    where: Where
    score_a: float | None = None
    score_b: float | None = None
    rank_a: int | None = None
    rank_b: int | None = None
    frequency_a: float | None = None
    frequency_b: float | None = None

    @property
    def flipped(self) -> bool | None:
        """Whether the scores have opposite signs; None if one of them is unknown."""
        if self.score_a is None or self.score_b is None:
            return None
        return min(self.score_a, self.score_b) < 0 < max(self.score_a, self.score_b)


@dataclass(frozen=True)
class Overlap:
    """The numbers of edges or nodes in both circuits and in one only; `jaccard` is both divided by either.

    Core edges (or nodes, where both files choose nodes) are those that a file counts as stable: in at least 90 % of its
    resamples.
    """

    kind: Literal["edges", "nodes", "core edges", "core nodes"]
    both: int
    only_a: int
    only_b: int
    jaccard: float


@dataclass(frozen=True)
class Agreement:
    """How well the scores of `n` edges (or nodes) agree: correlations, and how many have opposite signs.

    `over` says which edges. A correlation is None if it is undefined: for fewer than 3 scores, or if one file gives all
    of them the same score.
    """

    over: str
    n: int
    spearman: float | None
    pearson: float | None
    n_flipped: int


@dataclass(frozen=True)
class RoleDifference:
    """A node whose role differs, with the labels of both roles ("": no role)."""

    node: str
    a: str
    b: str
    change: Literal["moved", "gained", "lost", "only A", "only B"]
    """`gained`, `lost`: the node is in both circuits but has a role in one file only. `only A`: B lacks the node."""


@dataclass(frozen=True)
class CircuitDiff:
    """The differences between the circuit files `a` and `b`. Read `notes` first: they say what cannot be compared."""

    a: Path
    b: Path
    circuit_sha256: tuple[str, str]
    notes: tuple[str, ...]
    edges: tuple[Compared, ...]
    """All edges of either circuit, the best ranks first."""
    nodes: tuple[Compared, ...]
    roles: tuple[RoleDifference, ...]
    roles_removed: tuple[str, ...]
    """Labels that only A has."""
    roles_added: tuple[str, ...]
    scores: tuple[Agreement, ...]
    scored_alike: bool
    """Whether method, parameters, metric and replacement agree, so that the scores are on one scale."""
    fields: tuple[FieldDifference, ...]
    core: Overlap | None = None
    """Of what each file's resamples agree on: edges, or nodes where both choose nodes; None unless both say it."""

    @property
    def same_circuit(self) -> bool:
        """Whether the hash for citing is the same: that of model, graph, nodes, edges and positions."""
        return self.circuit_sha256[0] == self.circuit_sha256[1]

    @property
    def differs(self) -> bool:
        """Whether any edge or node is in one of the circuits only."""
        return any(entry.where != "both" for entry in (*self.edges, *self.nodes))

    def changes(self) -> tuple[Compared, ...]:
        """The edges that both circuits have and both files score, the largest changes first.

        A change is the difference of the scores if they are on one scale (`scored_alike`), otherwise of the ranks.
        """
        scored = [entry for entry in self.edges if entry.where == "both" and entry.flipped is not None]

        def size(entry: Compared) -> float:
            a, b = (entry.score_a, entry.score_b) if self.scored_alike else (entry.rank_a, entry.rank_b)
            return float(abs((b or 0) - (a or 0)))

        return tuple(sorted((entry for entry in scored if size(entry) > 0), key=lambda entry: -size(entry)))

    def to_frame(self) -> pd.DataFrame:
        """A tidy table of all edges and nodes: a column for each field of `Compared`, and `flipped`."""
        rows = [{**asdict(entry), "flipped": entry.flipped} for entry in (*self.edges, *self.nodes)]
        frame = _frame(rows, (*Compared.__dataclass_fields__, "flipped"))
        columns = {"score": "float64", "rank": "Int64", "frequency": "float64"}
        types = {f"{name}_{side}": kind for name, kind in columns.items() for side in ("a", "b")}
        return frame.astype({**types, "flipped": "boolean"})

    def overlaps(self) -> tuple[Overlap, ...]:
        """The overlap of the edges, of the nodes and, if both files state frequencies, of the core."""
        found = (_overlap("edges", self.edges), _overlap("nodes", self.nodes))
        return found if self.core is None else (*found, self.core)

    def overlap_frame(self) -> pd.DataFrame:
        """A tidy table of the overlaps: kind, both, only_a, only_b, jaccard."""
        return _frame([asdict(entry) for entry in self.overlaps()], tuple(Overlap.__dataclass_fields__))

    def scores_frame(self) -> pd.DataFrame:
        """A tidy table of how well the scores agree: over, n, spearman, pearson, n_flipped."""
        frame = _frame([asdict(entry) for entry in self.scores], tuple(Agreement.__dataclass_fields__))
        return frame.astype({"spearman": "float64", "pearson": "float64"})

    def roles_frame(self) -> pd.DataFrame:
        """A tidy table of the nodes whose roles differ: node, a, b, change."""
        return _frame([asdict(entry) for entry in self.roles], tuple(RoleDifference.__dataclass_fields__))

    def fields_frame(self) -> pd.DataFrame:
        """A tidy table of the fields that differ: field, a, b."""
        return _frame([asdict(entry) for entry in self.fields], tuple(FieldDifference.__dataclass_fields__))


def _overlap(kind: Literal["edges", "nodes"], entries: Sequence[Compared]) -> Overlap:
    both, only_a, only_b = (sum(entry.where == where for entry in entries) for where in ("both", "only A", "only B"))
    return Overlap(kind, both, only_a, only_b, both / len(entries))


def _core(a: _Side, b: _Side) -> Overlap | None:
    """The overlap of the core edges, or nodes where both files choose nodes; None if a file states no stability."""
    if a.document.stability is None or b.document.stability is None:
        return None
    of_nodes = a.circuit.graph.level == b.circuit.graph.level == "node"
    cores: list[set[str]] = []
    for side, least in ((a, a.document.stability.core_share), (b, b.document.stability.core_share)):
        core = {edge.name for edge in side.document.edges if (edge.frequency or 0) >= least - 1e-6}
        if of_nodes:
            graph = side.circuit.graph
            core = {_unit_name(graph, name, *graph.edge_index(name)) for name in core}
        cores.append(core)
    one, other = cores
    both = len(one & other)
    kind = "core nodes" if of_nodes else "core edges"
    return Overlap(kind, both, len(one - other), len(other - one), both / max(1, len(one | other)))


def _frame(rows: Sequence[dict[str, Any]], columns: tuple[str, ...]) -> pd.DataFrame:
    return pd.DataFrame(list(rows), columns=list(columns))


Scored = Mapping[str, tuple[float, int]]
"""Name -> (score, rank)."""


@dataclass(frozen=True)
class _Side:
    """One of the two files: its letter, its document, its circuit, and its scores by edge or node."""

    letter: str
    document: CircuitFile
    circuit: Circuit
    own: Mapping[str, float]
    """The scores of the circuit's edges; of its nodes, if nodes were chosen."""


def diff_circuits(a: str | Path, b: str | Path) -> CircuitDiff:
    """The differences between two circuit files: edges, nodes, roles, scores, and every other field.

    Edges are matched by name. If both files have all scores (sidecars) of one graph, scores and ranks are over all its
    edges, so that an edge of one circuit also has a score and rank in the other file; otherwise they are over the edges
    of each circuit. If nodes were chosen, each node counts once. `notes` say which of these applies, and what makes the
    files hard to compare: different graphs, different models, scores that were made differently.

    Args:
        a: one circuit file, or the name of a stored circuit.
        b: the other one.

    Raises:
        FormatError: if one of them is not a circuit file or was changed after it was written.
    """
    files = open_circuit_file(find_file(a)), open_circuit_file(find_file(b))
    return diff_opened(files, (circuit_of(files[0]), circuit_of(files[1])))


def diff_opened(files: tuple[OpenedFile, OpenedFile], circuits: tuple[Circuit, Circuit]) -> CircuitDiff:
    """As `diff_circuits`, of two opened files and their circuits."""
    one, other = _side("A", files[0], circuits[0]), _side("B", files[1], circuits[1])
    same_graph = one.circuit.graph.digest() == other.circuit.graph.digest()
    complete = same_graph and one.circuit.scores is not None and other.circuit.scores is not None
    unlike = _made_differently(one.document, other.document)
    names = sorted({*one.circuit.edges, *other.circuit.edges})
    known = tuple(_of_edges(side, names, complete) for side in (one, other))
    kept = (set(one.circuit.edges), set(other.circuit.edges))
    nodes = tuple(_of_nodes(side.document) for side in (one, other))
    used = (set(one.document.nodes), set(other.document.nodes))
    return CircuitDiff(
        a=files[0].path,
        b=files[1].path,
        circuit_sha256=(one.document.integrity.circuit_sha256, other.document.integrity.circuit_sha256),
        notes=tuple(_notes(one, other, same_graph, complete, unlike)),
        edges=_compared("edge", kept, known, (_frequencies(one.document), _frequencies(other.document))),
        nodes=_compared("node", used, nodes, ({}, {})),
        roles=tuple(_roles(one.document, other.document)),
        roles_removed=_labels_beyond(one.document, other.document),
        roles_added=_labels_beyond(other.document, one.document),
        scores=tuple(_agreements(one, other, complete)),
        scored_alike=not unlike,
        fields=different_fields(one.document, other.document),
        core=_core(one, other),
    )


def _side(letter: str, opened: OpenedFile, circuit: Circuit) -> _Side:
    document = opened.document
    stated = {entry.name: entry.score for entry in document.edges}
    graph, own = circuit.graph, dict[str, float]()
    table = None if circuit.scores is None else score_table(circuit.scores)
    for name in circuit.edges:
        r, w = graph.edge_index(name)
        score = stated[name] if table is None else float(table[r, w])
        if score is not None:
            own.setdefault(_unit_name(graph, name, r, w), score)
    return _Side(letter, document, circuit, own)


def _unit_name(graph: Graph, edge: str, reader: int, writer: int) -> str:
    """What is chosen when this edge is: the edge itself, or the node that it leaves."""
    return edge if graph.level == "edge" else graph.node_name(writer, int(graph.position[reader]))


def _all_scores(side: _Side) -> np.ndarray:
    """The score of every edge (or node) of the graph, in order of `graph.unit`."""
    scores = side.circuit.scores
    if scores is None:
        raise InputError("The file has scores for the edges of its circuit only.")
    first = side.circuit.graph.first_of_unit
    return score_table(scores)[first[:, 0], first[:, 1]].double().numpy()


def _of_edges(side: _Side, names: Iterable[str], complete: bool) -> Scored:
    """Score and rank of the named edges that this file has scores for."""
    graph = side.circuit.graph
    if complete:
        values = _all_scores(side)
        ranks = rankdata(-np.abs(values), method="min")
        units = {name: int(graph.unit[graph.edge_index(name)]) for name in names}
        return {name: (float(values[unit]), int(ranks[unit])) for name, unit in units.items()}
    ranked = _ranked(side.own)
    found: dict[str, tuple[float, int]] = {}
    for name in side.circuit.edges:
        unit = _unit_name(graph, name, *graph.edge_index(name))
        if unit in ranked:
            found[name] = ranked[unit]
    return found


def _of_nodes(document: CircuitFile) -> Scored:
    return _ranked({node.name: node.score for node in ranked_nodes(document) if node.score is not None})


def _ranked(scores: Mapping[str, float]) -> Scored:
    ranks = rankdata([-abs(score) for score in scores.values()], method="min")
    return {name: (score, int(rank)) for (name, score), rank in zip(scores.items(), ranks, strict=True)}


def _frequencies(document: CircuitFile) -> dict[str, float]:
    return {edge.name: edge.frequency for edge in document.edges if edge.frequency is not None}


def _compared(
    kind: Literal["edge", "node"],
    circuits: tuple[set[str], set[str]],
    known: tuple[Scored, ...],
    frequencies: tuple[Mapping[str, float], Mapping[str, float]],
) -> tuple[Compared, ...]:
    found: list[Compared] = []
    for name in circuits[0] | circuits[1]:
        where: Where = "both"
        if name not in circuits[0] or name not in circuits[1]:
            where = "only A" if name in circuits[0] else "only B"
        (score_a, rank_a), (score_b, rank_b) = (side.get(name, (None, None)) for side in known)
        often = (side.get(name) for side in frequencies)
        found.append(Compared(kind, name, where, score_a, score_b, rank_a, rank_b, *often))

    def place(entry: Compared) -> tuple[int, str]:
        return min((rank for rank in (entry.rank_a, entry.rank_b) if rank is not None), default=0), entry.name

    return tuple(sorted(found, key=place))


def _agreements(one: _Side, other: _Side, complete: bool) -> Iterable[Agreement]:
    """Over the edges or nodes in both circuits, and over the whole graph if both files have all scores."""
    graph = one.circuit.graph
    what = "nodes" if graph.level == "node" else "edges"
    shared = sorted(one.own.keys() & other.own.keys())
    if shared:
        pair = [np.array([side.own[name] for name in shared]) for side in (one, other)]
        yield _agreement(f"{what} in both circuits", *pair)
    if complete:
        yield _agreement(f"all {what} of the graph", _all_scores(one), _all_scores(other))


def _agreement(over: str, a: np.ndarray, b: np.ndarray) -> Agreement:
    flipped = int((np.sign(a) * np.sign(b) < 0).sum())
    # Scaled so that sums of squares stay finite; the correlations do not change.
    a, b = (scores / (np.abs(scores).max(initial=0) or 1) for scores in (a, b))
    if len(a) < 3 or min(np.ptp(a), np.ptp(b)) < 1e-9:  # undefined, or decided by rounding
        return Agreement(over, len(a), None, None, flipped)
    by_rank: Any = spearmanr(a, b)
    by_size: Any = pearsonr(a, b)
    return Agreement(over, len(a), float(by_rank.statistic), float(by_size.statistic), flipped)


def _made_differently(a: CircuitFile, b: CircuitFile) -> str:
    """Why the scores are not on one scale; "" if they were made in the same way."""
    if a.discovery is None or b.discovery is None:
        without = [letter for letter, document in (("A", a), ("B", b)) if document.discovery is None]
        return f"{' and '.join(without)} {'do' if len(without) > 1 else 'does'} not say how scores were made"
    names = ("method", "parameters", "metric", "replacement")
    found: list[str] = []
    for name in names:
        mine, theirs = getattr(a.discovery, name), getattr(b.discovery, name)
        if mine != theirs:
            shown = f" {_name(mine)} / {_name(theirs)}" if _name(mine) != _name(theirs) else ""
            found.append(f"{name}{shown}")
    return f"scores were made differently ({', '.join(found)})" if found else ""


def _name(part: object) -> str:
    if isinstance(part, Mapping):
        return " ".join(f"{key}={value}" for key, value in part.items()) or "none"
    return str(getattr(part, "name", part))


def _notes(one: _Side, other: _Side, same_graph: bool, complete: bool, unlike: str) -> Iterable[str]:
    if not same_graph:
        counts = [_n_edges_in(side.circuit, against.circuit.graph) for side, against in ((one, other), (other, one))]
        yield (
            f"different graphs: edges are compared by name; {counts[0]} of A's {one.circuit.n_edges} edges exist in "
            f"B's graph, {counts[1]} of B's {other.circuit.n_edges} in A's"
        )
        levels = [side.document.graph.granularity for side in (one, other)]
        if levels[0] != levels[1]:
            yield f"A chose {levels[0]}s and B chose {levels[1]}s, so their scores measure different things"
    yield from _about_models(one.document, other.document)
    without = [side.letter for side in (one, other) if not side.own]
    if without:
        yield f"no scores in {' and '.join(without)}: scores are not compared"
        return
    if unlike:
        yield (f"{unlike}, so they may be on different scales: compare order and sign, not size")
    yield from _about_examples(one.document, other.document)
    what = "nodes" if one.document.graph.granularity == "node" else "edges"
    if complete:
        yield f"ranks of edges are over all {one.circuit.graph.n_units:,} {what} of the graph"
    else:
        yield "ranks of edges are over each circuit's own; the files do not both have all scores of one graph"


def _about_models(a: CircuitFile, b: CircuitFile) -> Iterable[str]:
    one, other = a.model, b.model
    names = f"A is of {one.name} ({one.architecture}), B of {other.name} ({other.architecture})"
    if one.weights_sha256 is None or other.weights_sha256 is None:
        same = (one.name, one.revision, one.architecture) == (other.name, other.revision, other.architecture)
        if not same or one.dims != other.dims:
            yield f"different models, by name: {names}"
        elif one.weights_sha256 != other.weights_sha256:
            yield "one file states no hash of the weights: that the models are the same is known by name only"
    elif one.weights_sha256 != other.weights_sha256:
        yield f"different models: the weights differ; {names}"
    if one.processing != other.processing:
        yield f"the models were processed differently: {one.processing} in A, {other.processing} in B"


def _about_examples(a: CircuitFile, b: CircuitFile) -> Iterable[str]:
    hashes = (_examples(a), _examples(b))
    if hashes[0] is None or hashes[1] is None:
        yield "whether the scores were made on the same examples is not stated"
    elif hashes[0] != hashes[1]:
        yield "the scores were made on different examples"


def _examples(document: CircuitFile) -> str | None:
    """The sha256 of the pairs that the edges were scored on."""
    discovery = document.discovery
    return None if discovery is None or discovery.pairs is None else document.pairs[discovery.pairs].sha256


def _n_edges_in(circuit: Circuit, graph: Graph) -> int:
    """How many of the circuit's edges the graph has."""
    found = 0
    for name in circuit.edges:
        writer, _, reader = name.partition("->")
        if writer in graph.writer_index and reader in graph.reader_index:
            found += bool(graph.possible[graph.reader_index[reader], graph.writer_index[writer]])
    return found


def _labels(document: CircuitFile) -> dict[str, str]:
    """The labels of the roles of every node that has one."""
    found: dict[str, list[str]] = {}
    for role in document.roles.values():
        for node in role.nodes:
            found.setdefault(node, []).append(role.label)
    return {node: ", ".join(sorted(set(labels))) for node, labels in found.items()}


def _labels_beyond(mine: CircuitFile, other: CircuitFile) -> tuple[str, ...]:
    return tuple(sorted({role.label for role in mine.roles.values()} - {role.label for role in other.roles.values()}))


def _roles(a: CircuitFile, b: CircuitFile) -> Iterable[RoleDifference]:
    one, other = _labels(a), _labels(b)
    for node in sorted(one.keys() | other.keys()):
        mine, theirs = one.get(node, ""), other.get(node, "")
        if node not in b.nodes:
            yield RoleDifference(node, mine, "", "only A")
        elif node not in a.nodes:
            yield RoleDifference(node, "", theirs, "only B")
        elif mine != theirs:
            yield RoleDifference(node, mine, theirs, "gained" if not mine else "lost" if not theirs else "moved")
