"""Falsifiable predictions about a circuit: a measurement, a threshold, and negative controls.

These models are the entries under `predictions` in a circuit file; measurements.py runs them. Nothing in this file
needs torch.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mechinterp.base.errors import InputError
from mechinterp.models.sites import Edge, Node
from mechinterp.tasks.schema import Strict

Short = Annotated[str, Field(min_length=1, max_length=3000)]
Limit = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Place = Annotated[str, Field(min_length=1, max_length=1000)] | Annotated[int, Field(strict=True, ge=-(2**20), le=2**20)]
"""A named position of the pairs, or a token number (-1 is the last token)."""
Side = Literal["clean", "corrupt"]
ReplacementKind = Literal["corrupt", "mean", "mean-positional", "zero"]
"""The same as `mechinterp.engines.replacement.KINDS`, which needs torch."""
MAX_CONTROLS = 100


class PartsReplaced(Strict):
    """Replacing parts of the run lowers the metric by so much (in its unit; a higher number = the parts help more).

    `parts` are replaced together, in the whole model: `a9.h9`, `m3`, `m3.n17`, `a9.h9<q>`, each with `@S2` where the
    position matters. The number is that of `activation_patching` (noise).
    """

    kind: Literal["parts replaced"] = "parts replaced"
    parts: Annotated[tuple[Short, ...], Field(min_length=1, max_length=10_000)]
    replacement: ReplacementKind = "corrupt"
    metric: Short = "logit_diff"

    def __str__(self) -> str:
        return f"replacing {_listed(self.parts)} ({self.replacement}) lowers {self.metric} by"


class EdgesCut(Strict):
    """Cutting edges of the model's graph lowers the metric by so much: the number of `run_edges`."""

    kind: Literal["edges cut"] = "edges cut"
    edges: Annotated[tuple[Short, ...], Field(min_length=1, max_length=10_000)]
    replacement: ReplacementKind = "corrupt"
    metric: Short = "logit_diff"

    @model_validator(mode="after")
    def _known(self) -> EdgesCut:
        for name in self.edges:
            try:
                Edge.parse(name)
            except InputError as error:
                raise ValueError(str(error)) from None
            if "@" in name:
                raise ValueError(f"edges are cut at all positions; {name!r} names one")
        return self

    def __str__(self) -> str:
        return f"cutting {_listed(self.edges)} ({self.replacement}) lowers {self.metric} by"


class Attention(Strict):
    """A head pays so much attention (0 to 1) from one position to another: the number of `attention_to`."""

    kind: Literal["attention"] = "attention"
    head: Short
    query: Place
    key: Place
    prompt: Side = "clean"

    @model_validator(mode="after")
    def _known(self) -> Attention:
        _check_head(self.head)
        return self

    def __str__(self) -> str:
        where = "" if self.prompt == "clean" else " (corrupt prompts)"
        return f"{self.head} attends from {self.query} to {self.key}{where} with"


class DirectEffect(Strict):
    """A node writes so many logits toward the right answers: the number of `direct_logit_attribution`."""

    kind: Literal["direct effect"] = "direct effect"
    node: Short

    def __str__(self) -> str:
        return f"{self.node}'s direct effect in logits is"


class DirectEffectChange(Strict):
    """A node writes so many more logits toward the right answers when others are replaced: that of `compensation`."""

    kind: Literal["direct effect change"] = "direct effect change"
    node: Short
    replaced: Annotated[tuple[Short, ...], Field(min_length=1, max_length=10_000)]
    replacement: ReplacementKind = "corrupt"

    def __str__(self) -> str:
        others = f"{_listed(self.replaced)} ({self.replacement})"
        return f"replacing {others} changes {self.node}'s direct effect in logits by"


class PathPatched(Strict):
    """Patching the paths from some nodes to some inputs lowers the metric by so much: the number of `path_patching`.

    The senders carry their corrupt values along the paths to all receivers together; all other heads are as in the
    clean run, the MLPs between are recomputed.
    """

    kind: Literal["path patched"] = "path patched"
    senders: Annotated[tuple[Short, ...], Field(min_length=1, max_length=10_000)]
    receivers: Annotated[tuple[Short, ...], Field(min_length=1, max_length=10_000)]
    metric: Short = "logit_diff"

    def __str__(self) -> str:
        return f"patching the paths from {_listed(self.senders)} to {_listed(self.receivers)} lowers {self.metric} by"


