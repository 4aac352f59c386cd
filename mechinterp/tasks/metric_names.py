"""`METRICS`: the metrics by name. Listing them needs no torch; a metric is imported when it is first used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mechinterp.base.registry import Entry, Registry

if TYPE_CHECKING:
    from mechinterp.tasks.metrics import Metric

HOME = "mechinterp.tasks.metrics"
METRICS: Registry[Metric] = Registry(
    "metric",
    {
        "logit_diff": Entry(f"{HOME}:logit_diff", "right answers' logits minus wrong ones'"),
        "prob": Entry(f"{HOME}:prob", "probability of the right answers"),
        "log_prob": Entry(f"{HOME}:log_prob", "log of the probability of the right answers"),
        "prob_diff": Entry(f"{HOME}:prob_diff", "right answers' probability minus wrong ones'"),
        "accuracy": Entry(f"{HOME}:accuracy", "right answer above every wrong one; only for evaluating"),
        "kl_to_clean": Entry(f"{HOME}:kl_to_clean", "KL(full model || circuit), needs no answers"),
        "l2_to_clean": Entry(f"{HOME}:l2_to_clean", "distance of the logits, needs no answers"),
        "direction": Entry(
            f"{HOME}:direction", "reading of a direction: `run --direction`, or `read_direction` in Python"
        ),
    },
    plugins="mechinterp.metrics",
    type=f"{HOME}:Metric",
)
