"""A metric from a function of two arguments: `metric=lambda logits, pairs: ...`, or `@metric(direction="lower")`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.base.errors import InputError, clip
from mechinterp.base.registry import unknown
from mechinterp.tasks.metric_names import METRICS
from mechinterp.tasks.metrics import NO_ENTRY, Answers, Metric, at_least_float32, get_metric

Function: TypeAlias = Callable[[Tensor, Any], Tensor]
"""(logits `[batch, n_answer, d_vocab]`, pairs) -> values `[batch]` or `[batch, n_answer]`."""
MetricLike: TypeAlias = Metric | str | Function
"""A metric, the name of a registered one, or a function of logits and pairs, of which a higher value is better."""
DIRECTIONS = {"higher": +1, "lower": -1}


def metric(
    function: Function | None = None,
    *,
    direction: str = "higher",
    name: str | None = None,
    unit: str = "",
    differentiable: bool = True,
) -> Any:
    """The metric of a function; as a decorator, with or without arguments.

    The function gets the logits at the answer positions, `[batch, n_answer, d_vocab]` in float32 or better (mostly
    `n_answer` is 1, so that `logits[:, -1]` are the logits at the end), and the pairs of these rows: `pairs.right` and
    `pairs.wrong` `[batch, n]` with -1 where a row has fewer, `pairs.clean`, `pairs.positions`. It returns one number
    per example, `[batch]`; or `[batch, n_answer]`, whose mean over the answers that an example has is taken. An example
    must not depend on the others of its batch.

    Args:
        function: The function; None if more arguments are given in the decorator.
        direction: Which values are better: `higher` or `lower`.
        name: Its name; by default the function's.
        unit: The unit of the values, such as `logits`.
        differentiable: Whether gradients go through it; if not, methods that need gradients refuse it.

    Raises InputError for another direction, the name of a registered metric, and a function that does not take two
    arguments.

    To save a circuit that was scored or evaluated with it, register it (`mi.register_metric`): a file states metrics by
    name.

    >>> import mechinterp as mi
    >>> @mi.metric(direction="higher", unit="logits")
    ... def right_logit(logits, pairs):
    ...     return logits[:, -1].gather(1, pairs.right).mean(1)
    >>> model, task = mi.load_model("bundled"), mi.load_task("ioi")
    >>> pairs = task.pairs(model, n=4)
    >>> effects = mi.activation_patching(model, pairs, "z", metric=right_logit)
    >>> wrong_too = mi.activation_patching(model, pairs, "z", metric=lambda logits, pairs: logits[:, -1].mean(1))
    >>> effects.about["metric"], wrong_too.about["metric"]
    ('right_logit', 'own metric')
    """
    if direction not in DIRECTIONS:
        raise unknown("direction", direction, DIRECTIONS)

    def made(given: Function) -> FunctionMetric:
        _check_arguments(given)
        own = name or str(getattr(given, "__name__", "")).replace("<lambda>", "") or "own metric"
        if own in METRICS:
            raise InputError(f"A metric named {own!r} is registered already; give this one another `name`.")
        return FunctionMetric(
            own, _unused, DIRECTIONS[direction], unit, False, False, False, differentiable, False, function=given
        )

    return made if function is None else made(function)


def as_metric(given: MetricLike) -> Metric:
    """The metric itself, the one of a name, or that of a function. Raises InputError for anything else."""
    if isinstance(given, str):
        return get_metric(given)
    if isinstance(given, Metric):
        return given
    if not callable(given):
        raise InputError(f"A metric is a name, a Metric, or a function (logits, pairs); got {type(given).__name__}.")
    return cast(Metric, metric(given))


@dataclass(frozen=True)
class FunctionMetric(Metric):
    """A metric that a function of logits and pairs computes; made by `metric`."""

    function: Function = lambda logits, pairs: logits

    def __call__(
        self,
        logits: Float[Tensor, "batch n_answer d_vocab"],
        pairs: Answers,
        reference: Float[Tensor, "batch n_answer d_vocab"] | None = None,
    ) -> Float[Tensor, " batch"]:
        """One value per example. Raises InputError if the function returns something else."""
        self._check_shapes(logits, pairs, None)
        valid = pairs.answer_pos != NO_ENTRY
        if valid.shape[1] > 1:
            logits = torch.where(valid[:, :, None], logits, 0)
        values = self._checked(self.function(at_least_float32(logits), pairs), logits, pairs)
        if values.ndim > 1:
            return torch.where(valid, values, 0).sum(1) / valid.sum(1)
        if valid.shape[1] > 1:
            self._reads_answers_only(values.detach(), logits.detach(), valid, pairs)
        return values

    def _reads_answers_only(self, values: Tensor, logits: Tensor, valid: Tensor, pairs: Answers) -> None:
        """Return None if other logits at answers that an example does not have give the same values.

        Otherwise the value of an example would depend on how many answers the others of its batch have.
        """
        if bool(valid.all()):
            return
        other = torch.arange(logits.shape[-1], dtype=logits.dtype, device=logits.device)
        changed = self.function(at_least_float32(torch.where(valid[:, :, None], logits, other)), pairs)
        if not torch.equal(at_least_float32(changed.detach()), values):
            raise InputError(
                f"Metric {self.name!r} reads an answer position that some examples do not have (their "
                "pairs.answer_pos is -1 there); return one number per answer, [batch, n_answer]: the mean over the "
                "answers that an example has is then taken."
            )

    def _checked(self, values: Any, logits: Tensor, pairs: Answers) -> Tensor:
        batch, n_answer = pairs.answer_pos.shape
        if not isinstance(values, Tensor) or tuple(values.shape) not in ((batch,), (batch, n_answer)):
            got = f"shape {list(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
            raise InputError(
                f"Metric {self.name!r} must return one number per example, [{batch}] here (or [batch, n_answer], "
                f"[{batch}, {n_answer}]); got {got}. It is not averaged over the examples: means and intervals are "
                "taken later."
            )
        if self.differentiable and logits.requires_grad and not values.requires_grad:
            raise InputError(
                f"No gradient goes through the metric {self.name!r} (argmax, comparisons and .detach() stop it); take "
                "a method without gradients, such as 'exact', and say so with @mi.metric(differentiable=False)."
            )
        return at_least_float32(values)


def _unused(logits: Tensor, right: Tensor | None, wrong: Tensor | None, reference: Tensor | None) -> Tensor:
    raise NotImplementedError("a FunctionMetric is computed by its function")


def _check_arguments(function: Function) -> None:
    """Return None if the function can be called with two arguments. Raises InputError otherwise."""
    if not callable(function):
        raise InputError(f"A metric is a function (logits, pairs); got {clip(repr(function), 60)}.")
    try:
        inspect.signature(function).bind(None, None)
    except TypeError:
        raise InputError(
            f"The metric {getattr(function, '__name__', 'given')!r} must take two arguments, (logits, pairs); it takes "
            f"{inspect.signature(function)}."
        ) from None
    except ValueError:  # written in C: Python does not know its arguments
        return
