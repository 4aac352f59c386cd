"""Metrics of task performance: logits at the answer positions in, one number per example out.

A metric is never averaged over examples here: means, intervals and ratios belong to whoever asked, and a
score must not depend on how examples were cut into batches. Over several answer positions of one example the
value is the mean over the entries that the example has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.base.errors import InputError
from mechinterp.tasks.metric_names import METRICS

NO_ENTRY = -1


@runtime_checkable
class Answers(Protocol):
    """The part of `Pairs` that a metric reads; -1 means no entry."""

    @property
    def right(self) -> Int[Tensor, "batch n_right"] | None: ...

    @property
    def wrong(self) -> Int[Tensor, "batch n_wrong"] | None: ...

    @property
    def answer_pos(self) -> Int[Tensor, "batch n_answer"]: ...


AtPositions: TypeAlias = Callable[[Tensor, Tensor | None, Tensor | None, Tensor | None], Tensor]
"""(logits [batch, n_answer, d_vocab], right, wrong, reference logits) -> values [batch, n_answer]."""


@dataclass(frozen=True)
class Metric:
    """How well the task is done, per example.

    `direction` is +1 when a higher value is better and -1 when a lower one is; values are reported as they
    are named, so a KL stays positive. `unit` is that of the values. `columns_suffice` says that the answers'
    logits are all it needs, so that the rest of the unembedding need not be computed.
    """

    name: str
    at_positions: AtPositions
    direction: int
    unit: str
    needs_answers: bool
    needs_reference: bool
    columns_suffice: bool = False
    differentiable: bool = True
    needs_wrong: bool = True
    """Whether the answers that it needs include wrong ones."""

    def __post_init__(self) -> None:
        if self.direction not in (1, -1):
            raise InputError(f"Metric {self.name!r}: direction must be 1 or -1; got {self.direction!r}.")
        if self.columns_suffice and (self.needs_reference or not self.needs_answers):
            raise InputError(
                f"Metric {self.name!r}: columns_suffice is for metrics of the answers' logits alone "
                "(needs_answers, no reference)."
            )

    def __call__(
        self,
        logits: Float[Tensor, "batch n_answer d_vocab"],
        pairs: Answers,
        reference: Float[Tensor, "batch n_answer d_vocab"] | None = None,
    ) -> Float[Tensor, " batch"]:
        """One value per example, in float32 or better, differentiable in `logits`.

        `logits[:, i]` are those at `pairs.answer_pos[:, i]`; what stands where that is -1 is ignored.
        `reference` are the logits of the clean run. Raises InputError when something needed is missing.
        """
        self.check_answers(pairs)
        self._check_shapes(logits, pairs, reference)
        reference = at_least_float32(reference) if reference is not None and self.needs_reference else None
        return self._mean_over_entries(logits, pairs, pairs.right, pairs.wrong, reference)

    def columns(self, pairs: Answers) -> Int[Tensor, " n_columns"] | None:
        """The sorted token ids whose logits suffice, or None when the whole vocabulary is needed."""
        if not self.columns_suffice:
            return None
        self.check_answers(pairs)
        ids = torch.cat([table.flatten() for table in (pairs.right, pairs.wrong) if table is not None])
        return ids[ids != NO_ENTRY].unique(sorted=True)

    def on_columns(
        self,
        logits: Float[Tensor, "batch n_answer n_columns"],
        columns: Int[Tensor, " n_columns"],
        pairs: Answers,
    ) -> Float[Tensor, " batch"]:
        """The same values from the logits of `columns` only; `columns` may serve more than these pairs."""
        if not self.columns_suffice:
            raise InputError(f"Metric {self.name!r} needs the logits of the whole vocabulary.")
        self.check_answers(pairs)
        self._check_shapes(logits, pairs, None)
        right, wrong = _places(pairs.right, columns), _places(pairs.wrong, columns)
        return self._mean_over_entries(logits, pairs, right, wrong, None)

    def check_answers(self, pairs: Answers) -> None:
        """Return None when `pairs` hold the answers this metric needs. Raises InputError otherwise."""
        if self.needs_answers and (pairs.right is None or (self.needs_wrong and pairs.wrong is None)):
            absent = "right" if pairs.right is None else "wrong"
            raise InputError(
                f"Metric {self.name!r} needs right{' and wrong' * self.needs_wrong} answers, but the pairs have no "
                f"{absent} ones. "
                f"Give them, or use one of: {', '.join(_without_answers())}."
            )

    def _check_shapes(self, logits: Tensor, pairs: Answers, reference: Tensor | None) -> None:
        expected = tuple(pairs.answer_pos.shape)
        if logits.ndim != 3 or tuple(logits.shape[:2]) != expected:
            raise InputError(
                f"Metric {self.name!r} takes logits [batch, n_answer, d_vocab] at the answer positions, here "
                f"[{expected[0]}, {expected[1]}, ...]; got {tuple(logits.shape)}."
            )
        if self.needs_reference and reference is None:
            raise InputError(f"Metric {self.name!r} needs the clean run's logits as `reference`.")
        if self.needs_reference and reference is not None and reference.shape != logits.shape:
            raise InputError(
                f"Metric {self.name!r}: reference must have the shape of logits, {tuple(logits.shape)}; got "
                f"{tuple(reference.shape)}."
            )

    def _mean_over_entries(
        self,
        logits: Tensor,
        pairs: Answers,
        right: Tensor | None,
        wrong: Tensor | None,
        reference: Tensor | None,
    ) -> Float[Tensor, " batch"]:
        valid = pairs.answer_pos != NO_ENTRY
        if valid.shape[1] > 1:
            # Before, not after: an infinity where there is no entry must not reach the gradient either.
            logits = torch.where(valid[:, :, None], logits, 0)
            reference = None if reference is None else torch.where(valid[:, :, None], reference, 0)
        values = self.at_positions(logits, right, wrong, reference)
        return torch.where(valid, values, 0).sum(1) / valid.sum(1)


def at_least_float32(values: Tensor) -> Tensor:
    """`values` in float32, or as they are when they are finer."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _places(ids: Int[Tensor, "batch n"] | None, columns: Int[Tensor, " n_columns"]) -> Tensor | None:
    """Where in `columns` each id stands; -1 stays."""
    if ids is None:
        return None
    columns = columns.to(ids.device)
    places = torch.searchsorted(columns, ids.clamp(min=0)).clamp(max=len(columns) - 1)
    absent = (columns[places] != ids) & (ids != NO_ENTRY)
    if bool(absent.any()):
        raise InputError(f"The columns lack the logits of answer {int(ids[absent][0])}.")
    return torch.where(ids == NO_ENTRY, NO_ENTRY, places)


