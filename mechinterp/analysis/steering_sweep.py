"""`steering_sweep`: what steering does to the target against what it does to everything else, over strengths."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from mechinterp.analysis.directions import Direction, given_direction
from mechinterp.base.batches import batches
from mechinterp.base.errors import InputError
from mechinterp.base.registry import unknown
from mechinterp.engines.grid import Grid
from mechinterp.engines.readout import FINAL, checked_metric, metric_readout
from mechinterp.features.edits import add_features, scale_features, set_features
from mechinterp.models.components import Positions, as_pairs
from mechinterp.models.hook_manager import HookManager, Intervention
from mechinterp.tasks.metrics import Metric
from mechinterp.tasks.own_metric import MetricLike
from mechinterp.tasks.pairs import Pairs

MEASURES = ("target", "change", "kl", "perplexity", "side change")
"""target: the metric under the edit; change: less that without it; kl: nats per token of neutral text; perplexity: of
that text under the edit; side change: of the second concept's metric (NaN without one)."""
HOW = {"add": add_features, "set": set_features, "scale": scale_features}


def steering_sweep(
    model: HookManager,
    direction: Direction,
    strengths: Sequence[float],
    pairs: Pairs,
    neutral: Pairs | Int[Tensor, "batch pos"] | None,
    *,
    how: Literal["add", "set", "scale"] = "add",
    prompt: Literal["clean", "corrupt"] = "corrupt",
    positions: Positions = None,
    metric: MetricLike = "logit_diff",
    side: Pairs | None = None,
    side_metric: MetricLike | None = None,
    controls: int = 3,
    seed: int = 0,
    batch_size: int | None = None,
) -> Grid:
    """A Grid (edit, strength, measure): effect on the target against damage to neutral text, with random directions.

    The axis `edit` has `direction` and `random 0`, ...: random directions whose write is as long. An effect that they
    share comes from the size of the push. Measures: `target` and `change` (of the metric, mean over the prompts), `kl`
    (mean over the tokens of neutral text of KL(without || with the edit), in nats), `perplexity` (of that text with the
    edit), `side change` (of the metric on prompts of a second concept).

    Args:
        model: The model.
        direction: What is steered.
        strengths: Added to the reading (`add`; 1 = the distance of the classes' means), or what it is set to (`set`) or
            multiplied by (`scale`).
        pairs: The target's prompts.
        neutral: Text that has nothing to do with the concept: token ids, or pairs, whose clean prompts are taken. None:
            damage is not measured, `kl` and `perplexity` are NaN.
        how: `add`, `set` or `scale`.
        prompt: Which prompts of the pairs are steered.
        positions: Where in the target's prompts; by default everywhere. Neutral text and the second concept are always
            steered everywhere.
        metric: The target's.
        side: Clean prompts of a second concept, for side effects.
        side_metric: Its metric; by default the same.
        controls: How many random directions.
        seed: Of the random directions.
        batch_size: Examples at a time; by default all.

    Cost: (1 + controls) * strengths forwards of all three sets of prompts, and one without edits.

    Raises InputError for no strength, neutral text of one token per prompt, and answers that the pairs lack.

    >>> import mechinterp as mi
    >>> model = mi.load_model("bundled")
    >>> pairs = mi.orient_pairs(mi.load_task("subject_verb_agreement").pairs(model, n=8))
    >>> other = mi.load_task("ioi").pairs(model, n=4)
    >>> direction = mi.find_direction(model, pairs, "resid_pre.3", "end")
    >>> sweep = mi.steering_sweep(model, direction, [0.0, 1.0], pairs, other, positions="end", controls=1)
    >>> sweep.axes, float(sweep.at(edit="direction", strength="0", measure="kl"))
    (('edit', 'strength', 'measure'), 0.0)
    """
    if how not in HOW:
        raise unknown("kind of steering", how, HOW)
    if not len(strengths) or len(set(strengths)) != len(strengths) or controls < 0:
        raise InputError("Give at least one strength, each once, and `controls` of at least 0.")
    if prompt not in ("clean", "corrupt"):
        raise InputError(f"`prompt` is 'clean' or 'corrupt'; got {prompt!r}.")
    target_metric = checked_metric(model, pairs, metric)
    other_metric = None if side is None else checked_metric(model, side, side_metric or metric)
    text = None if neutral is None else as_pairs(neutral)
    if text is not None and not bool((text.lengths > 1).any()):
        raise InputError("Neutral text needs prompts of at least two tokens: the perplexity is that of the next token.")
    generator = torch.Generator().manual_seed(seed)
    edits = {"direction": direction}
    for i in range(controls):
        vector = torch.randn(direction.write.shape, generator=generator).to(direction.write)
        edits[f"random {i}"] = given_direction(direction.site, vector * (direction.write.norm() / vector.norm()))

    def task_value(own: Pairs, rule: Metric, which: str, made: Callable[[Pairs], list[Intervention]]) -> float:
        total = 0.0
        for _, batch in batches(own, batch_size):
            tokens = batch.clean if which == "clean" else batch.corrupt
            readout = metric_readout(model, batch, rule)
            run = model.run(tokens, batch.mask, record=[FINAL], stop=FINAL, interventions=made(batch))
            total += float(readout.of_resid(run.values[FINAL]).double().sum())
        return total / len(own)

    plain = task_value(pairs, target_metric, prompt, lambda _: [])
    side_plain = None if side is None or other_metric is None else task_value(side, other_metric, "clean", lambda _: [])
    listed = [] if text is None else [batch for _, batch in batches(text, batch_size)]
    reference = [_log_probabilities(model, batch, []) for batch in listed]
    values = torch.full((len(edits), len(strengths), len(MEASURES)), torch.nan, dtype=torch.float64)
    for i, own in enumerate(edits.values()):
        for j, strength in enumerate(strengths):
            everywhere = [HOW[how](own.basis, {0: float(strength)})]

            def there(batch: Pairs, own: Direction = own, strength: float = strength) -> list[Intervention]:
                return [HOW[how](own.basis, {0: float(strength)}, pairs=batch, positions=positions)]

            target = task_value(pairs, target_metric, prompt, there)
            kl, loss = _damage(model, listed, reference, everywhere)
            values[i, j, :4] = torch.tensor([target, target - plain, kl, loss]).double()
            if side is not None and other_metric is not None and side_plain is not None:
                values[i, j, 4] = task_value(side, other_metric, "clean", lambda _, e=everywhere: e) - side_plain
    labels = {"edit": tuple(edits), "strength": tuple(f"{s:g}" for s in strengths), "measure": MEASURES}
    runs = 1 + len(edits) * len(strengths)
    about = {
        "direction": repr(direction),
        "how": how,
        "prompt": prompt,
        "positions": positions,
        "metric": target_metric.name,
        "without the edit": plain,
        "perplexity without": _damage(model, listed, reference, [])[1],
        "neutral text is steered": "at every token",
        "seed": seed,
    }
    return Grid(values, labels, "value", "", about, {"forwards": float(runs * (2 + (side is not None)))})


