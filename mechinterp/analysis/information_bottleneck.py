"""`information_bottleneck`: how many bits of each token the metric needs at a site, by noise learned per prompt.

At the site every number x is mixed with noise of its own mean and spread: `l x + (1 - l) e`, e from N(mean, spread^2).
The mix carries at most KL(mix || noise) of information about x, which has a closed form. Per prompt the l are learned
that keep the metric with as little information as possible (Schulz et al. 2020).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.analysis.directions import vector_site
from mechinterp.base.batches import batches
from mechinterp.base.errors import InputError
from mechinterp.base.progress import Progress, no_progress
from mechinterp.engines.grid import Grid, numbered
from mechinterp.engines.readout import FINAL, Readout, checked_metric, metric_readout
from mechinterp.engines.site_gradients import check_differentiable, site_gradients
from mechinterp.models.hook_manager import HookManager, Intervention
from mechinterp.models.modes import Gradients
from mechinterp.models.sites import Site
from mechinterp.tasks.own_metric import MetricLike
from mechinterp.tasks.pairs import Pairs

START = 5.0
"""The first value of the masks before the sigmoid: nearly everything passes."""


def information_bottleneck(
    model: HookManager,
    pairs: Pairs,
    site: str | Site,
    *,
    beta: float = 10.0,
    metric: MetricLike = "log_prob",
    steps: int = 20,
    samples: int = 5,
    learning_rate: float = 1.0,
    seed: int = 0,
    batch_size: int | None = None,
    progress: Progress = no_progress,
) -> Grid:
    """A Grid (measure, pos, example): the bits of each token of the clean prompt that the metric needs at a site.

    The measures are `bits`, an upper bound of the information that the mix has of the token, summed over d_model, and
    `kept`, the mean l. What is minimised per prompt is `-metric + beta * KL / (tokens * d_model)`, KL in nats; mean and
    spread of the noise are those of every channel over all tokens of the clean and corrupt prompts.

    The run with everything replaced by noise is the control: `about` has the mean metric of the clean run (`clean`),
    under the learned masks (`kept`) and under noise alone (`noise`). Where `kept` is far below `clean`,
    take a smaller beta.

    Args:
        model: The model.
        pairs: Their clean prompts are explained; for `log_prob` they need right answers.
        site: A site of one vector per token, such as `resid_pre.2`.
        beta: The price of information; larger: fewer bits.
        metric: What is kept; it must have a gradient.
        steps: Steps of Adam.
        samples: Draws of the noise in each step.
        learning_rate: Of Adam.
        seed: Of the noise.
        batch_size: Examples at a time; by default all. Each has noise of its own, so size and padding change nothing.
        progress: Called after every step of a batch.

    Cost: `steps * samples` forwards and backwards after the site, and 4 + samples forwards.

    Raises InputError for a site that is not one vector per token, and a metric without a gradient.

    Source: Schulz et al. 2020 (arXiv 2001.00396), the per-sample bottleneck. Deviation: the loss is any metric, not
    only the cross entropy, and no smoothing over neighbouring tokens.

    >>> import mechinterp as mi
    >>> model = mi.load_model("bundled")
    >>> pairs = mi.load_task("ioi").pairs(model, n=2)
    >>> grid = mi.information_bottleneck(model, pairs, "resid_pre.2", steps=2, samples=1)
    >>> grid.axes, grid.about["clean"] >= grid.about["noise"]
    (('measure', 'pos', 'example'), True)
    """
    metric = checked_metric(model, pairs, metric)
    check_differentiable(metric)
    if not beta >= 0 or steps < 1 or samples < 1 or not learning_rate > 0:
        raise InputError("`beta` is at least 0, `steps` and `samples` are at least 1, `learning_rate` is above 0.")
    place, pairs = vector_site(model, site), pairs.to(model.device)
    mean, spread = _noise_of(model, pairs, place, batch_size)
    seeds = torch.randint(2**31, (len(pairs),), generator=torch.Generator().manual_seed(seed)).tolist()
    found: list[Tensor] = []
    totals = torch.zeros(3, dtype=torch.float64)
    for rows, batch in batches(pairs, batch_size):
        x = _wide(model.run(batch.clean, batch.mask, record=[place], stop=place).values[place])
        readout = metric_readout(model, batch, metric)
        real = batch.mask[..., None]
        alpha = torch.full_like(x, START).requires_grad_(True)
        adam = torch.optim.Adam([alpha], lr=learning_rate)
        generators = [torch.Generator().manual_seed(own) for own in seeds[rows]]
        share = beta / (batch.mask.sum(1) * x.shape[-1]).to(x)

        def value(mixed: Tensor, batch: Pairs = batch, readout: Readout = readout) -> Tensor:
            edit = Intervention(place, mixed.to(model.dtype))
            run = model.run(batch.clean, batch.mask, record=[FINAL], stop=FINAL, interventions=[edit])
            return readout.of_resid(run.values[FINAL]).double().sum().cpu()

        def drawn(
            x: Tensor = x, real: Tensor = batch.mask, generators: Sequence[torch.Generator] = generators
        ) -> Tensor:
            unit = torch.zeros_like(x)
            for row, own in enumerate(generators):  # for its own tokens only, however wide the batch is padded
                n = int(real[row].sum())
                unit[row, :n] = torch.randn(n, x.shape[-1], generator=own).to(x)
            return mean + spread * unit

        for step in range(steps):
            kept = alpha.detach().sigmoid()
            gradient = torch.zeros_like(x)
            for _ in range(samples):
                noise = drawn()
                mixed = mix(x, noise, kept, real)
                edit = Intervention(place, mixed.to(model.dtype))
                back = site_gradients(model, batch, batch.clean, [place], readout.of_resid, edits=[edit])
                # The mix is linear in l: its derivative is x - noise.
                gradient += back.gradients[place].to(x) * (x - noise) * (-metric.direction / samples)
            with Gradients(True) as on, on:
                cost = (information(x, mean, spread, alpha.sigmoid()) * real * share[:, None, None]).sum()
                (of_cost,) = torch.autograd.grad(cost, alpha)
            alpha.grad = (gradient * kept * (1 - kept) + of_cost) * real
            adam.step()
            progress(step + 1, steps)
        kept = alpha.detach().sigmoid()
        draws = [drawn() for _ in range(samples)]
        totals[0] += value(x)
        for i, mask in ((1, kept), (2, torch.zeros_like(kept))):
            totals[i] += torch.stack([value(mix(x, noise, mask, real)) for noise in draws]).mean()
        bits = information(x, mean, spread, kept).sum(-1) / math.log(2)
        both = torch.stack([bits, kept.mean(-1)])
        found.append(torch.where(batch.mask, both, torch.nan))
    values = torch.cat(found, 1).transpose(1, 2)
    axes = {
        "measure": ("bits", "kept"),
        "pos": numbered(pairs.clean.shape[1]),
        "example": numbered(len(pairs)),
    }
    clean, after, noise = (totals / len(pairs)).tolist()
    about = {"site": str(place), "beta": beta, "metric": metric.name, "clean": clean, "kept": after, "noise": noise}
    about |= {"steps": steps, "samples": samples, "learning_rate": learning_rate, "seed": seed}
    return Grid(values, axes, "value", "", about, {"forwards": float(steps * samples + 2 * samples + 4)})


def mix(x: Tensor, noise: Tensor, kept: Tensor, real: Tensor) -> Tensor:
    """`kept * x + (1 - kept) * noise` at real tokens; with `kept` = 1 it is x, to the last bit."""
    return torch.where(real & (kept < 1), kept * x + (1 - kept) * noise, x)


def information(
    x: Float[Tensor, "*axes d"], mean: Float[Tensor, " d"], spread: Float[Tensor, " d"], kept: Float[Tensor, "*axes d"]
) -> Float[Tensor, "*axes d"]:
    """KL(N(kept x + (1 - kept) mean, (1 - kept)^2 spread^2) || N(mean, spread^2)) of every number, in nats."""
    through = (1 - kept).clamp(min=torch.finfo(kept.dtype).tiny)
    standardized = (x - mean) / spread
    return ((1 - kept).square() + (kept * standardized).square() - 1) / 2 - through.log()


def _noise_of(model: HookManager, pairs: Pairs, site: Site, batch_size: int | None) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every channel over all real tokens of both prompts."""
    seen: list[Tensor] = []
    for _, batch in batches(pairs, batch_size):
        for ids in (batch.clean, batch.corrupt):
            seen.append(_wide(model.run(ids, batch.mask, record=[site], stop=site).values[site][batch.mask]))
    values = torch.cat(seen)
    spread = values.std(0)
    if not bool((spread > 0).all()):
        raise InputError(
            f"Some channels of '{site}' are the same at all tokens, so noise with their spread cannot be drawn."
        )
    return values.mean(0), spread


def _wide(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))
