"""Tests of a circuit against random ones: minimality, sufficiency, partial necessity.

Source: Shi et al. 2024, "Hypothesis Testing the Circuit Hypothesis in LLMs" (arXiv 2410.13032), and the authors' code,
blei-lab/circuitry, by which details were settled. The effect of a change is the mean over examples of
(s before - s after)^2, with s the metric. Each test counts against how many of n random circuits the circuit wins and
compares the count with a binomial distribution of chance `quantile` (q*). A rejection speaks against the circuit in
`minimality_test` and for it in the other two. Deviation: each random path goes through an edge drawn evenly from those
not yet in, and on from it in both directions; the authors walk from the input until the size is reached.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import median

import pandas as pd
import torch
from jaxtyping import Bool, Float
from scipy.stats import binomtest
from torch import Tensor

from mechinterp.base.errors import InputError
from mechinterp.base.progress import Progress, no_progress
from mechinterp.base.registry import unknown
from mechinterp.evaluation.faithfulness import ablation_of
from mechinterp.evaluation.hypotheses import TIE, HypothesisTest, check_level
from mechinterp.evaluation.masks import RandomPaths, mask_values, with_axes
from mechinterp.graphs.circuit import Circuit, on_paths
from mechinterp.graphs.scores import Parameter
from mechinterp.models.hook_manager import HookManager
from mechinterp.tasks.metrics import Metric
from mechinterp.tasks.pairs import Pairs

SOURCES = ("graph", "complement")
"""Where random circuits to cut come from."""


@dataclass(frozen=True)
class EdgeTest:
    """One edge of the circuit: is its effect large among those of random edges?"""

    edge: str
    effect: float
    """Mean squared change of the metric when the edge is cut."""
    n_larger: int
    """Than the effects of how many random edges it is larger."""
    p_value: float
    corrected: float
    """The p-value times the number of edges, at most 1 (Bonferroni)."""


@dataclass(frozen=True)
class MinimalityTest:
    """What `minimality_test` found: the test of the whole circuit (its worst edge), and of each edge."""

    test: HypothesisTest
    edges: tuple[EdgeTest, ...]
    """The most superfluous first."""
    random_effects: tuple[float, ...] = field(repr=False)
    """Of a random edge in each inflated circuit."""

    def to_frame(self) -> pd.DataFrame:
        """One row an edge, the most superfluous first: edge, effect, n_larger, p_value, corrected, rejected."""
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
    metric: Metric | str = "logit_diff",
    replacement: str = "corrupt",
    reference: Pairs | None = None,
    batch_size: int = 32,
    seed: int = 0,
    progress: Progress = no_progress,
) -> MinimalityTest:
    """Whether any edge of the circuit matters no more than edges that were added to it at random.

    `n_random` times a random path is added to the circuit, and one of its new edges is cut again: the effect of an
    edge that does not belong. Null, for every edge of the circuit: its effect is larger than that of such an edge with
    chance at least `quantile`. One-sided binomial tests, Bonferroni over the edges; the whole circuit's p-value is the
    smallest corrected one. `reference` as in `evaluate`. Cost: one forward an edge of the circuit and two a random
    circuit, for every example.

    Source: Shi et al. 2024, the minimality test; the random edges are the same for all edges of the circuit, as in the
    authors' code. Raises InputError for an empty circuit and for the whole graph.
    """
    check_level(alpha, quantile=quantile)
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
    table = mask_values(
        model,
        graph,
        pairs,
        cuts,
        metric=metric,
        replacement=replacement,
        reference=reference,
        batch_size=batch_size,
        progress=progress,
    )
    ours, others = table[:, 1 : 1 + len(edges)], table[:, 1 + len(edges) :]
    effects = _effects(table[:, :1], ours).tolist()
    random_effects = _effects(others[:, ::2], others[:, 1::2]).tolist()
    found: list[EdgeTest] = []
    for (r, w), effect in zip(edges, effects, strict=True):
        n_larger = sum(effect > other for other in random_effects)
        p = float(binomtest(n_larger, n_random, quantile, alternative="less").pvalue)
        found.append(EdgeTest(graph.edge_name(r, w), effect, n_larger, p, min(1.0, p * len(edges))))
    found.sort(key=lambda edge: (edge.n_larger, edge.effect))
    n_rejected = sum(edge.corrected <= alpha for edge in found)
    test = HypothesisTest(
        name="minimality",
        null=f"every edge has a larger effect than a random added edge with chance at least {quantile:g}",
        if_rejected=f"{n_rejected} of the {len(edges)} edges matter no more than random ones, which speaks against the "
        "circuit being minimal",
        statistic_name="share of random edges that the worst edge beats",
        statistic=found[0].n_larger / n_random,
        p_value=found[0].corrected,
        alpha=alpha,
        details={"quantile": quantile, "n_random": n_random, "n_rejected": n_rejected, "seed": seed},
        metric=metric if isinstance(metric, str) else metric.name,
        ablation=replace(
            ablation_of(circuit.graph, replacement),
            component="edges outside the circuit (some with a random path added), and one edge",
            set="complement and one edge",
        ),
        n_examples=len(pairs),
        circuit_digest=circuit.digest(),
        pairs=pairs,
        reference=reference,
    )
    return MinimalityTest(test, tuple(found), tuple(random_effects))


def sufficiency_test(
    model: HookManager,
    circuit: Circuit,
    pairs: Pairs,
    *,
    n_random: int = 100,
    random_edges: int | None = None,
    quantile: float = 0.9,
    alpha: float = 0.05,
    metric: Metric | str = "logit_diff",
    replacement: str = "corrupt",
    reference: Pairs | None = None,
    batch_size: int = 32,
    seed: int = 0,
    progress: Progress = no_progress,
) -> HypothesisTest:
    """Whether the circuit is more faithful than nearly all random circuits of a size.

    Null: the circuit's mean squared distance from the model, (s(M) - s(C))^2, is at most that of a random circuit with
    chance `quantile` or less. A random circuit has `random_edges` edges (default: as many as the circuit) on random
    paths, or a few more. One-sided binomial test over `n_random` of them; by default fewer than 29 cannot reject.
    `reference` as in `evaluate`. Cost: one forward a random circuit and example, and two more.

    Source: Shi et al. 2024, the sufficiency test. Raises InputError for a size that the graph has not.
    """
    check_level(alpha, quantile=quantile)
    possible = circuit.graph.possible
    drawn = _drawn(circuit, n_random, random_edges, seed, possible)
    table = mask_values(
        model,
        circuit.graph,
        pairs,
        [torch.zeros_like(possible), circuit.cut, *[possible & ~kept for kept in drawn]],
        metric=metric,
        replacement=replacement,
        reference=reference,
        batch_size=batch_size,
        progress=progress,
    )
    ours, *others = _effects(table[:, :1], table[:, 1:]).tolist()
    wins, size = sum(ours <= other for other in others), random_edges or circuit.n_edges
    return HypothesisTest(
        name="sufficiency",
        null=f"the circuit is as faithful as a random one of {size} edges, or more, with chance {quantile:g} or less",
        if_rejected="the circuit is as faithful as nearly all random ones, or more, which speaks for it",
        statistic_name="share of random circuits that are no more faithful",
        statistic=wins / n_random,
        p_value=float(binomtest(wins, n_random, quantile, alternative="greater").pvalue),
        alpha=alpha,
        details=_details(ours, others, drawn, quantile, seed),
        metric=metric if isinstance(metric, str) else metric.name,
        ablation=ablation_of(circuit.graph, replacement),
        n_examples=len(pairs),
        circuit_digest=circuit.digest(),
        pairs=pairs,
        reference=reference,
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
    metric: Metric | str = "logit_diff",
    replacement: str = "corrupt",
    reference: Pairs | None = None,
    batch_size: int = 32,
    seed: int = 0,
    progress: Progress = no_progress,
) -> HypothesisTest:
    """Whether cutting the circuit harms the model more than cutting nearly all random circuits of a size.

    Null: the mean squared change of the model's metric when the circuit is cut is larger than when a random circuit is
    cut with chance `quantile` or less. Random circuits, cost and errors as in `sufficiency_test`.

    `drawn_from`: the random circuits' edges come from the whole `graph`, so that they may hold some of the circuit's;
    or from the `complement` only. Where one edge's loss ends the task, as in small graphs, a random circuit from the
    whole graph does as much harm as the circuit itself, and the test can speak for none.

    Source: Shi et al. 2024, the partial necessity test; both sources are in the authors' code, `graph` in their
    settings.
    """
    check_level(alpha, quantile=quantile)
    if drawn_from not in SOURCES:
        raise unknown("source of random circuits", drawn_from, SOURCES)
    within = circuit.cut if drawn_from == "complement" else circuit.graph.possible
    drawn = _drawn(circuit, n_random, random_edges, seed, within)
    table = mask_values(
        model,
        circuit.graph,
        pairs,
        [torch.zeros_like(circuit.cut), circuit.members, *drawn],
        metric=metric,
        replacement=replacement,
        reference=reference,
        batch_size=batch_size,
        progress=progress,
    )
    ours, *others = _effects(table[:, :1], table[:, 1:]).tolist()
    wins, size = sum(ours > other for other in others), random_edges or circuit.n_edges
    return HypothesisTest(
        name="partial necessity",
        null=f"cutting the circuit changes more than cutting a random one of {size} edges with chance {quantile:g} or "
        "less",
        if_rejected="cutting the circuit changes more than cutting nearly all random ones, which speaks for it",
        statistic_name="share of random circuits that change less when cut",
        statistic=wins / n_random,
        p_value=float(binomtest(wins, n_random, quantile, alternative="greater").pvalue),
        alpha=alpha,
        details={"drawn_from": drawn_from, **_details(ours, others, drawn, quantile, seed)},
        metric=metric if isinstance(metric, str) else metric.name,
        ablation=replace(
            ablation_of(circuit.graph, replacement), component="all edges of the circuit's members", set="circuit"
        ),
        n_examples=len(pairs),
        circuit_digest=circuit.digest(),
        pairs=pairs,
        reference=reference,
    )


def _effects(before: Tensor, after: Float[Tensor, "example mask"]) -> Float[Tensor, " mask"]:
    """Mean squared changes; 0 below the resolution of the numbers, so that no rounding wins a comparison.

    `before` has a column for each mask, or one for all.
    """
    effects = ((before - after) ** 2).mean(0)
    return torch.where(effects > (TIE * before.abs().mean(0)) ** 2, effects, 0.0)


def _drawn(
    circuit: Circuit, n_random: int, size: int | None, seed: int, within: Bool[Tensor, "reader writer"]
) -> list[Bool[Tensor, "reader writer"]]:
    size = circuit.n_edges if size is None else size
    most = min(circuit.graph.n_edges - 1, int(on_paths(circuit.graph, within).sum()))
    if n_random < 1 or not 1 <= size <= most:
        raise InputError(
            f"Random circuits have here from 1 to {most} edges, and n_random is at least 1; got {size} and {n_random}."
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
