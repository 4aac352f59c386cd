"""`stable_scores`: which edges keep the sign of their score, and their place in the circuit, over other examples.

Source: bootstrap over examples (Efron & Tibshirani 1993, ch. 13), used to keep edges of consistent score by Nikankin et
al. 2025 (arXiv 2510.25786). Here an edge is stable when the sign of its score is the same in at least `agreement` of
the resamples; 0.975 is about what a two-sided 95 % interval without 0 asks for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechinterp.base.checkpoint import UNSAVED, Checkpoint
from mechinterp.base.errors import InputError
from mechinterp.base.progress import Progress, no_progress
from mechinterp.base.settings import Setting, check_settings
from mechinterp.discovery.method import score_edges
from mechinterp.discovery.score_pieces import ScorePieces, adds_up
from mechinterp.graphs.circuit import Circuit
from mechinterp.graphs.graph import Graph
from mechinterp.graphs.scores import Scores
from mechinterp.graphs.select import EmptyCircuit, select, sized, unit_count
from mechinterp.models.hook_manager import HookManager
from mechinterp.tasks.own_metric import MetricLike
from mechinterp.tasks.pairs import Pairs

STABLE = {
    "resamples": Setting(100, "how often the examples are drawn again", least=2, most=10_000),
    "agreement": Setting(0.975, "the share of resamples that must have the sign", above=0.5, most=1),
    "seed": Setting(0, "the seed of the resamples"),
}
"""The settings of `stable_scores`."""
CORE = 0.9
"""The share of resamples that an edge of the core is in."""


@dataclass(frozen=True, eq=False)
class StableScores:
    """Scores over all examples with their bootstrap resamples."""

    scores: Scores
    """Those of the stable edges; the others are 0. What `select` takes."""
    every: Scores
    """Those of all edges, as `score_edges` gives them."""
    samples: Float[Tensor, "resample edge"] = field(repr=False)
    """The mean score in each resample, edges in the order of `Graph.edge_names`."""
    agreement: float
    """The share of resamples that must have the sign."""
    seed: int

    @property
    def frequency(self) -> Float[Tensor, "reader writer"]:
        """The share of resamples in which an edge has the sign that it has over all examples; 0 for a score of 0."""
        return on_graph(self.every.graph, _same_sign(self.every, self.samples))

    def to_frame(self) -> pd.DataFrame:
        """A tidy table, the edges that matter most first: edge, writer, reader, score, frequency, sd, stable.

        `sd` is the standard deviation of the score over the resamples: its standard error.
        """
        possible = self.every.graph.possible
        table = pd.DataFrame(
            {
                "edge": self.every.graph.edge_names(),
                "frequency": self.frequency[possible].tolist(),
                "sd": self.samples.std(0).tolist(),
                "stable": (self.scores.values[possible] != 0).tolist(),
            }
        )
        return self.every.to_frame().merge(table, on="edge", validate="one_to_one")


@dataclass(frozen=True, eq=False)
class CircuitStability:
    """How alike the circuits are that one rule selects from the scores of each resample.

    Counted is what is chosen: edges, or nodes where the graph's level is `node`. A circuit has a node if it has an edge
    out of it.
    """

    circuit: Circuit
    """The one selected from the scores over all examples."""
    frequency: Float[Tensor, "reader writer"] = field(repr=False)
    """The share of resamples whose circuit has the edge; where nodes are chosen, the node that it leaves."""
    jaccard: float
    """Mean over all pairs of resamples of the Jaccard index of their circuits; 1 = always the same circuit."""
    resamples: int

    @property
    def jaccard_by_chance(self) -> float:
        """About what random circuits of this size have: n / (2 N - n), with n of N edges (or nodes)."""
        n, n_all = self.circuit.n_units, self.circuit.graph.n_units
        return n / (2 * n_all - n)

    @property
    def n_core(self) -> int:
        """The edges (or nodes) of the circuit that are in its core."""
        return len(self.circuit.graph.unit[self.core()].unique())

    @property
    def n_often_outside(self) -> int:
        """The edges (or nodes) outside the circuit that at least half of the resamples' circuits have."""
        often = units_in(self.circuit.graph, self.frequency >= 0.5 - 1e-9)
        return int((often & ~units_in(self.circuit.graph, self.circuit.kept)).sum())

    def core(self, share: float = CORE) -> Bool[Tensor, "reader writer"]:
        """The edges of the circuit that are in at least this share of the resamples' circuits, too.

        Where nodes are chosen: its edges out of nodes that are.
        """
        return self.circuit.kept & (self.frequency >= share - 1e-9)

    def to_frame(self) -> pd.DataFrame:
        """A tidy table of what is in any circuit, the most frequent first: edge (or node), frequency, in_circuit."""
        graph = self.circuit.graph
        frequency, kept = self.frequency[tuple(graph.first_of_unit.T)], units_in(graph, self.circuit.kept)
        rows = zip(graph.unit_names(), frequency.tolist(), kept.tolist(), strict=True)
        found = [row for row in rows if row[1] > 0 or row[2]]
        frame = pd.DataFrame(found, columns=[graph.level, "frequency", "in_circuit"])
        return frame.sort_values("frequency", ascending=False, kind="stable", ignore_index=True)


