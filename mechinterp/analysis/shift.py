"""SHIFT: a classifier is freed of a cue that it should not use, by ablating the features that stand for the cue.

A probe is trained on prompts in which the cue goes with the label. Features that are marked as irrelevant, by name or
by a rule, are set to 0 in the model's run, and the probe is measured where cue and label disagree.

Source: Marks et al. 2024 (arXiv 2403.19647), section 4: the features of a classifier's circuit are judged by a human,
and the classifier's head is trained again afterwards. Beside it: as many random features ablated instead, and a probe
that was trained without the cue.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechinterp.analysis.directions import vector_site
from mechinterp.analysis.texts import batches_of_texts
from mechinterp.base.errors import InputError
from mechinterp.features.addresses import by_name, parse_feature
from mechinterp.features.basis import Basis, check_ids
from mechinterp.features.direction_fits import DirectionFit, fit_direction
from mechinterp.features.edits import ablate_features
from mechinterp.models.hook_manager import HookManager, Intervention
from mechinterp.models.sites import Site

Rule = Callable[[Basis], Sequence[int]]
"""Maps a basis to the numbers of its features to ablate."""


@dataclass(frozen=True, eq=False)
class LabelledPrompts:
    """Prompts with a label and a cue.

    Args:
        prompts: Texts, or token ids.
        label: What the classifier should tell, True or False for every prompt.
        cue: What it should not use.
    """

    prompts: Sequence[str] | Sequence[Tensor] | Tensor
    label: Bool[Tensor, " prompt"]
    cue: Bool[Tensor, " prompt"]

    def __post_init__(self) -> None:
        n = len(self.prompts)
        for name in ("label", "cue"):
            value = getattr(self, name)
            if value.shape != (n,) or value.dtype != torch.bool:
                raise InputError(f"`{name}` must be one True or False for each of the {n} prompts.")
        if not bool(self.label.any()) or bool(self.label.all()):
            raise InputError("Prompts of both labels are needed.")


@dataclass(frozen=True, eq=False)
class ShiftedProbe:
    """How well a probe tells the label before and after features were ablated.

    Args:
        frame: A row per probe: probe, accuracy, worst_group (the least accuracy over the groups of label and cue),
            follows_cue (how often it says what the cue says where label and cue disagree).
        ablated: The features that were ablated, by name.
        groups: How many test prompts each group of (label, cue) has.
    """

    frame: pd.DataFrame
    ablated: tuple[str, ...]
    groups: Mapping[tuple[bool, bool], int]

    def __repr__(self) -> str:
        return f"ShiftedProbe({len(self.ablated)} features ablated)\n{self.frame.round(3).to_string(index=False)}"


def shift_probe(
    model: HookManager,
    train: LabelledPrompts,
    test: LabelledPrompts,
    site: str | Site,
    bases: Basis | Sequence[Basis],
    irrelevant: Sequence[str] | Rule,
    *,
    fit: str = "logistic",
    balanced: LabelledPrompts | None = None,
    draws: int = 20,
    seed: int = 0,
    batch_size: int = 64,
) -> ShiftedProbe:
    """The accuracy of a probe, overall and in its worst group, before and after irrelevant features are ablated.

    The probe reads the site at the last token of every prompt. The rows are

    - `before`: trained on `train`, with nothing ablated;
    - `ablated`: the same probe, features ablated in the run that it reads;
    - `retrained`: trained again on `train` with the features ablated;
    - `random ...`: the same two with as many random features of the same bases ablated, drawn from the others that are
      active on `train`: the mean over the draws, and for `retrained` the draw with the best worst group;
    - `balanced`: trained on prompts without the correlation, if there are any: what could be reached.

    Args:
        model: The model.
        train: Prompts in which the cue goes with the label.
        test: Prompts of all four groups of label and cue.
        site: What the probe reads: a site of one vector per token.
        bases: Dictionaries at the site or before it.
        irrelevant: Names of features (`m1.f17`), or a rule: a function that is called with each basis and returns the
            numbers of its features.
        fit: How the probe is trained, as in `fit_direction`.
        balanced: Prompts in which the cue says nothing about the label.
        draws: How many sets of random features.
        seed: Of the draws.
        batch_size: Prompts at a time.

    Cost: a forward of `train` and `test` before, after, and per draw.

    Raises InputError for a group without test prompts, no irrelevant feature, and fewer others active than are drawn.
    """
    several = [bases] if isinstance(bases, Basis) else list(bases)
    place = vector_site(model, site)
    chosen = _chosen(several, irrelevant)
    groups = {
        (label, cue): int(((test.label == label) & (test.cue == cue)).sum())
        for label in (False, True)
        for cue in (False, True)
    }
    if not all(groups.values()):
        raise InputError("The test prompts need all four groups: each label with the cue and without it.")

    def states(data: LabelledPrompts, ids: Mapping[Basis, Sequence[int]]) -> Tensor:
        return _states(model, data, place, ids, batch_size)

    def trained(data: LabelledPrompts, values: Tensor) -> DirectionFit:
        return fit_direction(values[data.label].double(), values[~data.label].double(), fit)

    plain = states(train, {})
    before = trained(train, plain)
    rows = [("before", *_scores(before, states(test, {}), test))]
    after = states(test, chosen)
    rows.append(("ablated", *_scores(before, after, test)))
    rows.append(("retrained", *_scores(trained(train, states(train, chosen)), after, test)))
    others = {
        basis: sorted({*_active(model, train, basis, batch_size)} - {*numbers}) for basis, numbers in chosen.items()
    }
    generator = torch.Generator().manual_seed(seed)
    random: list[tuple[tuple[float, float, float], tuple[float, float, float]]] = []
    for _ in range(draws):
        ids = {basis: _draw(others[basis], len(numbers), basis, generator) for basis, numbers in chosen.items()}
        values = states(test, ids)
        again = trained(train, states(train, ids))
        random.append((_scores(before, values, test), _scores(again, values, test)))
    for k, name in enumerate(("random ablated", "random retrained")):
        if random:
            accuracy, worst, cue = torch.tensor([draw[k] for draw in random]).mean(0).tolist()
            rows.append((name, accuracy, worst, cue))
    if random:
        best = max((draw[1] for draw in random), key=lambda scores: scores[1])
        rows.append(("random retrained, best draw", *best))
    if balanced is not None:
        rows.append(("balanced", *_scores(trained(balanced, states(balanced, {})), states(test, {}), test)))
    frame = pd.DataFrame(rows, columns=["probe", "accuracy", "worst_group", "follows_cue"])
    names = tuple(basis.address(i) for basis, numbers in chosen.items() for i in numbers)
    return ShiftedProbe(frame, names, groups)


def _chosen(bases: Sequence[Basis], irrelevant: Sequence[str] | Rule) -> dict[Basis, list[int]]:
    by_name(bases)
    found: dict[Basis, list[int]] = {}
    if callable(irrelevant):
        for basis in bases:
            numbers = list(irrelevant(basis))
            if numbers:
                found[basis] = sorted(set(check_ids(basis, numbers).tolist()))
    else:
        for name in irrelevant:
            part = parse_feature(name, bases)
            if part.feature is None or part.position is not None:
                raise InputError(f"'{name}' is not a feature at all positions; name features as 'm1.f17'.")
            owner = next(basis for basis in bases if basis is part.basis)
            found.setdefault(owner, [])
            if part.feature not in found[owner]:
                found[owner].append(part.feature)
    if not found:
        raise InputError("No feature is marked as irrelevant, so there is nothing to ablate.")
    return found


def _states(
    model: HookManager, data: LabelledPrompts, site: Site, ids: Mapping[Basis, Sequence[int]], size: int
) -> Float[Tensor, "prompt d"]:
    """The site at the last token of every prompt, with features ablated."""
    edits: list[Intervention] = [ablate_features(basis, list(numbers)) for basis, numbers in ids.items()]
    found: list[Tensor] = []
    for tokens, mask in batches_of_texts(model, data.prompts, size):
        run = model.run(tokens, mask, record=[site], interventions=edits, stop=Site("resid_final"))
        found.append(run.values[site][torch.arange(len(tokens)), mask.sum(1) - 1].double().cpu())
    return torch.cat(found)


def _active(model: HookManager, data: LabelledPrompts, basis: Basis, size: int) -> list[int]:
    """The features that are active at any token."""
    on = torch.zeros(basis.n_features, dtype=torch.bool)
    for tokens, mask in batches_of_texts(model, data.prompts, size):
        values = model.run(tokens, mask, record=[basis], stop=Site("resid_final")).values[basis]
        on |= (values[mask] != 0).any(0).cpu()
    return on.nonzero()[:, 0].tolist()


def _draw(others: Sequence[int], n: int, basis: Basis, generator: torch.Generator) -> list[int]:
    if len(others) < n:
        raise InputError(
            f"Only {len(others)} other features of '{basis.name}' are active, so {n} cannot be drawn at random."
        )
    return [others[i] for i in torch.randperm(len(others), generator=generator)[:n].tolist()]


def _scores(
    probe: DirectionFit, values: Float[Tensor, "prompt d"], data: LabelledPrompts
) -> tuple[float, float, float]:
    """(accuracy, accuracy in the worst group, how often it says what the cue says where the two disagree)."""
    said = (probe.reading(values) > 0).cpu()
    right = (said == data.label).double()
    groups = [
        right[(data.label == label) & (data.cue == cue)].mean() for label in (False, True) for cue in (False, True)
    ]
    apart = data.label != data.cue
    return float(right.mean()), float(torch.stack(groups).min()), float((said == data.cue)[apart].double().mean())
