"""Is a feature circuit faithful? All other features and errors get their mean; beside neurons, random and raw states.

Source: Marks et al. 2024 (arXiv 2403.19647), section 3.3: faithfulness (m(C) - m(empty)) / (m(model) - m(empty)), and
completeness as the faithfulness of the complement. The ablation acts in one run: every site is encoded as the run has
it, features outside the circuit get their mean over the corrupt prompts, and so does the error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechinterp.analysis.feature_circuit.build import FeatureCircuit, FeatureEffects, feature_effects
from mechinterp.analysis.feature_circuit.places import in_order
from mechinterp.base.batches import over_batches
from mechinterp.base.bootstrap import denominator_vanishes, share_with_interval
from mechinterp.base.errors import InputError
from mechinterp.base.registry import unknown
from mechinterp.base.shown import Shown
from mechinterp.engines.patch_sweep import memory_budget
from mechinterp.engines.readout import FINAL, checked_metric, metric_readout
from mechinterp.features.basis import PER_HEAD
from mechinterp.features.controls import coordinates, random_dictionary, whole_state
from mechinterp.features.sweep import coded
from mechinterp.models.components import Positions, position_sets
from mechinterp.models.feature_basis import FeatureBasis
from mechinterp.models.hook_manager import HookManager, Intervention
from mechinterp.models.sites import Site
from mechinterp.tasks.own_metric import MetricLike
from mechinterp.tasks.pairs import Pairs

ABLATIONS = ("mean", "mean-positional", "zero")
ERRORS = ("circuit", "all", "none")
CONTROLS = ("neurons", "random", "state")
Kept = Mapping[str, Bool[Tensor, "node set"]]
"""By the name of a basis, which nodes are kept: its features, and last its error, at every set of positions."""


@dataclass(frozen=True, eq=False, repr=False)
class FeatureFaithfulness(Shown):
    """What the model does when only some features are kept.

    Args:
        clean: The metric of the model, per example.
        empty: With every feature and error of every dictionary ablated.
        circuit: With all but the circuit ablated.
        complement: With the circuit ablated.
        n_nodes: How many nodes the circuit has.
        about: How it was measured.
    """

    clean: Float[Tensor, " example"]
    empty: Float[Tensor, " example"]
    circuit: Float[Tensor, " example"]
    complement: Float[Tensor, " example"]
    n_nodes: int
    about: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def faithfulness(self) -> float:
        """(m(C) - m(empty)) / (m(model) - m(empty)), of the means; NaN if ablating everything changes nothing."""
        return self._share(self.circuit)[0]

    @property
    def faithfulness_interval(self) -> tuple[float, float]:
        """Its 95 % bootstrap interval over the examples."""
        return self._share(self.circuit)[1:]

    @property
    def completeness(self) -> float:
        """The faithfulness of the complement: near 0 for a circuit that nothing outside can replace."""
        return self._share(self.complement)[0]

    @property
    def completeness_interval(self) -> tuple[float, float]:
        """Its 95 % bootstrap interval over the examples."""
        return self._share(self.complement)[1:]

    def _share(self, values: Tensor) -> tuple[float, float, float]:
        return share_with_interval(values, self.clean, self.empty)

    def _facts(self) -> list[tuple[str, object]]:
        if denominator_vanishes(self.clean, self.empty):
            ends = f"{float(self.clean.mean()):.3g}, then {float(self.empty.mean()):.3g}"
            return [
                ("", f"{self.n_nodes} nodes"),
                ("nothing to explain", f"ablating everything does not change the metric ({ends})"),
            ]
        return [
            ("", f"{self.n_nodes} nodes"),
            ("faithfulness", f"{self.faithfulness:.3f}"),
            ("completeness (of the complement)", f"{self.completeness:.3f}"),
            ("errors", self.about.get("errors", "")),
            ("examples", len(self.clean)),
        ]


def evaluate_feature_circuit(
    model: HookManager,
    pairs: Pairs,
    circuit: FeatureCircuit,
    *,
    kept: Kept | None = None,
    reference: Pairs | None = None,
    ablation: str = "mean",
    errors: str = "circuit",
    free_layers: int = 0,
    skip: int = 0,
    metric: MetricLike = "logit_diff",
    batch_size: int | None = 32,
) -> FeatureFaithfulness:
    """The faithfulness and completeness of a feature circuit on other pairs than it was found on.

    Args:
        model: The model.
        pairs: Clean prompts with answers, held out.
        circuit: The circuit.
        kept: Other nodes to keep than those of the circuit, such as `circuit.without({"m1": [17]})`.
        reference: The pairs whose corrupt prompts give the means; by default `pairs`.
        ablation: What ablated features and errors get: their `mean` over all tokens, `mean-positional` (per position,
            for prompts of one length; the paper's), or `zero`.
        errors: Which errors are kept: those of the `circuit`, `all`, or `none`.
        free_layers: Dictionaries in layers below this are left alone, in the empty circuit, too. The paper has 2 of 6
            layers (Pythia-70M) and 8 of 26 (Gemma 2 2B).
        skip: So many tokens at the beginning of every prompt are left alone, and are in no mean. Give 1 where prompts
            begin with a BOS token and the model keeps large activations there: with 0 these are in the `mean` of all
            tokens, and the first token itself is ablated.
        metric: What is measured.
        batch_size: Examples at a time.

    Cost: two forwards for the means, and four.

    Raises InputError for unknown names, when no dictionary is left to ablate, and if `skip` leaves a prompt no token.
    """
    chosen = circuit.kept if kept is None else kept
    found = _curve(
        model, pairs, circuit.effects, [chosen], reference or pairs, ablation, [errors], free_layers, skip, metric,
        batch_size,
    )  # fmt: skip
    return found[0]


@dataclass(frozen=True, eq=False)
class FeatureCurves:
    """Faithfulness and completeness by size, for dictionaries and for what they are compared with.

    Args:
        frame: A row per kind, errors and size: kind (`dictionaries`, `neurons`, `random`, `state`), errors, nodes,
            faithfulness, the ends of its 95 % interval over the examples (`faithfulness_low`, `faithfulness_high`),
            completeness.
        gaps: By kind, the completeness gaps of the effects by which nodes were ranked.
    """

    frame: pd.DataFrame
    gaps: Mapping[str, pd.DataFrame]

    def __repr__(self) -> str:
        table = self.frame.pivot_table(index=["kind", "errors"], columns="nodes", values="faithfulness", sort=False)
        table = table.sort_index(axis=1).round(3)
        return f"FeatureCurves(faithfulness by number of nodes)\n{table.to_string()}"


def feature_circuit_curves(
    model: HookManager,
    train: Pairs,
    test: Pairs,
    bases: Sequence[FeatureBasis],
    *,
    sizes: Sequence[int] = (5, 10, 20, 50, 100, 200),
    controls: Sequence[str] = CONTROLS,
    errors: Sequence[str] = ("circuit", "none"),
    positions: Positions = None,
    ablation: str = "mean",
    free_layers: int = 0,
    skip: int = 0,
    method: str = "eap-ig-activations",
    steps: int = 10,
    metric: MetricLike = "logit_diff",
    seed: int = 0,
    batch_size: int | None = 32,
) -> FeatureCurves:
    """Faithfulness and completeness of the strongest nodes, beside the same with other bases of the same sites.

    Every kind goes through the same code: effects on `train`, the nodes of largest effect, ablation of all others on
    `test` by means of the corrupt prompts of `train`. `neurons` are the coordinates of each site, `random` as many
    random directions as the dictionary has with as many active per token (`random_dictionary`), `state` each site as
    one node.

    Args:
        model: The model.
        train: Pairs that effects and means are from.
        test: Pairs that the circuits are run on.
        bases: The dictionaries.
        sizes: Numbers of nodes.
        controls: Which of `neurons`, `random`, `state`.
        errors: As in `evaluate_feature_circuit`, one curve each.
        positions: Nodes by position; by default one node for all positions together.
        ablation: `mean`, `mean-positional` or `zero`.
        free_layers: As in `evaluate_feature_circuit`.
        skip: As in `evaluate_feature_circuit`.
        method: As in `feature_effects`.
        steps: The number of interpolated runs.
        metric: What is measured.
        seed: Of the random directions.
        batch_size: Examples at a time.

    Cost: per kind that of `feature_effects`, and two forwards of `test` per size and kind of errors.

    Raises InputError for unknown names and sizes.
    """
    for control in controls:
        if control not in CONTROLS:
            raise unknown("control", control, CONTROLS)
    if not sizes or any(type(n) is not int or n < 1 for n in sizes):
        raise InputError(f"`sizes` are numbers of nodes, at least 1 each; got {list(sizes)}.")
    kinds = {"dictionaries": in_order(model, bases), **_controls(model, train, bases, controls, seed)}
    rows: list[dict[str, Any]] = []
    gaps: dict[str, pd.DataFrame] = {}
    for kind, own in kinds.items():
        effects = feature_effects(
            model, train, own, method=method, steps=steps, positions=positions, metric=metric, batch_size=batch_size
        )
        gaps[kind] = effects.gaps()
        several = [effects.strongest(n) for n in sizes]
        used = errors if kind == "dictionaries" or kind == "random" else ("circuit",)
        settings = (train, ablation, used, free_layers, skip, metric, batch_size)
        for found in _curve(model, test, effects, several, *settings):
            row = {"kind": kind, "errors": found.about["errors"], "nodes": found.n_nodes}
            low, high = found.faithfulness_interval
            row |= {"faithfulness": found.faithfulness, "faithfulness_low": low, "faithfulness_high": high}
            rows.append({**row, "completeness": found.completeness})
    frame = pd.DataFrame(rows).drop_duplicates(["kind", "errors", "nodes"], ignore_index=True)
    return FeatureCurves(frame, gaps)


def _controls(
    model: HookManager, train: Pairs, bases: Sequence[FeatureBasis], controls: Sequence[str], seed: int
) -> dict[str, list[FeatureBasis]]:
    """The bases of every control, one per dictionary, at the site that it writes to."""
    pairs = train.to(model.device)
    codes = coded(model, pairs, pairs.clean, bases)
    values = model.run(pairs.clean, pairs.mask, record=[basis.sites_out[0] for basis in bases], stop=FINAL).values
    made: dict[str, list[FeatureBasis]] = {control: [] for control in controls}
    for basis in bases:
        site = basis.sites_out[0]
        if site.kind in PER_HEAD and "state" in made:
            raise InputError(f"The control 'state' needs sites of one vector per token; '{basis.name}' is at '{site}'.")
        own = values[site][pairs.mask].flatten(1)
        l0 = int((codes[basis].features.values[pairs.mask] != 0).sum(-1).float().mean().round().clamp(min=1))
        for control, several in made.items():
            if control == "neurons":
                several.append(coordinates(site, own.shape[1], label=basis.name))
            elif control == "random":
                several.append(random_dictionary(site, own, basis.n_features, l0, seed=seed, label=basis.name))
            else:
                several.append(whole_state(site, own.shape[1], label=basis.name).to(model.device, model.dtype))
    return made


def _curve(
    model: HookManager,
    pairs: Pairs,
    effects: FeatureEffects,
    several: Sequence[Kept],
    reference: Pairs,
    ablation: str,
    errors: Sequence[str],
    free_layers: int,
    skip: int,
    metric: MetricLike,
    batch_size: int | None,
) -> list[FeatureFaithfulness]:
    """The faithfulness of several sets of nodes, with every treatment of errors."""
    if ablation not in ABLATIONS:
        raise unknown("ablation", ablation, ABLATIONS)
    for one in errors:
        if one not in ERRORS:
            raise unknown("treatment of errors", one, ERRORS)
    measured = checked_metric(model, pairs, metric)
    bases = [b for b in effects.bases if b.sites_out[0].layer is None or b.sites_out[0].layer >= free_layers]
    bases = [b for b in bases if not (free_layers and b.sites_out[0].kind in ("embed", "pos_embed"))]
    if not bases:
        raise InputError(f"With {free_layers} free layers no dictionary is left to ablate.")
    pairs = pairs.to(model.device)
    sets = position_sets(pairs, effects.asked)
    if sets.labels != effects.positions:
        raise InputError("These pairs do not have the positions of those that the circuit was found on.")
    for kept in several:
        _check_kept(kept, effects)
    reference = reference.to(model.device)
    least = min(int(pairs.lengths.min()), int(reference.lengths.min()))
    if type(skip) is not int or not 0 <= skip < least:
        raise InputError(
            f"`skip` is a number of tokens, from 0 to less than the shortest prompt ({least}); got {skip}."
        )
    lengths = {*pairs.lengths.tolist(), *reference.lengths.tolist()}
    if ablation == "mean-positional" and len(lengths) > 1:
        raise InputError("A mean per position needs prompts of one length, those of `reference` too; use 'mean'.")
    means = _means(model, bases, reference, ablation, skip, batch_size)
    runs: list[Kept] = [{b.name: torch.zeros_like(effects.values[b.name], dtype=torch.bool) for b in bases}]
    for treatment in errors:
        for kept in several:
            runs += [_with_errors(kept, bases, treatment, False), _with_errors(kept, bases, treatment, True)]

    def measure(batch: Pairs, rows: slice) -> dict[str, Tensor]:
        readout = metric_readout(model, batch, measured)
        clean = model.run(batch.clean, batch.mask, record=[FINAL], stop=FINAL).values[FINAL]
        found = [readout.of_resid(clean)[None]]
        masks = sets.masks[:, rows]
        size = _at_once(model, bases, batch)
        for first in range(0, len(runs), size):
            chunk = runs[first : first + size]
            n = len(chunk)
            run = model.run(
                batch.clean.repeat(n, 1),
                batch.mask.repeat(n, 1),
                interventions=_edits(bases, chunk, means, masks, skip),
                record=[FINAL],
                stop=FINAL,
            )
            found.append(readout.of_runs(run.values[FINAL], n, 0))
        return {"metric": torch.cat(found)}

    values = over_batches(pairs, batch_size, measure, {"metric": 1})["metric"].cpu()
    about = {
        "ablation": ablation,
        "free_layers": free_layers,
        "skip": skip,
        "metric": measured.name,
        "unit": measured.unit,
    }
    results: list[FeatureFaithfulness] = []
    for i, treatment in enumerate(errors):
        for k, kept in enumerate(several):
            at = 2 + 2 * (i * len(several) + k)
            n = sum(int(mask.sum()) for mask in kept.values())
            more = {**about, "errors": treatment}
            results.append(FeatureFaithfulness(values[0], values[1], values[at], values[at + 1], n, more))
    return results


def _check_kept(kept: Kept, effects: FeatureEffects) -> None:
    """Return None if there is a mask of the right shape for every dictionary. Raises InputError otherwise."""
    for name in kept:
        if name not in effects.values:
            raise unknown("dictionary", name, effects.values)
    for name, values in effects.values.items():
        mask = kept.get(name)
        if mask is None or mask.dtype != torch.bool or mask.shape != values.shape:
            got = "none" if mask is None else f"{mask.dtype} {list(mask.shape)}"
            raise InputError(f"`kept` needs a boolean mask {list(values.shape)} of '{name}', errors last; got {got}.")


def _with_errors(kept: Kept, bases: Sequence[FeatureBasis], treatment: str, complement: bool) -> Kept:
    found: dict[str, Tensor] = {}
    for basis in bases:
        mask = (~kept[basis.name] if complement else kept[basis.name]).clone()
        if treatment != "circuit":
            mask[-1] = treatment == "all"
        found[basis.name] = mask
    return found


Means = Mapping[FeatureBasis, tuple[Tensor, Tensor]]
"""Per basis what ablated features and the ablated error get."""


def _means(
    model: HookManager,
    bases: Sequence[FeatureBasis],
    reference: Pairs,
    ablation: str,
    skip: int,
    batch_size: int | None,
) -> Means:
    def sums(batch: Pairs, _: slice) -> dict[str, Tensor]:
        codes = coded(model, batch, batch.corrupt, bases)
        found: dict[str, Tensor] = {}
        for i, basis in enumerate(bases):
            error = codes[basis].errors[basis.sites_out[0]]
            for name, value in ((f"f {i}", codes[basis].features.values), (f"e {i}", error)):
                counted = batch.mask & (torch.arange(batch.mask.shape[1], device=batch.mask.device) >= skip)
                mask = counted.reshape(*batch.mask.shape, *[1] * (value.ndim - 2))
                real = torch.where(mask, value, 0).double()
                found[name] = real.sum(0, keepdim=True) if ablation == "mean-positional" else real.sum((0, 1))
        return found

    names = [f"{kind} {i}" for i in range(len(bases)) for kind in "fe"]
    totals = over_batches(reference, batch_size, sums, dict.fromkeys(names, "sum"))
    count = len(reference) if ablation == "mean-positional" else int(reference.mask[:, skip:].sum())
    scale = 0.0 if ablation == "zero" else 1 / count
    wide = torch.promote_types(model.dtype, torch.float32)
    made = {name: (value * scale).to(model.device, wide) for name, value in totals.items()}
    return {basis: (made[f"f {i}"], made[f"e {i}"]) for i, basis in enumerate(bases)}


def _edits(
    bases: Sequence[FeatureBasis], runs: Sequence[Kept], means: Means, masks: Bool[Tensor, "set batch pos"], skip: int
) -> list[Intervention]:
    """The edits of all runs side by side; the first tokens keep everything."""
    edits: list[Intervention] = []
    for basis in bases:
        kept = torch.stack([run[basis.name] for run in runs]).to(masks.device)
        where = torch.einsum("nfs,sbp->nbpf", kept.float(), masks.float()) > 0
        where[:, :, :skip] = True
        where = where.flatten(0, 1)
        seen: dict[Site, Tensor] = {}
        site_in, site_out = basis.sites_in[0], basis.sites_out[0]
        if site_in != site_out:
            edits.append(Intervention(site_in, _noting(seen, site_in)))
        edits.append(Intervention(site_out, _ablated(basis, seen, where, *means[basis])))
    return edits


def _noting(seen: dict[Site, Tensor], site: Site) -> Callable[[Tensor], Tensor]:
    def note(value: Tensor) -> Tensor:
        seen[site] = value
        return value

    return note


def _ablated(
    basis: FeatureBasis, seen: Mapping[Site, Tensor], where: Tensor, mean: Tensor, error_mean: Tensor
) -> Callable[[Tensor], Tensor]:
    """The edit that gives every feature and the error its mean where it is not kept; where all are, nothing changes."""
    site = basis.sites_out[0]

    def edit(value: Tensor) -> Tensor:
        code = basis.encode(seen.get(basis.sites_in[0], value))
        new = torch.where(where[..., :-1], code.values, mean.to(code.values))
        before, after = basis.decode(code)[site], basis.decode(code.with_values(new))[site]
        error = value.to(before) - before
        held = where[..., -1].reshape(*where.shape[:2], *[1] * (value.ndim - 2))
        change = (after - before) + torch.where(held, 0, error_mean.to(before) - error)
        return value + change.to(value.dtype)

    return edit


def _at_once(model: HookManager, bases: Sequence[FeatureBasis], batch: Pairs) -> int:
    """How many runs side by side fit the memory budget."""
    widest = max(basis.n_features for basis in bases)
    each = 4 * batch.clean.numel() * (6 * widest + 24 * model.dims.d_model)
    return 1 if model.edited else max(1, memory_budget(model.device, None) // each)
