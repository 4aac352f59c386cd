"""Edge attribution patching: `eap`, `eap-ig` (integrated gradients over the inputs) and `clean-corrupted`.

Source: Syed et al. 2023 (arXiv 2310.10348); Hanna et al. 2024 (arXiv 2403.17806). Deviations: the score is positive
when the edge helps (EAP-IG's code has the opposite sign); a mean over examples that does not depend on the batches;
the IG steps are k = 1..m as in the paper (EAP-IG's code takes 0..m-1: `schedule="left"`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from mechinterp.activation_paths import activation_path_gradients, n_groups
from mechinterp.discovery.method import METHODS, Method, Progress
from mechinterp.errors import InputError
from mechinterp.gradients import edge_gradients
from mechinterp.graph import Graph
from mechinterp.hooks import HookManager
from mechinterp.metrics import Metric
from mechinterp.registry import unknown
from mechinterp.replacement import build_replacement
from mechinterp.scores import Parameter, Scores
from mechinterp.tasks.pairs import Pairs

SCHEDULES = {
    "right": lambda k, m: (k + 1) / m,
    "left": lambda k, m: k / m,
    "midpoint": lambda k, m: (k + 0.5) / m,
}
"""Where on the way from the corrupt (0) to the clean input (1) the gradients are taken, for k = 0..m-1."""


def integration_points(steps: object, schedule: object) -> tuple[float, ...]:
    """The points of the path from corrupt (0) to clean (1). Raises InputError for a bad number or schedule.

    >>> integration_points(4, "right")
    (0.25, 0.5, 0.75, 1.0)
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= 1000:
        raise InputError(f"steps must be a whole number from 1 to 1000; got {steps!r}.")
    if schedule not in SCHEDULES:
        raise unknown("schedule", str(schedule), SCHEDULES)
    return tuple(SCHEDULES[str(schedule)](k, steps) for k in range(steps))


def _run(
    name: str,
    model: HookManager,
    graph: Graph,
    pairs: Pairs,
    metric: Metric,
    settings: Mapping[str, Parameter],
    alphas: tuple[float, ...],
    batch_size: int,
    progress: Progress,
) -> Scores:
    if metric.needs_reference and alphas == (1.0,):
        raise InputError(
            f"The gradient of {metric.name} at the clean run is 0, so {name!r} would score every edge 0; "
            "use method 'eap-ig' with several steps, or metric 'logit_diff'."
        )
    kind = str(settings["replacement"])
    replacement = build_replacement(kind, model, graph, pairs, batch_size)
    total = torch.zeros(graph.possible.shape, dtype=torch.promote_types(model.dtype, torch.float32))
    done = 0
    progress(0, len(pairs))
    for chunk in pairs.chunks(batch_size):
        part = edge_gradients(model, graph, chunk, metric, replacement=replacement, alphas=alphas)
        total += metric.direction * part.cpu()
        done += len(chunk)
        progress(done, len(pairs))
    forwards = 1 + len(alphas) + (1.0 not in alphas) + (kind != "corrupt" and kind != "zero")
    cost = {"forwards": forwards * len(pairs), "backwards": len(alphas) * len(pairs)}
    return Scores(graph, total, len(pairs), name, metric.name, kind, dict(settings), cost)


def _eap(
    model: HookManager,
    graph: Graph,
    pairs: Pairs,
    metric: Metric,
    settings: Mapping[str, Parameter],
    batch_size: int,
    progress: Progress,
) -> Scores:
    return _run("eap", model, graph, pairs, metric, settings, (1.0,), batch_size, progress)


def _eap_ig(
    model: HookManager,
    graph: Graph,
    pairs: Pairs,
    metric: Metric,
    settings: Mapping[str, Parameter],
    batch_size: int,
    progress: Progress,
) -> Scores:
    alphas = integration_points(settings["steps"], settings["schedule"])
    return _run("eap-ig", model, graph, pairs, metric, settings, alphas, batch_size, progress)


def _clean_corrupted(
    model: HookManager,
    graph: Graph,
    pairs: Pairs,
    metric: Metric,
    settings: Mapping[str, Parameter],
    batch_size: int,
    progress: Progress,
) -> Scores:
    return _run("clean-corrupted", model, graph, pairs, metric, settings, (0.0, 1.0), batch_size, progress)


def _activations(
    model: HookManager,
    graph: Graph,
    pairs: Pairs,
    metric: Metric,
    settings: Mapping[str, Parameter],
    batch_size: int,
    progress: Progress,
) -> Scores:
    alphas = integration_points(settings["steps"], settings["schedule"])
    if settings["replacement"] != "corrupt":
        raise InputError("'eap-ig-activations' goes from the corrupt to the clean activations: replacement 'corrupt'.")
    total = torch.zeros(graph.possible.shape, dtype=torch.promote_types(model.dtype, torch.float32))
    done = 0
    progress(0, len(pairs))
    for chunk in pairs.chunks(batch_size):
        total += metric.direction * activation_path_gradients(model, graph, chunk, metric, alphas).cpu()
        done += len(chunk)
        progress(done, len(pairs))
    runs = len(alphas) * n_groups(model)
    cost = {"forwards": (3 + runs) * len(pairs), "backwards": runs * len(pairs)}
    return Scores(graph, total, len(pairs), "eap-ig-activations", metric.name, "corrupt", dict(settings), cost)


METHODS.register(
    "eap",
    Method(
        "eap",
        "Edge attribution patching: gradient at the clean run",
        "Syed et al. 2023, arXiv 2310.10348",
        _eap,
        {"replacement": "corrupt"},
    ),
)
METHODS.register(
    "eap-ig",
    Method(
        "eap-ig",
        "Edge attribution patching with integrated gradients over the inputs",
        "Hanna et al. 2024, arXiv 2403.17806",
        _eap_ig,
        {"steps": 5, "schedule": "right", "replacement": "corrupt"},
    ),
)
METHODS.register(
    "eap-ig-activations",
    Method(
        "eap-ig-activations",
        "Edge attribution patching with integrated gradients over each layer's activations",
        "Hanna et al. 2024, arXiv 2403.17806; Mueller et al. 2025, arXiv 2504.13151",
        _activations,
        {"steps": 5, "schedule": "midpoint", "replacement": "corrupt"},
    ),
)
METHODS.register(
    "clean-corrupted",
    Method(
        "clean-corrupted",
        "Edge attribution patching: the mean of the gradients at the clean and at the corrupt run",
        "Hanna et al. 2024, arXiv 2403.17806",
        _clean_corrupted,
        {"replacement": "corrupt"},
    ),
)
