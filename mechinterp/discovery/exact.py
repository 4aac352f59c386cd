"""`exact`: every edge (or node) replaced alone, by the exact engine. The reference that the other methods estimate."""

from __future__ import annotations

import torch

from mechinterp.discovery.method import REPLACEMENT, Job, Method
from mechinterp.engines.edge_patching import edge_logits
from mechinterp.engines.readout import answer_logits
from mechinterp.engines.replacement import build_replacement
from mechinterp.graphs.scores import Scores

UNITS_AT_ONCE = 64
"""Masks made at a time: neighbours in this order cut the same layer, so they share the run before it."""


def _exact(job: Job) -> Scores:
    """Drop of the metric when one edge (or node) is cut; those that begin in one layer share the run before it."""
    model, graph, metric = job.model, job.graph, job.metric
    replacement = build_replacement(job.replacement, model, graph, job.pairs, job.batch_size)
    units = list(range(graph.n_units))
    total, before = job.zeros(), 0
    done, n_runs = 0, len(units) * len(job.pairs)
    saved = job.checkpoint.load({"total": total, "done": torch.tensor(0)}, {"done": n_runs})
    if saved is not None:
        total, before = saved["total"], int(saved["done"])
    job.progress(before, n_runs)
    for chunk in job.pairs.to(model.device).chunks(job.batch_size):
        if done + len(units) * len(chunk) <= before:
            done += len(units) * len(chunk)
            continue
        clean = answer_logits(model, chunk.clean, chunk)
        full = metric(clean, chunk, clean)
        values = replacement.on(chunk)
        for some in (units[i : i + UNITS_AT_ONCE] for i in range(0, len(units), UNITS_AT_ONCE)):
            done += len(some) * len(chunk)
            if done <= before:
                continue
            cut = torch.stack([graph.unit == unit for unit in some])
            for mask, logits in zip(cut, edge_logits(model, graph, chunk, cut.float(), values), strict=True):
                drop = metric.direction * (full - metric(logits, chunk, clean)).sum()
                total[mask] += drop.cpu().to(total.dtype)
            job.checkpoint.save({"total": total, "done": torch.tensor(done)})
            job.progress(done, n_runs)
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
