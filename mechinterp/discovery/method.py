"""The registry of methods, and `score_edges`, which runs one of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mechinterp.edges import check_model
from mechinterp.errors import InputError
from mechinterp.graph import Graph
from mechinterp.hooks import HookManager
from mechinterp.metrics import Metric, get_metric
from mechinterp.registry import Registry
from mechinterp.scores import Parameter, Scores
from mechinterp.tasks.pairs import Pairs


@dataclass(frozen=True)
class Method:
    """A way to score edges: `run(model, graph, pairs, metric, parameters, batch_size, progress) -> Scores`.

    `defaults` are its parameters with their default values; an unknown one is refused.
    """

    name: str
    title: str
    source: str
    run: Callable[..., Scores]
    defaults: Mapping[str, Parameter] = field(default_factory=dict[str, Parameter])
    threshold: float | None = None
    """Of a method that chooses the circuit itself: `select` with this threshold gives it."""


METHODS: Registry[Method] = Registry("method")

Progress = Callable[[int, int], None]
"""Called with (examples done, examples in all)."""


def no_progress(done: int, total: int) -> None:
    """Says nothing."""


def score_edges(
    model: HookManager,
    graph: Graph,
    pairs: Pairs,
    *,
    method: str = "eap-ig",
    metric: Metric | str = "logit_diff",
    batch_size: int = 32,
    progress: Progress = no_progress,
    **parameters: Any,
) -> Scores:
    """The score of every edge by a registered method; positive = the edge helps the task.

    Parameters of the method go by name (`steps=5` for `eap-ig`). The result does not depend on `batch_size`.
    Raises InputError for an unknown method, parameter or metric, and for token ids that the model does not have.
    """
    chosen = METHODS.get(method)
    unknown_names = sorted(set(parameters) - set(chosen.defaults))
    if unknown_names:
        known = ", ".join(sorted(chosen.defaults)) or "none"
        raise InputError(f"Method {method!r} has no parameter {unknown_names[0]!r}. Known: {known}.")
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1; got {batch_size}.")
    check_model(model, graph, pairs)
    metric = get_metric(metric) if isinstance(metric, str) else metric
    settings = {**chosen.defaults, **parameters}
    scores = chosen.run(model, graph, pairs, metric, settings, batch_size, progress)
    return replace(scores, pairs=pairs)
