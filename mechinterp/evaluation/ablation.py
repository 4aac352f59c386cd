"""How circuits are run: the six axes of an ablation, and the setup that all runs of one call share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypedDict

from mechinterp.base.progress import Progress, no_progress
from mechinterp.engines.replacement import Replacement, build_replacement
from mechinterp.graphs.circuit import Circuit
from mechinterp.graphs.graph import Graph
from mechinterp.models.hook_manager import HookManager
from mechinterp.tasks.metrics import Metric
from mechinterp.tasks.own_metric import MetricLike, as_metric
from mechinterp.tasks.pairs import Pairs


@dataclass(frozen=True)
class Ablation:
    """The six axes that define an ablation (Miller et al. 2024, arXiv 2407.08734)."""

    granularity: str = "edge"
    component: str = "edges outside the circuit"
    value: str = "corrupt"
    positions: str = "all"
    direction: str = "noising (the clean run is destroyed)"
    set: str = "complement"


def ablation_of(graph: Graph, replacement: str) -> Ablation:
    """The six axes of running a circuit of this graph alone."""
    where = ", ".join(graph.positions) if graph.positions else "all"
    return Ablation(graph.level, f"{graph.level}s outside the circuit", replacement, where)


class Stated(TypedDict):
    """What every result says about the runs behind it."""

    metric: str
    n_examples: int
    circuit_digest: str
    pairs: Pairs
    reference: Pairs | None


@dataclass(frozen=True)
class AblationSetup:
    """Everything but the masks: the model, the examples, the metric, and what a cut edge carries."""

    model: HookManager
    graph: Graph
    pairs: Pairs = field(repr=False)
    metric: Metric
    replacement: str
    reference: Pairs | None = field(repr=False)
    """The pairs whose corrupt prompts give the means; None: `pairs`."""
    batch_size: int
    progress: Progress = no_progress

    @classmethod
    def of(
        cls,
        model: HookManager,
        graph: Graph,
        pairs: Pairs,
        metric: MetricLike,
        replacement: str,
        reference: Pairs | None,
        batch_size: int,
        progress: Progress,
    ) -> AblationSetup:
        """The setup, from the arguments of a public function. Raises InputError for an unknown metric."""
        metric = as_metric(metric)
        return cls(model, graph, pairs, metric, replacement, reference, batch_size, progress)

    @property
    def axes(self) -> Ablation:
        """The six axes of running a circuit alone in this setup."""
        return ablation_of(self.graph, self.replacement)

    def build_replacement(self) -> Replacement:
        """What cut edges carry. Cost: one forward for each reference example for means, none otherwise."""
        return build_replacement(
            self.replacement, self.model, self.graph, self.reference or self.pairs, self.batch_size
        )

    def stated(self, circuit: Circuit) -> Stated:
        """The fields that every result about the circuit has."""
        return {
            "metric": self.metric.name,
            "n_examples": len(self.pairs),
            "circuit_digest": circuit.digest(),
            "pairs": self.pairs,
            "reference": self.reference,
        }
