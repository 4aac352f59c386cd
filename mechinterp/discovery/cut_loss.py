"""`CutLoss`: the mean loss with edges cut, for searches that try one cut after another."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechinterp.base.errors import InputError
from mechinterp.base.shards import computed, current, relayed, share
from mechinterp.engines.edge_patching import edge_logits, run_prefix
from mechinterp.engines.patched_run import Prefix
from mechinterp.engines.readout import Readout, metric_readout
from mechinterp.engines.replacement import Values, build_replacement
from mechinterp.graphs.graph import Graph
from mechinterp.models.hook_manager import HookManager
from mechinterp.tasks.metrics import Metric
from mechinterp.tasks.pairs import Pairs


@dataclass
class CutLoss:
    """The batches, and what their patched runs share. The loss is the metric, turned so that lower is better.

    Processes that share the work have some of the batches each.
    """

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
    begun_at: int = -1
    """The layer of the prefixes."""
    n_runs: int = 0
    """Masks that were run, on all examples."""
    n_prefixes: int = 0
    """Prefixes that were run, on all examples: a forward at most, each."""

    @classmethod
    def of(
        cls, model: HookManager, graph: Graph, pairs: Pairs, metric: Metric, replacement: str, batch_size: int
    ) -> CutLoss:
        """The loss on the pairs. Cost: a forward of the corrupt prompts, and of the clean ones for some metrics."""
        replaced, here = build_replacement(replacement, model, graph, pairs, batch_size), current()
        chunks = list(pairs.to(model.device).chunks(batch_size))
        mine = share(len(chunks), here.index, here.count)
        chunks = chunks[mine.start : mine.stop]
        readouts = [metric_readout(model, chunk, metric) for chunk in chunks]
        return cls(model, graph, metric, len(pairs), chunks, [replaced.on(chunk) for chunk in chunks], readouts)

    def of_masks(self, masks: Float[Tensor, "candidate reader writer"], layer: int) -> Float[Tensor, " candidate"]:
        """The mean loss over all examples with each mask's edges cut. Before `layer` all masks cut the same edges.

        Raises InputError if it is NaN or infinite, which no threshold can be compared with.
        """
        begins = masks[0, : self.graph.readers_before[layer]].cpu() != 0
        new = self.begun_at != layer or not torch.equal(begins, self.begun)
        if new:
            self.prefixes = []  # frees the last layer's before the next one's are made
            self.begun, self.begun_at = begins, layer
            self.n_prefixes += 1

        def of_chunk(number: int) -> Float[Tensor, " candidate"]:
            chunk, values, readout = self.chunks[number], self.values[number], self.readouts[number]
            if new:
                self.prefixes.append(run_prefix(self.model, self.graph, chunk, values, layer, masks[0]))
            prefix, total = self.prefixes[number], torch.zeros(len(masks), dtype=torch.float64)
            runs = edge_logits(self.model, self.graph, chunk, masks, values, readout.columns, prefix)
            for i, logits in enumerate(runs):
                total[i] -= self.metric.direction * readout.of_logits(logits).double().sum().cpu()
            return total

        own = computed(range(len(self.chunks)), of_chunk)
        nothing = torch.zeros(len(masks), dtype=torch.float64)
        found = relayed(lambda state: {"total": sum(own, state.get("total", nothing))})
        self.n_runs += len(masks)
        mean = found["total"] / self.n_examples
        if not bool(mean.isfinite().all()):
            bad = int((~mean.isfinite()).nonzero()[0])
            value = -self.metric.direction * float(mean[bad])
            raise InputError(
                f"With {int((masks[bad] != 0).sum()):,} edges cut the metric {self.metric.name!r} is "
                f"{value} on these pairs, so edges cannot be tried one by one. Take another metric, or leave "
                "out the pairs on which it has no value."
            )
        return mean


def layer_of(graph: Graph, unit: int) -> int:
    """The first layer that reads an edge of the unit; the number of layers for the logits."""
    return graph.layer_of_reader(int(graph.first_of_unit[unit, 0]))
