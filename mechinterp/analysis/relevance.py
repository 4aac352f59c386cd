"""Relevance: how much of the output every token and every activation carries, by layer-wise relevance propagation.

Sources: RelP's rules (Rezaei Jafari et al. 2025, arXiv 2508.21258), AttnLRP (Achtibat et al. 2024, arXiv 2402.05602);
the rules are in `engines/lrp.py`. Deviations: linear layers use the plain 0-rule (no epsilon), biases keep their
relevance by name instead of losing it, and where attention scores have a soft cap AttnLRP takes its gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.base.batches import batches
from mechinterp.base.errors import InputError
from mechinterp.engines.grid import Grid, numbered
from mechinterp.engines.lrp import Rules, check_receives, get_rules, lrp_head, lrp_loss, rule_edits, unembedding
from mechinterp.engines.readout import FINAL, Readout, checked_metric, metric_readout
from mechinterp.engines.site_gradients import (
    SiteGradients,
    check_differentiable,
    over_sets,
    site_gradients,
    unit_products,
)
from mechinterp.models.components import layer_range, n_units, unit_axis
from mechinterp.models.hook_manager import HookManager
from mechinterp.models.modes import Gradients
from mechinterp.models.norm import Norm
from mechinterp.models.sites import Site
from mechinterp.tasks.own_metric import MetricLike
from mechinterp.tasks.pairs import Pairs


@dataclass(frozen=True, eq=False)
class Relevance:
    """The relevances of one site and of all biases, and the output that they add up to."""

    scores: Grid
    """`[pos, example]`, or `[layer, (head or neuron,) pos, example]`; NaN at padding."""
    biases: Grid
    """`[part, example]`: what biases carry, per layer of attention and MLP and at the end; `a3 softmax` is what
    AttnLRP's softmax does not pass on."""
    output: Float[Tensor, " example"]
    """What is distributed: the sum of logits times the metric's gradient at them; for logit_diff the metric itself."""
    violation: float
    """The largest |relevance of the residual stream + biases after it - output| of any layer and example, as a share
    of the largest output. Rounding for the LRP rules; not small for `gradient` and `gim`, which do not conserve it."""


