"""`Readout`: the metric of one batch of pairs, read off the final residual stream or the logits of a run.

A metric compares logits at the answer positions, some metrics with the clean run's logits, others from the answers'
columns of the unembedding alone. What it needs is found once for a batch; every run of these pairs is then read alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.base.errors import InputError
from mechinterp.graphs.token_positions import take_positions
from mechinterp.models.direction_readout import DirectionReadout
from mechinterp.models.hook_manager import HookManager
from mechinterp.models.layout import Layout
from mechinterp.models.sites import Site
from mechinterp.tasks.metrics import Metric
from mechinterp.tasks.own_metric import MetricLike, as_metric
from mechinterp.tasks.pairs import Pairs

FINAL = Site("resid_final")


@dataclass(frozen=True, eq=False)
class Readout:
    """The metric of one batch of pairs, with all that it needs; made by `metric_readout`."""

    layout: Layout
    pairs: Pairs
    metric: Metric
    columns: Int[Tensor, " n_columns"] | None
    """The token ids whose logits suffice; None: the metric needs the whole vocabulary."""
    reference: Float[Tensor, "batch n_answer d_vocab"] | None
    """The clean run's logits, if the metric compares with them."""

    def of_logits(self, logits: Float[Tensor, "batch n_answer n_columns"]) -> Float[Tensor, " batch"]:
        """The metric of every example from the logits of `columns` at the answer positions; differentiable."""
        if self.columns is None:
            return self.metric(logits, self.pairs, self.reference)
        return self.metric.on_columns(logits, self.columns, self.pairs)

    def of_answers(self, resid: Float[Tensor, "*run batch n_answer d_model"]) -> Float[Tensor, "*run batch"]:
        """The metric of one run or several from the final residual stream at the answer positions; differentiable."""
        logits = self.layout.unembed(resid, self.columns)
        if logits.ndim == 3:
            return self.of_logits(logits)
        return torch.stack([self.of_logits(own) for own in logits])

    def of_resid(self, resid: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, " batch"]:
        """The metric of every example from its final residual stream, in float32 or better; differentiable."""
        return self.of_answers(answer_rows(resid, self.pairs.answer_pos))

    def of_runs(self, resid: Float[Tensor, "rows pos d_model"], n: int, first: int) -> Float[Tensor, "run batch"]:
        """The metric of `n` runs side by side, whose rows are run by run and whose first position is `first`."""
        at = (self.pairs.answer_pos - first).clamp(min=-1).repeat(n, 1)
        return self.of_answers(answer_rows(resid, at).unflatten(0, (n, len(self.pairs))))


def checked_metric(model: HookManager, pairs: Pairs, metric: MetricLike) -> Metric:
    """The metric, or that of the name, when the pairs have the answers it needs and tokens of the model.

    Raises InputError for an unknown name, missing answers, and token ids outside the model's vocabulary.
    """
    metric = as_metric(metric)
    metric.check_answers(pairs)
    if isinstance(model, DirectionReadout) and pairs.right is not None:
        raise InputError(
            "The model reads a direction, which has no right answers; give `direction.pairs(pairs)`, the same prompts "
            "without answers, read at the direction's position."
        )
    pairs.check_vocabulary(model.dims.d_vocab, model.dims.d_vocab_out)
    return metric


def metric_readout(model: HookManager, pairs: Pairs, metric: Metric) -> Readout:
    """The readout of a batch. Cost: a forward of the clean prompts if the metric compares with their logits."""
    reference = clean_logits(model, pairs) if metric.needs_reference else None
    return readout_with(model, pairs, metric, reference)


def readout_with(model: HookManager, pairs: Pairs, metric: Metric, reference: Tensor | None) -> Readout:
    """The readout of a batch where the clean run's logits (None: not needed) are already there."""
    return Readout(model.layout, pairs, metric, metric.columns(pairs), reference)


def answer_rows(
    resid: Float[Tensor, "batch pos d_model"], at: Int[Tensor, "batch n_answer"]
) -> Float[Tensor, "batch n_answer d_model"]:
    """The residual stream at the answer positions, in float32 or better (position 0 where an entry is -1)."""
    return take_positions(resid, at).to(torch.promote_types(resid.dtype, torch.float32))


def clean_logits(model: HookManager, pairs: Pairs) -> Float[Tensor, "batch n_answer d_vocab"]:
    """The clean run's logits at the answer positions. One forward."""
    return answer_logits(model, pairs.clean, pairs)


def answer_logits(
    model: HookManager, tokens: Int[Tensor, "batch pos"], pairs: Pairs
) -> Float[Tensor, "batch n_answer d_vocab"]:
    """The logits at the answer positions of any prompts of the shape of the pairs. One forward."""
    run = model.run(tokens, pairs.mask, record=[FINAL], stop=FINAL)
    return model.layout.unembed(take_positions(run.values[FINAL], pairs.answer_pos))


def metric_values(
    model: HookManager,
    pairs: Pairs,
    metric: Metric,
    resid: Float[Tensor, "batch pos d_model"],
    reference: Float[Tensor, "batch n_answer d_vocab"] | None = None,
) -> Float[Tensor, " batch"]:
    """`Readout.of_resid` for a metric that is read once; `reference` are the clean run's logits."""
    return readout_with(model, pairs, metric, reference).of_resid(resid)
