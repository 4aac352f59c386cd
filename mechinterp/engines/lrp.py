"""Layer-wise relevance propagation as a modified backward pass; the forward is exactly the model's own.

A rule replaces the gradient of an operation by a coefficient with `coefficient * input = output`, so that a unit's
relevance is distributed without loss. Each rule is an edit of the gradient at a site, so that relevance = activation x
modified gradient. Sources: Ali et al. 2022 (norms and attention patterns as constants; PMLR 162), Achtibat
et al. 2024 (AttnLRP, arXiv 2402.05602), Rezaei Jafari et al. 2025 (RelP, arXiv 2508.21258), Edin et al. 2025 (GIM,
arXiv 2505.17630).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.base.errors import UnsupportedError
from mechinterp.base.registry import unknown
from mechinterp.engines.readout import Readout, answer_rows
from mechinterp.engines.site_gradients import Loss
from mechinterp.models.hook_manager import HookManager, Intervention
from mechinterp.models.norm import Norm
from mechinterp.models.sites import Site


@dataclass(frozen=True)
class Rules:
    """Which operations get a rule, and the factors of the gradient into each factor of attention."""

    norm: bool = True
    """LN-rule: the scale of every norm (pre, post and final) is a constant."""
    activation: bool = True
    """Identity rule: an activation function is the coefficient f(x) / x, and so is a soft cap on the logits."""
    gate: float = 0.5
    """Half rule: each factor of a gated MLP gets half (1: the plain gradient, which counts the product twice)."""
    pattern: float = 0.0
    """At attention patterns: 0 makes them constants (AH-rule), 0.5 is the half rule for pattern x v."""
    value: float = 1.0
    """At values: 1 with constant patterns, 0.5 for the half rule."""
    query_key: float = 1.0
    """At queries and keys: 0.5 is the half rule for their product."""
    temperature: float = 1.0
    """Of the softmax in the backward: above 1 it is less flat where a head attends sharply."""


RULES = {
    "gradient": Rules(norm=False, activation=False, gate=1.0, pattern=1.0),
    "relp": Rules(),
    "attnlrp": Rules(pattern=0.5, value=0.5, query_key=0.5),
    "gim": Rules(activation=False, gate=1.0, pattern=1.0, value=0.5, query_key=0.25, temperature=2.0),
}
"""gradient: no rule, so relevance is gradient x activation. relp: norms, activations, halved gates, constant patterns.
attnlrp: the same, but every product in attention halved, and the softmax's gradient (its Taylor expansion). gim: norms,
the softmax's gradient at temperature 2, a quarter of it to queries and keys, half of the gradient to values."""


def get_rules(rules: str | Rules) -> Rules:
    """The named set of rules. Raises InputError for an unknown name."""
    if isinstance(rules, Rules):
        return rules
    if rules not in RULES:
        raise unknown("set of rules", rules, RULES)
    return RULES[rules]


def check_receives(rules: Rules, kind: str) -> None:
    """Return None when relevance can reach a kind of site. Raises UnsupportedError otherwise."""
    factors = {"pattern": 1.0, "scores": 1.0, "q": rules.query_key, "k": rules.query_key}
    if kind in factors and rules.pattern * factors[kind] == 0:
        names = [name for name, known in RULES.items() if known == rules]
        raise UnsupportedError(
            f"The rules {names[0] if names else rules!r} hold attention patterns constant, so {kind!r} gets no "
            "relevance; use 'attnlrp', or a method with gradients."
        )


def rule_edits(model: HookManager, rules: Rules) -> list[Intervention]:
    """The rules of every layer as edits for one run with a backward; every run needs new ones.

    The rules of the final norm and of a soft cap on the logits are in `lrp_loss`. Raises UnsupportedError for an MLP
    whose activation function has no site, as in a mixture of experts.
    """
    _check_activations(model, rules)
    kept = _Kept({}, {})
    edits: list[Intervention] = []
    for layer in range(model.dims.n_layers):
        for kind, factor in (
            ("pattern", rules.pattern),
            ("v", rules.value),
            ("q", rules.query_key),
            ("k", rules.query_key),
        ):
            if factor != 1.0:
                edits.append(Intervention(Site(kind, layer), grad=_scaled(factor)))
        if rules.temperature != 1.0 and rules.pattern != 0.0:
            edits.append(_at_temperature(Site("pattern", layer), rules.temperature))
        if rules.norm:
            edits += _norm_edits(model, layer, kept)
        if model.dims.has_mlp:
            edits += _mlp_edits(model, layer, rules, kept)
    return edits


