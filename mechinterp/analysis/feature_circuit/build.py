"""`feature_circuit`: the features of dictionaries that make a behaviour together, and the edges between them.

Source: Marks et al. 2024 (arXiv 2403.19647): integrated gradients at every site by itself, errors of the dictionaries
as nodes, edges as products of gradients with paths through other sites stopped. Deviations: midpoints instead of left
ends by default (`quadrature="right"` are the paper's points, whose path is counted from the other end); the circuit is
chosen once, by the mean over the examples, instead of example by example and then again; positive = helps the task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechinterp.analysis.feature_circuit.edges import Target, edges_into, edges_into_logits
from mechinterp.analysis.feature_circuit.effects import AtSite, at_sites
from mechinterp.analysis.feature_circuit.places import in_order
from mechinterp.analysis.integrated_gradients import integration_points
from mechinterp.base.batches import batches
from mechinterp.base.errors import InputError
from mechinterp.base.progress import Progress, no_progress
from mechinterp.base.shown import Shown
from mechinterp.engines.readout import checked_metric, metric_readout
from mechinterp.engines.site_gradients import check_differentiable
from mechinterp.features.basis import Basis
from mechinterp.models.components import Positions, position_sets
from mechinterp.models.feature_basis import FeatureBasis
from mechinterp.models.hook_manager import HookManager
from mechinterp.tasks.own_metric import MetricLike
from mechinterp.tasks.pairs import Pairs

LOGITS = "logits"


@dataclass(frozen=True, eq=False, repr=False)
class FeatureEffects(Shown):
    """The effect of every feature and error of some dictionaries, at every set of positions.

    Args:
        bases: The dictionaries in the order of a run.
        positions: The labels of the sets of positions (`all`: each node stands for all positions together).
        asked: What was asked for as positions.
        values: By the name of a basis, the mean effect over the examples, `[feature + 1, set]`; the last is the error.
        exact: By the name of a basis, the mean over the examples of metric(clean) less the metric with the whole site
            replaced, which the effects of all its nodes at all positions estimate.
        gap: By the name of a basis, the mean distance between the two, example by example, in units of the metric.
        unit: The unit of the metric.
        about: How they were made.
    """

    bases: tuple[FeatureBasis, ...]
    positions: tuple[str, ...]
    asked: Positions
    values: Mapping[str, Float[Tensor, "node set"]]
    exact: Mapping[str, float]
    gap: Mapping[str, float]
    unit: str = ""
    about: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def name(self, basis: FeatureBasis, node: int, at: int) -> str:
        """The name of a node: `m1.f17`, `m1.err`, with `@S2` where positions are named."""
        what = "err" if node == basis.n_features else f"f{node}"
        where = "" if self.positions == ("all",) else f"@{self.positions[at]}"
        return f"{basis.name}.{what}{where}"

    def strongest(self, n: int | None = None, threshold: float | None = None) -> dict[str, Bool[Tensor, "node set"]]:
        """The nodes of largest effect of either sign, as masks by the name of their basis.

        Args:
            n: How many; nodes of no effect at all are left out. Ties go to the earlier node.
            threshold: Instead, the effect that a node must exceed.

        Raises InputError for both or neither, and for a number below 0.
        """
        if (n is None) == (threshold is None):
            raise InputError("Say how many nodes to keep, or the effect that a node must exceed; one of the two.")
        if (n is not None and (type(n) is not int or n < 0)) or (threshold is not None and threshold < 0):
            raise InputError(f"The number of nodes, or the threshold, must be at least 0; got {n or threshold}.")
        sizes = torch.cat([self.values[basis.name].flatten() for basis in self.bases]).abs()
        if threshold is not None:
            kept = sizes > threshold
        else:
            best = sizes.argsort(descending=True, stable=True)[:n]
            kept = torch.zeros_like(sizes, dtype=torch.bool)
            kept[best[sizes[best] > 0]] = True
        shapes = [self.values[basis.name].shape for basis in self.bases]
        parts = kept.split([shape.numel() for shape in shapes])
        return {b.name: part.reshape(shape) for b, part, shape in zip(self.bases, parts, shapes, strict=True)}

    def to_frame(self) -> pd.DataFrame:
        """A row per node of any effect: node, basis, feature (-1: the error), pos, effect; the largest first."""
        rows = [
            (
                self.name(basis, node, at),
                basis.name,
                -1 if node == basis.n_features else node,
                self.positions[at],
                value,
            )
            for basis in self.bases
            for (node, at), value in _entries(self.values[basis.name])
        ]
        frame = pd.DataFrame(rows, columns=["node", "basis", "feature", "pos", "effect"])
        return frame.sort_values("effect", key=abs, ascending=False, kind="stable", ignore_index=True)

    def gaps(self) -> pd.DataFrame:
        """A row per basis: basis, sum (of all effects), exact (replacing the whole site), gap, error_share.

        `error_share` is the share of the absolute effects that errors have. `sum` is that of the named positions.
        """
        rows = [
            (
                basis.name,
                float(values.sum()),
                self.exact[basis.name],
                self.gap[basis.name],
                float(values[-1].abs().sum() / values.abs().sum().clamp(min=torch.finfo(values.dtype).tiny)),
            )
            for basis in self.bases
            for values in (self.values[basis.name],)
        ]
        return pd.DataFrame(rows, columns=["basis", "sum", "exact", "gap", "error_share"])

    @property
    def quality(self) -> list[tuple[str, object]]:
        """How far the effects can be trusted: the largest completeness gap, and what share of them errors carry."""
        return [
            ("largest completeness gap", f"{max(self.gap.values()):.3g}{' ' * bool(self.unit)}{self.unit}"),
            ("errors carry", f"{self.gaps()['error_share'].mean():.0%} of the absolute effects"),
        ]

    def _facts(self) -> list[tuple[str, object]]:
        n = sum(int((value != 0).sum()) for value in self.values.values())
        return [("", f"{n:,} nodes of {len(self.bases)} dictionaries"), *self.quality]


@dataclass(frozen=True, eq=False, repr=False)
class FeatureCircuit(Shown):
    """Features and errors of dictionaries with a large effect, and the direct effects between them.

    Args:
        effects: The effects of all nodes.
        kept: The nodes of the circuit, as masks by the name of their basis.
        edges: A row per edge: upstream, downstream (a node, or `logits`), weight; the largest first. Positive =
            what the upstream node sends to the downstream one helps the task.
    """

    effects: FeatureEffects
    kept: Mapping[str, Bool[Tensor, "node set"]]
    edges: pd.DataFrame

    @property
    def bases(self) -> tuple[FeatureBasis, ...]:
        """The dictionaries in the order of a run."""
        return self.effects.bases

    @property
    def n_nodes(self) -> int:
        """How many nodes it has."""
        return sum(int(mask.sum()) for mask in self.kept.values())

    def nodes(self) -> pd.DataFrame:
        """The rows of `effects.to_frame()` that are in the circuit."""
        names = {
            self.effects.name(basis, node, at)
            for basis in self.bases
            for node, at in self.kept[basis.name].nonzero().tolist()
        }
        frame = self.effects.to_frame()
        return frame.loc[frame["node"].isin(names)].reset_index(drop=True)

    def features(self) -> dict[FeatureBasis, tuple[int, ...]]:
        """The numbers of its features by basis, as `build_graph(features=)` takes them (transcoders and outputs)."""
        found = {basis: self.kept[basis.name][:-1].any(1).nonzero()[:, 0].tolist() for basis in self.bases}
        return {basis: tuple(numbers) for basis, numbers in found.items() if numbers}

    def without(self, nodes: Mapping[str, Sequence[int]]) -> dict[str, Bool[Tensor, "node set"]]:
        """The masks of the circuit less some features, by the name of their basis: for an evaluation."""
        masks = {name: mask.clone() for name, mask in self.kept.items()}
        for name, numbers in nodes.items():
            if name not in masks:
                raise InputError(f"The circuit has no dictionary {name!r}; it has {', '.join(masks)}.")
            masks[name][list(numbers)] = False
        return masks

    def _facts(self) -> list[tuple[str, object]]:
        errors = sum(int(mask[-1].sum()) for mask in self.kept.values())
        return [
            ("", f"{self.n_nodes} nodes ({errors} errors) of {len(self.bases)} dictionaries"),
            ("edges", len(self.edges)),
            *self.effects.quality,
        ]


def feature_effects(
    model: HookManager,
    pairs: Pairs,
    bases: Basis | Sequence[FeatureBasis],
    *,
    method: str = "eap-ig-activations",
    steps: int = 10,
    quadrature: str = "midpoint",
    replacement: str = "pair",
    positions: Positions = None,
    metric: MetricLike = "logit_diff",
    batch_size: int | None = 32,
    progress: Progress = no_progress,
) -> FeatureEffects:
    """The effect of every feature and error of dictionaries at any sites: positive = it helps the task.

    The effect estimates metric(clean) - metric(clean run with the node's activation replaced), the sign turned where a
    lower metric is better. The effects of a basis add up to the estimate for its whole site, and with integrated
    gradients to the exact effect of replacing the site, but for the gap that is returned.

    Args:
        model: The model, or a view of it that reads a direction (`read_direction`).
        pairs: Clean and corrupt prompts.
        bases: Dictionaries of one site (`resid_pre`, `resid_mid`, `attn_out`, `mlp_out`, ...) and transcoders, at most
            one at a place.
        method: `eap-ig-activations`: the gradient is integrated over runs in which the site is interpolated between its
            clean value and its replacement, each site by itself. `atp`: the gradient at the clean run.
        steps: The number of interpolated runs.
        quadrature: Where these lie: `midpoint`, `gauss-legendre`, or `right` (the points of the paper).
        replacement: `pair` (the corrupt run's activations and errors) or `zero` (none; the corrupt prompts are not
            used: for a set of prompts without counterparts).
        positions: Nodes by position (see `Positions`); by default one node for all positions together.
        metric: What is measured; it must have a gradient.
        batch_size: Examples at a time.
        progress: Called after every batch.

    Cost: per basis `steps` forwards and backwards from its layer on, and a forward. Memory: activations, gradients and
    changes of every basis for one batch.

    Raises InputError for names, positions and metrics that do not fit, UnsupportedError for a basis of several sites.
    """
    plan = _Plan.checked(model, pairs, bases, method, steps, quadrature, replacement, positions, metric)
    total: dict[str, Tensor] = {}
    for rows, batch in batches(plan.pairs, batch_size):
        for part in plan.parts(model, batch):
            plan.add(total, part, rows)
        progress(rows.stop, len(pairs))
    return plan.effects(total)


def feature_circuit(
    model: HookManager,
    pairs: Pairs,
    bases: Basis | Sequence[FeatureBasis],
    *,
    nodes: int | None = 50,
    node_threshold: float | None = None,
    edges: int | None = None,
    edge_threshold: float = 0.0,
    method: str = "eap-ig-activations",
    steps: int = 10,
    quadrature: str = "midpoint",
    replacement: str = "pair",
    positions: Positions = None,
    metric: MetricLike = "logit_diff",
    batch_size: int | None = 32,
    memory: int | None = None,
    progress: Progress = no_progress,
) -> FeatureCircuit:
    """The features and errors of largest effect, and the direct effects between them and on the metric.

    The weight of an edge is the share of the downstream node's effect that the upstream node's change makes, to first
    order, along paths that pass through no other dictionary's site: (metric's gradient at the downstream node) x
    (derivative of the downstream node) x (change of the upstream node), summed over positions, mean over examples. With
    method `atp` the edges out of a node to all nodes, errors included, and the logits add up to its effect.

    Args:
        model: The model.
        pairs: Clean and corrupt prompts.
        bases: As in `feature_effects`, like all arguments that are not named here.
        nodes: How many nodes to keep, features and errors together.
        node_threshold: Instead, the effect that a node must exceed (the paper's is 0.1).
        edges: How many edges to keep; by default all above the threshold.
        edge_threshold: The size that an edge must exceed (the paper's is 0.01).
        method: How nodes are scored.
        steps: The number of interpolated runs.
        quadrature: Where these lie.
        replacement: `pair` or `zero`.
        positions: Nodes by position; by default one node for all positions together.
        metric: What is measured.
        batch_size: Examples at a time.
        memory: Bytes of activations at a time for the edges.
        progress: Called after every batch.

    Cost: that of `feature_effects`, and per kept node a forward and a backward up to its site. Memory: also
    activations, gradients and changes of every basis for all examples.

    Raises InputError and UnsupportedError as `feature_effects` does, and when no node is kept.

    >>> import mechinterp as mi
    >>> model = mi.load_model("bundled")
    >>> pairs = mi.load_task("ioi").pairs(model, n=4)
    >>> bases = [mi.load_basis("bundled:m0"), mi.load_basis("bundled:resid_pre.1")]
    >>> circuit = mi.feature_circuit(model, pairs, bases, nodes=6, steps=4)
    >>> circuit.n_nodes, set(circuit.edges["downstream"]) <= {*circuit.nodes()["node"], "logits"}
    (6, True)
    """
    plan = _Plan.checked(model, pairs, bases, method, steps, quadrature, replacement, positions, metric)
    if (edges is not None and (type(edges) is not int or edges < 0)) or edge_threshold < 0:
        raise InputError("`edges` is a number of edges and `edge_threshold` a size; both are at least 0.")
    several = [(rows, plan.parts(model, batch), batch) for rows, batch in batches(plan.pairs, batch_size)]
    total: dict[str, Tensor] = {}
    for rows, parts, _ in several:
        for part in parts:
            plan.add(total, part, rows)
    effects = plan.effects(total)
    kept = effects.strongest(*((nodes, None) if node_threshold is None else (None, node_threshold)))
    if not any(bool(mask.any()) for mask in kept.values()):
        raise InputError("No node is kept: lower `node_threshold`, or raise `nodes`.")
    weights: dict[tuple[str, str], float] = {}
    for done, (rows, parts, batch) in enumerate(several):
        readout = metric_readout(model, batch, plan.metric)
        masks = plan.sets.masks[:, rows]
        arrivals: list[tuple[list[str], dict[FeatureBasis, Tensor]]] = []
        for own in parts:
            places = kept[own.basis.name].nonzero().tolist()
            if not places:
                continue
            targets = [Target(node, at) for node, at in places]
            names = [effects.name(own.basis, node, at) for node, at in places]
            arrivals.append((names, edges_into(model, readout, parts, own, targets, masks, memory=memory)))
        into = edges_into_logits(model, readout, parts, masks)
        arrivals.append(([LOGITS], {basis: rows_[None] for basis, rows_ in into.items()}))
        for names, by_basis in arrivals:
            for basis, found in by_basis.items():
                mean = plan.metric.direction * found.double().sum(-1) / len(pairs)
                for k, name in enumerate(names):
                    for node, at in kept[basis.name].nonzero().tolist():
                        key = (effects.name(basis, node, at), name)
                        weights[key] = weights.get(key, 0.0) + float(mean[k, node, at])
        progress(done + 1, len(several))
    rows_of = [(up, down, weight) for (up, down), weight in weights.items() if abs(weight) > edge_threshold]
    frame = pd.DataFrame(rows_of, columns=["upstream", "downstream", "weight"])
    frame = frame.sort_values("weight", key=abs, ascending=False, kind="stable", ignore_index=True)
    return FeatureCircuit(effects, kept, frame if edges is None else frame.head(edges))


@dataclass(frozen=True, eq=False)
class _Plan:
    """The settings of a call, checked."""

    pairs: Pairs
    bases: tuple[FeatureBasis, ...]
    sets: Any
    asked: Positions
    metric: Any
    method: str
    points: list[tuple[float, float]]
    replacement: str
    about: Mapping[str, Any]

    @staticmethod
    def checked(
        model: HookManager,
        pairs: Pairs,
        bases: Basis | Sequence[FeatureBasis],
        method: str,
        steps: int,
        quadrature: str,
        replacement: str,
        positions: Positions,
        metric: MetricLike,
    ) -> _Plan:
        measured = checked_metric(model, pairs, metric)
        check_differentiable(measured)
        ordered = in_order(model, [bases] if isinstance(bases, Basis) else list(bases))
        pairs = pairs.to(model.device)
        about: dict[str, Any] = {
            "analysis": "feature circuit",
            "method": method,
            "replacement": replacement,
            "metric": measured.name,
            "sign": "positive = the node helps the task",
            "examples": len(pairs),
            "bases": {basis.name: getattr(basis, "sha256", "") for basis in ordered},
        }
        if method != "atp":
            about |= {"steps": steps, "quadrature": quadrature}
        points = integration_points(steps, quadrature)
        sets = position_sets(pairs, positions)
        return _Plan(pairs, ordered, sets, positions, measured, method, points, replacement, about)

    def parts(self, model: HookManager, batch: Pairs) -> list[AtSite]:
        readout = metric_readout(model, batch, self.metric)
        return at_sites(
            model, readout, self.bases, method=self.method, points=self.points, replacement=self.replacement
        )

    def add(self, total: dict[str, Tensor], part: AtSite, rows: slice) -> None:
        """Adds one basis of one batch to the sums over the examples."""
        sign, name = self.metric.direction, part.basis.name
        every = part.effects(self.pairs.mask[None, rows]).double().sum((0, 1))
        exact = part.exact.double()
        values = {
            "effects": sign * part.effects(self.sets.masks[:, rows]).double().sum(-1),
            "exact": sign * exact.sum(),
            "gap": (every - exact).abs().sum(),
        }
        for key, value in values.items():
            total[f"{key} {name}"] = total[f"{key} {name}"] + value if f"{key} {name}" in total else value

    def effects(self, total: Mapping[str, Tensor]) -> FeatureEffects:
        n = len(self.pairs)
        names = [basis.name for basis in self.bases]
        return FeatureEffects(
            self.bases,
            self.sets.labels,
            self.asked,
            {name: total[f"effects {name}"].cpu() / n for name in names},
            {name: float(total[f"exact {name}"]) / n for name in names},
            {name: float(total[f"gap {name}"]) / n for name in names},
            self.metric.unit,
            self.about,
        )


def _entries(values: Float[Tensor, "node set"]) -> list[tuple[tuple[int, int], float]]:
    """The entries that are not 0, with their places."""
    return [((node, at), float(values[node, at])) for node, at in values.nonzero().tolist()]