def relevance(
    model: HookManager,
    pairs: Pairs,
    what: str = "input",
    *,
    rules: str | Rules = "relp",
    metric: MetricLike = "logit_diff",
    batch_size: int | None = None,
) -> Relevance:
    """How much of the clean run's output each token (`what="input"`), or each unit of a kind of site, carries.

    Positive = it raises the metric; in units of the logits.

    Conservation is checked at every layer in each run: the relevances of one residual stream and of the biases behind
    it sum to the output (see `Relevance.violation`).

    Args:
        model: The model.
        pairs: Their clean prompts are explained.
        what: `input` (the input of the first layer) or a kind of site (`resid_pre`, `attn_out`, `mlp_out`, `z`, `v`,
            `mlp_post`, ...), by layer, head or neuron, and position.
        rules: `relp`, `attnlrp`, `gim`, `gradient` (gradient x activation) or your own `Rules`.
        metric: What is explained; it must have a gradient at the clean run.
        batch_size: Examples at a time; by default all.

    Cost: one forward and one backward. Memory: the run's graph with the values and gradients of every site that has
    a bias.

    Raises InputError for an unknown site, metric or set of rules, and a metric without a gradient; UnsupportedError
    for a site that the model does not have or that gets no relevance under the rules.

    >>> import mechinterp as mi
    >>> from mechinterp.analysis.relevance import relevance
    >>> model = mi.load_model("bundled")
    >>> found = relevance(model, mi.load_task("ioi").pairs(model, n=4))
    >>> found.scores.axes, found.violation < 1e-3
    (('pos', 'example'), True)
    """
    metric = checked_metric(model, pairs, metric)
    check_differentiable(metric)
    if metric.needs_reference:
        raise InputError(
            f"Metric {metric.name!r} has no gradient at the clean run itself; use logit_diff or prob_diff."
        )
    chosen = get_rules(rules)
    labels, sites = _sites(model, what, chosen)
    scores: list[Tensor] = []
    parts: list[Mapping[str, Tensor]] = []
    outputs: list[Tensor] = []
    gaps: list[Tensor] = []
    watched = _bias_sites(model)
    for _, chunk in batches(pairs.to(model.device), batch_size):
        readout = metric_readout(model, chunk, metric)
        loss = lrp_loss(model, readout, chosen)
        found = site_gradients(
            model, chunk, chunk.clean, [*sites, *watched], loss, record=[FINAL], edits=rule_edits(model, chosen)
        )
        output, last = _output(model, readout, chosen, found.values[FINAL])
        here = _biases(model, chunk, found, chosen)
        gaps.append(_gaps(model, chunk, found, here, last, output))
        per_site = [_relevance(found, site) for site in sites]
        real = chunk.mask[None, :, :, None]
        scores.append(torch.where(real, torch.stack(per_site), torch.nan).permute(0, 3, 2, 1))
        parts.append({**here, "logits": last})
        outputs.append(output)
    output = torch.cat(outputs)
    values = torch.cat(scores, -1).reshape(*(len(names) for names in labels.values()), -1, len(pairs))
    scale = max(float(output.abs().max()), torch.finfo(output.dtype).tiny)
    violation = float(torch.cat(gaps, 1).abs().max()) / scale
    about = {
        "analysis": "relevance",
        "rules": rules if isinstance(rules, str) else str(rules),
        "metric": metric.name,
        "sign": "positive = it raises the metric",
        "violation": violation,
        "examples": len(pairs),
    }
    cost = {"forwards": 1.0, "backwards": 1.0}
    examples = numbered(len(pairs))
    axes = {**labels, "pos": numbered(pairs.clean.shape[1]), "example": examples}
    named = torch.stack([torch.cat([part[name] for part in parts]) for name in parts[0]])
    return Relevance(
        Grid(values, axes, "relevance", metric.unit, about, cost),
        Grid(named, {"part": tuple(parts[0]), "example": examples}, "relevance", metric.unit, about, cost),
        output,
        violation,
    )


def _sites(model: HookManager, what: str, rules: Rules) -> tuple[dict[str, tuple[str, ...]], list[Site]]:
    if what == "input":
        return {}, [Site("resid_pre", 0)]
    layers = layer_range(model, what, None)
    check_receives(rules, what)
    labels = {"layer": tuple(map(str, layers))}
    axis = unit_axis(model, what)
    if axis is not None:
        labels[axis] = numbered(n_units(model, Site(what, layers[0])))
    return labels, [Site(what, layer) for layer in layers]


def _relevance(found: SiteGradients, site: Site) -> Float[Tensor, "batch pos unit"]:
    value = found.values[site]
    if site.kind == "scores":
        value = torch.where(found.gradients[site] == 0, 0, value)  # what is not attended to is -inf
    return unit_products(site, value, found.gradients[site])


def _bias_sites(model: HookManager) -> list[Site]:
    """The sites whose gradients give the relevance of the biases and of AttnLRP's softmax; and the residual streams."""
    kinds = ["resid_pre", "attn_in", "q", "k", "v", "pattern", "attn_out"]
    if model.dims.has_mlp:
        kinds += ["mlp_in", "mlp_pre", "mlp_up", "mlp_out"]
    sites = [Site(kind, layer) for layer in range(model.dims.n_layers) for kind in [*kinds, "attn_raw", "mlp_raw"]]
    return [site for site in sites if site.kind not in ("attn_raw", "mlp_raw", "mlp_up") or model.has(site)]


def _carried(gradient: Tensor, bias: Tensor | None) -> Float[Tensor, " batch"] | float:
    """bias x gradient, summed over all but the examples."""
    if bias is None:
        return 0.0
    wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    return (wide * bias.to(wide.dtype)).flatten(1).sum(1)