def _check_activations(model: HookManager, rules: Rules) -> None:
    if not model.dims.has_mlp or (not rules.activation and rules.gate == 1.0):
        return
    for layer in range(model.dims.n_layers):
        maps = model.layout.mlp_maps[layer]
        kinds = ["mlp_pre", "mlp_post"] + ["mlp_up"] * (maps is not None and maps.W_gate is not None)
        for site in (Site(kind, layer) for kind in kinds):
            if not model.has(site):
                why = model.refused.get(site, "the model has no such site")
                raise UnsupportedError(
                    f"The rules for activation functions and gates need '{site}', which layer {layer} of "
                    f"{model.info.architecture} does not have: {why}. Use plain gradients: method 'eap' or "
                    "'eap-ig' (of attribution_patching: 'atp' or 'eap-ig-inputs'), or rules='gradient'."
                )


@dataclass(frozen=True)
class _Kept:
    """Activations and gradients of the run that a rule needs at another site."""

    values: dict[Site, Tensor]
    gradients: dict[Site, Tensor]

    def value(self, site: Site) -> Intervention:
        def keep(value: Tensor) -> Tensor:
            self.values[site] = value.detach()
            return value

        return Intervention(site, value=keep)

    def gradient(self, site: Site) -> Intervention:
        def keep(gradient: Tensor) -> Tensor:
            self.gradients[site] = gradient
            return gradient

        return Intervention(site, grad=keep)


def _scaled(factor: float):
    return lambda gradient: gradient * factor  # pyright: ignore[reportUnknownLambdaType, reportUnknownVariableType]


def _at_temperature(site: Site, temperature: float) -> Intervention:
    """The gradient at a pattern p with which the softmax's own backward is that of the softmax at a temperature.

    With p' the pattern at the temperature, the scores are to get `p' (g - <p', g>)`; the softmax's backward makes that
    of `(p' / p) (g - <p', g>)`, since its mean under p is 0.
    """
    kept: list[Tensor] = []

    def keep(pattern: Tensor) -> Tensor:
        sums = pattern.detach().sum(-1)
        if bool(((sums > 0.02) & (sums < 0.98)).any()):  # rows of padding may be 0
            raise UnsupportedError(
                f"The rows of '{site}' do not sum to 1 (an attention sink takes the rest), so there is no softmax at "
                "another temperature for them; use method 'eap' or 'eap-ig'."
            )
        kept[:] = [pattern.detach()]
        return pattern

    def edit(gradient: Tensor) -> Tensor:
        wide = torch.promote_types(gradient.dtype, torch.float32)
        pattern, own = kept[0].to(wide), gradient.to(wide)
        softer = pattern ** (1 / temperature)
        softer = softer / softer.sum(-1, keepdim=True).clamp(min=torch.finfo(wide).tiny)
        ratio = torch.where(pattern > 0, softer / torch.where(pattern > 0, pattern, 1), 0)
        return (ratio * (own - (softer * own).sum(-1, keepdim=True))).to(gradient.dtype)

    return Intervention(site, value=keep, grad=edit)


def _norm_edits(model: HookManager, layer: int, kept: _Kept) -> list[Intervention]:
    """The edits for every norm of the layer."""
    attention, mlp_norm = model.layout.attention[layer], model.layout.mlp_norm[layer]
    pre = Site("resid_pre", layer)
    norms: dict[Site, list[tuple[Norm, Site]]] = {pre: [(attention.norm, Site("attn_in", layer))]}
    if attention.post.kind != "none":
        norms[Site("attn_raw", layer)] = [(attention.post, Site("attn_out", layer))]
    if mlp_norm is not None:
        entry = pre if model.dims.parallel else Site("resid_mid", layer)
        norms.setdefault(entry, []).append((mlp_norm, Site("mlp_in", layer)))
        if model.has(Site("mlp_raw", layer)):
            norms[Site("mlp_raw", layer)] = [(model.layout.neurons(layer).post, Site("mlp_out", layer))]
    edits: list[Intervention] = []
    for entry, outputs in norms.items():
        curved = [(norm, out) for norm, out in outputs if norm.kind != "none"]
        if not curved:
            continue
        edits += [kept.value(entry), *(kept.gradient(out) for _, out in curved)]
        edits.append(Intervention(entry, grad=_without_scale(kept, entry, curved)))
    return edits


