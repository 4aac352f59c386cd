"""Is a dictionary good for a task that is understood? Sufficiency, necessity and sparse control, beside other bases.

Source: Makelov et al. 2024 (arXiv 2405.08366): reconstructions should do the task, what is left of the states should
not, and a few features should be enough to change an attribute. What a dictionary reaches is compared with a supervised
dictionary of the attributes, the coordinates, principal components and random directions. The features to change are
chosen greedily by how much closer they bring the state to that of the other prompt. Deviation: one position of one site
is judged at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.analysis.directions import direction_values, vector_site
from mechinterp.base.bootstrap import bootstrap_interval, denominator_vanishes, share_with_interval
from mechinterp.base.errors import InputError
from mechinterp.base.registry import unknown
from mechinterp.engines.readout import FINAL, checked_metric, metric_readout
from mechinterp.features.basis import Basis
from mechinterp.features.controls import coordinates, random_dictionary
from mechinterp.features.subspaces import svd_basis
from mechinterp.features.supervised import supervised_basis
from mechinterp.models.components import Position, position_index
from mechinterp.models.feature_basis import FeatureBasis, Features
from mechinterp.models.hook_manager import HookManager, Intervention
from mechinterp.models.sites import Site
from mechinterp.tasks.own_metric import MetricLike
from mechinterp.tasks.pairs import Pairs

CONTROLS = ("supervised", "neurons", "pca", "random")


@dataclass(frozen=True, eq=False)
class JudgedBases:
    """How well bases stand for the states of a task at one site and position.

    Args:
        frame: A row per attribute and basis: attribute, basis, features (in all), active (per state), fvu (variance of
            the states unexplained), sufficiency, necessity, the ends of their 95 % intervals over the examples
            (`sufficiency_low`, `sufficiency_high`, ...), and for every number of changed features `control@k` and
            `weight@k` (the share of the reconstruction that the features which were changed make).
        site: Where.
        position: At which token.
        about: What the numbers are shares of: by attribute, the mean metric of the `model`, with the state at its
            `mean`, and with the state of the `other` prompt; and the 95 % intervals over the examples of the two
            effects: of the mean state (`effect_low`, `effect_high`) and of the other one (`other_low`, `other_high`).
    """

    frame: pd.DataFrame
    site: Site
    position: Position
    about: Mapping[str, Mapping[str, float]]

    def __repr__(self) -> str:
        columns = [name for name in self.frame.columns if not name.startswith("weight")]
        columns = [name for name in columns if not name.endswith(("_low", "_high"))]
        lines = [f"JudgedBases({self.site} at {self.position})", self.frame[columns].round(3).to_string(index=False)]
        rows = self.frame if "attribute" in self.frame else self.frame.assign(attribute="")
        nothing = set(rows.loc[rows["sufficiency"].isna(), "attribute"])
        for name, ends in self.about.items():
            of = f"{name}: " if name else ""
            for kind, what, shares in (
                ("effect", "mean", "sufficiency and necessity"), ("other", "other prompt's", "control"),
            ):  # fmt: skip
                low, high = ends[f"{kind}_low"], ends[f"{kind}_high"]
                if low <= 0 <= high and name not in nothing:
                    lines.append(
                        f"{of}the effect of the {what} state on the metric [{low:.3g}, {high:.3g}] is not told apart "
                        f"from 0 over these examples, so {shares} say nothing here; take more examples, or another "
                        "site or position."
                    )
            if name not in nothing:
                continue
            lines.append(
                f"{of}putting the state at its mean does not change the metric ({ends['model']:.3g}, then "
                f"{ends['mean']:.3g}), so there is nothing to be sufficient or necessary for; take another site or "
                "position."
            )
        return "\n".join(lines)


def judge_bases(
    model: HookManager,
    train: Pairs,
    test: Pairs | Mapping[str, Pairs],
    bases: Basis | Sequence[Basis],
    *,
    position: Position = -1,
    attributes: Mapping[str, Sequence[str]] | None = None,
    changes: Sequence[int] = (1, 2, 4, 8, 16),
    controls: Sequence[str] = CONTROLS,
    metric: MetricLike = "logit_diff",
    seed: int = 0,
    batch_size: int | None = None,
) -> JudgedBases:
    """Sufficiency, necessity and sparse control of bases at one site, beside four other bases.

    The state x of the site at one position is replaced in the clean run, m being the mean metric and x0 the mean state:

    - `sufficiency`: by its reconstruction x^; (m(x^) - m(x0)) / (m(x) - m(x0)). 1: the reconstruction does the task.
    - `necessity`: by x0 + x - x^, what the reconstruction misses; 1 - (m - m(x0)) / (m(x) - m(x0)). 1: nothing of the
      task is left outside.
    - `control@k`: k features get the activations of the corrupt prompt; the change of the metric as a share of that by
      patching the whole state. The features are chosen greedily such that the state comes closest to the corrupt one.

    All are 1 for the whole state. Where the mean changes the metric by less than a thousandth of its size, sufficiency
    and necessity are NaN; where the interval of its effect over the examples holds 0, they say nothing. The result says
    both. Where patching the whole state changes it by as little, or by less
    than a twentieth of what the mean does, there is nothing to control, and `control@k` is NaN. With `weight@k` near 1,
    control is by nearly the whole reconstruction, not by the features of one attribute.

    Args:
        model: The model.
        train: Pairs (clean and corrupt prompts) whose states give means, principal components and the supervised
            dictionary.
        test: Other pairs, whose corrupt prompts differ from the clean ones in one attribute; or such pairs by the name
            of the attribute.
        bases: Dictionaries of one and the same site, of one vector per token, that reconstruct what they read.
        position: At which token.
        attributes: For the control `supervised`, by name the value of every clean prompt of `train`.
        changes: Numbers of features that are changed. Setting an attribute takes two: its old and its new value.
        controls: Which of `supervised`, `neurons`, `pca` (as many components as the first dictionary has active
            features), `random` (as many directions, as many active).
        metric: What is measured.
        seed: Of the random directions.
        batch_size: Examples at a time.

    Cost: four forwards of `train` and `test`, and per attribute and basis 2 + len(changes).

    Raises InputError for bases of other sites, numbers that do not fit, and `supervised` without attributes.
    """
    several = [bases] if isinstance(bases, Basis) else list(bases)
    site = _site(model, several)
    for control in controls:
        if control not in CONTROLS:
            raise unknown("control", control, CONTROLS)
    if "supervised" in controls and attributes is None:
        raise InputError("The control 'supervised' needs `attributes`: by name, the value of every clean prompt.")
    if not changes or any(type(k) is not int or k < 1 for k in changes):
        raise InputError(f"`changes` are numbers of features, at least 1 each; got {list(changes)}.")
    tests = {"": test} if isinstance(test, Pairs) else dict(test)
    clean, corrupt = direction_values(model, train, [site], [position], batch_size=batch_size)[site, position]
    states = torch.cat([clean, corrupt])
    kinds: dict[str, FeatureBasis] = {basis.name: basis for basis in several}
    kinds |= _controls(site, several[0], clean, states, attributes, controls, seed)
    rows: list[dict[str, object]] = []
    about: dict[str, dict[str, float]] = {}
    for name, pairs in tests.items():
        pairs = pairs.to(model.device)
        found = direction_values(model, pairs, [site], [position], batch_size=batch_size)[site, position]
        run = _Runs(model, pairs, site, position, metric, batch_size)
        mean = states.mean(0)
        ends = {"model": run(found[0]), "mean": run(mean.expand_as(found[0])), "other": run(found[1])}
        about[name] = {end: float(value.mean()) for end, value in ends.items()}
        for kind, end in (("effect", "mean"), ("other", "other")):
            low, high = bootstrap_interval(_mean, (ends["model"] - ends[end])[:, None])
            about[name] |= {f"{kind}_low": low, f"{kind}_high": high}
        for label, basis in kinds.items():
            rows.append({"attribute": name, "basis": label, **_judged(basis, run, *found, mean, ends, changes)})
    frame = pd.DataFrame(rows)
    return JudgedBases(frame.drop(columns="attribute") if isinstance(test, Pairs) else frame, site, position, about)


def _mean(rows: Float[Tensor, "resample example 1"]) -> Float[Tensor, " resample"]:
    return rows.mean((1, 2))


def _site(model: HookManager, bases: Sequence[Basis]) -> Site:
    if not bases:
        raise InputError("Give at least one dictionary to judge.")
    sites = {basis.sites_in + basis.sites_out for basis in bases}
    site = bases[0].sites_out[0]
    if sites != {(site, site)}:
        raise InputError("The dictionaries must be of one and the same site, and reconstruct what they read.")
    if len({basis.name for basis in bases}) < len(bases) or {basis.name for basis in bases} & set(CONTROLS):
        raise InputError("Give every dictionary a label of its own, other than those of the controls.")
    return vector_site(model, site)


def _controls(
    site: Site,
    basis: Basis,
    clean: Float[Tensor, "n d"],
    states: Float[Tensor, "m d"],
    attributes: Mapping[str, Sequence[str]] | None,
    controls: Sequence[str],
    seed: int,
) -> dict[str, FeatureBasis]:
    l0 = max(1, round(float((basis.encode(states).values != 0).sum(-1).double().mean())))
    made: dict[str, FeatureBasis] = {}
    if "supervised" in controls and attributes is not None:
        made["supervised"] = supervised_basis(site, clean, attributes)
    if "neurons" in controls:
        made["neurons"] = coordinates(site, states.shape[1])
    if "pca" in controls:
        made["pca"] = svd_basis(site, states, min(l0, *states.shape))
    if "random" in controls:
        made["random"] = random_dictionary(site, states, basis.n_features, min(l0, basis.n_features), seed=seed)
    return {name: made[name] for name in controls}


class _Runs:
    """The metric of every example when the state at the position is replaced."""

    def __init__(
        self,
        model: HookManager,
        pairs: Pairs,
        site: Site,
        position: Position,
        metric: MetricLike,
        batch_size: int | None,
    ) -> None:
        self.model, self.pairs, self.site = model, pairs, site
        self.metric = checked_metric(model, pairs, metric)
        self.at: Int[Tensor, " batch"] = position_index(pairs, position)
        self.size = len(pairs) if batch_size is None else batch_size

    def __call__(self, new: Float[Tensor, "batch d"]) -> Float[Tensor, " batch"]:
        found: list[Tensor] = []
        for first in range(0, len(self.pairs), self.size):
            rows = slice(first, first + self.size)
            batch, at, own = self.pairs[rows], self.at[rows], new[rows]

            def put(value: Tensor, at: Tensor = at, own: Tensor = own) -> Tensor:
                changed = value.clone()
                changed[torch.arange(len(value), device=value.device), at] = own.to(value)
                return changed

            edits = [Intervention(self.site, put)]
            run = self.model.run(batch.clean, batch.mask, interventions=edits, record=[FINAL], stop=FINAL)
            found.append(metric_readout(self.model, batch, self.metric).of_resid(run.values[FINAL]).double().cpu())
        return torch.cat(found)


def _judged(
    basis: FeatureBasis,
    run: _Runs,
    x: Float[Tensor, "batch d"],
    other: Float[Tensor, "batch d"],
    mean: Float[Tensor, " d"],
    ends: Mapping[str, Tensor],
    changes: Sequence[int],
) -> dict[str, float]:
    site = basis.sites_out[0]
    code, there = basis.encode(x), basis.encode(other)
    decoded = basis.decode(code)[site]
    full, none = ends["model"], ends["mean"]
    whole, empty, patched = (ends[name].mean() for name in ("model", "mean", "other"))
    controlled = not denominator_vanishes(full, ends["other"]) and abs(whole - patched) >= abs(whole - empty) / 20
    spread = (x - x.mean(0)).square().sum().clamp(min=torch.finfo(x.dtype).tiny)
    row = {
        "features": float(basis.n_features),
        "active": float((code.values != 0).double().sum(-1).mean()),
        "fvu": float((x - decoded).square().sum() / spread),
    }
    shares = {
        "sufficiency": share_with_interval(run(decoded), full, none),
        "necessity": share_with_interval(run(mean + x - decoded), none, full),
    }
    row |= {name: share for name, (share, _, _) in shares.items()}
    for name, (_, low, high) in shares.items():
        row |= {f"{name}_low": low, f"{name}_high": high}
    order = greedy_changes(basis, code.values, there.values, in_units_of(code, other - x), max(changes))
    weights = feature_weights_of(basis, code.values)
    for k in changes:
        values = code.values.clone()
        for i, ids in enumerate(order):
            values[i, ids[:k]] = there.values[i, ids[:k]]
        moved = basis.decode(code.with_values(values))[site] - decoded
        share = (whole - run(x + moved).mean()) / (whole - patched)
        row[f"control@{k}"] = float(share) if controlled else torch.nan
        changed = torch.stack([weights[i, ids[:k]].sum() for i, ids in enumerate(order)])
        row[f"weight@{k}"] = float(changed.mean())
    return row


def in_units_of(code: Features, change: Float[Tensor, "row d"]) -> Float[Tensor, "row d"]:
    """A change of the state in the units in which features write: of each token's scale, if the input is normalised."""
    return change / code.context.get("scale", 1)