def _biases(model: HookManager, chunk: Pairs, found: SiteGradients, rules: Rules) -> dict[str, Tensor]:
    """Per layer the relevance of the biases of its attention and of its MLP, and of its softmax."""
    out: dict[str, Tensor] = {}
    for layer in range(model.dims.n_layers):
        maps = model.layout.attention[layer]

        def carried(kind: str, bias: Tensor | None, layer: int = layer) -> Float[Tensor, " batch"] | float:
            return _carried(found.gradients[Site(kind, layer)], bias)

        raw = "attn_raw" if model.has(Site("attn_raw", layer)) else "attn_out"
        written = _multiplied(maps.post, maps.b_O)
        total = carried("attn_in", maps.norm.bias) + carried(raw, written) + carried("attn_out", maps.post.bias)
        for channel in "qkv":
            total = total + carried(channel, maps.b[channel])
        zero = torch.zeros_like(found.metric)
        out[f"a{layer} bias"] = zero + total
        if rules.pattern != 0:
            out[f"a{layer} softmax"] = _softmax_gap(chunk, found, layer)
        if model.dims.has_mlp:
            mlp, norm = model.layout.neurons(layer), model.layout.mlp_norm[layer]
            raw = "mlp_raw" if model.has(Site("mlp_raw", layer)) else "mlp_out"
            total = carried("mlp_in", None if norm is None else norm.bias)
            total = total + carried("mlp_pre", mlp.b_in if mlp.W_gate is None else mlp.b_gate)
            if mlp.W_gate is not None:
                total = total + carried("mlp_up", mlp.b_in)
            written = _multiplied(mlp.post, mlp.b_out)
            out[f"m{layer} bias"] = zero + total + carried(raw, written) + carried("mlp_out", mlp.post.bias)
    return out


def _multiplied(post: Norm, bias: Tensor | None) -> Tensor | None:
    """An output bias as it is added: with a constant multiplier, but before a real post-norm."""
    return bias if bias is None or post.kind != "none" else post.project(bias)


def _softmax_gap(chunk: Pairs, found: SiteGradients, layer: int) -> Float[Tensor, " batch"]:
    """Relevance of the patterns minus that of the queries and keys that they are computed from."""

    def total(kind: str) -> Tensor:
        return over_sets(_relevance(found, Site(kind, layer)), chunk.mask[None]).sum((0, 1))

    return total("pattern") - total("q") - total("k")


def _output(
    model: HookManager, readout: Readout, rules: Rules, resid: Tensor
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """(logits x gradient of the metric, the share of the biases of the final norm and of the unembedding)."""
    with Gradients(True) as on, on:
        head = lrp_head(model, readout, rules, resid.detach().requires_grad_())
        at = torch.autograd.grad(head.metric.sum(), [head.logits, head.uncapped, head.normed])
    output = (head.logits.detach() * at[0]).flatten(1).sum(1)
    _, bias = unembedding(model, readout.columns, output.dtype)
    last = torch.zeros_like(output) + _carried(at[1], bias)
    return output, last + _carried(at[2], model.layout.final_norm.bias)


def _gaps(
    model: HookManager,
    chunk: Pairs,
    found: SiteGradients,
    biases: Mapping[str, Tensor],
    last: Tensor,
    output: Tensor,
) -> Float[Tensor, "layer batch"]:
    """Residual relevance + biases behind it - output, at every layer."""
    behind, gaps = last, list[Tensor]()
    for layer in reversed(range(model.dims.n_layers)):
        behind = behind + sum(value for name, value in biases.items() if name.split()[0] in (f"a{layer}", f"m{layer}"))
        products = _relevance(found, Site("resid_pre", layer))
        gaps.append(over_sets(products, chunk.mask[None])[0, 0] + behind - output)
    return torch.stack(gaps)
