"""`exact`: every edge (or node) replaced alone, by the exact engine. The reference that the other methods estimate."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.base.shards import State
from mechinterp.discovery.method import REPLACEMENT, Job, Method
from mechinterp.discovery.table_sums import sum_tables
from mechinterp.engines.edge_patching import edge_logits
from mechinterp.engines.readout import answer_logits
from mechinterp.engines.replacement import Values, build_replacement
from mechinterp.graphs.scores import Scores
from mechinterp.tasks.pairs import Pairs

UNITS_AT_ONCE = 64
"""Masks made at a time: neighbours in this order cut the same layer, so they share the run before it."""


def unit_drops(
    job: Job,
    batch: Pairs,
    clean: Float[Tensor, "batch n_answer d_vocab"],
    values: Values,
    units: Sequence[int],
) -> Float[Tensor, " unit"]:
    """The drop of the metric when each unit alone is cut, summed over the examples of one batch; positive = it helps.

    Args:
        job: The job.
        batch: The examples, on the model's device.
        clean: The logits of their clean prompts at the answers.
        values: What replaces writes on this batch.
        units: The numbers of the edges or nodes.
    """
    graph, metric = job.graph, job.metric
    full = metric(clean, batch, clean)
    cut = torch.stack([graph.unit == unit for unit in units])
    drops = torch.zeros(len(units), dtype=torch.float64)
    for i, logits in enumerate(edge_logits(job.model, graph, batch, cut.float(), values)):
        drops[i] = (metric.direction * (full - metric(logits, batch, clean)).sum()).cpu()
    return drops


def _exact(job: Job) -> Scores:
    """Drop of the metric when one edge (or node) is cut; those that begin in one layer share the run before it.

    A piece of work is some units on one batch.
    """
    model, graph = job.model, job.graph
    replacement = build_replacement(job.replacement, model, graph, job.pairs, job.batch_size)
    batches = list(job.pairs.to(model.device).chunks(job.batch_size))
    first_units = range(0, graph.n_units, UNITS_AT_ONCE)
    n_pieces, n_runs = len(batches) * len(first_units), graph.n_units * len(job.pairs)
    begun: list[tuple[int, Tensor, Values]] = []
    """The batch of the last piece, its clean logits, and what replaces writes."""

    def units_of(number: int) -> range:
        first = first_units[number % len(first_units)]
        return range(first, min(first + UNITS_AT_ONCE, graph.n_units))

    def piece(number: int) -> State:
        at, units = number // len(first_units), units_of(number)
        batch = batches[at]
        if not begun or begun[0][0] != at:
            clean = answer_logits(model, batch.clean, batch)
            begun[:] = [(at, clean, replacement.on(batch))]
        _, clean, values = begun[0]
        drops = torch.zeros(UNITS_AT_ONCE, dtype=torch.float64)
        drops[: len(units)] = unit_drops(job, batch, clean, values, units)
        return {"drops": drops}

    def add(sums: State, number: int, found: State) -> None:
        units = units_of(number)
        sums["units"][units.start : units.stop] += found["drops"][: len(units)]

    like = {"drops": torch.zeros(UNITS_AT_ONCE, dtype=torch.float64)}
    start = {"units": torch.zeros(graph.n_units, dtype=torch.float64)}

    def report(done: int, total: int) -> None:
        job.progress(done * n_runs // max(1, total), n_runs)

    sums = sum_tables(n_pieces, piece, like, start, add, job.checkpoint, report, job.batch_size)
    total = job.zeros()
    total[graph.possible] = sums["units"][graph.unit[graph.possible]].to(total.dtype)
    return job.scores("exact", total, {"forwards": n_runs + 2 * len(job.pairs), "backwards": 0})


EXACT = Method(
    "exact",
    "Every edge replaced alone (as many forwards as edges)",
    "activation patching of single edges; Conmy et al. 2023, arXiv 2304.14997, for the edges",
    _exact,
    {"replacement": REPLACEMENT},
    graphs="own",
    additive=True,
)
