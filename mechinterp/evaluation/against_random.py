"""Tests of a circuit against random ones: minimality, sufficiency, partial necessity.

Source: Shi et al. 2024, "Hypothesis Testing the Circuit Hypothesis in LLMs" (arXiv 2410.13032); where the paper leaves
details open, we follow the authors' code (blei-lab/circuitry). The effect of a change is the mean over examples of
(s before - s after)^2, with s the metric. Each test counts how many of n random circuits the circuit beats and compares
the count with a binomial distribution with success probability `quantile` (q*). A rejection is evidence against the
circuit in `minimality_test` and for it in the other two. Deviation: each random path starts at an edge drawn uniformly
from those not chosen yet and is extended in both directions; the authors walk from the input until the size is reached.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import TypeVar

import pandas as pd
import torch
from jaxtyping import Bool, Float
from scipy.stats import binomtest
from torch import Tensor

from mechinterp.base.errors import InputError, UnsupportedError
from mechinterp.base.progress import Progress, no_progress
from mechinterp.base.registry import unknown
from mechinterp.base.settings import Parameter
from mechinterp.evaluation.ablation import AblationSetup
from mechinterp.evaluation.hypotheses import TIE, HypothesisTest, check_level
from mechinterp.evaluation.masks import mask_values, with_axes
from mechinterp.graphs.circuit import Circuit, on_paths
from mechinterp.graphs.graph import Graph
from mechinterp.models.hook_manager import HookManager
from mechinterp.tasks.own_metric import MetricLike
from mechinterp.tasks.pairs import Pairs

SOURCES = ("graph", "complement")
"""Where the edges of the random circuits of `necessity_test` may come from."""


@dataclass(frozen=True)
class EdgeTest:
    """One edge of the circuit, with its effect compared with those of random edges."""

    edge: str
    effect: float
    """Mean squared change of the metric when the edge is cut."""
    n_larger: int
    """How many random edges have a smaller effect."""
    p_value: float
    corrected: float
    """The p-value times the number of edges, at most 1 (Bonferroni)."""


@dataclass(frozen=True)
class MinimalityTest:
    """The outcome of `minimality_test`: for the whole circuit (its worst edge) and for each edge."""

    test: HypothesisTest
    edges: tuple[EdgeTest, ...]
    """The most superfluous first."""
    random_effects: tuple[float, ...] = field(repr=False)
    """The effect of a random added edge, one for each inflated circuit."""

    def to_frame(self) -> pd.DataFrame:
        """One row per edge, the most superfluous first: edge, effect, n_larger, p_value, corrected, rejected."""
        rows = [{**vars(edge), "rejected": edge.corrected <= self.test.alpha} for edge in self.edges]
        return with_axes(pd.DataFrame(rows), self.test.metric, self.test.ablation)


def minimality_test(
    model: HookManager,
    circuit: Circuit,
    pairs: Pairs,
    *,
    n_random: int = 100,
    quantile: float = 0.9,
    alpha: float = 0.05,
    metric: MetricLike = "logit_diff",
    replacement: str = "corrupt",
    reference: Pairs | None = None,
    batch_size: int = 32,
    seed: int = 0,
    progress: Progress = no_progress,
) -> MinimalityTest:
    """Tests whether every edge of the circuit matters more than edges that were added to it at random.

    `n_random` times, a random path is added to the circuit and one of its new edges is cut: this is the effect of an
    edge that does not belong. Null, for every edge of the circuit: its effect is larger than that of such an edge with
    probability at least `quantile`. One-sided binomial tests with Bonferroni correction over the edges; the whole
    circuit's p-value is the smallest corrected one. Cost: per example, one forward for each edge of the circuit and two
    for each random circuit.

    Source: Shi et al. 2024, the minimality test; the random edges are the same for all edges of the circuit, as in the
    authors' code.

    Args:
        model: The model that the circuit was found in.
        circuit: The circuit.
        pairs: The examples; use held-out ones.
        n_random: How many random paths to add, one at a time.
        quantile: The probability in the null hypothesis.
        alpha: The significance level.
        metric: A metric, or the name of one.
        replacement: What a cut edge carries: `corrupt`, `mean`, `mean-positional` or `zero`.
        reference: The pairs whose corrupt prompts give the means; by default `pairs`.
        batch_size: How many examples to run at a time.
        seed: The seed of the random paths.
        progress: Called with the number of runs done and their total; one run is one mask on one example.

    Raises:
        InputError: The circuit is empty, or is the whole graph, to which no edge can be added.
    """
    check_level(alpha, quantile=quantile)
    setup = AblationSetup.of(model, circuit.graph, pairs, metric, replacement, reference, batch_size, progress)
    graph, edges = circuit.graph, circuit.kept.nonzero().tolist()
    if not edges or n_random < 1:
        raise InputError(f"Give a circuit with edges and n_random of at least 1; got {len(edges)} and {n_random}.")
    paths = RandomPaths(graph, seed)
    cuts = [circuit.cut]
    for r, w in edges:
        cuts.append(circuit.cut.clone())
        cuts[-1][r, w] = True
    for _ in range(n_random):
        inflated, edge = paths.added_path(circuit.kept)
        cuts += [graph.possible & ~inflated, (graph.possible & ~inflated) | paths.mask([edge])]
    table = mask_values(setup, cuts)
    own, random = table[:, 1 : 1 + len(edges)], table[:, 1 + len(edges) :]
    effects = _effects(table[:, :1], own).tolist()
    random_effects = _effects(random[:, ::2], random[:, 1::2]).tolist()
    tests: list[EdgeTest] = []
    for (r, w), effect in zip(edges, effects, strict=True):
        n_larger = sum(effect > other for other in random_effects)
        p = float(binomtest(n_larger, n_random, quantile, alternative="less").pvalue)
        tests.append(EdgeTest(graph.edge_name(r, w), effect, n_larger, p, min(1.0, p * len(edges))))
    tests.sort(key=lambda edge: (edge.n_larger, edge.effect))
    n_rejected = sum(edge.corrected <= alpha for edge in tests)
    test = HypothesisTest(
        name="minimality",
        null=f"every edge has a larger effect than a random added edge with probability at least {quantile:g}",
        if_rejected=f"{n_rejected} of the {len(edges)} edges matter no more than random ones, which is evidence that "
        "the circuit is not minimal",
        statistic_name="share of random edges that the worst edge beats",
        statistic=tests[0].n_larger / n_random,
        p_value=tests[0].corrected,
        alpha=alpha,
        details={"quantile": quantile, "n_random": n_random, "n_rejected": n_rejected, "seed": seed},
        ablation=replace(
            setup.axes,
            component="edges outside the circuit (some with a random path added), and one edge",
            set="complement and one edge",
        ),
        **setup.stated(circuit),
    )
    return MinimalityTest(test, tuple(tests), tuple(random_effects))


def sufficiency_test(
    model: HookManager,
    circuit: Circuit,
    pairs: Pairs,
    *,
    n_random: int = 100,
    random_edges: int | None = None,
    quantile: float = 0.9,
    alpha: float = 0.05,
    metric: MetricLike = "logit_diff",
    replacement: str = "corrupt",
    reference: Pairs | None = None,
    batch_size: int = 32,
    seed: int = 0,
    progress: Progress = no_progress,
) -> HypothesisTest:
    """Tests whether the circuit is more faithful than nearly all random circuits of its size.

    Null: the circuit's mean squared distance from the model, (s(M) - s(C))^2, is at most that of a random circuit with
    probability `quantile` or less. A random circuit consists of random paths. One-sided binomial test over the random
    circuits; with the default `quantile` and `alpha`, fewer than 29 of them cannot reject. Cost: one forward per random
    circuit and example, and two more.

    Source: Shi et al. 2024, the sufficiency test.

    Args:
        model: The model that the circuit was found in.
        circuit: The circuit.
        pairs: The examples; use held-out ones.
        n_random: How many random circuits to draw.
        random_edges: How many edges each has, or a few more, because the last path is kept whole; by default as many
            as the circuit.
        quantile: The probability in the null hypothesis.
        alpha: The significance level.
        metric: A metric, or the name of one.
        replacement: What a cut edge carries: `corrupt`, `mean`, `mean-positional` or `zero`.
        reference: The pairs whose corrupt prompts give the means; by default `pairs`.
        batch_size: How many examples to run at a time.
        seed: The seed of the random circuits.
        progress: Called with the number of runs done and their total; one run is one mask on one example.

    Raises:
        InputError: The graph has no random circuits of that size.
    """
    check_level(alpha, quantile=quantile)
    setup = AblationSetup.of(model, circuit.graph, pairs, metric, replacement, reference, batch_size, progress)
    possible = circuit.graph.possible
    drawn = _drawn(circuit, n_random, random_edges, seed, possible)
    table = mask_values(setup, [torch.zeros_like(possible), circuit.cut, *[possible & ~kept for kept in drawn]])
    ours, *others = _effects(table[:, :1], table[:, 1:]).tolist()
    wins, size = sum(ours <= other for other in others), random_edges or circuit.n_edges
    return HypothesisTest(
        name="sufficiency",
        null=f"the circuit is at least as faithful as a random one of {size} edges with probability {quantile:g} or "
        "less",
        if_rejected="the circuit is at least as faithful as nearly all random ones, which is evidence for it",
        statistic_name="share of random circuits that are no more faithful",
        statistic=wins / n_random,
        p_value=float(binomtest(wins, n_random, quantile, alternative="greater").pvalue),
        alpha=alpha,
        details=_details(ours, others, drawn, quantile, seed),
        ablation=setup.axes,
        **setup.stated(circuit),
    )


def necessity_test(
    model: HookManager,
    circuit: Circuit,
    pairs: Pairs,
    *,
    n_random: int = 100,
    random_edges: int | None = None,
    drawn_from: str = "graph",
    quantile: float = 0.9,
    alpha: float = 0.05,
    metric: MetricLike = "logit_diff",
    replacement: str = "corrupt",
    reference: Pairs | None = None,
    batch_size: int = 32,
    seed: int = 0,
    progress: Progress = no_progress,
) -> HypothesisTest:
    """Tests whether cutting the circuit harms the model more than cutting nearly any random circuit of its size.

    Null: the mean squared change of the model's metric is larger when the circuit is cut than when a random circuit is
    cut with probability `quantile` or less. Cost: one forward per random circuit and example, and two more.

    Where losing one edge is enough to fail the task, as in small graphs, a random circuit drawn from the whole graph
    does as much harm as the circuit itself, and the test cannot reject; draw from the complement then.

    Source: Shi et al. 2024, the partial necessity test; the authors' code has both values of `drawn_from`, and their
    settings use `graph`.

    Args:
        model: The model that the circuit was found in.
        circuit: The circuit.
        pairs: The examples; use held-out ones.
        n_random: How many random circuits to draw.
        random_edges: How many edges each has, or a few more, because the last path is kept whole; by default as many
            as the circuit.
        drawn_from: Where their edges come from: the whole `graph`, the circuit's edges included, or its `complement`.
        quantile: The probability in the null hypothesis.
        alpha: The significance level.
        metric: A metric, or the name of one.
        replacement: What a cut edge carries: `corrupt`, `mean`, `mean-positional` or `zero`.
        reference: The pairs whose corrupt prompts give the means; by default `pairs`.
        batch_size: How many examples to run at a time.
        seed: The seed of the random circuits.
        progress: Called with the number of runs done and their total; one run is one mask on one example.

    Raises:
        InputError: There are no random circuits of that size.
    """
    check_level(alpha, quantile=quantile)
    setup = AblationSetup.of(model, circuit.graph, pairs, metric, replacement, reference, batch_size, progress)
    if drawn_from not in SOURCES:
        raise unknown("source of random circuits", drawn_from, SOURCES)
    within = circuit.cut if drawn_from == "complement" else circuit.graph.possible
    drawn = _drawn(circuit, n_random, random_edges, seed, within)
    table = mask_values(setup, [torch.zeros_like(circuit.cut), circuit.members, *drawn])
    ours, *others = _effects(table[:, :1], table[:, 1:]).tolist()
    wins, size = sum(ours > other for other in others), random_edges or circuit.n_edges
    return HypothesisTest(
        name="partial necessity",
        null=f"cutting the circuit changes more than cutting a random one of {size} edges with probability "
        f"{quantile:g} or less",
        if_rejected="cutting the circuit changes more than cutting nearly any random one, which is evidence for it",
        statistic_name="share of random circuits that change less when cut",
        statistic=wins / n_random,
        p_value=float(binomtest(wins, n_random, quantile, alternative="greater").pvalue),
        alpha=alpha,
        details={"drawn_from": drawn_from, **_details(ours, others, drawn, quantile, seed)},
        ablation=replace(setup.axes, component="all edges of the circuit's members", set="circuit"),
        **setup.stated(circuit),
    )


def _effects(before: Tensor, after: Float[Tensor, "example mask"]) -> Float[Tensor, " mask"]:
    """Mean squared changes; 0 below the numerical resolution, so that rounding never decides a comparison.

    `before` has one column for each mask, or a single one for all.
    """
    effects = ((before - after) ** 2).mean(0)
    return torch.where(effects > (TIE * before.abs().mean(0)) ** 2, effects, 0.0)


def _drawn(
    circuit: Circuit, n_random: int, size: int | None, seed: int, within: Bool[Tensor, "reader writer"]
) -> list[Bool[Tensor, "reader writer"]]:
    """Random circuits of `size` edges (by default as many as the circuit has), drawn from the edges `within`."""
    size = circuit.n_edges if size is None else size
    most = min(circuit.graph.n_edges - 1, int(on_paths(circuit.graph, within).sum()))
    if n_random < 1 or not 1 <= size <= most:
        raise InputError(
            f"Random circuits can have from 1 to {most} edges, and n_random must be at least 1; got {size} edges and "
            f"n_random={n_random}."
        )
    paths = RandomPaths(circuit.graph, seed, within)
    return [paths.circuit(size) for _ in range(n_random)]


def _details(
    ours: float, others: Sequence[float], drawn: Sequence[Tensor], quantile: float, seed: int
) -> dict[str, Parameter]:
    return {
        "quantile": quantile,
        "n_random": len(drawn),
        "random_edges_mean": sum(int(kept.sum()) for kept in drawn) / len(drawn),
        "effect": ours,
        "random_effect_median": median(others),
        "seed": seed,
    }


T = TypeVar("T")
PathEdges = list[tuple[int, int]]
"""(reader row, writer row) of each edge, in any order."""


class RandomPaths:
    """Draws random paths through a graph, or through a part of its edges, under a seed."""

    def __init__(self, graph: Graph, seed: int, within: Bool[Tensor, "reader writer"] | None = None) -> None:
        if graph.positions or graph.level != "edge":
            raise UnsupportedError(
                "Random paths consist of single edges at all positions, so the circuit must be of edges, not of nodes, "
                "and of a graph without named positions; build one with build_graph(model)."
            )
        allowed = graph.possible if within is None else on_paths(graph, within)
        self.graph, self.allowed = graph, allowed
        self.generator = torch.Generator().manual_seed(seed)
        self.edges: PathEdges = [(r, w) for r, w in allowed.nonzero().tolist()]
        self._into = [row.nonzero().flatten().tolist() for row in allowed]
        self._out = [column.nonzero().flatten().tolist() for column in allowed.T]
        # A path cannot go on at a node without an allowed edge (some heads that share a K or V, for example).
        self._fed_by = [[w for w in row.nonzero().flatten().tolist() if self._out[w]] for row in graph.feeds]
        self._inputs_of = [
            [r for r in column.nonzero().flatten().tolist() if self._into[r]] for column in graph.feeds.T
        ]

    def below(self, n: int) -> int:
        """A random integer from 0 to n - 1."""
        return int(torch.randint(n, (1,), generator=self.generator))

    def through(self, edge: tuple[int, int]) -> PathEdges:
        """A random path through the edge; each step is drawn uniformly from the ways to go on."""
        path, (reader, writer) = [edge], edge
        while self._fed_by[reader]:  # on to the logits, which feed nothing
            node = self._one_of(self._fed_by[reader])
            reader = self._one_of(self._out[node])
            path.append((reader, node))
        while self._inputs_of[writer]:  # back to an input of the graph, which reads nothing
            reader = self._one_of(self._inputs_of[writer])
            writer = self._one_of(self._into[reader])
            path.append((reader, writer))
        return path

    def circuit(self, n_edges: int) -> Bool[Tensor, "reader writer"]:
        """The edges of random paths, each through a random edge not chosen yet, until there are `n_edges`.

        The last path is kept whole, so that every edge is on a path; there may be a few more than `n_edges`.
        """
        if not 1 <= n_edges <= len(self.edges):
            raise InputError(f"Random paths can have from 1 to {len(self.edges)} edges; got {n_edges!r}.")
        chosen: set[tuple[int, int]] = set()
        for i in torch.randperm(len(self.edges), generator=self.generator).tolist():
            if len(chosen) >= n_edges:
                break
            if self.edges[i] not in chosen:
                chosen.update(self.through(self.edges[i]))
        return self.mask(chosen)

    def added_path(self, kept: Bool[Tensor, "reader writer"]) -> tuple[Bool[Tensor, "reader writer"], tuple[int, int]]:
        """`kept` with a random path through an edge that it does not have, and one of the new edges."""
        missing = (self.allowed & ~kept).nonzero().tolist()
        if not missing:
            raise InputError("The circuit is the whole graph: no edge can be added to it.")
        r, w = missing[self.below(len(missing))]
        path = self.through((r, w))
        new = [edge for edge in path if not kept[edge]]
        return kept | self.mask(path), self._one_of(new)

    def mask(self, edges: PathEdges | set[tuple[int, int]]) -> Bool[Tensor, "reader writer"]:
        """The mask of the edges."""
        out = torch.zeros_like(self.graph.possible)
        for edge in edges:
            out[edge] = True
        return out

    def _one_of(self, options: Sequence[T]) -> T:
        return options[self.below(len(options))]
