"""`Circuit`: the edges that were chosen from a graph. The one object that is saved, evaluated, drawn and verified."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import networkx as nx
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechinterp.base.errors import InputError
from mechinterp.base.pictures import PICTURES
from mechinterp.base.registry import unknown
from mechinterp.base.settings import Parameter
from mechinterp.base.shown import facts_table
from mechinterp.graphs.families.family import NodeFamily
from mechinterp.graphs.graph import Graph
from mechinterp.graphs.scores import Scores
from mechinterp.models.sites import canonical, canonical_edge

if TYPE_CHECKING:
    NodeGraph = nx.MultiDiGraph[str]
else:  # networkx's types take arguments in its stubs only
    NodeGraph = nx.MultiDiGraph

MOST_SHOWN = 12
"""Nodes that a notebook shows of a circuit."""


@dataclass(frozen=True, eq=False)
class Circuit:
    """Edges of `graph` that make up the circuit: `kept`, every one on a path from an input to the logits.

    `a | b`, `a & b` and `a - b` are circuits of the same graph; `len` counts edges, `in` takes nodes and edges.

    `n_selected` counts the edges of the selection before those on no path were dropped.
    """

    graph: Graph
    kept: Bool[Tensor, "reader writer"] = field(repr=False)
    n_selected: int
    selection: Mapping[str, Parameter] = field(default_factory=dict[str, Parameter])
    """The rule that chose the edges, with its parameters."""
    scores: Scores | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.kept.shape != self.graph.possible.shape or bool((self.kept & ~self.graph.possible).any()):
            raise InputError("The circuit's mask is not a part of its graph.")
        object.__setattr__(self, "kept", self.kept.cpu().clone())

    def __repr__(self) -> str:
        how = ", ".join(f"{name}={value}" for name, value in self.selection.items())
        return f"Circuit({self.n_edges} of {self.graph.n_edges} edges, {self.n_selected} selected ({how}))"

    def on_graph(self, graph: Graph) -> Circuit:
        """The same circuit on a graph of the same nodes and edges, such as one with its feature bases.

        Raises InputError for another graph.
        """
        if graph.digest() != self.graph.digest():
            raise InputError("The graph is not that of the circuit.")
        scores = None if self.scores is None else replace(self.scores, graph=graph)
        return replace(self, graph=graph, scores=scores)

    def _repr_html_(self) -> str:
        how = ", ".join(f"{name}={value}" for name, value in self.selection.items())
        facts = [("edges", f"{self.n_edges:,} of {self.graph.n_edges:,}"), ("selected", f"{self.n_selected:,} ({how})")]
        shown = ", ".join(self.nodes[:MOST_SHOWN]) + f", ... ({len(self.nodes)})" * (len(self.nodes) > MOST_SHOWN)
        return facts_table("Circuit", [*facts, ("nodes", shown)])

    @staticmethod
    def from_edges(graph: Graph, edges: Iterable[str]) -> Circuit:
        """The circuit of the named edges, without those on no path from an input to the logits.

        Args:
            graph: The graph that they are of.
            edges: Their names, such as `a0.h0->a5.h5<q>` (or `L0H0->L5H5<q>`).

        Raises InputError for unknown and doubled edges, and where nodes are chosen, not edges.

        >>> import mechinterp as mi
        >>> graph = mi.build_graph(mi.load_model("bundled"))
        >>> circuit = mi.Circuit.from_edges(graph, ["input->L0H1<v>", "L0H1->logits", "input->m0"])
        >>> len(circuit), circuit.n_selected, "L0H1" in circuit
        (2, 3, True)
        """
        if graph.level == "node":
            raise InputError("In this graph nodes are chosen, with all edges out of them; use Circuit.from_nodes.")
        names = [edges] if isinstance(edges, str) else list(edges)
        return _pruned(graph, graph.mask_of(map(canonical_edge, names)), {"rule": "edges"})

    @staticmethod
    def from_nodes(graph: Graph, nodes: Iterable[str]) -> Circuit:
        """The circuit of all edges between the named nodes; the inputs and the logits always belong to it.

        Args:
            graph: The graph that they are of. Where nodes are chosen at named positions, their names have one.
            nodes: Heads (`a9.h9`, `L9H9`), MLPs (`m3`) and other nodes of the graph.

        Raises InputError for unknown nodes, and for edges at named positions, which `from_edges` takes.
        """
        names = [canonical(name) for name in ([nodes] if isinstance(nodes, str) else nodes)]
        if graph.level == "node":
            known = {name: unit for unit, name in enumerate(graph.unit_names())}
            for name in names:
                if name not in known and name != "logits":
                    raise unknown("node", name, known)
            inputs = [unit for name, unit in known.items() if name.partition("@")[0] in graph.inputs]
            units = torch.tensor([*inputs, *(known[name] for name in names if name != "logits")])
            mask = torch.isin(graph.unit, units) & graph.possible
            return _pruned(graph, mask, {"rule": "nodes"})
        if graph.positions:
            raise InputError("This graph has edges at named positions; name them in Circuit.from_edges.")
        for name in names:
            if name not in graph.writer_index and name != "logits":
                raise unknown("node", name, graph.writers)
        chosen = torch.tensor([name in names or name in graph.inputs for name in graph.writers])
        into = (graph.feeds & chosen).any(1)
        into[-1] = True
        return _pruned(graph, graph.possible & chosen & into[:, None], {"rule": "nodes"})

    def __len__(self) -> int:
        return self.n_edges

    def __bool__(self) -> bool:
        return True  # an empty circuit is a circuit, too

    def __contains__(self, name: object) -> bool:
        """Whether it has the node (`a9.h9`, `L9H9`) or edge. Raises InputError for what its graph does not have."""
        text = canonical_edge(str(name))
        if "->" in text:
            reader, writer = self.graph.edge_index(text)
            return bool(self.kept[reader, writer])
        bare = text.partition("@")[0]
        if bare != "logits" and bare not in self.graph.writer_index:
            raise unknown("node or edge", text, (*self.graph.writers, "logits"))
        position = text.partition("@")[2]
        if position and position not in self.graph.positions:
            raise unknown("position of the graph", position, self.graph.positions)
        return any(node == text or (not position and node.partition("@")[0] == text) for node in self.nodes)

    def __or__(self, other: Circuit) -> Circuit:
        """The edges of either."""
        return self._with(other, self.members | self._other(other), "union")

    def __and__(self, other: Circuit) -> Circuit:
        """The edges of both, without those that are then on no path; `n_selected` counts them before."""
        return self._with(other, self.members & self._other(other), "intersection")

    def __sub__(self, other: Circuit) -> Circuit:
        """The edges of this one only, without those that are then on no path; `n_selected` counts them before.

        Where nodes are chosen, all inputs stay, so that the other nodes can be reached.
        """
        less = self._other(other)
        if self.graph.level == "node":
            less[:, : self.graph.n_inputs] = False
        return self._with(other, self.members & ~less, "difference")

    def _other(self, other: Circuit) -> Tensor:
        if not isinstance(other, Circuit):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InputError(f"A circuit is combined with a circuit; got {type(other).__name__}.")
        if other.graph.digest() != self.graph.digest():
            raise InputError(f"The circuits are of two graphs, {self.graph!r} and {other.graph!r}.")
        return other.members

    def _with(self, other: Circuit, mask: Tensor, rule: str) -> Circuit:
        scores = self.scores if self.scores is other.scores else None
        return replace(_pruned(self.graph, mask, {"rule": rule}), scores=scores)

    def plot(self, **how: Any) -> Any:
        """The circuit as a plotly figure, input at the bottom and logits at the top; `roles=` colours its nodes."""
        return PICTURES.get("circuit")(self, **how)

    @cached_property
    def edges(self) -> tuple[str, ...]:
        """The names of the edges, sorted."""
        return tuple(sorted(self.graph.edge_name(r, w) for r, w in self.kept.nonzero().tolist()))

    @property
    def nodes(self) -> tuple[str, ...]:
        """The writers (and `logits`) that an edge touches, in the model's order; `a9.h9@end` where positions are named.

        Where positions, nodes or neurons are told apart, these are the nodes that write: a key at one position
        serves its head at all later ones, and the input of an MLP serves every neuron of it.
        """
        if not self.graph.plain:
            readers, writers = self.kept.nonzero(as_tuple=True)
            pairs = torch.stack([writers, self.graph.position[readers]], 1).unique(dim=0)  # sorted
            written = [self.graph.node_name(w, p) for w, p in pairs.tolist()]
            return (*written, "logits") if bool(self.kept[-1].any()) else tuple(written)
        used = self.kept.any(0) | (self.graph.feeds & self.kept.any(1, keepdim=True)).any(0)
        names = [name for name, is_used in zip(self.graph.writers, used.tolist(), strict=True) if is_used]
        return (*names, "logits") if bool(self.kept[-1].any()) else tuple(names)

    @property
    def n_edges(self) -> int:
        """How many edges the circuit has."""
        return int(self.kept.sum())

    @property
    def n_units(self) -> int:
        """How many edges were chosen, or nodes where the graph's level is `node`."""
        return len(self.graph.unit[self.kept].unique())

    @property
    def cut(self) -> Bool[Tensor, "reader writer"]:
        """The edges that are replaced when the circuit is run alone: all but its own."""
        return self.graph.possible & ~self.kept

    @property
    def members(self) -> Bool[Tensor, "reader writer"]:
        """All edges of what was chosen: those of the circuit, and where nodes are chosen all edges out of them.

        Cutting these is running the model without the circuit.
        """
        units = self.graph.unit[self.kept].unique()
        return torch.isin(self.graph.unit, units) & self.graph.possible

    def digest(self) -> str:
        """sha256 over the graph and the edges: tells which circuit a result belongs to."""
        return hashlib.sha256(json.dumps([self.graph.digest(), self.edges]).encode()).hexdigest()

    def to_networkx(self) -> NodeGraph:
        """Nodes and edges as a networkx graph; an edge has `name`, `channel` and, when scored, `score`."""
        out = to_networkx(self.graph, self.kept)
        if self.scores is not None:
            values = self.scores.values
            for _, _, data in out.edges(data=True):
                data["score"] = float(values[self.graph.edge_index(data["name"])])
        return out


