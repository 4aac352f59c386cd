"""`cd-edges`: relevance along every edge by contextual decomposition's linear rules, in one backward.

Source: the rules of contextual decomposition with frozen norms, and f(t) / t for activations (Hsu et al. 2024, arXiv
2407.00886, preset `linear`), which are RelP's coefficients (Rezaei Jafari et al. 2025, arXiv 2508.21258); with
`attention=halved` attention is not frozen but split as in AttnLRP (Achtibat et al. 2024, arXiv 2402.05602). `relp` is
the same backward with the plain gradient of attention, as RelP has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch

from mechinterp.analysis.lrp_rules import RULES, lrp_loss, rule_edits
from mechinterp.discovery.method import METHODS, Method, Progress
from mechinterp.errors import InputError
from mechinterp.gradients import Backward, edge_gradients
from mechinterp.graph import Graph
from mechinterp.hooks import HookManager
from mechinterp.metrics import Metric
from mechinterp.registry import unknown
from mechinterp.replacement import build_replacement
from mechinterp.scores import Parameter, Scores
from mechinterp.tasks.pairs import Pairs

ATTENTION = {
    "frozen": RULES["relp"],
    "halved": RULES["attnlrp"],
    "gradient": replace(RULES["relp"], pattern=1.0),
}
"""frozen: the preset `linear`. Patterns are constants, so every edge into a query or a key scores exactly 0, and no
circuit of these scores can attend where the model does. halved: each product in attention gives half to each factor,
and the softmax its gradient. gradient: attention is differentiated as it is."""


def _cd_edges(
    name: str,
    model: HookManager,
    graph: Graph,
    pairs: Pairs,
    metric: Metric,
    settings: Mapping[str, Parameter],
    batch_size: int,
    progress: Progress,
) -> Scores:
    """<write of the clean run less its replacement, changed gradient at the reader's input>, summed over tokens."""
    if metric.needs_reference:
        raise InputError(f"{metric.name} has no relevance at the clean run itself; use metric 'logit_diff'.")
    attention, kind = str(settings["attention"]), str(settings["replacement"])
    if attention not in ATTENTION:
        raise unknown("attention", attention, ATTENTION)
    rules = ATTENTION[attention]
    backward = Backward(
        partial(rule_edits, model, rules), lambda chunk, reference: lrp_loss(model, chunk, metric, reference, rules)
    )
    replacement = build_replacement(kind, model, graph, pairs, batch_size)
    total = torch.zeros(graph.possible.shape, dtype=torch.promote_types(model.dtype, torch.float32))
    done = 0
    progress(0, len(pairs))
    for chunk in pairs.chunks(batch_size):
        part = edge_gradients(model, graph, chunk, metric, replacement=replacement, backward=backward)
        total += metric.direction * part.cpu()
        done += len(chunk)
        progress(done, len(pairs))
    cost = {"forwards": (2 + kind.startswith("mean")) * len(pairs), "backwards": len(pairs)}
    return Scores(graph, total, len(pairs), name, metric.name, kind, dict(settings), cost)


METHODS.register(
    "cd-edges",
    Method(
        "cd-edges",
        "Contextual decomposition along edges: linear rules in one backward",
        "Hsu et al. 2024, arXiv 2407.00886, with the linear rules; RelP, arXiv 2508.21258",
        partial(_cd_edges, "cd-edges"),
        {"replacement": "corrupt", "attention": "halved"},
    ),
)
METHODS.register(
    "relp",
    Method(
        "relp",
        "Relevance patching: edge attribution with LRP coefficients for norms, activations and gates",
        "Rezaei Jafari et al. 2025, arXiv 2508.21258",
        partial(_cd_edges, "relp"),
        {"replacement": "corrupt", "attention": "gradient"},
    ),
)
