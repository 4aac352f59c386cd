"""`acdc`: automatic circuit discovery, edge by edge from the logits back.

Source: Conmy et al. 2023 (arXiv 2304.14997). Every edge is cut in turn, in reverse order of the model (readers from the
logits to the first layer; of a reader, the latest writer first; nodes, where those are chosen, in reverse order too);
it stays cut when that raises the loss by less than
`tau`. The loss is the metric, turned so that lower is better; with `kl_to_clean` that is the paper's KL divergence.
Deviations: the order is fixed (the paper's code takes a set's), and several next edges are tried at once.

Speed: the next k edges are cut one upon the other in k runs side by side, as if each were going to stay cut. The runs
up to the first edge that must be kept are what one-by-one search does; the rest is thrown away. So the kept set is
the same. The layers before the reader's are run once per layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechinterp.discovery.method import METHODS, Job, Method
from mechinterp.edges import clean_logits, edge_logits
from mechinterp.errors import InputError
from mechinterp.patched_run import Prefix, run_prefix
from mechinterp.replacement import Values, build_replacement
from mechinterp.scores import Scores
from mechinterp.tasks.pairs import Pairs

MOST_AT_ONCE = 64


@dataclass
class _Search:
    """The batches with what their patched runs share, and what was decided so far."""

    job: Job
    chunks: list[Pairs]
    values: list[Values]
    references: list[Tensor | None]
    prefixes: list[Prefix]
    n_runs: int = 0

    def losses(self, masks: Float[Tensor, "candidate reader writer"], layer: int) -> Float[Tensor, " candidate"]:
        """The mean loss over all examples with each mask's edges cut; nothing before `layer` is cut."""
        job = self.job
        if not self.prefixes or self.prefixes[0].layer != layer:
            self.prefixes = []  # frees the last layer's before the next one's are made
            pairs = zip(self.chunks, self.values, strict=True)
            self.prefixes = [run_prefix(job.model, job.graph, chunk, values, layer) for chunk, values in pairs]
        total = torch.zeros(len(masks), dtype=torch.float64)
        for chunk, values, reference, prefix in zip(
            self.chunks, self.values, self.references, self.prefixes, strict=True
        ):
            columns = job.metric.columns(chunk)
            runs = edge_logits(job.model, job.graph, chunk, masks, values, columns, prefix)
            for i, logits in enumerate(runs):
                if columns is None:
                    found = job.metric(logits, chunk, reference)
                else:
                    found = job.metric.on_columns(logits, columns, chunk)
                total[i] -= job.metric.direction * found.double().sum().cpu()
        self.n_runs += len(masks)
        return total / len(job.pairs)


def _acdc(job: Job) -> Scores:
    """The score of a kept edge is what cutting it added to the loss, at least tau; of a cut one 0."""
    tau, at_once = job.settings["tau"], job.settings["at_once"]
    if isinstance(tau, (bool, str)) or not 0 < tau < float("inf"):
        raise InputError(f"tau must be a number above 0; got {tau!r}.")
    if type(at_once) is not int or not 1 <= at_once <= MOST_AT_ONCE:
        raise InputError(f"at_once must be a whole number from 1 to {MOST_AT_ONCE}; got {at_once!r}.")
    model, graph = job.model, job.graph
    replacement = build_replacement(job.replacement, model, graph, job.pairs, job.batch_size)
    chunks = list(job.pairs.to(model.device).chunks(job.batch_size))
    references = [clean_logits(model, chunk) if job.metric.needs_reference else None for chunk in chunks]
    search = _Search(job, chunks, [replacement.on(chunk) for chunk in chunks], references, [])
    units = list(reversed(range(graph.n_units)))
    cut, kept, done, k = torch.zeros_like(graph.possible), job.zeros(), 0, 1
    saved = job.checkpoint.load()
    if saved is not None:
        cut, kept, done, search.n_runs = saved["cut"], saved["kept"], int(saved["done"]), int(saved["n_runs"])
    loss = float(search.losses(cut[None].float(), _layer(job, units[min(done, len(units) - 1)]))[0])
    search.n_runs -= saved is not None
    job.progress(done, len(units))
    while done < len(units):
        layer = _layer(job, units[done])
        some = [unit for unit in units[done : done + k] if _layer(job, unit) == layer]
        edges = [graph.unit == unit for unit in some]
        losses = search.losses(_one_upon_the_other(cut, edges), layer)
        all_cut = True
        for mask, value in zip(edges, losses.tolist(), strict=True):
            done += 1
            if value - loss >= tau:
                kept[mask] = value - loss
                all_cut = False
                break
            cut, loss = cut | mask, value
        k = min(int(at_once), 2 * len(some)) if all_cut else max(1, k // 2)
        job.checkpoint.save(
            {"cut": cut, "kept": kept, "done": torch.tensor(done), "n_runs": torch.tensor(search.n_runs)}
        )
        job.progress(done, len(units))
    per_example = search.n_runs + 2 + job.metric.needs_reference + graph.dims.n_layers
    return job.scores(
        "acdc", kept * len(job.pairs), {"forwards": per_example * len(job.pairs), "backwards": 0}, additive=False
    )


def _layer(job: Job, unit: int) -> int:
    """The first layer that reads an edge of the unit; the number of layers for the logits."""
    reader = int(job.graph.first_of_unit[unit, 0])
    per_layer = (len(job.graph.readers) - 1) // job.graph.dims.n_layers
    return min(reader // per_layer, job.graph.dims.n_layers)


def _one_upon_the_other(cut: Bool[Tensor, "reader writer"], units: list[Tensor]) -> Float[Tensor, "unit reader writer"]:
    """What is cut, with the first unit, with the first two, and so on."""
    masks: list[Tensor] = []
    for unit in units:
        cut = cut | unit
        masks.append(cut)
    return torch.stack(masks).float()


METHODS.register(
    "acdc",
    Method(
        "acdc",
        "Automatic circuit discovery: every edge cut for good unless that costs tau",
        "Conmy et al. 2023, arXiv 2304.14997",
        _acdc,
        {"replacement": "corrupt", "tau": 0.01, "at_once": 8},
        threshold=0.0,
        graphs="own",
    ),
)