def _pruned(graph: Graph, mask: Tensor, selection: Mapping[str, Parameter]) -> Circuit:
    """The circuit of a mask, without the edges on no path."""
    return Circuit(graph, on_paths(graph, mask), int(mask.sum()), selection)


def to_networkx(graph: Graph, mask: Bool[Tensor, "reader writer"]) -> NodeGraph:
    """The masked edges between nodes; an edge into a shared K or V head leads to every head of its group, one into the
    rest of an MLP with features that write later to the later rests, too.

    At named positions the nodes are `a9.h9@end`, and a key or value leads to its head wherever that writes. Where
    positions, nodes or neurons are told apart, an edge leads only to nodes that write.
    """
    out: NodeGraph = nx.MultiDiGraph(positions=graph.positions)
    for r, w, source, targets in _ends(graph, mask):
        reader = graph.readers[r].partition("@")[0]
        channel = reader.partition("<")[2].rstrip(">")
        for node in targets:
            out.add_edge(source, node, name=graph.edge_name(r, w), channel=channel)
    return out


def on_paths(graph: Graph, mask: Bool[Tensor, "reader writer"]) -> Bool[Tensor, "reader writer"]:
    """The part of the mask that lies on a path from an input to the logits."""
    n, n_writers = graph.n_positions, len(graph.writers)
    groups = [_Readers.of(graph, mask, family) for family in graph.families if family.ports]
    # Whether a path from an input leads to a writer at a position, and one from there to the logits.
    reached, useful = (torch.zeros(n_writers, n, dtype=torch.bool) for _ in range(2))
    reached[: graph.n_inputs] = True
    into_logits = mask[-1].cpu()
    here = int(graph.position[-1])
    for group in groups:
        reached |= group.forward(reached)
    useful[:, here] = into_logits
    kept = torch.zeros_like(mask, device="cpu")
    kept[-1] = into_logits & reached[:, here]
    for group in reversed(groups):
        ports = group.backward(useful)
        edges = group.edges & ports[..., None]
        useful |= edges.any(0).T
        kept[group.rows] = (edges & reached.T).flatten(0, 1)
    return kept.to(mask.device)


