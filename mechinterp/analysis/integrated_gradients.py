"""Integrated gradients over the embeddings: how much each token contributes to the metric.

Source: Sundararajan et al. 2017 (arXiv 1703.01365). Deviation: midpoints by default instead of the paper's right ends
(`quadrature="right"`). Gauss-Legendre points are far more accurate where the metric is smooth along the path (small
weights), and less so on trained models, whose metric often jumps in the middle, where these points are sparse.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.base.batches import over_batches
from mechinterp.base.errors import InputError, UnsupportedError
from mechinterp.base.registry import unknown
from mechinterp.engines.grid import Grid, numbered
from mechinterp.engines.readout import FINAL, checked_metric, metric_readout
from mechinterp.engines.site_gradients import check_differentiable, site_gradients
from mechinterp.models.hook_manager import HookManager, Intervention
from mechinterp.models.sites import Site
from mechinterp.tasks.own_metric import MetricLike
from mechinterp.tasks.pairs import Pairs

Baseline: TypeAlias = "str | int | Tensor"
BASELINES = ("corrupt", "zero", "pad")
INPUTS = {"embed": Site("embed"), "resid_pre": Site("resid_pre", 0)}


def _gauss_legendre(n: int) -> list[tuple[float, float]]:
    points, weights = np.polynomial.legendre.leggauss(n)
    return [((float(x) + 1) / 2, float(w) / 2) for x, w in zip(points, weights, strict=True)]


QUADRATURES: dict[str, Callable[[int], list[tuple[float, float]]]] = {
    "gauss-legendre": _gauss_legendre,
    "midpoint": lambda n: [((k + 0.5) / n, 1 / n) for k in range(n)],
    "right": lambda n: [((k + 1) / n, 1 / n) for k in range(n)],
}
"""(point, weight) pairs of an integral from 0 to 1. `right` is the sum of Hanna et al. 2024 and of the IG paper."""


def integration_points(steps: int, quadrature: str) -> list[tuple[float, float]]:
    """(point, weight) of every step of an integral from 0 to 1. Raises InputError for a bad number or rule.

    >>> integration_points(2, "midpoint")
    [(0.25, 0.5), (0.75, 0.5)]
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= 1000:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError(f"`steps` must be a whole number from 1 to 1000; got {steps!r}.")
    if quadrature not in QUADRATURES:
        raise unknown("quadrature", quadrature, QUADRATURES)
    return QUADRATURES[quadrature](steps)


