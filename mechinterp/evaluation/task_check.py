"""Does the model do the task? Its accuracy, and its metric on clean and corrupt prompts, before anything is explained.

A circuit of a model that cannot do the task explains noise: faithfulness is a ratio of two differences near zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.base.batches import over_batches
from mechinterp.base.bootstrap import bootstrap_interval
from mechinterp.base.errors import InputError
from mechinterp.engines.readout import answer_logits
from mechinterp.models.hook_manager import HookManager
from mechinterp.tasks.metrics import get_metric
from mechinterp.tasks.own_metric import MetricLike, as_metric
from mechinterp.tasks.pairs import Pairs

CHANCE = 0.5
"""The accuracy of answers at random: a right and a wrong answer are compared."""


@dataclass(frozen=True)
class TaskCheck:
    """How well the full model does the task. Metric values are in the metric's unit, means over examples.

    `difference` is the metric of the clean prompts minus that of the corrupt ones, signed so that positive is better,
    with a bootstrap interval over examples.
    """

    metric: str
    n_examples: int
    clean: float
    corrupt: float
    difference: float
    difference_ci: tuple[float, float]
    accuracy: float | None
    """The share of examples whose right answer beats the wrong one; None without answers."""
    accuracy_ci: tuple[float, float] | None
    by_template: tuple[tuple[str, int, float | None, float], ...] = ()
    """Per template: its text, its examples, their accuracy and their mean difference."""
    seed: int = 0
    """Of the interval of the difference."""

    @property
    def failures(self) -> tuple[str, ...]:
        """Why there is nothing to explain, one sentence each; empty if the model does the task."""
        found: list[str] = []
        low, high = self.difference_ci
        if not low > 0:
            found.append(
                f"{self.metric} of clean prompts is not above that of corrupt ones ({self.clean:.3g} and "
                f"{self.corrupt:.3g}, difference {self.difference:.3g} [{low:.3g}, {high:.3g}])"
            )
        if self.accuracy is not None and self.accuracy_ci is not None and self.accuracy_ci[0] <= CHANCE:
            low, high = self.accuracy_ci
            found.append(f"accuracy {self.accuracy:.0%} [{low:.0%}, {high:.0%}] is not above chance ({CHANCE:.0%})")
        return tuple(found)

    def to_frame(self) -> pd.DataFrame:
        """One row per template and one for all: template, examples, accuracy, difference."""
        rows = [*self.by_template, ("all", self.n_examples, self.accuracy, self.difference)]
        return pd.DataFrame(rows, columns=["template", "examples", "accuracy", "difference"])


def check_performance(
    model: HookManager,
    pairs: Pairs,
    *,
    metric: MetricLike = "logit_diff",
    templates: Sequence[str] | None = None,
    batch_size: int = 32,
    seed: int = 0,
) -> TaskCheck:
    """How well the model does the task on these pairs. Cost: a forward of the clean and of the corrupt prompts.

    Args:
        model: The model.
        pairs: The examples.
        metric: Task performance, or its name.
        templates: The template of each example, for a breakdown.
        batch_size: How many examples to run at a time.
        seed: The seed of the bootstrap.

    Raises:
        InputError: If the metric needs answers that the pairs do not have, or `templates` has another length.
    """
    metric = as_metric(metric)
    if templates is not None and len(templates) != len(pairs):
        raise InputError(f"There are {len(pairs)} pairs, but {len(templates)} templates.")
    has_answers = pairs.right is not None and pairs.wrong is not None
    accuracy = get_metric("accuracy")

    def run(batch: Pairs, rows: slice) -> dict[str, Tensor]:
        clean, corrupt = (answer_logits(model, tokens, batch) for tokens in (batch.clean, batch.corrupt))
        columns = [metric(clean, batch, clean), metric(corrupt, batch, clean)]
        if has_answers:
            columns.append(accuracy(clean, batch, clean).to(columns[0].dtype))
        return {"table": torch.stack(columns, 1).cpu()}

    table = over_batches(pairs.to(model.device), batch_size, run, {"table": 0})["table"].double()
    difference = metric.direction * (table[:, 0] - table[:, 1])
    right = table[:, 2] if has_answers else None
    return TaskCheck(
        metric=metric.name,
        n_examples=len(pairs),
        clean=float(table[:, 0].mean()),
        corrupt=float(table[:, 1].mean()),
        difference=float(difference.mean()),
        difference_ci=bootstrap_interval(_mean, difference[:, None], seed=seed),
        accuracy=None if right is None else float(right.mean()),
        accuracy_ci=None if right is None else wilson_interval(float(right.mean()), len(pairs)),
        by_template=_by_template(templates, right, difference),
        seed=seed,
    )


def wilson_interval(share: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % interval of a share of n examples (Wilson 1927), which has a width even where all are right.

    >>> [round(bound, 3) for bound in wilson_interval(1.0, 20)]
    [0.839, 1.0]
    """
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


def _mean(rows: Float[Tensor, "resample example 1"]) -> Float[Tensor, " resample"]:
    return rows.mean(1)[:, 0]


def _by_template(
    templates: Sequence[str] | None, right: Tensor | None, difference: Tensor
) -> tuple[tuple[str, int, float | None, float], ...]:
    rows: list[tuple[str, int, float | None, float]] = []
    for template in dict.fromkeys(templates or ()):
        mine = torch.tensor([one == template for one in templates or ()])
        accuracy = None if right is None else float(right[mine].mean())
        rows.append((template, int(mine.sum()), accuracy, float(difference[mine].mean())))
    return tuple(rows)