BLOCKS = "bootstrap over blocks of examples"
RUNS = "runs on examples drawn again"


@dataclass(frozen=True, eq=False)
class MeasuredStability:
    """The stability of a circuit, and how it was measured."""

    found: CircuitStability
    pairs: Pairs = field(repr=False)
    kind: str
    """`BLOCKS` or `RUNS`."""
    seed: int


def stable_scores(
    model: HookManager,
    graph: Graph,
    pairs: Pairs,
    *,
    method: str = "eap-ig",
    metric: MetricLike = "logit_diff",
    resamples: int = 100,
    agreement: float = 0.975,
    seed: int = 0,
    batch_size: int = 32,
    progress: Progress = no_progress,
    **parameters: Any,
) -> StableScores:
    """The scores of `score_edges`, and 0 for every edge whose sign is not stable when the examples are drawn again.

    A resample is as many examples, drawn with replacement. Its scores are exactly those that `score_edges` gives for
    the drawn examples. The result cannot be added to others, and `score_edges` alone does not reproduce it, so its
    parameters name the bootstrap.

    Cost: where scores of examples add up, every example is scored once, by itself (`batch_size` plays no part), and
    the resamples are weighted sums. Where they do not (`acdc`, `cd`, `path-patching`, and every method under a mean
    replacement, as each resample has its own mean): one run of the method per resample, one over all examples, and one
    of the first example, which shows that they do not.
    Memory: resamples x edges x 8 bytes (26 MB for 100 resamples of GPT-2 small).

    Raises InputError for fewer than 2 examples or resamples, an agreement that is not above 0.5 and up to 1, and what
    `score_edges` refuses.

    Args:
        model: The model.
        graph: Its graph, of edges or nodes.
        pairs: The examples to score with.
        method: A name of `METHODS`.
        metric: A metric or its name.
        resamples: How often the examples are drawn again.
        agreement: The share of resamples in which a stable edge has the same sign.
        seed: The seed of the resamples.
        batch_size: How many examples are run at once, where all are run together.
        progress: Called with the number of runs done, and of all.
        parameters: Parameters of the method by name.
    """
    check_settings("stable_scores", STABLE, {"resamples": resamples, "agreement": agreement, "seed": seed})
    if len(pairs) < 2:
        raise InputError("One example drawn again is always itself; give at least 2 pairs.")
    rows = torch.randint(len(pairs), (resamples, len(pairs)), generator=torch.Generator().manual_seed(seed))
    asked: dict[str, Any] = {"method": method, "metric": metric, "batch_size": batch_size, **parameters}
    every, samples = resampled_scores(model, graph, pairs, rows, asked, progress)
    share = on_graph(graph, _same_sign(every, samples))
    settings = {"agreement": float(agreement), "resamples": resamples, "seed": seed}
    scores = replace(
        every,
        total=torch.where(share >= agreement, every.total.cpu(), 0),
        parameters={**every.parameters, **{f"bootstrap_{name}": value for name, value in settings.items()}},
        additive=False,
    )
    return StableScores(scores, every, samples, float(agreement), seed)


def resampled_scores(
    model: HookManager,
    graph: Graph,
    pairs: Pairs,
    rows: Int[Tensor, "resample example"],
    asked: Mapping[str, Any],
    progress: Progress = no_progress,
    checkpoint: Checkpoint = UNSAVED,
) -> tuple[Scores, Float[Tensor, "resample edge"]]:
    """The scores over all pairs, and the mean scores over the examples of each row of `rows`.

    `asked` are the arguments of `score_edges`; `checkpoint` keeps the state where scores add up. Cost: see
    `stable_scores`.
    """
    pieces = ScorePieces(model, graph, pairs, asked, rows)
    if not adds_up(asked):
        (first,) = raw = pieces.raw(0)
        if not first.additive or first.replacement.startswith("mean"):
            every = score_edges(model, graph, pairs, **asked)
            samples = torch.zeros(len(rows), graph.n_edges, dtype=torch.float64)
            progress(0, len(rows))
            for i, chosen in enumerate(rows):
                samples[i] = score_edges(model, graph, pairs[chosen], **asked).values.cpu()[graph.possible]
                progress(i + 1, len(rows))
            return every, samples
        pieces.known[0] = raw
    every, samples = pieces.result(pieces.sums(checkpoint, progress))
    assert samples is not None
    return every, samples


