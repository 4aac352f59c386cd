"""Two tests of what features stand for, on labelled texts, each beside what shuffled labels give.

`score_description` tests a description as a classifier: does the feature fire on the texts that the description names,
and only there, and does ablating it matter there? `separation_scores` goes the other way: which features fire on one
set of texts and not on the other?

Sources: Huang et al. 2023 (arXiv 2309.10312): observation and intervention modes; Ferrando et al. 2024 (arXiv
2411.14257): separation scores. Deviation: here a description is the set of texts that it names, chosen by the user or
by a model of theirs; no language model is called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechinterp.analysis.describe_subject import Subject, subject_of
from mechinterp.analysis.texts import Texts, batches_of_texts
from mechinterp.base.errors import InputError
from mechinterp.models.feature_basis import FeatureBasis
from mechinterp.models.hook_manager import HookManager, Intervention
from mechinterp.models.modes import Gradients

SHUFFLES = 1000
TOKENS = ("last", "any")


@dataclass(frozen=True)
class DescriptionScore:
    """How well a description predicts a feature, on texts that it names (inside) and others (outside).

    Args:
        name: The feature, neuron or head.
        n_inside: Texts that the description names.
        n_outside: The others.
        precision: Of the texts on which it fires, the share that the description names; NaN if it fires on none.
        recall: Of the texts that the description names, the share on which it fires.
        auroc: How often it is stronger on a text inside than on one outside.
        auroc_shuffled: The 95 % quantile of `auroc` when the labels of the texts are shuffled.
        effect_inside: The mean divergence (KL, nats per token) of the output when it is ablated, on texts inside.
        effect_outside: The same outside.
        effect_shuffled: The 95 % quantile of their difference when labels are shuffled.
    """

    name: str
    n_inside: int
    n_outside: int
    precision: float
    recall: float
    auroc: float
    auroc_shuffled: float
    effect_inside: float
    effect_outside: float
    effect_shuffled: float

    @property
    def holds(self) -> bool:
        """Whether both the activation and the effect separate the texts better than 95 % of shuffled descriptions."""
        return self.auroc > self.auroc_shuffled and self.effect_inside - self.effect_outside > self.effect_shuffled

    def __repr__(self) -> str:
        return (
            f"DescriptionScore({self.name} on {self.n_inside} + {self.n_outside} texts: precision "
            f"{self.precision:.2f}, "
            f"recall {self.recall:.2f}, AUROC {self.auroc:.3f} (shuffled: below {self.auroc_shuffled:.3f}); ablated, "
            "KL "
            f"{self.effect_inside:.4f} inside and {self.effect_outside:.4f} outside (shuffled difference: below "
            f"{self.effect_shuffled:.4f}))"
        )


def score_description(
    model: HookManager,
    subject: FeatureBasis | str,
    feature: int | None = None,
    *,
    inside: Texts,
    outside: Texts,
    threshold: float = 0.0,
    skip: int = 0,
    batch_size: int = 16,
    seed: int = 0,
) -> DescriptionScore:
    """How well a description of a feature, neuron or head holds on held-out texts, in activation and in effect.

    Args:
        model: The model.
        subject: As in `describe`.
        feature: The number of the feature.
        inside: Texts on which the description says that it fires; not those that the description was made from.
        outside: Texts on which it says that it does not.
        threshold: It fires on a text if its largest activation there is above this.
        skip: So many tokens at the beginning of every text do not count, and it is not ablated there. Give 1 where a
            feature is strong on the first token whatever follows (BOS): with 0 that alone would be its strength.
        batch_size: Texts per run.
        seed: Of the shuffled labels.

    Cost: two forwards per text.

    Raises InputError for fewer than two texts on a side, and a text of no more than `skip` tokens.
    """
    found = subject_of(model, subject, feature)
    with Gradients(False) as off, off:
        parts = [_strength_and_effect(model, found, texts, skip, batch_size) for texts in (inside, outside)]
    for texts in parts:
        if len(texts[0]) < 2:
            raise InputError("A score needs at least two texts inside and two outside.")
    strength, effect = (torch.cat([part[k] for part in parts]) for k in (0, 1))
    n = len(parts[0][0])
    labels = torch.arange(len(strength)) < n
    fires = strength > threshold
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.stack([labels[torch.randperm(len(labels), generator=generator)] for _ in range(SHUFFLES)])
    aurocs = torch.stack([auroc(strength, one) for one in shuffled])
    differences = torch.stack([effect[one].mean() - effect[~one].mean() for one in shuffled])
    return DescriptionScore(
        found.name,
        n,
        len(strength) - n,
        float((fires & labels).sum() / fires.sum()) if bool(fires.any()) else float("nan"),
        float((fires & labels).sum() / labels.sum()),
        float(auroc(strength, labels)),
        float(aurocs.quantile(0.95)),
        float(effect[:n].mean()),
        float(effect[n:].mean()),
        float(differences.quantile(0.95)),
    )


def auroc(scores: Float[Tensor, " n"], positive: Bool[Tensor, " n"]) -> Tensor:
    """The probability that a positive has a larger score than a negative, ties counting half."""
    _, inverse, counts = scores.unique(return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0).double() - (counts.double() - 1) / 2)[inverse]
    n, m = int(positive.sum()), int((~positive).sum())
    return (ranks[positive].sum() - n * (n + 1) / 2) / (n * m)


def _strength_and_effect(
    model: HookManager, subject: Subject, texts: Texts, skip: int, batch_size: int
) -> tuple[Float[Tensor, " text"], Float[Tensor, " text"]]:
    """(the largest activation, the mean KL of the output when it is ablated) for every text."""
    strength, effect = [torch.zeros(0, dtype=torch.double)], [torch.zeros(0, dtype=torch.double)]
    ablation = _behind(subject.ablated(), skip)
    for tokens, every in batches_of_texts(model, texts, batch_size):
        mask = _counted(every, skip)
        plain = model.run(tokens, every, record=[subject.site])
        ablated = model.run(tokens, every, interventions=[ablation])
        assert plain.logits is not None and ablated.logits is not None
        activation = subject.activation(plain.values[subject.site]).double().masked_fill(~mask, -torch.inf)
        strength.append(activation.amax(1).cpu())
        before, after = (logits.double().log_softmax(-1) for logits in (plain.logits, ablated.logits))
        divergence = (before.exp() * (before - after)).sum(-1).masked_fill(~mask, 0)
        effect.append((divergence.sum(1) / mask.sum(1)).cpu())
    return torch.cat(strength), torch.cat(effect)


def _counted(mask: Bool[Tensor, "text pos"], skip: int) -> Bool[Tensor, "text pos"]:
    """The tokens behind the first ones. Raises InputError for a text that has none."""
    counted = mask & (torch.arange(mask.shape[1], device=mask.device) >= skip)
    if skip < 0 or not bool(counted.any(1).all()):
        raise InputError(f"`skip` is a number of tokens, at least 0 and below that of every text; got {skip}.")
    return counted


def _behind(edit: Intervention, skip: int) -> Intervention:
    """The same edit of one value per token, which leaves the first tokens as they are."""
    change = cast(Callable[[Tensor], Tensor], edit.value)  # as `Subject` makes them

    def behind(value: Tensor) -> Tensor:
        return torch.cat([value[:, :skip], change(value.clone())[:, skip:]], 1)

    return Intervention(edit.site, behind) if skip else edit


@dataclass(frozen=True, eq=False)
class SeparationScores:
    """How much more often each feature is active on one set of texts than on the other.

    Args:
        basis: The name of the basis.
        frame: A row per feature: feature, positive (the share of texts on which it is active; the least over the kinds
            of texts), negative, score; features that `exclude` drops are left out. The largest scores first.
        shuffled: The 95 % quantile of the largest score when the labels of the texts are shuffled: a score below it may
            be chance, given that the best of many features was taken.
        dropped: How many features were dropped because they fire on the texts to exclude.
    """

    basis: str
    frame: pd.DataFrame
    shuffled: float
    dropped: int

    def __repr__(self) -> str:
        best = self.frame.iloc[0] if len(self.frame) else None
        shown = "none left" if best is None else f"best f{int(best['feature'])} {best['score']:.3f}"
        return (
            f"SeparationScores({self.basis}: {shown}; the best of shuffled labels is below {self.shuffled:.3f}; "
            f"{self.dropped:,} features dropped)"
        )


def separation_scores(
    model: HookManager,
    basis: FeatureBasis,
    positive: Texts | Mapping[str, Texts],
    negative: Texts | Mapping[str, Texts],
    *,
    exclude: Texts | None = None,
    most: float = 0.02,
    token: str = "last",
    skip: int = 0,
    batch_size: int = 16,
    seed: int = 0,
) -> SeparationScores:
    """Which features are active on the positive texts and not on the negative ones.

    The score is the share of positive texts on which a feature is active less the share of negative ones; with several
    kinds of texts (types of entities), the least over the kinds.

    Args:
        model: The model.
        basis: The basis.
        positive: Texts, or texts by kind.
        negative: Texts, or texts of the same kinds.
        exclude: General text: features that are active on more than a share `most` of its tokens are dropped.
        most: That share.
        token: Where a feature must be active: at the `last` token of a text, or at `any`.
        skip: So many tokens at the beginning of every text do not count, those of `exclude` included. Give 1 where
            features are active on the first token whatever follows (BOS).
        batch_size: Texts per run.
        seed: Of the shuffled labels.

    Cost: one forward per text.

    Raises InputError for other kinds on the two sides, fewer than two texts, and a text of no more than `skip` tokens.

    Source: Ferrando et al. 2024 (arXiv 2411.14257), section 3; their general text is the Pile.
    """
    if token not in TOKENS:
        raise InputError(f"`token` is last or any; got {token!r}.")
    kinds = [_by_kind(positive), _by_kind(negative)]
    if list(kinds[0]) != list(kinds[1]) or not kinds[0]:
        raise InputError(f"Both sides need texts of the same kinds; got {list(kinds[0])} and {list(kinds[1])}.")
    with Gradients(False) as off, off:
        active = [
            {kind: _active(model, basis, texts, token, skip, batch_size) for kind, texts in side.items()}
            for side in kinds
        ]
        busy = None if exclude is None else _density(model, basis, exclude, skip, batch_size)
    for side in active:
        if any(len(rows) < 2 for rows in side.values()):
            raise InputError("Separation needs at least two texts of every kind on both sides.")
    kept = torch.ones(basis.n_features, dtype=torch.bool) if busy is None else busy <= most
    both = {kind: torch.cat([active[0][kind], active[1][kind]]).float() for kind in kinds[0]}
    sizes = {kind: len(active[0][kind]) for kind in kinds[0]}

    def scores(order: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """(score, share of positives, share of negatives): the kind with the least score decides."""
        shares = [
            (both[kind][order[kind][: sizes[kind]]].mean(0), both[kind][order[kind][sizes[kind] :]].mean(0))
            for kind in both
        ]
        gaps = torch.stack([a - b for a, b in shares])
        least = gaps.min(0)
        rows = torch.arange(basis.n_features)
        ups, downs = (torch.stack([share[k] for share in shares])[least.indices, rows] for k in (0, 1))
        return least.values, ups, downs

    score, up, down = scores({kind: torch.arange(len(rows)) for kind, rows in both.items()})
    generator = torch.Generator().manual_seed(seed)
    best = torch.stack(
        [
            scores({kind: torch.randperm(len(rows), generator=generator) for kind, rows in both.items()})[0]
            .masked_fill(~kept, -1)
            .max()
            for _ in range(SHUFFLES // 5)
        ]
    )
    frame = pd.DataFrame(
        {"feature": range(basis.n_features), "positive": up.numpy(), "negative": down.numpy(), "score": score.numpy()}
    ).loc[kept.numpy()]
    frame = frame.sort_values("score", ascending=False, kind="stable", ignore_index=True)
    return SeparationScores(basis.name, frame, float(best.quantile(0.95)), int((~kept).sum()))


def _by_kind(texts: Texts | Mapping[str, Texts]) -> dict[str, Texts]:
    return {str(kind): some for kind, some in texts.items()} if isinstance(texts, Mapping) else {"": texts}


def _active(
    model: HookManager, basis: FeatureBasis, texts: Texts, token: str, skip: int, batch_size: int
) -> Bool[Tensor, "text feature"]:
    """Whether each feature is active at the last token, or at any token, of every text."""
    rows: list[Tensor] = []
    for tokens, mask in batches_of_texts(model, texts, batch_size):
        on = (model.run(tokens, mask, record=[basis]).values[basis] != 0) & _counted(mask, skip)[..., None]
        last = mask.sum(1) - 1
        rows.append((on.any(1) if token == "any" else on[torch.arange(len(on)), last]).cpu())
    return torch.cat(rows) if rows else torch.zeros(0, basis.n_features, dtype=torch.bool)


def _density(
    model: HookManager, basis: FeatureBasis, texts: Texts, skip: int, batch_size: int
) -> Float[Tensor, " feature"]:
    """The share of tokens on which each feature is active."""
    total, count = torch.zeros(basis.n_features), 0
    for tokens, mask in batches_of_texts(model, texts, batch_size):
        on = model.run(tokens, mask, record=[basis]).values[basis] != 0
        counted = mask & (torch.arange(mask.shape[1], device=mask.device) >= skip)
        total, count = total + on[counted].float().sum(0).cpu(), count + int(counted.sum())
    if not count:
        raise InputError("`exclude` has no texts.")
    return total / count
