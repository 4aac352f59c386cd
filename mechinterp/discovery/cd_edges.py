"""`cd-edges`: relevance along every edge by contextual decomposition's linear rules, in one backward.

Source: the rules of contextual decomposition with frozen norms, and f(t) / t for activations (Hsu et al. 2024, arXiv
2407.00886, preset `linear`), which are RelP's coefficients (Rezaei Jafari et al. 2025, arXiv 2508.21258); with
`attention=halved` attention is not frozen but split as in AttnLRP (Achtibat et al. 2024, arXiv 2402.05602). `relp` is
the same backward with the plain gradient of attention, as RelP has it.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from mechinterp.base.errors import InputError
from mechinterp.base.settings import Setting
from mechinterp.discovery.method import REPLACEMENT, Job, Method
from mechinterp.engines.edge_attribution import Backward, edge_gradients
from mechinterp.engines.lrp import RULES, lrp_loss, rule_edits
from mechinterp.engines.replacement import build_replacement
from mechinterp.graphs.scores import Scores

ATTENTION = {
    "frozen": RULES["relp"],
    "halved": RULES["attnlrp"],
    "gradient": replace(RULES["relp"], pattern=1.0),
}
"""frozen: the preset `linear`. Patterns are constants, so every edge into a query or a key scores exactly 0, and no
circuit of these scores can attend where the model does. halved: each product in attention gives half to each factor,
and the softmax its gradient. gradient: attention is differentiated as it is."""
_ATTENTION = Setting("halved", "how relevance passes through attention", choices=tuple(ATTENTION))


def _cd_edges(name: str, job: Job) -> Scores:
    """<write of the clean run less its replacement, changed gradient at the reader's input>, summed over tokens."""
    model, metric = job.model, job.metric
    if metric.needs_reference:
        raise InputError(f"{metric.name} has no relevance at the clean run itself; use metric 'logit_diff'.")
    rules = ATTENTION[str(job.settings["attention"])]
    backward = Backward(
        partial(rule_edits, model, rules),
        lambda readout: lrp_loss(model, readout, rules),
    )
    replacement = build_replacement(job.replacement, model, job.graph, job.pairs, job.batch_size)
    total = job.sum_over_batches(
        lambda chunk: (
            metric.direction
            * edge_gradients(model, job.graph, chunk, metric, replacement=replacement, backward=backward)
        )
    )
    forwards = (2 + job.replacement.startswith("mean")) * len(job.pairs)
    return job.scores(name, total, {"forwards": forwards, "backwards": len(job.pairs)})


CD_EDGES = Method(
    "cd-edges",
    "Contextual decomposition along edges: linear rules in one backward",
    "Hsu et al. 2024, arXiv 2407.00886, with the linear rules; RelP, arXiv 2508.21258",
    partial(_cd_edges, "cd-edges"),
    {"replacement": REPLACEMENT, "attention": _ATTENTION},
    graphs="summed",
    additive=True,
)
RELP = Method(
    "relp",
    "Relevance patching: edge attribution with LRP coefficients for norms, activations and gates",
    "Rezaei Jafari et al. 2025, arXiv 2508.21258",
    partial(_cd_edges, "relp"),
    {"replacement": REPLACEMENT, "attention": replace(_ATTENTION, default="gradient")},
    graphs="summed",
    additive=True,
)
