"""What was measured: the records of discovery, selection, evaluation, curve, performance and stability."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mechinterp.circuit_file.field_types import Count, Label, Named, Number, Parameter, Seed, Share, Text
from mechinterp.circuit_file.limits import MAX_POINTS, MAX_RANDOM
from mechinterp.tasks.schema import Strict

SCORE_SIGN = "positive = the edge helps the task"


class MetricRecord(Strict):
    """How the task is measured, at the answer positions of the pairs."""

    name: Label
    direction: Literal["higher is better", "lower is better"]
    unit: Label
    positions: Literal["answer_pos"] = "answer_pos"


class SizeRule(Strict):
    """How the number of edges was chosen by default. Version 0.1 had the first rule, with `target`."""

    rule: Literal[
        "smallest size whose faithfulness reaches the target",
        "smallest size that passes, as does the next larger one",
    ] = "smallest size whose faithfulness reaches the target"
    target: Number | None = None
    low: Number | None = None
    """A size passes if the interval of its faithfulness lies in [low, high] ..."""
    high: Number | None = None
    kl_share: Number | None = None
    """... and its KL divergence is at most this share of the empty circuit's."""
    most: Share | None = None
    """The largest share of the graph that counts as an answer."""
    agreement: Share | None = None
    """The share of resamples of the examples on which the size must pass."""
    spread: tuple[Count, Count] | None = None
    """The central 90 % of the sizes that other examples would choose; null: most of them choose none."""
    pairs: Label
    """The examples on which it was measured."""

    @model_validator(mode="after")
    def _whole(self) -> SizeRule:
        levels = (self.low, self.high, self.kl_share, self.most, self.agreement)
        if ((self.target is None) == (None in levels)) or (
            (self.target is None) != self.rule.startswith("smallest size that")
        ):
            raise ValueError("a size rule states its target, or all of low, high, kl_share, most and agreement")
        return self


class SelectionRecord(Strict):
    """How the edges were chosen from the scores: `parameters` are those of `mechinterp.select`, and of a refined
    circuit those of `mechinterp.refine_circuit`, with what it did."""

    parameters: Annotated[dict[Label, Parameter], Named]
    n_selected: Count
    """Edges that the rule chose (all those out of a chosen node), before those on no path from the input to the logits
    were dropped."""
    n_edges: Count
    size: SizeRule | None = None


class DiscoveryRecord(Strict):
    """How the scores were made."""

    method: Label
    parameters: Annotated[dict[Label, Parameter], Named]
    replacement: Label
    metric: MetricRecord
    pairs: Label | None = None
    n_examples: Count
    score_sign: Literal["positive = the edge helps the task"] = SCORE_SIGN
    cost: Annotated[dict[Label, Count], Named]
    """Examples run forward and backward."""


class AblationRecord(Strict):
    """The six axes that define an ablation (Miller et al. 2024, arXiv 2407.08734)."""

    granularity: Label
    component: Label
    value: Label
    positions: Label
    direction: Label
    set: Label


class Tolerance(Strict):
    """A re-run agrees when |got - stated| <= absolute + relative * |stated|."""

    relative: Annotated[Number, Field(ge=0, le=0.1)]
    absolute: Annotated[Number, Field(ge=0, le=0.1)]


class EvaluationRecord(Strict):
    """What the circuit alone does: the numbers of `mechinterp.evaluate` at 6 significant digits."""

    pairs: Label
    reference: Label | None = None
    metric: MetricRecord
    ablation: AblationRecord
    n_examples: Count
    n_edges: Count
    n_edges_graph: Annotated[int, Field(strict=True, ge=1, le=2**53)]
    circuit_value: Number
    full_value: Number
    empty_value: Number
    faithfulness: Number
    faithfulness_ci: tuple[Number, Number]
    ci_level: Number
    example_quartiles: tuple[Number, Number, Number]
    n_ratio: Count
    kl: Number
    accuracy: Number | None = None
    accuracy_full: Number | None = None
    random_faithfulness: Annotated[tuple[Number, ...], Field(max_length=MAX_RANDOM)]
    seed: Seed
    tolerance: Tolerance


class CurvePointRecord(Strict):
    """Faithfulness of the circuit that the same rule gives at another size."""

    n_selected: Count
    n_edges: Count
    faithfulness: Number
    faithfulness_ci: tuple[Number, Number] | None = None
    kl: Number | None = None
    """KL(full model || circuit) in nats, mean over the examples."""
    passing: Share | None = None
    """The share of resamples of the examples on which this size passes."""


class CurveRecord(Strict):
    """Faithfulness against size."""

    pairs: Label
    metric: Label
    replacement: Label
    points: Annotated[tuple[CurvePointRecord, ...], Field(min_length=1, max_length=MAX_POINTS)]
    kl_empty: Number | None = None
    """The KL divergence of the empty circuit."""
    seed: Seed | None = None
    """Of the intervals."""
    folds: Annotated[int, Field(strict=True, ge=2, le=20)] | None = None
    """With cross-fitting: every folds-th pair was measured with the scores of the others."""


class TemplateRecord(Strict):
    """The same for the examples of one template."""

    template: Text
    n_examples: Count
    accuracy: Share | None = None
    difference: Number


class PerformanceRecord(Strict):
    """How well the full model does the task, before anything was discovered. Metric values are means over examples.

    `difference` is clean minus corrupt, signed so that positive is better.
    """

    pairs: Label
    metric: Label
    n_examples: Count
    clean: Number
    corrupt: Number
    difference: Number
    difference_ci: tuple[Number, Number]
    accuracy: Share | None = None
    accuracy_ci: tuple[Share, Share] | None = None
    by_template: Annotated[tuple[TemplateRecord, ...], Field(max_length=1000)] = ()
    seed: Seed
    tolerance: Tolerance


class StabilityRecord(Strict):
    """How alike the circuits of resampled examples are, each of the size of the circuit (of a refined one: before).

    Where nodes are chosen, everything here is counted in nodes.
    """

    pairs: Label
    kind: Literal["bootstrap over blocks of examples", "runs on examples drawn again"]
    resamples: Annotated[int, Field(strict=True, ge=2, le=10_000)]
    seed: Seed
    jaccard: Share
    """Mean over all two of them of the edges in both, as a share of those in either."""
    jaccard_by_chance: Share
    """What random circuits of this size have in common."""
    core_share: Share
    """An edge is in the core if at least this share of the resamples' circuits has it."""
    n_core: Count
    n_often_outside: Count
    """Edges outside the circuit (of a refined one: as it was before) that at least half of them have."""