class Detector(Strict):
    """A head attends on random tokens said twice as a previous-token, duplicate-token or induction head would.

    The number, 0 to 1, is that of `head_scores`; no pairs are needed.
    """

    kind: Literal["detector"] = "detector"
    head: Short
    pattern: Literal["previous_token", "duplicate_token", "induction"]
    n: Annotated[int, Field(strict=True, ge=1, le=1000)] = 10
    length: Annotated[int, Field(strict=True, ge=2, le=1000)] = 25
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**63)] = 0

    @model_validator(mode="after")
    def _known(self) -> Detector:
        _check_head(self.head)
        return self

    def __str__(self) -> str:
        return f"{self.head}'s {self.pattern.replace('_', ' ')} score is"


class Copying(Strict):
    """A head's OV circuit copies (-1 to 1): the number of `copying_scores`; no pairs are needed."""

    kind: Literal["copying"] = "copying"
    head: Short

    @model_validator(mode="after")
    def _known(self) -> Copying:
        _check_head(self.head)
        return self

    def __str__(self) -> str:
        return f"{self.head}'s copying score is"


Measure = Annotated[
    PartsReplaced | EdgesCut | Attention | DirectEffect | DirectEffectChange | PathPatched | Detector | Copying,
    Field(discriminator="kind"),
]
ON_PAIRS = (PartsReplaced, EdgesCut, Attention, DirectEffect, DirectEffectChange, PathPatched)
"""The measures that are means over examples; the others only need the model."""


class Control(Strict):
    """A negative control: the same kind of measurement where the prediction must not hold."""

    measure: Measure
    measured: Limit | None = None
    """The measured number when the file was written."""


class Prediction(Strict):
    """A measurement (a mean over examples) lies on one side of a number, and every control on the other.

    >>> Prediction(name="S2 to S1", measure=Attention(head="a1.h0", query="S2", key="S1"), relation=">=", value=0.5)
    a1.h0 attends from S2 to S1 with >= 0.5
    """

    name: Short
    statement: Annotated[str, Field(max_length=2000)] = ""
    """The prediction in the author's words."""
    measure: Measure
    relation: Literal[">=", "<="]
    value: Limit
    controls: Annotated[tuple[Control, ...], Field(max_length=MAX_CONTROLS)] = ()
    pairs: Annotated[str, Field(min_length=1, max_length=1000)] | None = None
    """The name of the examples in the file; null if the measure needs none."""
    measured: Limit | None = None
    """The measured number when the file was written."""

    @model_validator(mode="after")
    def _controls_are_alike(self) -> Prediction:
        for control in self.controls:
            if control.measure.kind != self.measure.kind:
                raise ValueError(
                    f"prediction {self.name!r} is of kind {self.measure.kind!r} and has a control of kind "
                    f"{control.measure.kind!r}; a control is the same kind of measurement elsewhere"
                )
            if control.measure == self.measure:
                raise ValueError(f"prediction {self.name!r} has itself as a control")
        return self

    def __repr__(self) -> str:
        return f"{self.measure} {self.relation} {self.value:.4g}"

    def holds(self, got: float) -> bool:
        """Whether a measured number is on the predicted side; never for NaN."""
        return bool(got >= self.value if self.relation == ">=" else got <= self.value)

    def refuted(self, got: float) -> bool:
        """Whether a measured number is on the other side, as a control's must be; never for NaN."""
        return bool(got < self.value if self.relation == ">=" else got > self.value)


def _listed(names: tuple[str, ...]) -> str:
    return " + ".join(names) if len(names) <= 6 else f"{' + '.join(names[:5])} + {len(names) - 5} more"


def _check_head(name: str) -> None:
    try:
        kind = Node.parse(name).kind
    except InputError as error:
        raise ValueError(str(error)) from None
    if kind != "head":
        raise ValueError(f"{name!r} is not a head, such as 'a9.h9'")