def integrated_gradients(
    model: HookManager,
    pairs: Pairs,
    *,
    baseline: Baseline = "corrupt",
    site: str = "embed",
    steps: int = 32,
    quadrature: str = "midpoint",
    metric: MetricLike = "logit_diff",
    batch_size: int | None = None,
) -> Grid:
    """How much every token of the clean prompt adds to the metric, against a baseline: axes (pos, example).

    The gradient of the metric is integrated along the straight line from the baseline's embeddings to the clean
    ones, times their difference, summed over d_model. Positive = the token raises the metric (the sign is not turned
    where lower is better). Padding has NaN.

    Completeness: a prompt's numbers sum to metric(clean) - metric(baseline) as `steps` grows. `about` has the largest
    error, in units of the metric (`completeness_error`) and as a share of the largest difference
    (`completeness_error_share`). Under RMSNorm or LayerNorm a `zero` baseline converges slowly or never, because a
    norm's output jumps at zero.

    Args:
        model: The model.
        pairs: Their clean prompts are explained.
        baseline: `corrupt` (the corrupt prompt's embeddings), `zero`, `pad` (the tokenizer's padding token, or its
            end token, at every position), a token id, or embeddings `[d_model]` or `[batch, pos, d_model]`.
        site: `embed` (token embeddings; position embeddings stay) or `resid_pre` (the input of the first layer; both
            change).
        steps: Points of the integral.
        quadrature: Where these lie: `midpoint`, `gauss-legendre` or `right`.
        metric: What is measured; it must have a gradient.
        batch_size: Examples at a time; by default all.

    Cost: `steps` forwards and backwards, and three forwards. Memory: one run's graph.

    Raises InputError for an unknown baseline, site, metric or number of steps.

    >>> import mechinterp as mi
    >>> from mechinterp.analysis.integrated_gradients import integrated_gradients
    >>> model = mi.load_model("bundled")
    >>> tokens = integrated_gradients(model, mi.load_task("ioi").pairs(model, n=4), steps=48)
    >>> tokens.axes, tokens.about["completeness_error_share"] < 0.01
    (('pos', 'example'), True)
    """
    metric = checked_metric(model, pairs, metric)
    check_differentiable(metric)
    if site not in INPUTS:
        raise unknown("input site", site, INPUTS)
    points = integration_points(steps, quadrature)
    where = INPUTS[site]
    model.resolve(where)
    pairs = pairs.to(model.device)
    fixed = _fixed(model, pairs, baseline, where)

    def integrated(batch: Pairs, rows: slice) -> dict[str, Tensor]:
        clean = _embeddings(model, batch, batch.clean, where)
        base = _embeddings(model, batch, batch.corrupt, where) if fixed is None else fixed
        base = base[rows] if base.ndim == 3 and len(base) == len(pairs) and fixed is not None else base
        base = base.expand_as(clean)
        loss = metric_readout(model, batch, metric).of_resid

        def at(point: float) -> Intervention:
            between = torch.where(batch.mask[..., None], base + point * (clean - base), clean)
            return Intervention(where, between.to(model.dtype))

        dtype = torch.promote_types(model.dtype, torch.float32)
        gradient = torch.zeros(clean.shape, dtype=dtype, device=model.device)
        for point, weight in points:
            found = site_gradients(model, batch, batch.clean, [where], loss, edits=[at(point)])
            gradient += weight * found.gradients[where].to(dtype)
        product = ((clean - base).to(dtype) * gradient).sum(-1)
        ends = [
            loss(model.run(batch.clean, batch.mask, interventions=[at(p)], record=[FINAL], stop=FINAL).values[FINAL])
            for p in (1.0, 0.0)
        ]
        return {"scores": torch.where(batch.mask, product, torch.nan), "total": ends[0] - ends[1]}

    found = over_batches(pairs, batch_size, integrated, {"scores": 0, "total": 0})
    values, total = found["scores"], found["total"]
    error = float((values.nansum(1) - total).abs().max())
    about = {
        "analysis": "integrated gradients",
        "baseline": baseline if isinstance(baseline, (str, int)) else "tensor",
        "site": str(where),
        "metric": metric.name,
        "sign": "positive = the token raises the metric",
        "quadrature": quadrature,
        "steps": steps,
        "completeness_error": error,
        "completeness_error_share": error / max(float(total.abs().max()), torch.finfo(total.dtype).tiny),
        "examples": len(pairs),
    }
    labels = {"pos": numbered(values.shape[1]), "example": numbered(len(pairs))}
    cost = {"forwards": float(steps + 3 + (baseline == "corrupt") + metric.needs_reference), "backwards": float(steps)}
    return Grid(values.T, labels, "attribution", metric.unit, about, cost)


def _embeddings(model: HookManager, pairs: Pairs, tokens: Tensor, where: Site) -> Float[Tensor, "batch pos d_model"]:
    return model.run(tokens, pairs.mask, record=[where], stop=where).values[where]


def _fixed(model: HookManager, pairs: Pairs, baseline: Baseline, where: Site) -> Tensor | None:
    """The baseline's embeddings where they do not depend on the corrupt prompts, in a shape that broadcasts."""
    if isinstance(baseline, Tensor):
        shape, d_model = tuple(baseline.shape), model.dims.d_model
        if shape not in ((d_model,), (*pairs.clean.shape, d_model)):
            raise InputError(
                f"A baseline tensor is [d_model] = [{d_model}] or [batch, pos, d_model] = "
                f"{[*pairs.clean.shape, d_model]}; got {list(shape)}."
            )
        return baseline.to(device=model.device, dtype=model.dtype)
    if baseline == "zero":
        return torch.zeros(model.dims.d_model, device=model.device, dtype=model.dtype)
    if isinstance(baseline, str):
        if baseline not in BASELINES:
            raise unknown("baseline", baseline, BASELINES)
        if baseline == "corrupt":
            return None
        found = [getattr(model.tokenizer, name, None) for name in ("pad_token_id", "eos_token_id")]
        baseline = next((int(token) for token in found if token is not None), -1)
        if baseline < 0:
            raise UnsupportedError(
                f"{model.info.name} has no tokenizer with a padding or end token; give a token id as the baseline."
            )
    if not 0 <= baseline < model.dims.d_vocab:
        raise InputError(f"The baseline token {baseline} is not in the vocabulary (0..{model.dims.d_vocab - 1}).")
    tokens = torch.full_like(pairs.clean[:1], baseline)
    return model.run(tokens, record=[where], stop=where).values[where]
