"""`ScorePieces`: scores that add up over examples, in pieces that any process or machine can compute by itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.base.progress import Progress, no_progress
from mechinterp.base.settings import check_settings
from mechinterp.base.shards import State
from mechinterp.discovery.checkpoint import UNSAVED, Checkpoint
from mechinterp.discovery.method import METHODS, by_unit, raw_scores
from mechinterp.discovery.table_sums import sum_tables
from mechinterp.graphs.graph import Graph
from mechinterp.graphs.scores import Scores
from mechinterp.models.hook_manager import HookManager
from mechinterp.tasks.metrics import get_metric
from mechinterp.tasks.pairs import Pairs

COSTS = ("forwards", "backwards")


@dataclass(frozen=True, eq=False)
class ScorePieces:
    """The examples in groups, each of which is scored at once, with what their tables add up to.

    `asked` are the arguments of `score_edges`. With `rows` (the examples of every resample) a group is the examples
    that all resamples draw equally often, and the scores of the resamples are weighted sums; without, it is a batch.
    """

    model: HookManager
    graph: Graph
    pairs: Pairs
    asked: Mapping[str, Any]
    rows: Int[Tensor, "resample example"] | None = None
    known: dict[int, Scores] = field(default_factory=dict[int, Scores])
    """Raw scores of groups that are there already."""

    @cached_property
    def groups(self) -> list[list[int]]:
        """The numbers of the examples of every group, in the order in which tables are added up."""
        if self.rows is None:
            size, n = self.batch_size, len(self.pairs)
            return [list(range(first, min(first + size, n))) for first in range(0, n, size)]
        found: dict[tuple[float, ...], list[int]] = {}
        for i, column in enumerate(self._weights.T.tolist()):
            found.setdefault(tuple(column), []).append(i)
        return list(found.values())

    @property
    def batch_size(self) -> int:
        """That of the groups, if they are batches; otherwise 0."""
        return int(self.asked.get("batch_size", 32)) if self.rows is None else 0

    @cached_property
    def _weights(self) -> Float[Tensor, "resample example"]:
        """How often each resample draws each example."""
        assert self.rows is not None
        return torch.stack([drawn.bincount(minlength=len(self.pairs)) for drawn in self.rows]).double()

    def raw(self, group: int) -> Scores:
        """The raw scores of one group."""
        return raw_scores(self.model, self.graph, self.pairs[self.groups[group]], **self.asked)

    def piece(self, group: int) -> State:
        """The tables of one group: the sum over its examples, and what it cost."""
        scores = self.known.pop(group) if group in self.known else self.raw(group)
        costs = torch.tensor([scores.cost.get(name, 0) for name in COSTS])
        return {"total": scores.total.to("cpu", self.dtype), "costs": costs}

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of tables; they are added up in float64."""
        return torch.promote_types(self.model.dtype, torch.float32)

    @property
    def like(self) -> State:
        """Tables with the names, dtypes and shapes of a piece."""
        costs = torch.zeros(len(COSTS), dtype=torch.int64)
        return {"total": torch.zeros(self.graph.possible.shape, dtype=self.dtype), "costs": costs}

    @property
    def start(self) -> State:
        """The sums before the first piece."""
        sums = {"total": self.like["total"].double(), "costs": self.like["costs"]}
        if self.rows is not None:
            sums["samples"] = torch.zeros(len(self.rows), self.graph.n_edges, dtype=torch.float64)
        return sums

    def add(self, sums: State, group: int, found: State) -> None:
        """Adds the tables of a group to the sums, in place."""
        sums["total"] += found["total"]
        sums["costs"] += found["costs"]
        if self.rows is not None:
            weights = self._weights[:, self.groups[group][0]]
            sums["samples"].addr_(weights, found["total"][self.graph.possible].double())

    def sums(self, checkpoint: Checkpoint = UNSAVED, progress: Progress = no_progress) -> State:
        """The sums over all groups; processes that share the work take a part of them each."""
        n = len(self.groups)
        return sum_tables(n, self.piece, self.like, self.start, self.add, checkpoint, progress, self.batch_size)

    def result(self, sums: State) -> tuple[Scores, Float[Tensor, "resample edge"] | None]:
        """The scores over all examples, and the mean scores over those of each resample."""
        graph, method = self.graph, METHODS.get(str(self.asked.get("method", "eap-ig")))
        about = {"method", "metric", "batch_size"}
        given = {name: value for name, value in self.asked.items() if name not in about}
        settings = check_settings(f"method {method.name!r}", method.settings, given)
        metric = self.asked.get("metric", "logit_diff")
        scores = Scores(
            graph,
            by_unit(graph, method.name, sums["total"].to(self.dtype)),
            len(self.pairs),
            method.name,
            (get_metric(metric) if isinstance(metric, str) else metric).name,
            str(settings["replacement"]),
            settings,
            dict(zip(COSTS, sums["costs"].tolist(), strict=True)),
            pairs=self.pairs,
        )
        if self.rows is None:
            return scores, None
        samples = sums["samples"] / self.rows.shape[1]
        if graph.level == "node" and method.graphs == "summed":
            units = graph.unit[graph.possible]
            samples = samples.new_zeros(len(samples), graph.n_units).index_add(1, units, samples)[:, units]
        return scores, samples