@dataclass(frozen=True)
class _Readers:
    """Readers that see the same writers, and the masked edges into them."""

    rows: slice
    edges: Bool[Tensor, "port position writer"]
    feeds: Float[Tensor, "port writer"]
    everywhere: Bool[Tensor, "port 1"]
    """Whether it serves its writer at all positions: keys and values."""

    @staticmethod
    def of(graph: Graph, mask: Tensor, family: NodeFamily) -> _Readers:
        n, rows = graph.n_positions, graph.readers_of(family)
        everywhere = torch.tensor([ports.everywhere for ports in family.ports for _ in ports.names])[:, None]
        return _Readers(rows, mask[rows].cpu().unflatten(0, (-1, n)), graph.feeds[rows][::n].float(), everywhere)

    def forward(self, reached: Bool[Tensor, "writer position"]) -> Bool[Tensor, "writer position"]:
        """The writers that are reached through an edge from one that is."""
        ports = (self.edges & reached.T).any(-1)
        ports |= self.everywhere & ports.any(1, keepdim=True)
        return self.feeds.T @ ports.float() > 0

    def backward(self, useful: Bool[Tensor, "writer position"]) -> Bool[Tensor, "port position"]:
        """The readers that serve a writer that is useful."""
        ports = self.feeds @ useful.float() > 0
        return ports | (self.everywhere & ports.any(1, keepdim=True))


def _ends(graph: Graph, mask: Bool[Tensor, "reader writer"]) -> Iterator[tuple[int, int, str, tuple[str, ...]]]:
    """(reader, writer, the node that it comes from, the nodes that it leads to) of every masked edge."""
    places: list[int] = graph.position.tolist()
    fed_by: dict[int, list[int]] = {}
    for r, f in graph.feeds.nonzero().tolist():
        fed_by.setdefault(r, []).append(f)
    writes_at: dict[int, set[int]] = {}
    edges: list[list[int]] = mask.nonzero().tolist()
    for r, w in edges:
        writes_at.setdefault(w, set()).add(places[r])
    for r, w in edges:
        fed, here = fed_by.get(r, []), places[r]
        source = graph.node_name(w, here)
        if not fed:
            targets = ["logits"]
        elif graph.positions and graph.everywhere[r]:
            targets = [graph.node_name(f, p) for f in fed for p in sorted(writes_at.get(f, ()))]
        else:
            targets = [graph.node_name(f, here) for f in fed if graph.plain or here in writes_at.get(f, ())]
        yield r, w, source, tuple(targets)
