"""Keystones: the edges from the input into the first layer, measured by exact runs where a method estimates.

Whatever a circuit does begins with them, and they carry whole embeddings, for which a first-order estimate is at its
worst: on Gemma 3 270M `eap` gives `input->m0` -1.7 where cutting it costs +4, and circuits selected by value are then
useless at every size up to 60 %. They are few (a layer's inputs), so a run each is cheap, and as the exact effect is a
mean over examples, too, scores still add up.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from mechinterp.base.errors import InputError
from mechinterp.base.settings import Setting
from mechinterp.discovery.exact import unit_drops
from mechinterp.discovery.method import Job
from mechinterp.engines.readout import answer_logits
from mechinterp.engines.replacement import Replacement
from mechinterp.graphs.graph import Graph
from mechinterp.tasks.pairs import Pairs

KEYSTONES = Setting(False, "measure the edges from the input into the first layer by exact runs instead")


def keystones(graph: Graph) -> list[int]:
    """The units of the edges from the input into the readers of the first layer."""
    possible = graph.possible.clone()
    possible[:, graph.n_inputs :] = False
    readers = sorted({int(reader) for reader in possible.nonzero()[:, 0] if graph.layer_of_reader(int(reader)) == 0})
    return sorted({int(graph.unit[r, w]) for r in readers for w in range(graph.n_inputs) if possible[r, w]})


def repaired(job: Job, of: Callable[[Pairs], Tensor], replacement: Replacement) -> Callable[[Pairs], Tensor]:
    """`of` with the exact drop at the keystones, if the job asks for it.

    Raises InputError where nodes are chosen.
    """
    if not job.settings.get("keystones"):
        return of
    if job.graph.level == "node":
        raise InputError("Keystones are edges; where nodes are chosen, method 'exact' measures each of them.")
    units = keystones(job.graph)

    def measured(chunk: Pairs) -> Tensor:
        batch, table = chunk.to(job.model.device), of(chunk).clone()
        clean = answer_logits(job.model, batch.clean, batch)
        for unit, drop in zip(units, unit_drops(job, batch, clean, replacement.on(batch), units), strict=True):
            table[(job.graph.unit == unit) & job.graph.possible] = drop.to(table)
        return table

    return measured


def keystone_forwards(job: Job) -> int:
    """How many forwards an example the repair takes."""
    return 1 + len(keystones(job.graph)) if job.settings.get("keystones") else 0