def _without_scale(kept: _Kept, entry: Site, norms: list[tuple[Norm, Site]]):
    """Adds back the gradient through a norm's scale, `u <u, W' g> / (d_model s)`, with u the standardized input.

    The gradient through the norm is `P (W' g / s - u <u, W' g> / (d_model s))`, P the centring, and P u = u.
    """

    def edit(gradient: Tensor) -> Tensor:
        wide = torch.promote_types(gradient.dtype, torch.float32)
        x, total = kept.values[entry].to(wide), gradient.to(wide)
        for norm, out in norms:
            weighted = kept.gradients[out].to(wide)
            weighted = weighted if norm.weight is None else weighted * norm.weight
            u = norm.standardize(x)
            total = total + u * (u * weighted).mean(-1, keepdim=True) / norm.scale(x)
        return total.to(gradient.dtype)

    return edit


def _mlp_edits(model: HookManager, layer: int, rules: Rules, kept: _Kept) -> list[Intervention]:
    pre, up, post = (Site(kind, layer) for kind in ("mlp_pre", "mlp_up", "mlp_post"))
    gated = model.has(up)
    factor = rules.gate if gated else 1.0
    edits: list[Intervention] = []
    if gated and factor != 1.0:
        edits.append(Intervention(up, grad=_scaled(factor)))
    if rules.activation:
        edits += [kept.value(pre), kept.value(post), kept.gradient(post)]
        edits.append(Intervention(pre, grad=_as_coefficient(kept, pre, post, factor)))
    elif gated and factor != 1.0:
        edits.append(Intervention(pre, grad=_scaled(factor)))
    return edits


def _as_coefficient(kept: _Kept, pre: Site, post: Site, factor: float):
    """The gradient at the activation's input with f(x) / x (times a gate's other factor) instead of f'(x)."""

    def edit(gradient: Tensor) -> Tensor:
        x, out = kept.values[pre], kept.values[post]
        # The ratio tends to the derivative where x tends to 0.
        at_zero = x.abs() < torch.finfo(x.dtype).tiny
        coefficient = out / torch.where(at_zero, 1, x)
        return factor * torch.where(at_zero, gradient, kept.gradients[post] * coefficient)

    return edit


@dataclass(frozen=True)
class Head:
    """The values from the final residual stream to the metric, at the answer positions; differentiable."""

    normed: Float[Tensor, "batch n_answer d_model"]
    uncapped: Float[Tensor, "batch n_answer n_columns"]
    logits: Float[Tensor, "batch n_answer n_columns"]
    metric: Float[Tensor, " batch"]


def lrp_head(model: HookManager, readout: Readout, rules: Rules, resid: Float[Tensor, "batch pos d_model"]) -> Head:
    """The final norm, the unembedding, a soft cap and the metric, with the rules in their backward."""
    rows = answer_rows(resid, readout.pairs.answer_pos)
    normed, uncapped, logits = lrp_logits(model, readout.columns, rules, rows)
    return Head(normed, uncapped, logits, readout.of_logits(logits))


def lrp_logits(
    model: HookManager, columns: Tensor | None, rules: Rules, resid: Float[Tensor, "*axes d_model"]
) -> tuple[Float[Tensor, "*axes d_model"], Float[Tensor, "*axes n_columns"], Float[Tensor, "*axes n_columns"]]:
    """(the final norm's output, the logits before a soft cap, the logits), with the rules in their backward."""
    layout = model.layout
    norm = layout.final_norm
    normed = norm(resid)
    if rules.norm:
        normed = norm.project(resid) / norm.scale(resid).detach()
        normed = normed if norm.bias is None else normed + norm.bias
    weight, bias = unembedding(model, columns, resid.dtype)
    uncapped = logits = normed @ weight if bias is None else normed @ weight + bias
    if layout.soft_cap:
        logits = layout.soft_cap * torch.tanh(uncapped / layout.soft_cap)
        if rules.activation:
            at_zero = uncapped.abs() < torch.finfo(uncapped.dtype).tiny
            logits = uncapped * torch.where(at_zero, 1, logits / torch.where(at_zero, 1, uncapped)).detach()
    return normed, uncapped, logits


def unembedding(model: HookManager, columns: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """(weight, bias) of the unembedding, of all tokens or of the columns."""
    weight, bias = model.layout.W_U, model.layout.b_U
    if columns is not None:
        weight, bias = weight[:, columns], None if bias is None else bias[columns]
    return weight.to(dtype), None if bias is None else bias.to(dtype)


def lrp_loss(model: HookManager, readout: Readout, rules: Rules) -> Loss:
    """The metric of every example as a function of the final residual stream, with the rules in its backward."""
    return lambda resid: lrp_head(model, readout, rules, resid).metric