def _log_probabilities(model: HookManager, text: Pairs, edits: list[Intervention]) -> Tensor:
    run = model.run(text.clean, text.mask, interventions=edits)
    assert run.logits is not None
    return run.logits.to(torch.promote_types(run.logits.dtype, torch.float32)).log_softmax(-1)


def _damage(
    model: HookManager, text: Sequence[Pairs], reference: Sequence[Tensor], edits: list[Intervention]
) -> tuple[float, float]:
    """(mean KL per token in nats, perplexity of the next token) of neutral text under the edits."""
    kl = loss = 0.0
    n_tokens = n_next = 0
    if not text:
        return math.nan, math.nan
    for batch, before in zip(text, reference, strict=True):
        after = _log_probabilities(model, batch, edits)
        mask = batch.mask.to(after.device)
        divergence = (before.exp() * (before - after)).sum(-1)
        kl += float(divergence[mask].double().sum())
        following = batch.clean[:, 1:].to(after.device)
        next_loss = -after[:, :-1].gather(-1, following[..., None])[..., 0]
        loss += float(next_loss[mask[:, 1:]].double().sum())
        n_tokens, n_next = n_tokens + int(mask.sum()), n_next + int(mask[:, 1:].sum())
    return kl / n_tokens, float(torch.tensor(loss / n_next).exp())
