"""`Scores`: one number per edge of a graph, positive = the edge helps the task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.base.errors import InputError
from mechinterp.base.settings import Parameter
from mechinterp.graphs.graph import Graph
from mechinterp.tasks.pairs import Pairs


@dataclass(frozen=True, eq=False)
class Scores:
    """How much each edge helps the task. **Positive = the edge helps**: the (estimated) drop of the task's
    performance when the edge is replaced, in the metric's unit, mean over examples.

    Kept as a sum and a count, so that batches and shards add up without weights.
    """

    graph: Graph
    total: Float[Tensor, "reader writer"]
    count: int
    method: str
    metric: str
    replacement: str
    parameters: Mapping[str, Parameter] = field(default_factory=dict[str, Parameter])
    cost: Mapping[str, int] = field(default_factory=dict[str, int])
    """Examples run forward and backward."""
    additive: bool = True
    """Whether scores of two sets of examples add up to those of both; not where nodes are chosen on the way."""
    pairs: Pairs | None = field(default=None, repr=False)
    """The examples, for the record; None in a sum and in scores that were read from a file."""
    samples: Float[Tensor, "resample edge"] | None = field(default=None, repr=False)
    """Of a method that averages runs on resamples of the examples: the scores of each, edges in the order of
    `Graph.edge_names`. A file does not keep them."""

    def __post_init__(self) -> None:
        if self.total.shape != self.graph.possible.shape:
            raise InputError(f"Scores are {list(self.total.shape)}; the graph is {list(self.graph.possible.shape)}.")
        if not bool(torch.isfinite(self.total).all()):
            raise InputError("Some scores are NaN or infinite; look at the model's weights and the metric.")

    def __repr__(self) -> str:
        return f"Scores({self.method}, {self.graph.n_edges} edges, {self.metric}, {self.count} examples)"

    @property
    def values(self) -> Float[Tensor, "reader writer"]:
        """Mean score of every edge; 0 where there is no edge."""
        return self.total / self.count

    def by_writer(self) -> Float[Tensor, " writer"]:
        """The sum of what the edges out of each writer score; where nodes are chosen, the sum of its own scores."""
        if self.graph.level == "edge":
            return self.values.sum(0)
        first = self.graph.first_of_unit
        out = self.values.new_zeros(len(self.graph.writers))
        return out.index_add(0, first[:, 1], self.values[first[:, 0], first[:, 1]])

    def __add__(self, other: Scores) -> Scores:
        """The scores over both sets of examples. Raises InputError when they were made differently."""
        mine = (self.method, self.metric, self.replacement, dict(self.parameters), self.graph.digest())
        theirs = (other.method, other.metric, other.replacement, dict(other.parameters), other.graph.digest())
        if mine != theirs:
            raise InputError("Only scores of one method, metric, replacement and graph can be added.")
        if not (self.additive and other.additive):
            raise InputError(f"Scores of method {self.method!r} cannot be added; score all examples in one call.")
        if self.replacement.startswith("mean"):
            raise InputError(
                "Scores under a mean replacement cannot be added: each was made with the mean of its own examples. "
                "Score all examples in one call."
            )
        cost = {name: self.cost.get(name, 0) + other.cost.get(name, 0) for name in {*self.cost, *other.cost}}
        total, count = self.total + other.total, self.count + other.count
        return Scores(self.graph, total, count, self.method, self.metric, self.replacement, self.parameters, cost)

    def to_dict(self) -> dict[str, float]:
        """Edge name to score, for every edge."""
        values = self.values[self.graph.possible].tolist()
        return dict(zip(self.graph.edge_names(), values, strict=True))

    def to_frame(self) -> pd.DataFrame:
        """A tidy table, the edges that matter most first: edge, writer, reader, score."""
        rows = [(name, *name.split("->"), score) for name, score in self.to_dict().items()]
        frame = pd.DataFrame(rows, columns=["edge", "writer", "reader", "score"])
        return frame.sort_values("score", key=abs, ascending=False, kind="stable", ignore_index=True)
