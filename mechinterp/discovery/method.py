"""`Method` and `Job`, of which a discovery method is made, and `score_edges`, which runs one by name."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.base.checkpoint import UNSAVED, Checkpoint
from mechinterp.base.errors import InputError
from mechinterp.base.progress import Progress, no_progress
from mechinterp.base.settings import Parameter, Setting, check_settings
from mechinterp.base.shards import State
from mechinterp.discovery.methods import METHODS
from mechinterp.discovery.run_state import open_checkpoint
from mechinterp.discovery.table_sums import sum_tables
from mechinterp.engines.edge_patching import check_model
from mechinterp.engines.replacement import KINDS
from mechinterp.graphs.graph import Graph
from mechinterp.graphs.scores import Scores
from mechinterp.models.hook_manager import HookManager
from mechinterp.tasks.metrics import Metric
from mechinterp.tasks.own_metric import MetricLike, as_metric
from mechinterp.tasks.pairs import Pairs


@dataclass(frozen=True)
class Job:
    """All that a method is given. `settings` has every parameter of the method, already checked."""

    model: HookManager
    graph: Graph
    pairs: Pairs
    metric: Metric
    settings: Mapping[str, Parameter]
    batch_size: int
    progress: Progress
    checkpoint: Checkpoint

    @property
    def replacement(self) -> str:
        """The kind of replacement: what a cut edge carries."""
        return str(self.settings["replacement"])

    def zeros(self) -> Float[Tensor, "reader writer"]:
        """A table for scores, in float32 or better."""
        dtype = torch.promote_types(self.model.dtype, torch.float32)
        return torch.zeros(self.graph.possible.shape, dtype=dtype)

    def scores(self, method: str, total: Tensor, cost: Mapping[str, int], **more: Any) -> Scores:
        """The result, with the settings that it was computed with.

        Args:
            method: The name of the method.
            total: The sum over examples of every edge's score, `[reader, writer]`.
            cost: How many forwards and backwards of one prompt it took.
            more: Other fields of `Scores`, such as `additive=False`.
        """
        return Scores(
            self.graph,
            total,
            len(self.pairs),
            method,
            self.metric.name,
            self.replacement,
            dict(self.settings),
            cost,
            **more,
        )

    def sum_over_batches(self, of: Callable[[Pairs], Tensor]) -> Float[Tensor, "reader writer"]:
        """The sum over all batches of a table of edges, added up in float64; a killed run resumes at the batch that it
        had reached, and processes that share the work take a part of the batches each."""
        zeros, size = self.zeros(), self.batch_size
        n = -(-len(self.pairs) // size)

        def piece(batch: int) -> State:
            return {"total": of(self.pairs[batch * size : (batch + 1) * size]).to("cpu", zeros.dtype)}

        def add(sums: State, batch: int, found: State) -> None:
            sums["total"] += found["total"]

        like, start = {"total": zeros}, {"total": zeros.double()}
        found = sum_tables(n, piece, like, start, add, self.checkpoint, self.progress, size)
        return found["total"].to(zeros.dtype)


REPLACEMENT = Setting("corrupt", "what a cut edge carries", choices=KINDS)
"""The setting that every method has."""


@dataclass(frozen=True)
class Method:
    """A way to score edges.

    Args:
        name: The name under which it is registered.
        title: What it does, in one line.
        source: The paper that it is from.
        run: The scores of a job.
        settings: Its parameters by name; one of them is `replacement`. An unknown one is refused.
        threshold: For a method that chooses the circuit itself: `select` with this threshold gives it.
        additive: Whether scores of two sets of examples add up to those of both.
        graphs: Which graphs it takes: `plain`, only those of edges at all positions and whole MLPs; `summed`, any, and
            a node scores the sum of its edges; `own`, any, and the method scores nodes itself.
    """

    name: str
    title: str
    source: str
    run: Callable[[Job], Scores]
    settings: Mapping[str, Setting] = field(default_factory=lambda: {"replacement": REPLACEMENT})
    threshold: float | None = None
    additive: bool = False
    graphs: Literal["plain", "summed", "own"] = "plain"

    def __post_init__(self) -> None:
        for name, setting in self.settings.items():
            if not isinstance(setting, Setting):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise InputError(f"Setting {name!r} of method {self.name!r} must be a Setting, such as Setting(5).")
        if "replacement" not in self.settings:
            raise InputError(f"Method {self.name!r} needs a setting 'replacement'; use REPLACEMENT of this module.")

    @property
    def defaults(self) -> dict[str, Parameter]:
        """The default of every parameter."""
        return {name: setting.default for name, setting in self.settings.items()}


def score_edges(
    model: HookManager,
    graph: Graph,
    pairs: Pairs,
    *,
    method: str = "eap-ig",
    metric: MetricLike = "logit_diff",
    batch_size: int = 32,
    progress: Progress = no_progress,
    resume: str | os.PathLike[str] | None = None,
    **parameters: Any,
) -> Scores:
    """The score of every edge by a registered method; positive = the edge helps the task.

    Raises InputError for an unknown method, parameter or metric, a parameter out of bounds, token ids that the model
    does not have, and a `resume` file of another run.

    Args:
        model: The model.
        graph: Its graph, of edges or nodes.
        pairs: The examples to score with.
        method: A name of `METHODS`.
        metric: A metric or its name.
        batch_size: How many examples are run at once; the result does not depend on it.
        progress: Called with the number of steps done, and of all.
        resume: A file that keeps the state of a long run, written every half minute. The next call with the same
            arguments resumes from it (another `batch_size` is refused where the state counts batches); the file is
            deleted when the scores are done.
        parameters: Parameters of the method by name: `steps=5` for `eap-ig`.
    """
    chosen = METHODS.get(method)
    settings = check_settings(f"method {method!r}", chosen.settings, parameters)
    metric = as_metric(metric)
    checkpoint = open_checkpoint(resume, model, graph, pairs, method, metric.name, settings)
    scores = raw_scores(
        model, graph, pairs, method=method, metric=metric, batch_size=batch_size, progress=progress,
        checkpoint=checkpoint, **parameters,
    )  # fmt: skip
    checkpoint.clear()
    return replace(scores, total=by_unit(graph, method, scores.total), pairs=pairs)


def raw_scores(
    model: HookManager,
    graph: Graph,
    pairs: Pairs,
    *,
    method: str,
    metric: MetricLike = "logit_diff",
    batch_size: int = 32,
    progress: Progress = no_progress,
    checkpoint: Checkpoint = UNSAVED,
    **parameters: Any,
) -> Scores:
    """What the method gives for every edge, before `by_unit`: what adds up over examples to the last bit."""
    chosen = METHODS.get(method)
    settings = check_settings(f"method {method!r}", chosen.settings, parameters)
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1; got {batch_size}.")
    check_graph(method, graph)
    check_model(model, graph, pairs)
    metric = as_metric(metric)
    return chosen.run(Job(model, graph, pairs, metric, settings, batch_size, progress, checkpoint))


def by_unit(graph: Graph, method: str, table: Float[Tensor, "reader writer"]) -> Float[Tensor, "reader writer"]:
    """The table of a method whose nodes score the sum of their edges, where nodes are chosen; others as they are."""
    return by_node(graph, table) if METHODS.get(method).graphs == "summed" and graph.level == "node" else table


def check_graph(method: str, graph: Graph) -> None:
    """Return None when the method takes the graph. Raises InputError for an unknown method, or one that does not."""
    if METHODS.get(method).graphs == "plain" and not graph.plain:
        others = ", ".join(sorted(name for name, one in METHODS.importable().items() if one.graphs != "plain"))
        raise InputError(
            f"Method {method!r} scores edges at all positions between heads and whole MLPs. For nodes, named "
            f"positions, neurons, experts and features take one of: {others}."
        )


def by_node(graph: Graph, table: Float[Tensor, "reader writer"]) -> Float[Tensor, "reader writer"]:
    """Every edge with the sum over all edges that are chosen with it."""
    units = graph.unit[graph.possible]
    sums = table.new_zeros(graph.n_units).index_add(0, units, table[graph.possible])
    out = torch.zeros_like(table)
    out[graph.possible] = sums[units]
    return out
