"""`cd-edges`: relevance along every edge by contextual decomposition's linear rules, in one backward.

Source: the rules of contextual decomposition with frozen norms, and f(t) / t for activations (Hsu et al. 2024, arXiv
2407.00886, preset `linear`), which are RelP's coefficients (Rezaei Jafari et al. 2025, arXiv 2508.21258); with
`attention=halved` attention is not frozen but split as in AttnLRP (Achtibat et al. 2024, arXiv 2402.05602). `relp` is
the same backward with the plain gradient of attention, as RelP has it.

`gim` (Edin et al. 2025, arXiv 2505.17630) has other rules: constant norms, the gradient of the softmax at temperature
2, a quarter of the gradient into queries and keys, half of it into values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from torch import Tensor

from mechinterp.base.errors import InputError
from mechinterp.base.settings import Setting
from mechinterp.discovery.keystones import KEYSTONES, keystone_forwards, repaired
from mechinterp.discovery.method import REPLACEMENT, Job, Method
from mechinterp.engines.edge_attribution import Backward, edge_gradients
from mechinterp.engines.lrp import RULES, Rules, lrp_loss, rule_edits
from mechinterp.engines.replacement import build_replacement
from mechinterp.graphs.scores import Scores
from mechinterp.tasks.pairs import Pairs

ATTENTION = {
    "frozen": RULES["relp"],
    "halved": RULES["attnlrp"],
    "gradient": replace(RULES["relp"], pattern=1.0),
}
"""frozen: the preset `linear`. Patterns are constants, so every edge into a query or a key scores exactly 0, and no
circuit of these scores can attend where the model does. halved: each product in attention gives half to each factor,
and the softmax its gradient. gradient: attention is differentiated as it is."""
_ATTENTION = Setting("halved", "how relevance passes through attention", choices=tuple(ATTENTION))


def _modified(name: str, rules_of: Callable[[Job], Rules], job: Job) -> Scores:
    """<write of the clean run less its replacement, changed gradient at the reader's input>, summed over tokens."""
    model, metric = job.model, job.metric
    if metric.needs_reference:
        raise InputError(
            f"{metric.name} has no relevance at the clean run itself; use metric 'logit_diff', or method 'eap-ig'."
        )
    rules = rules_of(job)
    backward = Backward(
        partial(rule_edits, model, rules),
        lambda readout: lrp_loss(model, readout, rules),
    )
    replacement = build_replacement(job.replacement, model, job.graph, job.pairs, job.batch_size)

    def of(chunk: Pairs) -> Tensor:
        found = edge_gradients(model, job.graph, chunk, metric, replacement=replacement, backward=backward)
        return metric.direction * found

    total = job.sum_over_batches(repaired(job, of, replacement))
    forwards = (2 + job.replacement.startswith("mean") + keystone_forwards(job)) * len(job.pairs)
    return job.scores(name, total, {"forwards": forwards, "backwards": len(job.pairs)})


def _by_attention(job: Job) -> Rules:
    return ATTENTION[str(job.settings["attention"])]


CD_EDGES = Method(
    "cd-edges",
    "Contextual decomposition along edges: linear rules in one backward",
    "Hsu et al. 2024, arXiv 2407.00886, with the linear rules; RelP, arXiv 2508.21258",
    partial(_modified, "cd-edges", _by_attention),
    {"replacement": REPLACEMENT, "attention": _ATTENTION, "keystones": KEYSTONES},
    graphs="summed",
    additive=True,
)
GIM = Method(
    "gim",
    "Gradient interaction modifications: edge attribution with a softer softmax and constant norms in the backward",
    "Edin et al. 2025, arXiv 2505.17630",
    partial(_modified, "gim", lambda _: RULES["gim"]),
    {"replacement": REPLACEMENT, "keystones": KEYSTONES},
    graphs="summed",
    additive=True,
)
RELP = Method(
    "relp",
    "Relevance patching: edge attribution with LRP coefficients for norms, activations and gates",
    "Rezaei Jafari et al. 2025, arXiv 2508.21258",
    partial(_modified, "relp", _by_attention),
    {"replacement": REPLACEMENT, "attention": replace(_ATTENTION, default="gradient"), "keystones": KEYSTONES},
    graphs="summed",
    additive=True,
)
