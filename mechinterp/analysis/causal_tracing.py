"""Causal tracing: noise on the subject's embeddings destroys the answer; which clean states restore it?

Source: Meng et al. 2022 (arXiv 2202.05262), section 2.1 and appendix B.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.base.batches import batches, over_batches
from mechinterp.base.errors import InputError
from mechinterp.base.progress import Progress, no_progress
from mechinterp.base.registry import unknown
from mechinterp.engines.grid import Grid, numbered
from mechinterp.engines.patch_direction import DENOISE
from mechinterp.engines.patch_sweep import Patch, run_base, start_layers, sweep
from mechinterp.engines.readout import checked_metric, metric_readout
from mechinterp.models.components import Part, Positions, layer_range, position_sets
from mechinterp.models.hook_manager import HookManager, Intervention
from mechinterp.models.sites import Site
from mechinterp.tasks.own_metric import MetricLike
from mechinterp.tasks.pairs import Pairs

RESTORABLE = ("resid_post", "resid_mid", "resid_pre", "attn_out", "mlp_out")


def causal_tracing(
    model: HookManager,
    pairs: Pairs,
    subject: Positions,
    what: str = "resid_post",
    *,
    positions: Positions = "each",
    window: int = 1,
    noise: float = 3.0,
    samples: int = 10,
    seed: int = 0,
    metric: MetricLike = "prob",
    layers: Sequence[int] | None = None,
    batch_size: int | None = None,
    memory: int | None = None,
    progress: Progress = no_progress,
) -> Grid:
    """The indirect effect of each layer and position: metric(noised, state restored) - metric(noised).

    Gaussian noise is added to the clean prompts' embeddings of the subject; then the clean run's values of `what` are
    restored in a window of layers around each layer, at each of `positions`. The corrupt prompts are not used.

    Axes layer, pos, example, in units of the metric (`prob`: the probability of the right answers), positive = the
    state carries what the noise destroyed. `about` has the means of the metric in the clean and in the noised runs;
    `fraction` divides by their difference.

    Args:
        model: The model.
        pairs: Their clean prompts are traced.
        subject: The positions that get the noise, one set.
        what: The site that is restored: `resid_post`, `resid_mid`, `resid_pre`, `attn_out` or `mlp_out`.
        positions: Where it is restored (see `Positions`).
        window: How many layers are restored together, from `layer - window // 2` on; the paper takes 1 for
            `resid_post`, 10 for `attn_out` and `mlp_out`.
        noise: The noise's standard deviation, in units of that of all embedding entries of the pairs' clean tokens.
        samples: Draws of the noise, over which the effect is averaged.
        seed: Of the noise, which depends on the seed and the order of the examples, not on padding or batches.
        metric: What is measured.
        layers: The layers to restore around; by default all.
        batch_size: Examples at a time; by default all.
        memory: Bytes of activations at a time, as in `activation_patching`.
        progress: Called after every sample.

    Cost: per sample two forwards, and per entry the share of a forward that can differ (see `cost`).

    Raises InputError for positions that do not exist, and a window or a number of samples below 1.

    >>> import mechinterp as mi
    >>> model = mi.load_model("bundled")
    >>> pairs = mi.load_task("ioi").pairs(model, n=4)
    >>> traced = mi.causal_tracing(model, pairs, subject="S2", positions=["S2", "end"], samples=2)
    >>> traced.mean().axes
    ('layer', 'pos')
    """
    metric = checked_metric(model, pairs, metric)
    if what not in RESTORABLE:
        raise unknown("site to restore", what, RESTORABLE)
    if window < 1 or samples < 1 or not noise > 0:
        raise InputError(
            f"`window` and `samples` must be at least 1 and `noise` positive; got {window}, {samples} and {noise}."
        )
    pairs = pairs.to(model.device)
    chosen = layer_range(model, what, layers)
    where, noised_at = position_sets(pairs, positions), position_sets(pairs, subject)
    if len(noised_at.labels) != 1:
        raise InputError(f"`subject` must be one set of positions; write [({', '.join(map(repr, noised_at.labels))})].")
    spread = _spread(model, pairs, batch_size)
    totals, forwards = torch.zeros(2, dtype=torch.float64), 0.0
    effects = torch.zeros(len(chosen) * len(where.labels), len(pairs), dtype=torch.float64, device=model.device)
    restored = [tuple(Part(Site(what, near)) for near in _window(model, what, layer, window)) for layer in chosen]
    sites = tuple(dict.fromkeys(part.site for parts in restored for part in parts))
    for sample, drawn in enumerate(_draws(pairs, model.dims.d_model, samples, seed)):
        for rows, batch in batches(pairs, batch_size):
            readout = metric_readout(model, batch, metric)
            patches = [Patch(parts, (mask[rows],) * len(parts)) for parts in restored for mask in where.masks]
            clean = run_base(model, readout, batch.clean, record=sites)
            extra = noise * spread * drawn[rows].to(model.dtype) * noised_at.masks[0, rows, :, None]
            entering = _noised_input(model, batch, extra)
            layers = start_layers(model, patches)
            noised = run_base(model, readout, batch.clean, layers=layers, entering=entering)
            after, cost = sweep(model, readout, noised, patches, clean.recorded, memory=memory)
            effects[:, rows] += DENOISE.effect(noised.values, after, metric).double() / samples
            totals += torch.stack([run.values.double().sum().cpu() for run in (clean, noised)]) / samples
            forwards += (2 + cost) * len(batch) / len(pairs)
        progress(sample + 1, samples)
    effects = torch.where(where.present.repeat(len(chosen), 1), effects, torch.nan)
    clean_value, noised_value = (totals / len(pairs)).tolist()
    about = {
        "analysis": "causal tracing",
        "metric": metric.name,
        "metric_direction": metric.direction,
        "sign": "positive = the state restores the task",
        "noise": noise,
        "noise_standard_deviation": noise * spread,
        "samples": samples,
        "seed": seed,
        "window": window,
        "site": what,
        "clean_value": clean_value,
        "corrupt_value": noised_value,
        "examples": len(pairs),
    }
    labels = {"layer": tuple(map(str, chosen)), "pos": where.labels, "example": numbered(len(pairs))}
    shape = [len(names) for names in labels.values()]
    dtype = torch.promote_types(model.dtype, torch.float32)
    return Grid(effects.to(dtype).reshape(shape), labels, "effect", metric.unit, about, {"forwards": forwards})


def _window(model: HookManager, what: str, layer: int, window: int) -> tuple[int, ...]:
    """The layers around `layer`, as the paper's code takes them."""
    first, stop = max(0, layer - window // 2), min(model.dims.n_layers, layer + (window + 1) // 2)
    return tuple(near for near in range(first, stop) if model.has(Site(what, near)))


def _spread(model: HookManager, pairs: Pairs, batch_size: int | None) -> float:
    """The standard deviation of all entries of the clean tokens' embeddings, about their mean."""

    def sums(batch: Pairs, _: slice) -> dict[str, float]:
        embedded = model.run(batch.clean, batch.mask, record=["embed"], stop=Site("embed")).values["embed"]
        real = embedded[batch.mask].double()
        return {"total": float(real.sum()), "square": float(real.pow(2).sum())}

    found = over_batches(pairs, batch_size, sums, {"total": "sum", "square": "sum"})
    total, square = float(found["total"]), float(found["square"])
    count = int(pairs.mask.sum()) * model.dims.d_model
    return max(0.0, square / count - (total / count) ** 2) ** 0.5


def _draws(pairs: Pairs, d_model: int, samples: int, seed: int) -> Iterator[Float[Tensor, "batch pos d_model"]]:
    """Standard normal numbers for every real token, sample by sample; padding gets none."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(samples):
        out = torch.zeros(*pairs.clean.shape, d_model)
        for row, length in enumerate(pairs.lengths.tolist()):
            out[row, :length] = torch.randn(length, d_model, generator=generator)
        yield out.to(pairs.device)


def _noised_input(
    model: HookManager, chunk: Pairs, extra: Float[Tensor, "batch pos d_model"]
) -> Float[Tensor, "batch pos d_model"]:
    """What enters the first layer with the noise on the embeddings."""
    site = Site("resid_pre", 0)
    noisy = Intervention(Site("embed"), lambda value: value + extra.to(value.dtype))
    return model.run(chunk.clean, chunk.mask, interventions=[noisy], record=[site], stop=site).values[site]
