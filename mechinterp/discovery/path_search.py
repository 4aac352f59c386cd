"""`path-patching`: from the logits back, the receivers of one round being the strongest senders of the round before.

Source: Wang et al. 2022 (arXiv 2211.00593), who found the IOI circuit this way. Every node sends to the logits; the
`top` strongest become receivers, each of their inputs separately; and so on until no new node is found. Deviations:
receivers are chosen by number and not by looking at plots; MLPs are nodes too; and by default only the direct edges
are patched (`meaning=direct`), so that a score is exactly that of `exact`, without the edges into other nodes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, cast

from mechinterp.analysis.path_patching import MEANINGS, path_patching
from mechinterp.base.errors import InputError
from mechinterp.base.settings import Setting
from mechinterp.discovery.cd import between
from mechinterp.discovery.method import REPLACEMENT, Job, Method
from mechinterp.graphs.circuit import on_paths
from mechinterp.graphs.scores import Scores


def _path_patching(job: Job) -> Scores:
    model, graph, top, meaning = job.model, job.graph, int(job.settings["top"]), str(job.settings["meaning"])
    if graph.split_input:
        raise InputError("'path-patching' takes the input as one node; build the graph without split_input.")
    table, forwards = job.zeros(), 0.0
    nodes: list[str] = []
    rows, scored = [len(graph.readers) - 1], set[int]()
    while rows:
        best = dict.fromkeys(graph.writers, 0.0)
        for row in rows:
            before = graph.possible[row].nonzero().flatten().tolist()
            senders = [graph.writers[i] for i in before]
            grid = path_patching(
                model,
                job.pairs,
                senders,
                "logits" if graph.readers[row] == "logits" else [graph.readers[row]],
                meaning=cast(Literal["direct", "mlps-recomputed"], meaning),
                metric=job.metric,
                batch_size=job.batch_size,
            )
            table[row, before] = grid.values[:, 0].mean(-1).cpu().to(table.dtype)
            forwards += grid.cost["forwards"] * len(job.pairs)
            scored.add(row)
            job.progress(len(scored), len(graph.readers))
            for name, effect in zip(graph.writers, table[row].abs().tolist(), strict=True):
                best[name] = max(best[name], effect)
        found = sorted((n for n in best if n not in graph.inputs and best[n] > 0), key=lambda n: -best[n])[:top]
        new = [name for name in found if name not in nodes]
        nodes += new
        fed = [graph.feeds[:, graph.writer_index[name]].nonzero().flatten().tolist() for name in new]
        rows = sorted({row for several in fed for row in several} - scored)
    mask = on_paths(graph, between(graph, [*graph.inputs, *nodes]) & (table != 0))
    job.progress(len(graph.readers), len(graph.readers))
    cost = {"forwards": round(forwards), "backwards": 0}
    return job.scores("path-patching", table * mask * len(job.pairs), cost, additive=False)


PATH_PATCHING = Method(
    "path-patching",
    "Path patching from the logits back, the strongest senders being the next receivers",
    "Wang et al. 2022, arXiv 2211.00593",
    _path_patching,
    {
        "replacement": replace(REPLACEMENT, choices=("corrupt",)),
        "top": Setting(6, "senders of a round that become receivers", least=1),
        "meaning": Setting("direct", "which paths are patched", choices=tuple(MEANINGS)),
    },
    threshold=0.0,
)