def _answers(values: Tensor, ids: Tensor | None, absent: float) -> Float[Tensor, "batch n_answer n"]:
    """The entries of `values` [batch, n_answer, d_vocab] at `ids`; `absent` where an id is -1."""
    ids = _given(ids)
    index = ids.clamp(min=0)[:, None, :].expand(-1, values.shape[1], -1)
    found = at_least_float32(values.gather(2, index))
    return torch.where((ids == NO_ENTRY)[:, None, :], absent, found)


def _given(values: Tensor | None) -> Tensor:
    if values is None:
        raise InputError("The metric needs right and wrong answers, or the clean run's logits; none are given.")
    return values


def _mean_answer(logits: Tensor, ids: Tensor | None) -> Float[Tensor, "batch n_answer"]:
    ids = _given(ids)
    return _answers(logits, ids, absent=0.0).sum(2) / (ids != NO_ENTRY).sum(1, keepdim=True)


def _logit_diff(
    logits: Tensor, right: Tensor | None, wrong: Tensor | None, reference: Tensor | None
) -> Float[Tensor, "batch n_answer"]:
    return _mean_answer(logits, right) - _mean_answer(logits, wrong)


def _prob_diff(
    logits: Tensor, right: Tensor | None, wrong: Tensor | None, reference: Tensor | None
) -> Float[Tensor, "batch n_answer"]:
    probabilities = at_least_float32(logits).softmax(-1)
    return _answers(probabilities, right, 0.0).sum(2) - _answers(probabilities, wrong, 0.0).sum(2)