def block_resamples(n: int, resamples: int, seed: int, blocks: int = 40) -> Int[Tensor, "resample example"]:
    """Rows of a bootstrap that draws whole blocks of neighbouring examples, so that only the blocks are scored.

    As examples are drawn independently, blocks of them are, too: their bootstrap estimates the same spread, with
    `blocks` instead of `n` independent draws. Blocks have n // blocks examples; those left over are in no resample.
    """
    blocks = min(blocks, n)
    size = n // blocks
    drawn = torch.randint(blocks, (resamples, blocks), generator=torch.Generator().manual_seed(seed))
    return (drawn[:, :, None] * size + torch.arange(size)).flatten(1)


def circuit_stability(
    stable: StableScores, *, edges: int | str, rule: str = "top", by: str = "magnitude", ratio: float | None = None
) -> CircuitStability:
    """How often each edge is in the circuit that `select` gives for the scores of a resample, and how alike they are.

    Where nodes are chosen, `edges` and all that is counted are nodes. The circuits are those of all edges' scores,
    stable or not. Cost: one `select` per resample, no run of the model.
    A resample without a circuit of that size counts as an empty one. Raises what `select` refuses.

    Args:
        stable: What `stable_scores` returned.
        edges: How many edges (or nodes) to select, or a share such as "5%".
        rule: As in `select`.
        by: As in `select`.
        ratio: As in `select`.
    """
    n = unit_count(stable.every.graph, edges)
    return stability_at(stable.every, stable.samples, n, rule=rule, by=by, ratio=ratio)


def stability_at(
    scores: Scores,
    samples: Float[Tensor, "resample edge"],
    size: int,
    *,
    rule: str = "top",
    by: str = "magnitude",
    ratio: float | None = None,
) -> CircuitStability:
    """The same for any scores with those of their resamples, edges in the order of `Graph.edge_names`."""
    graph = scores.graph
    how: dict[str, Any] = {"rule": rule, "by": by, "ratio": ratio}
    circuit = select(graph, scores, **sized(graph, size), **how)
    chosen: list[Bool[Tensor, " unit"]] = []
    for sample in samples:
        drawn = replace(scores, total=on_graph(graph, sample), count=1, samples=None)
        try:
            chosen.append(units_in(graph, select(graph, drawn, **sized(graph, size), **how).kept))
        except EmptyCircuit:
            chosen.append(torch.zeros(graph.n_units, dtype=torch.bool))
    table = torch.stack(chosen).double()
    shared, sizes = table @ table.T, table.sum(1)
    joined = sizes[:, None] + sizes[None] - shared
    jaccard = torch.where(joined > 0, shared / joined.clamp(min=1), 1.0)
    first, second = torch.triu_indices(len(table), len(table), offset=1)
    frequency = on_graph(graph, table.mean(0)[graph.unit[graph.possible]])
    return CircuitStability(circuit, frequency, float(jaccard[first, second].mean()), len(table))


def units_in(graph: Graph, kept: Bool[Tensor, "reader writer"]) -> Bool[Tensor, " unit"]:
    """Which edges are among the kept ones or, where nodes are chosen, which nodes have an edge out of them there."""
    found = torch.zeros(graph.n_units, dtype=torch.bool)
    found[graph.unit[kept]] = True
    return found


def on_graph(graph: Graph, values: Float[Tensor, " edge"]) -> Float[Tensor, "reader writer"]:
    """The table `[reader, writer]` of values in the order of `Graph.edge_names`; 0 where there is no edge."""
    table = torch.zeros(graph.possible.shape, dtype=values.dtype)
    table[graph.possible] = values
    return table


def _same_sign(scores: Scores, samples: Float[Tensor, "resample edge"]) -> Float[Tensor, " edge"]:
    sign = scores.values.cpu()[scores.graph.possible].sign()
    return ((samples.sign() == sign) & (sign != 0)).double().mean(0)