def greedy_changes(
    basis: FeatureBasis,
    values: Float[Tensor, "row feature"],
    other: Float[Tensor, "row feature"],
    wanted: Float[Tensor, "row d"],
    most: int,
) -> list[list[int]]:
    """Per row, which features to give the other activations, one after another, to come closest to a wanted change.

    Stops where no further feature brings it closer.

    Args:
        basis: The basis.
        values: The activations.
        other: The activations to change to.
        wanted: The change of the state that is wanted.
        most: How many features at most.
    """
    chosen: list[list[int]] = []
    for own, new, left in zip(values, other, wanted, strict=True):
        ids = (own != new).nonzero()[:, 0]
        taken: list[int] = []
        if len(ids):
            moves = (new - own)[ids, None] * basis.writes(ids).to(own)
            size, left = moves.square().sum(1), left.to(moves)
            free = torch.ones(len(ids), dtype=torch.bool, device=moves.device)
            for _ in range(min(most, len(ids))):
                gain = (2 * moves @ left - size).masked_fill(~free, -torch.inf)
                best = int(gain.argmax())
                if float(gain[best]) <= 0:
                    break
                taken.append(int(ids[best]))
                free[best], left = False, left - moves[best]
        chosen.append(taken)
    return chosen


def feature_weights_of(basis: FeatureBasis, values: Float[Tensor, "row feature"]) -> Float[Tensor, "row feature"]:
    """The share of every feature in what is written: f_j d_j . w / |w|^2 for w = sum_j f_j d_j; they add up to 1.

    Args:
        basis: The basis.
        values: The activations.
    """
    directions = basis.writes().to(values)
    written = values @ directions
    along = written @ directions.T
    return values * along / written.square().sum(-1, keepdim=True).clamp(min=torch.finfo(written.dtype).tiny)
