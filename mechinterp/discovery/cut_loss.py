"""`CutLoss`: the mean loss with edges cut, for searches that try one cut after another."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechinterp.engines.edge_patching import Prefix, edge_logits, run_prefix
from mechinterp.engines.readout import Readout, metric_readout
from mechinterp.engines.replacement import Values, build_replacement
from mechinterp.graphs.graph import Graph
from mechinterp.models.hook_manager import HookManager
from mechinterp.tasks.metrics import Metric
from mechinterp.tasks.pairs import Pairs


@dataclass
class CutLoss:
    """The batches, and what their patched runs share. The loss is the metric, turned so that lower is better."""

    model: HookManager
    graph: Graph
    metric: Metric
    n_examples: int
    chunks: list[Pairs]
    values: list[Values]
    readouts: list[Readout]
    prefixes: list[Prefix] = field(default_factory=list[Prefix])
    begun: Bool[Tensor, "reader writer"] = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.bool))
    """The edges that are cut in the prefixes, of the readers before their layer."""
    n_runs: int = 0
    """Masks that were run, on all examples."""
    n_prefixes: int = 0
    """Prefixes that were run, on all examples: a forward at most, each."""

    @classmethod
    def of(
        cls, model: HookManager, graph: Graph, pairs: Pairs, metric: Metric, replacement: str, batch_size: int
    ) -> CutLoss:
        """The loss on the pairs. Cost: a forward of the corrupt prompts, and of the clean ones for some metrics."""
        replaced = build_replacement(replacement, model, graph, pairs, batch_size)
        chunks = list(pairs.to(model.device).chunks(batch_size))
        readouts = [metric_readout(model, chunk, metric) for chunk in chunks]
        return cls(model, graph, metric, len(pairs), chunks, [replaced.on(chunk) for chunk in chunks], readouts)

    def of_masks(self, masks: Float[Tensor, "candidate reader writer"], layer: int) -> Float[Tensor, " candidate"]:
        """The mean loss over all examples with each mask's edges cut. Before `layer` all masks cut the same edges."""
        begins = masks[0, : self.graph.readers_before[layer]].cpu() != 0
        if not self.prefixes or self.prefixes[0].layer != layer or not torch.equal(begins, self.begun):
            self.prefixes = []  # frees the last layer's before the next one's are made
            pairs = zip(self.chunks, self.values, strict=True)
            self.prefixes = [
                run_prefix(self.model, self.graph, chunk, values, layer, masks[0]) for chunk, values in pairs
            ]
            self.begun = begins
            self.n_prefixes += 1
        total = torch.zeros(len(masks), dtype=torch.float64)
        for chunk, values, readout, prefix in zip(self.chunks, self.values, self.readouts, self.prefixes, strict=True):
            runs = edge_logits(self.model, self.graph, chunk, masks, values, readout.columns, prefix)
            for i, logits in enumerate(runs):
                total[i] -= self.metric.direction * readout.of_logits(logits).double().sum().cpu()
        self.n_runs += len(masks)
        return total / self.n_examples


def layer_of(graph: Graph, unit: int) -> int:
    """The first layer that reads an edge of the unit; the number of layers for the logits."""
    return graph.layer_of_reader(int(graph.first_of_unit[unit, 0]))
