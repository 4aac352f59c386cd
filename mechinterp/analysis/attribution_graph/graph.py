"""`AttributionGraph`: nodes, the matrix of edges, influence, scores and pruning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechinterp.base.errors import InputError, clip
from mechinterp.base.registry import unknown

KINDS = ("token", "bias", "error", "rest", "feature", "target")
"""Kinds of nodes, in the order in which they stand: first those that nothing is attributed to."""
LEAVES = ("token", "bias", "error", "rest")


@dataclass(frozen=True)
class GraphNode:
    """A node of an attribution graph.

    Args:
        kind: `token`, `bias` (every constant: biases, learned positions), `error` (what the transcoders miss of one
            layer at one position), `rest` (features that were not expanded), `feature` or `target`.
        layer: The layer that a feature reads, or of an error; -1 for others.
        position: The position; -1 for the bias and the rest.
        feature: The number of the feature, the id of the token of a token or target; -1 otherwise.
        basis: The name of the feature's transcoder.
        text: A token's or target's text; of a feature a description, if one was given.
        value: A feature's activation; a target's probability.
        pre: What the incoming edges of a feature or target sum to: its pre-activation, or its logit less the mean
            logit.
        weight: Of a target, its weight in influences.
    """

    kind: str
    layer: int = -1
    position: int = -1
    feature: int = -1
    basis: str = ""
    text: str = ""
    value: float = 0.0
    pre: float = 0.0
    weight: float = 0.0

    @property
    def name(self) -> str:
        """`m3.f17@4`, `m3.err@4`, `token@4`, `bias`, `rest`, `target: ' John'`."""
        if self.kind == "feature":
            return f"{self.basis}.f{self.feature}@{self.position}"
        if self.kind == "error":
            return f"m{self.layer}.err@{self.position}"
        if self.kind == "target":
            return f"target: {self.text!r}" if self.text else f"target: {self.feature}"
        return f"token@{self.position}" if self.kind == "token" else self.kind


@dataclass(frozen=True)
class Supernode:
    """Nodes that are shown as one.

    Args:
        label: Its name.
        members: The names of its nodes.
    """

    label: str
    members: tuple[str, ...]


@dataclass(frozen=True)
class GraphScores:
    """How much of a graph is explained, from 0 to 1.

    `replacement` and `completeness` are circuit-tracer's, without constants: the share of tokens in the influence of
    tokens and errors, and the mean share of edges that are not from errors, weighted by the influence of what they
    enter. The `of_*` shares are of the influence on the targets of everything that nothing is attributed to, constants
    included: they add up to 1.
    """

    replacement: float
    completeness: float
    of_tokens: float
    of_constants: float
    of_errors: float
    of_rest: float

    def __str__(self) -> str:
        rest = f", {self.of_rest:.3f} from features not expanded" if self.of_rest else ""
        return (
            f"replacement {self.replacement:.3f}, completeness {self.completeness:.3f}; with constants: "
            f"{self.of_tokens:.3f} from tokens, {self.of_constants:.3f} from constants, {self.of_errors:.3f} from "
            f"errors{rest}"
        )

    def __repr__(self) -> str:
        return f"GraphScores({self})"


@dataclass(frozen=True, eq=False)
class AttributionGraph:
    """The direct effects between tokens, features, errors and logits of one prompt. Made by `attribution_graph`.

    `weights[r, w]` is what writer w adds to the pre-activation of reader r (of a target: to its logit less the mean
    logit), in the run's own units; positive = it raises it. A row sums to `GraphNode.pre` in a graph that is not
    pruned (and whose edges hold patterns and norm scales, as they do by default: `about["held"]`).

    Args:
        tokens: The ids of the prompt.
        words: The text of every token.
        nodes: Tokens, the bias, errors, the rest, features by layer, targets.
        weights: `[reader, writer]`: readers are the features and targets, writers all but the targets.
        model: The name of the model.
        bases: By name, the sha256 of every transcoder.
        supernodes: Nodes that are shown as one.
        about: How it was made: the largest gap between a row's sum and its pre-activation, the memory, ...
    """

    tokens: tuple[int, ...]
    words: tuple[str, ...]
    nodes: tuple[GraphNode, ...]
    weights: Float[Tensor, "reader writer"]
    model: str = ""
    bases: Mapping[str, str] = field(default_factory=dict[str, str])
    supernodes: tuple[Supernode, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        if [node.kind for node in self.nodes] != sorted((node.kind for node in self.nodes), key=KINDS.index):
            raise InputError(f"The nodes of an attribution graph stand in the order {', '.join(KINDS)}.")
        expected = (len(self.nodes) - self.n_leaves, len(self.nodes) - self.n_targets)
        if tuple(self.weights.shape) != expected:
            raise InputError(f"The weights must be {list(expected)}; got {list(self.weights.shape)}.")
        if len(self.index) != len(self.nodes):
            raise InputError("Two nodes of an attribution graph have the same name.")
        for group in self.supernodes:
            for name in group.members:
                if name not in self.index:
                    raise unknown("node", name, self.index)

    @cached_property
    def index(self) -> dict[str, int]:
        """The number of every node by its name."""
        return {node.name: i for i, node in enumerate(self.nodes)}

    @cached_property
    def n_leaves(self) -> int:
        """How many nodes are tokens, constants, errors or the rest."""
        return sum(node.kind in LEAVES for node in self.nodes)

    @cached_property
    def n_targets(self) -> int:
        """How many targets there are."""
        return sum(node.kind == "target" for node in self.nodes)

    @property
    def writers(self) -> tuple[GraphNode, ...]:
        """The nodes of the columns."""
        return self.nodes[: len(self.nodes) - self.n_targets]

    @property
    def readers(self) -> tuple[GraphNode, ...]:
        """The nodes of the rows."""
        return self.nodes[self.n_leaves :]

    @property
    def features(self) -> tuple[GraphNode, ...]:
        """The feature nodes."""
        return self.nodes[self.n_leaves : len(self.nodes) - self.n_targets]

    @property
    def targets(self) -> tuple[GraphNode, ...]:
        """The targets."""
        return self.nodes[len(self.nodes) - self.n_targets :]

    @property
    def prompt(self) -> str:
        """The text of the prompt; tokens that do not hold their spaces are joined by one."""
        return ("" if any(word[:1].isspace() for word in self.words) else " ").join(self.words)

    @property
    def n_edges(self) -> int:
        """How many edges are not 0."""
        return int((self.weights != 0).sum())

    def __repr__(self) -> str:
        prompt = clip(self.prompt, 60)
        return (
            f"AttributionGraph({prompt!r}: {len(self.features):,} features, {self.n_edges:,} edges, "
            f"targets {', '.join(repr(node.text or str(node.feature)) for node in self.targets)}; "
            f"{self.scores.of_errors:.0%} of the influence is from errors)"
        )

    def _normalised(self, constants: bool) -> Float[Tensor, "reader writer"]:
        size = self.weights.abs().double()
        if not constants:
            size[:, [node.kind == "bias" for node in self.writers]] = 0
        return size / size.sum(1, keepdim=True).clamp(min=1e-300)

    def _influence(self, normalised: Tensor) -> Float[Tensor, " writer"]:
        """The sum over all paths to the targets of products of normalised edges, weighted by the targets."""
        n = self.n_leaves
        weight = torch.tensor([node.weight for node in self.targets], dtype=torch.float64, device=normalised.device)
        n_features = len(self.features)
        direct = weight @ normalised[n_features:]
        among = normalised[:n_features, n:]  # strictly lower triangular: a feature reads earlier layers
        eye = torch.eye(n_features, dtype=among.dtype, device=among.device)
        through = torch.linalg.solve_triangular((eye - among).T, direct[n:, None], upper=True)[:, 0]
        return torch.cat([direct[:n] + through @ normalised[:n_features, :n], through])

    def influence(self, *, constants: bool = False) -> Float[Tensor, " writer"]:
        """How much every token, error and feature matters to the targets, directly and through features.

        The sum over all paths of the products of edges, each divided by the sum of the sizes of the edges into the same
        reader; targets count by their weights. Over everything that nothing is attributed to, it sums to the sum of the
        targets' weights. Source: Ameisen et al. 2025; circuit-tracer.

        Args:
            constants: Whether constants count among the edges; circuit-tracer has none.
        """
        return self._influence(self._normalised(constants))

    @cached_property
    def scores(self) -> GraphScores:
        """How much of the graph is explained."""
        kinds = [node.kind for node in self.writers]

        def share(influence: Tensor, kind: str) -> float:
            return float(influence[[one == kind for one in kinds]].sum())

        normalised = self._normalised(False)
        influence = self._influence(normalised)
        tokens, errors = share(influence, "token"), share(influence, "error")
        weight = torch.tensor([node.weight for node in self.targets], dtype=torch.float64, device=influence.device)
        counts = torch.cat([influence, weight])
        clean = torch.ones_like(counts)
        clean[self.n_leaves :] -= normalised[:, [kind == "error" for kind in kinds]].sum(1)
        with_constants = self.influence(constants=True)
        total = float(weight.sum()) or 1.0
        return GraphScores(
            tokens / max(tokens + errors, 1e-300),
            float((clean * counts).sum() / counts.sum()),
            *(share(with_constants, kind) / total for kind in LEAVES),
        )

    def pruned(self, nodes: float = 0.8, edges: float = 0.98) -> AttributionGraph:
        """The graph of the nodes and edges that matter most, by circuit-tracer's rules.

        Kept are the fewest nodes that hold the share `nodes` of all influence (tokens, constants and targets always),
        then the fewest edges that hold the share `edges` of the influence that flows through edges; then features
        without an edge in or out are dropped until none is left. Weights stay as they are: `left_out` says how much of
        every reader's sum was pruned, `about["errors_before_pruning"]` how much of the influence was from errors.

        Args:
            nodes: The share of influence that the kept nodes hold, from 0 to 1.
            edges: The same for edges.
        """
        for name, share in (("nodes", nodes), ("edges", edges)):
            if not 0 < share <= 1:
                raise InputError(f"`{name}` is a share of the influence, above 0 and at most 1; got {share}.")
        always = [node.kind in ("token", "bias") for node in self.writers]
        influence = self.influence()
        kept = influence >= _threshold(influence, nodes)
        kept |= torch.tensor(always, device=kept.device)
        size = self._normalised(False)
        constant = torch.tensor([node.kind == "bias" for node in self.writers], device=kept.device)
        n, n_features = self.n_leaves, len(self.features)
        rows = torch.cat([kept[n:], torch.ones(self.n_targets, dtype=torch.bool, device=kept.device)])
        size = torch.where(rows[:, None] & kept[None], self.weights.abs().double(), 0)
        size[:, constant] = 0
        size = size / size.sum(1, keepdim=True).clamp(min=1e-300)
        inner = self._influence(size)[n:]
        weight = torch.tensor([node.weight for node in self.targets], dtype=torch.float64, device=inner.device)
        flow = size * torch.cat([inner, weight])[:, None]
        edge = (flow >= _threshold(flow.flatten(), edges)) & (size > 0)
        while True:
            before = int(kept.sum())
            sends = edge.any(0)
            kept &= sends | torch.tensor(always, device=kept.device)
            kept[n:] &= edge[:n_features].any(1)
            edge[:n_features] &= kept[n:, None]
            edge &= kept[None]
            if int(kept.sum()) == before:
                break
        edge[:, constant] = True  # the constants of what is kept
        return self._part(kept, edge, {"nodes": nodes, "edges": edges})

    def _part(
        self, kept: Bool[Tensor, " writer"], edge: Bool[Tensor, "reader writer"], how: Mapping[str, float]
    ) -> AttributionGraph:
        rows = torch.cat([kept[self.n_leaves :], kept.new_ones(self.n_targets)])
        weights = torch.where(edge, self.weights, 0)[rows][:, kept]
        chosen = [node for node, keep in zip(self.writers, kept.tolist(), strict=True) if keep]
        names = {node.name for node in chosen} | {node.name for node in self.targets}
        groups = [
            Supernode(group.label, tuple(name for name in group.members if name in names)) for group in self.supernodes
        ]
        return replace(
            self,
            nodes=(*chosen, *self.targets),
            weights=weights,
            supernodes=tuple(group for group in groups if group.members),
            about={"errors_before_pruning": self.scores.of_errors, **self.about, "pruned": dict(how)},
        )

    def left_out(self) -> Float[Tensor, " reader"]:
        """What every reader's edges miss of its pre-activation: what was pruned; rounding in a whole graph.

        Derivatives (`held` other than `norms`) do not add up; then it is also what is not of the first order.
        """
        pre = torch.tensor([node.pre for node in self.readers], dtype=torch.float64, device=self.weights.device)
        return pre - self.weights.double().sum(1)

    def to_frame(self) -> pd.DataFrame:
        """A row per node: name, kind, layer, position, token, feature, value, pre, influence."""
        influence = [*self.influence().tolist(), *(node.weight for node in self.targets)]
        rows = [
            {
                "node": node.name,
                "kind": node.kind,
                "layer": node.layer,
                "position": node.position,
                "token": self.words[node.position] if node.position >= 0 else "",
                "feature": node.feature,
                "text": node.text,
                "value": node.value,
                "pre": node.pre,
                "influence": share,
            }
            for node, share in zip(self.nodes, influence, strict=True)
        ]
        return pd.DataFrame(rows)

    def edges(self, into: str | None = None) -> pd.DataFrame:
        """A row per edge, the largest first: source, target, weight.

        Args:
            into: Only the edges into this node, by name.
        """
        rows, columns = self.weights.nonzero(as_tuple=True)
        if into is not None:
            if into not in self.index:
                raise unknown("node", into, self.index)
            chosen = rows == self.index[into] - self.n_leaves
            rows, columns = rows[chosen], columns[chosen]
        values = self.weights[rows, columns]
        order = values.abs().argsort(descending=True, stable=True)
        readers, writers = self.readers, self.writers
        return pd.DataFrame(
            {
                "source": [writers[i].name for i in columns[order].tolist()],
                "target": [readers[i].name for i in rows[order].tolist()],
                "weight": values[order].double().cpu().numpy(),
            }
        )

    def collapsed_edges(self) -> pd.DataFrame:
        """The edges of the graph in which every supernode is one node, the largest first: source, target, weight.

        An edge is the sum of those between the nodes of its ends; those inside a supernode lead from it to itself. So
        the edges sum to those of the graph. What enters a supernode is in the units of several readers.

        Raises InputError if two supernodes have one label, or one has the name of a node.
        """
        labels = [group.label for group in self.supernodes]
        if len({*labels, *self.index}) < len(labels) + len(self.index):
            raise InputError("Two supernodes have the same label, or one has the name of a node; rename one.")
        joined = {name: group.label for group in self.supernodes for name in group.members}
        sums: dict[tuple[str, str], float] = {}
        edges = self.edges()
        for source, target, weight in zip(edges["source"], edges["target"], edges["weight"].tolist(), strict=True):
            ends = joined.get(str(source), str(source)), joined.get(str(target), str(target))
            sums[ends] = sums.get(ends, 0.0) + weight
        rows = sorted(((*ends, weight) for ends, weight in sums.items()), key=lambda row: -abs(row[2]))
        return pd.DataFrame(rows, columns=["source", "target", "weight"])

    def with_supernodes(self, supernodes: Sequence[Supernode]) -> AttributionGraph:
        """The same graph with these groups. Raises InputError for a node that it does not have or that is in two."""
        members = [name for group in supernodes for name in group.members]
        if len(set(members)) != len(members):
            raise InputError("A node belongs to at most one supernode.")
        return replace(self, supernodes=tuple(supernodes))

    def with_texts(self, texts: Mapping[str, str]) -> AttributionGraph:
        """The same graph with descriptions of features, by the names of nodes (`m3.f17@4`) or features (`m3.f17`)."""
        known = {node.name for node in self.features}
        bare = {node.name.partition("@")[0] for node in self.features}
        for name in texts:
            if name not in known and name not in bare:
                raise unknown("feature", name, [*known, *sorted(bare)])
        nodes = [
            replace(node, text=texts.get(node.name, texts.get(node.name.partition("@")[0], node.text)))
            if node.kind == "feature"
            else node
            for node in self.nodes
        ]
        return replace(self, nodes=tuple(nodes))

    def total_effects(self) -> Float[Tensor, "target feature"]:
        """What the graph predicts for a target's logit (less the mean logit) when a feature is doubled.

        Directly and through later features, which stay active and respond linearly; minus it is the prediction for
        ablating the feature.
        """
        n, n_features = self.n_leaves, len(self.features)
        weights = self.weights.double()
        among = weights[:n_features, n:]
        value = torch.tensor([node.value or 1.0 for node in self.features], dtype=torch.float64, device=weights.device)
        per_unit, direct = among / value, weights[n_features:, n:] / value
        eye = torch.eye(n_features, dtype=weights.dtype, device=weights.device)
        # x (I - B) = direct, with B strictly lower triangular
        total = torch.linalg.solve_triangular((eye - per_unit).T, direct.T, upper=True).T
        return total * value


def _threshold(scores: Float[Tensor, " n"], share: float) -> float:
    """The smallest score among the fewest that together hold the share."""
    ordered = scores.sort(descending=True).values
    reached = ordered.cumsum(0) / ordered.sum().clamp(min=1e-300)
    place = int((reached < share - 1e-12).sum())
    return float(ordered[min(place, len(ordered) - 1)])