def _prob(
    logits: Tensor, right: Tensor | None, wrong: Tensor | None, reference: Tensor | None
) -> Float[Tensor, "batch n_answer"]:
    return _answers(at_least_float32(logits).softmax(-1), right, 0.0).sum(2)


def _log_prob(
    logits: Tensor, right: Tensor | None, wrong: Tensor | None, reference: Tensor | None
) -> Float[Tensor, "batch n_answer"]:
    return _answers(at_least_float32(logits).log_softmax(-1), right, -torch.inf).logsumexp(2)


def _accuracy(
    logits: Tensor, right: Tensor | None, wrong: Tensor | None, reference: Tensor | None
) -> Float[Tensor, "batch n_answer"]:
    best_right = _answers(logits, right, -torch.inf).amax(2)
    best_wrong = _answers(logits, wrong, -torch.inf).amax(2)
    return (best_right > best_wrong).to(best_right.dtype)


def _kl_to_clean(
    logits: Tensor, right: Tensor | None, wrong: Tensor | None, reference: Tensor | None
) -> Float[Tensor, "batch n_answer"]:
    ours, clean = (at_least_float32(_given(values)).log_softmax(-1) for values in (logits, reference))
    return torch.nn.functional.kl_div(ours, clean, reduction="none", log_target=True).sum(-1)


def _l2_to_clean(
    logits: Tensor, right: Tensor | None, wrong: Tensor | None, reference: Tensor | None
) -> Float[Tensor, "batch n_answer"]:
    return torch.linalg.vector_norm(at_least_float32(logits) - _given(reference), dim=-1)


def _direction(
    logits: Tensor, right: Tensor | None, wrong: Tensor | None, reference: Tensor | None
) -> Float[Tensor, "batch n_answer"]:
    if logits.shape[-1] != 2:
        raise InputError(
            "The metric 'direction' reads a direction; the model must be `read_direction(model, direction)`."
        )
    return at_least_float32(logits[..., 0]) - at_least_float32(logits[..., 1])


logit_diff = Metric("logit_diff", _logit_diff, +1, "logits", True, False, columns_suffice=True)
"""Mean logit of the right answers minus mean logit of the wrong ones."""

prob_diff = Metric("prob_diff", _prob_diff, +1, "probability", True, False)
"""Probability of all right answers together minus that of all wrong ones together, in [-1, 1]."""

prob = Metric("prob", _prob, +1, "probability", True, False, needs_wrong=False)
"""Probability of all right answers together."""

log_prob = Metric("log_prob", _log_prob, +1, "nats", True, False, needs_wrong=False)
"""Log of the probability of all right answers together."""

accuracy = Metric("accuracy", _accuracy, +1, "fraction", True, False, columns_suffice=True, differentiable=False)
"""1 where the highest right answer's logit is above every wrong answer's (a tie counts as 0), else 0."""

kl_to_clean = Metric("kl_to_clean", _kl_to_clean, -1, "nats", False, True)
"""KL(clean || this), the sum over the vocabulary in nats. Its gradient at the clean run itself is 0."""

l2_to_clean = Metric("l2_to_clean", _l2_to_clean, -1, "logits", False, True)
"""Euclidean distance of the logit vectors. Unlike KL it also sees a shift of all logits alike."""


direction = Metric("direction", _direction, +1, "units of the direction", False, False)
"""The reading of a direction (1 = the distance of the classes' means), of a model that `read_direction` has made."""


def get_metric(name: str) -> Metric:
    """The registered metric of that name. Raises InputError, with the nearest name, when there is none."""
    return METRICS.get(name)


def register_metric(metric: Metric) -> Metric:
    """Return `metric` after registering it under its own name. Raises InputError when the name is taken."""
    return METRICS.register(metric.name, metric)


def metric_names() -> tuple[str, ...]:
    """The names of all registered metrics, sorted."""
    return METRICS.names()


def _without_answers() -> tuple[str, ...]:
    return tuple(sorted(name for name, metric in METRICS.importable().items() if not metric.needs_answers))
