"""`ScorePieces`: scores that add up over examples, in pieces that any process or machine can compute by itself.

An ensemble of methods whose scores add up is the tables of its members, combined in the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.base.checkpoint import UNSAVED, Checkpoint
from mechinterp.base.progress import Progress, no_progress
from mechinterp.base.settings import Parameter, check_settings
from mechinterp.base.shards import State
from mechinterp.discovery.ensemble import (
    ensemble_samples,
    ensemble_scores,
    members_asked,
    parse_weights,
)
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
    known: dict[int, list[Scores]] = field(default_factory=dict[int, list[Scores]])
    """Raw scores of groups that are there already."""

    @cached_property
    def members(self) -> list[dict[str, Any]]:
        """What is asked of every member of an ensemble; of another method only what is asked."""
        return members_asked(self.asked) or [dict(self.asked)]

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

    def raw(self, group: int) -> list[Scores]:
        """The raw scores of one group, by member."""
        some = self.pairs[self.groups[group]]
        return [raw_scores(self.model, self.graph, some, **asked) for asked in self.members]

    def piece(self, group: int) -> State:
        """The tables of one group: the sum over its examples, and what it cost."""
        found = self.known.pop(group) if group in self.known else self.raw(group)
        costs = torch.tensor([sum(scores.cost.get(name, 0) for scores in found) for name in COSTS])
        return {"total": torch.stack([scores.total.to("cpu", self.dtype) for scores in found]), "costs": costs}

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of tables; they are added up in float64."""
        return torch.promote_types(self.model.dtype, torch.float32)

    @property
    def like(self) -> State:
        """Tables with the names, dtypes and shapes of a piece."""
        costs = torch.zeros(len(COSTS), dtype=torch.int64)
        return {"total": torch.zeros(len(self.members), *self.graph.possible.shape, dtype=self.dtype), "costs": costs}

    @property
    def start(self) -> State:
        """The sums before the first piece."""
        sums = {"total": self.like["total"].double(), "costs": self.like["costs"]}
        if self.rows is not None:
            shape = len(self.rows), len(self.members), self.graph.n_edges
            sums["samples"] = torch.zeros(shape, dtype=torch.float64)
        return sums

    def add(self, sums: State, group: int, found: State) -> None:
        """Adds the tables of a group to the sums, in place."""
        sums["total"] += found["total"]
        sums["costs"] += found["costs"]
        if self.rows is not None:
            weights = self._weights[:, self.groups[group][0]]
            for i, table in enumerate(found["total"]):
                sums["samples"][:, i].addr_(weights, table[self.graph.possible].double())

    def sums(self, checkpoint: Checkpoint = UNSAVED, progress: Progress = no_progress) -> State:
        """The sums over all groups; processes that share the work take a part of them each."""
        n = len(self.groups)
        return sum_tables(n, self.piece, self.like, self.start, self.add, checkpoint, progress, self.batch_size)

    def result(self, sums: State) -> tuple[Scores, Float[Tensor, "resample edge"] | None]:
        """The scores over all examples, and the mean scores over those of each resample."""
        cost: dict[str, int] = dict(zip(COSTS, sums["costs"].tolist(), strict=True))
        found = [self._scores(asked, sums["total"][i], cost) for i, asked in enumerate(self.members)]
        samples = None
        if self.rows is not None:
            samples = sums["samples"] / self.rows.shape[1]
            for i, one in enumerate(found):
                samples[:, i] = self._samples(one.method, samples[:, i])
        if members_asked(self.asked) is None:
            return found[0], None if samples is None else samples[:, 0]
        settings = self._settings(self.asked)
        how, weights = str(settings["how"]), parse_weights(str(settings["weights"]))
        scores = replace(ensemble_scores(found, how=how, weights=weights), parameters=settings, cost=cost)
        return scores, None if samples is None else ensemble_samples(self.graph, samples, how, weights)

    def _settings(self, asked: Mapping[str, Any]) -> dict[str, Parameter]:
        """The settings of what is asked, with their defaults."""
        method, about = METHODS.get(str(asked.get("method", "eap-ig"))), {"method", "metric", "batch_size"}
        given = {name: value for name, value in asked.items() if name not in about}
        return check_settings(f"method {method.name!r}", method.settings, given)

    def _scores(self, asked: Mapping[str, Any], total: Tensor, cost: Mapping[str, int]) -> Scores:
        """The scores of one member over all examples."""
        name, settings, metric = str(asked.get("method", "eap-ig")), self._settings(asked), asked.get("metric")
        metric = "logit_diff" if metric is None else metric
        return Scores(
            self.graph,
            by_unit(self.graph, name, total.to(self.dtype)),
            len(self.pairs),
            name,
            (get_metric(metric) if isinstance(metric, str) else metric).name,
            str(settings["replacement"]),
            settings,
            cost,
            pairs=self.pairs,
        )

    def _samples(self, name: str, samples: Float[Tensor, "resample edge"]) -> Float[Tensor, "resample edge"]:
        """The mean scores of the resamples, where nodes are chosen by node."""
        graph = self.graph
        if graph.level != "node" or METHODS.get(name).graphs != "summed":
            return samples
        units = graph.unit[graph.possible]
        return samples.new_zeros(len(samples), graph.n_units).index_add(1, units, samples)[:, units]


def adds_up(asked: Mapping[str, Any]) -> bool:
    """Whether scores add up over examples, so that those of resamples cost no further runs."""
    additive = METHODS.get(str(asked.get("method", "eap-ig"))).additive or members_asked(asked) is not None
    return additive and not str(asked.get("replacement", "")).startswith("mean")
