"""Edge attribution patching: `eap`, `eap-ig` (integrated gradients over the inputs), `eap-ig-activations`, `eap-gp` and
`clean-corrupted`.

Source: Syed et al. 2023 (arXiv 2310.10348); Hanna et al. 2024 (arXiv 2403.17806). Deviations: the score is positive
when the edge helps (EAP-IG's code has the opposite sign); a mean over examples that does not depend on the batches;
the IG steps are k = 1..m as in the paper (EAP-IG's code takes 0..m-1: `schedule="left"`).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from torch import Tensor

from mechinterp.base.errors import InputError
from mechinterp.base.settings import Setting
from mechinterp.discovery.keystones import KEYSTONES, keystone_forwards, repaired
from mechinterp.discovery.method import REPLACEMENT, Job, Method
from mechinterp.engines.edge_attribution import activation_path_gradients, edge_gradients, n_groups
from mechinterp.engines.gradient_path import gradient_path
from mechinterp.engines.replacement import build_replacement
from mechinterp.graphs.scores import Scores
from mechinterp.tasks.pairs import Pairs

SCHEDULES = {
    "right": lambda k, m: (k + 1) / m,
    "left": lambda k, m: k / m,
    "midpoint": lambda k, m: (k + 0.5) / m,
}
"""Where on the way from the corrupt (0) to the clean input (1) the gradients are taken, for k = 0..m-1."""
STEPS = Setting(5, "points of the path at which gradients are taken", least=1, most=1000)
SCHEDULE = Setting("right", "where these points are", choices=tuple(SCHEDULES))


def integration_points(steps: object, schedule: object) -> tuple[float, ...]:
    """The points of the path from corrupt (0) to clean (1). Raises InputError for a bad number or schedule.

    >>> integration_points(4, "right")
    (0.25, 0.5, 0.75, 1.0)
    """
    n, place = int(STEPS.check("steps", steps)), SCHEDULES[str(SCHEDULE.check("schedule", schedule))]
    return tuple(place(k, n) for k in range(n))


def _run(name: str, alphas: tuple[float, ...] | None, job: Job) -> Scores:
    if alphas is None:
        alphas = integration_points(job.settings["steps"], job.settings["schedule"])
    if job.metric.needs_reference and alphas == (1.0,):
        raise InputError(
            f"The gradient of {job.metric.name} at the clean run is 0, so {name!r} would score every edge 0; "
            "use method 'eap-ig' with several steps, or metric 'logit_diff'."
        )
    replacement = build_replacement(job.replacement, job.model, job.graph, job.pairs, job.batch_size)

    def of(chunk: Pairs) -> Tensor:
        found = edge_gradients(job.model, job.graph, chunk, job.metric, replacement=replacement, alphas=alphas)
        return job.metric.direction * found

    total = job.sum_over_batches(repaired(job, of, replacement))
    forwards = 1 + len(alphas) + (1.0 not in alphas) + (job.replacement != "corrupt" and job.replacement != "zero")
    forwards += keystone_forwards(job)
    return job.scores(name, total, {"forwards": forwards * len(job.pairs), "backwards": len(alphas) * len(job.pairs)})


def _activations(job: Job) -> Scores:
    alphas = integration_points(job.settings["steps"], job.settings["schedule"])
    total = job.sum_over_batches(
        lambda chunk: job.metric.direction * activation_path_gradients(job.model, job.graph, chunk, job.metric, alphas)
    )
    runs = len(alphas) * n_groups(job.graph) * len(job.pairs)
    return job.scores("eap-ig-activations", total, {"forwards": 3 * len(job.pairs) + runs, "backwards": runs})


def _gradient_path(job: Job) -> Scores:
    steps, length = int(job.settings["steps"]), float(job.settings["length"])
    replacement = build_replacement(job.replacement, job.model, job.graph, job.pairs, job.batch_size)

    def of(chunk: Pairs) -> Tensor:
        points = gradient_path(job.model, job.graph, chunk, steps, length)
        found = edge_gradients(job.model, job.graph, chunk, job.metric, replacement=replacement, points=points)
        return job.metric.direction * found

    total = job.sum_over_batches(repaired(job, of, replacement))
    own = job.replacement not in ("corrupt", "zero")
    forwards = 3 + 2 * steps + own + job.metric.needs_reference + keystone_forwards(job)
    return job.scores("eap-gp", total, {"forwards": forwards * len(job.pairs), "backwards": 2 * steps * len(job.pairs)})


EAP = Method(
    "eap",
    "Edge attribution patching: gradient at the clean run",
    "Syed et al. 2023, arXiv 2310.10348",
    partial(_run, "eap", (1.0,)),
    {"replacement": REPLACEMENT, "keystones": KEYSTONES},
    graphs="summed",
    additive=True,
)
EAP_IG = Method(
    "eap-ig",
    "Edge attribution patching with integrated gradients over the inputs",
    "Hanna et al. 2024, arXiv 2403.17806",
    partial(_run, "eap-ig", None),
    {"steps": STEPS, "schedule": SCHEDULE, "replacement": REPLACEMENT, "keystones": KEYSTONES},
    graphs="summed",
    additive=True,
)
EAP_IG_ACTIVATIONS = Method(
    "eap-ig-activations",
    "Edge attribution patching with integrated gradients over each layer's activations",
    "Hanna et al. 2024, arXiv 2403.17806; Mueller et al. 2025, arXiv 2504.13151",
    _activations,
    {
        "steps": STEPS,
        "schedule": replace(SCHEDULE, default="midpoint"),
        "replacement": replace(REPLACEMENT, choices=("corrupt",)),
    },
    additive=True,
)
EAP_GP = Method(
    "eap-gp",
    "Edge attribution patching along a path that descends from the clean output to the corrupt one (GradPath)",
    "Zhang et al. 2025, arXiv 2502.06852",
    _gradient_path,
    {
        "steps": STEPS,
        "length": Setting(1.0, "the length of a step, in the units of the residual stream", above=0),
        "replacement": REPLACEMENT,
        "keystones": KEYSTONES,
    },
    graphs="summed",
    additive=True,
)
CLEAN_CORRUPTED = Method(
    "clean-corrupted",
    "Edge attribution patching: the mean of the gradients at the clean and at the corrupt run",
    "Hanna et al. 2024, arXiv 2403.17806",
    partial(_run, "clean-corrupted", (0.0, 1.0)),
    {"replacement": REPLACEMENT, "keystones": KEYSTONES},
    graphs="summed",
    additive=True,
)
