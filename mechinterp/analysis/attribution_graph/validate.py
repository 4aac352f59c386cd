"""Two checks of an attribution graph against runs of the model: of its edges (exact), and of its predictions.

An *edge* says by how much a reader changes when one feature is scaled and everything else is held: patterns, scales of
norms, all other MLP outputs. `validate_edges` makes such runs of the model itself, so that every reader must move as
the feature's column says. A *graph* claims more: that the model, in which nothing is held, behaves like it.
`validate_graph` weakens or ablates features in the real model and compares the logits with what the graph predicts, and
with what the model's own gradient predicts: the limit of weak interventions, an exact account of the first order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.analysis.attribution_graph.frozen_run import FrozenRun, check_transcoders, freeze
from mechinterp.analysis.attribution_graph.graph import AttributionGraph, GraphNode
from mechinterp.analysis.attribution_graph.held_run import HELD, HeldEdits, gradients_at, held_edits
from mechinterp.base.errors import InputError
from mechinterp.base.registry import unknown
from mechinterp.features.basis import Basis
from mechinterp.models.hook_manager import HookManager, Intervention
from mechinterp.models.modes import Gradients
from mechinterp.models.sites import Site

STEP = 0.01
"""By how much a feature is scaled up and down for edges that hold only to first order."""
SHUFFLES = 1000
"""How often predictions are shuffled among the features for the control of a correlation."""


@dataclass(frozen=True)
class EdgeValidation:
    """How exactly readers move as the edges say when a feature is scaled and everything else is held.

    Args:
        features: How many features were scaled.
        readers: How many readers were compared for each.
        factor: By what; of first-order edges, by this and by as much less than 1.
        worst: The largest difference from an edge, as a share of the largest edge out of the same feature.
    """

    features: int
    readers: int
    factor: float
    worst: float

    def __str__(self) -> str:
        return (
            f"{self.features} features times {self.factor:g}, {self.readers:,} readers each: the largest difference "
            f"from an edge is {self.worst:.1e} of the largest edge of its feature"
        )

    def __repr__(self) -> str:
        return f"EdgeValidation({self})"


@dataclass(frozen=True, eq=False)
class GraphValidation:
    """What ablating features does to the targets in the model, beside what the graph predicts.

    Args:
        frame: A row per feature and target: feature, target, predicted, measured, gradient, in logits (less the mean
            logit).
        pearson: The correlation of predicted and measured.
        spearman: The same of their ranks.
        direct: The correlation (Pearson) with the direct edge alone: the control of paths through other features.
        gradient: The correlation (Pearson) of the measured changes with those that the model's own gradient predicts:
            an exact account of the first order. Where it is high and `pearson` is low, the graph's assumptions are
            wrong (what is held, what transcoders miss); where both are low, the change is not linear.
        shuffled: The 95 % quantile of the size of the correlation (Pearson) when the predictions are shuffled among the
            features, those of one feature for all targets together: logits of several targets often move alike.
        held: What was held in the model: `nothing`, `patterns`, or `norms` (with the patterns).
        strength: The share of each feature's activation that was taken away; 1: ablated.
    """

    frame: pd.DataFrame
    pearson: float
    spearman: float
    direct: float
    gradient: float
    shuffled: float
    held: str
    strength: float = 1.0

    def __str__(self) -> str:
        words = {"norms": "patterns and norms"}.get(self.held, self.held)
        done = "ablated" if self.strength == 1 else f"weakened by {self.strength:g} of their activation"
        return (
            f"{self.frame['feature'].nunique()} features {done} in the model, {words} held: measured "
            f"against predicted changes of logits, Pearson {self.pearson:.3f}, Spearman {self.spearman:.3f}; "
            f"the model's own gradient {self.gradient:.3f}; "
            f"controls: direct edges alone {self.direct:.3f}, shuffled predictions below {self.shuffled:.3f}"
        )

    def __repr__(self) -> str:
        return f"GraphValidation({self})"


def validate_edges(
    model: HookManager,
    graph: AttributionGraph,
    transcoders: Sequence[Basis],
    *,
    n: int = 8,
    factor: float | None = None,
    batch_size: int = 16,
) -> EdgeValidation:
    """How exactly every reader moves as the edges say, in runs of the model in which all else is held.

    Args:
        model: The model.
        graph: A graph that is not pruned.
        transcoders: Those that it was made with.
        n: So many features, those of the largest influence.
        factor: By what each is multiplied; not 1. By default 2. In a graph whose edges are only of the first order
            (`held=` is not `norms`) 1.01, and the central difference with 0.99 is compared.
        batch_size: Features per run.

    The runs are the model's own, with MLP outputs and what the graph holds edited; only readings are ours. Cost: `n`
    forwards of the prompt (first-order edges: two times `n`).

    Raises InputError for another model, other transcoders, a pruned graph or a graph without features.
    """
    if factor is not None and (factor == 1 or not math.isfinite(factor)):
        raise InputError(f"`factor` is a finite number other than 1; got {factor}.")
    if n < 1:
        raise InputError(f"`n` is at least 1; got {n}.")
    held = str(graph.about.get("held", "norms"))
    if factor is None:
        factor = 2.0 if held == "norms" else 1 + STEP
    if "pruned" in graph.about:
        raise InputError("Edges are validated in the whole graph; this one is pruned.")
    run = _frozen(model, graph, transcoders)
    chosen = _strongest(graph, n)
    worst = 0.0
    with Gradients(False) as off, off:
        plain = _readings(run, graph, held, [])
        for first in range(0, len(chosen), batch_size):
            some = chosen[first : first + batch_size]
            nodes = [graph.features[i] for i in some]
            more = _readings(run, graph, held, nodes, factor)
            if held == "norms":
                moved = (more - plain) / (factor - 1)
            else:
                moved = (more - _readings(run, graph, held, nodes, 2 - factor)) / (2 * (factor - 1))
            edges = graph.weights[:, [graph.n_leaves + i for i in some]].T.to(moved)
            size = edges.abs().amax(1).clamp(min=1e-9)
            away = float(((moved - edges).abs().amax(1) / size).max())
            if not math.isfinite(away):
                raise InputError("Some edges, or what readers read in these runs, are not finite.")
            worst = max(worst, away)
    return EdgeValidation(len(chosen), len(graph.readers), factor, worst)


def validate_graph(
    model: HookManager,
    graph: AttributionGraph,
    transcoders: Sequence[Basis],
    *,
    n: int = 32,
    held: str = "nothing",
    strength: float = 1.0,
    batch_size: int = 32,
) -> GraphValidation:
    """Ablations of features in the model, at their positions, beside what the graph predicts for its targets.

    The graph's prediction for a feature is minus the sum over all paths to the target: later features stay active and
    respond linearly. In the model all is free: other MLPs run as they are, features may switch on or off, norms
    rescale.

    Args:
        model: The model.
        graph: A graph, pruned or not; predictions are those of its edges.
        transcoders: Those that it was made with.
        n: So many features, those of the largest influence.
        held: What is held at its value on the prompt in the model: `nothing`, the attention `patterns`, or these and
            the scales of all `norms`. What fails with one and not with the next says which assumption of the graph
            fails.
        strength: The share of each feature's activation that is taken away, above 0: 1 ablates it, 0.1 weakens it by a
            tenth. The weaker, the nearer is the change to the model's gradient (`gradient`), which is its limit.
        batch_size: Features per run.

    Cost: `n` forwards of the prompt, and a forward and a backward per target for the gradient.

    Raises InputError for another model, other transcoders, and a graph of fewer than two features.
    """
    if held not in HELD:
        raise unknown("part to hold", held, HELD)
    if not 0 < strength <= 1:
        raise InputError(f"`strength` is the share of an activation that is taken away, above 0 to 1; got {strength}.")
    if len(graph.features) < 2:
        raise InputError("A correlation needs at least two features; the graph has fewer.")
    run = _frozen(model, graph, transcoders)
    chosen = _strongest(graph, n)
    rows: list[Tensor] = []
    with Gradients(False) as off, off:
        plain = _target_logits(run, graph, [], held, strength)
        for first in range(0, len(chosen), batch_size):
            some = [graph.features[i] for i in chosen[first : first + batch_size]]
            rows.append(_target_logits(run, graph, some, held, strength) - plain)
    measured = torch.cat(rows).double().cpu()
    predicted = -strength * graph.total_effects()[:, chosen].T.cpu()
    direct = -strength * graph.weights[len(graph.features) :, [graph.n_leaves + i for i in chosen]].T.double().cpu()
    gradient = -strength * _gradients(run, graph, [graph.features[i] for i in chosen], held)
    frame = pd.DataFrame(
        [
            {
                "feature": graph.features[i].name,
                "target": target.name,
                "predicted": float(predicted[row, column]),
                "measured": float(measured[row, column]),
                "gradient": float(gradient[row, column]),
            }
            for row, i in enumerate(chosen)
            for column, target in enumerate(graph.targets)
        ]
    )
    flat, real = predicted.flatten(), measured.flatten()
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(len(chosen), generator=generator) for _ in range(SHUFFLES)]
    chance = torch.stack([_correlation(predicted[order].flatten(), real).abs() for order in orders]).quantile(0.95)
    return GraphValidation(
        frame,
        float(_correlation(flat, real)),
        float(_correlation(_ranks(flat), _ranks(real))),
        float(_correlation(direct.flatten(), real)),
        float(_correlation(gradient.flatten(), real)),
        float(chance),
        held,
        strength,
    )


def _gradients(
    run: FrozenRun, graph: AttributionGraph, nodes: Sequence[GraphNode], held: str
) -> Float[Tensor, "feature target"]:
    """What every target would lose per share of a feature that is taken away, by the gradient of the model."""
    weights = _target_weights(run, graph)
    sites = list(dict.fromkeys(site for basis in run.transcoders.values() for site in basis.sites_out))
    found = torch.zeros(len(nodes), graph.n_targets, dtype=torch.float64)
    for column in range(graph.n_targets):

        def read(normed: Tensor, column: int = column) -> Tensor:
            return normed[:, -1].to(run.dtype) @ (run.model.layout.W_U.to(run.dtype) @ weights[:, column])

        holding = HeldEdits(run, 1)
        edits = [] if held == "nothing" else holding.patterns()
        edits += holding.norms() if held == "norms" else []
        at = gradients_at(run, sites, edits, read, n=1, stop=Site("final_norm"))
        for row, node in enumerate(nodes):
            basis = run.transcoders[node.layer]
            for i, site in enumerate(basis.sites_out):
                direction = basis.W_dec[node.feature, i].double()
                found[row, column] += node.value * (at[site][0, node.position].double() @ direction).cpu()
    return found


def _frozen(model: HookManager, graph: AttributionGraph, transcoders: Sequence[Basis]) -> FrozenRun:
    found = {basis.name: basis.sha256 for basis in transcoders}
    if found != dict(graph.bases):
        raise InputError(f"The graph was made with {', '.join(graph.bases) or 'no transcoders'}; give the same ones.")
    if not graph.features:
        raise InputError("The graph has no features.")
    own = {basis.name: basis.sites_in[0].layer for basis in transcoders}
    for node in graph.features:
        if own[node.basis] != node.layer or node.position >= len(graph.tokens):
            raise InputError(f"The graph's feature {node.name} is not one of its transcoders' on this prompt.")
    with Gradients(False) as off, off:
        tokens = torch.tensor(graph.tokens, device=model.device)
        run = freeze(model, tokens, check_transcoders(model, transcoders))
        target = _target_logits(run, graph, [], "nothing")[0]
    known = torch.tensor([node.pre for node in graph.targets], dtype=target.dtype, device=target.device)
    if not torch.allclose(target, known, rtol=1e-3, atol=1e-3 * float(known.abs().max())):
        raise InputError(
            f"On {model.info.name} the prompt has other logits than in the graph, which is of {graph.model}."
        )
    return run


def _strongest(graph: AttributionGraph, n: int) -> list[int]:
    """The numbers of the features of the largest influence."""
    influence = graph.influence()[graph.n_leaves :]
    return influence.argsort(descending=True, stable=True)[:n].tolist()


def _target_weights(run: FrozenRun, graph: AttributionGraph) -> Float[Tensor, "d_vocab target"]:
    """The targets as combinations of logits, less the mean logit."""
    known = graph.about.get("targets", {})
    weights = torch.zeros(run.model.dims.d_vocab_out, graph.n_targets, dtype=run.dtype, device=run.model.device)
    for column, node in enumerate(graph.targets):
        if node.feature < 0 and node.text not in known:
            raise InputError(f"The graph does not say which tokens {node.name} is made of, so it cannot be measured.")
        for token, by in known.get(node.text, {str(node.feature): 1.0}).items():
            if not 0 <= int(token) < len(weights):
                raise InputError(f"{node.name} is made of token {token}; the model has {len(weights)} outputs.")
            weights[int(token), column] += by
    return weights - weights.sum(0) / len(weights)


def _target_logits(
    run: FrozenRun, graph: AttributionGraph, ablated: Sequence[GraphNode], held: str, strength: float = 1.0
) -> Float[Tensor, "feature target"]:
    """The targets in a run of the model for every ablated feature (none: one run of the prompt)."""
    n = max(1, len(ablated))
    holding = HeldEdits(run, n)
    edits = [] if held == "nothing" else holding.patterns()
    for layer, basis in run.transcoders.items():
        own = [(row, node) for row, node in enumerate(ablated) if node.layer == layer]
        if own:

            def off(values: Tensor, own: Sequence[tuple[int, GraphNode]] = own) -> Tensor:
                values = values.clone()
                for row, node in own:
                    values[row, node.position, node.feature] *= 1 - strength
                return values

            edits.append(Intervention(basis, off))
    # Norms after the features, whose edits then come before what the norms read.
    edits += holding.norms() if held == "norms" else []
    site = Site("final_norm")
    final = run.model.run(run.tokens.expand(n, -1), record=[site], interventions=edits).values[site][:, -1]
    return _unembedded(run, final.to(run.dtype), graph)


def _unembedded(
    run: FrozenRun, normed: Float[Tensor, "n d_model"], graph: AttributionGraph
) -> Float[Tensor, "n target"]:
    weights, layout = _target_weights(run, graph), run.model.layout
    out = normed @ (layout.W_U.to(normed) @ weights)
    return out if layout.b_U is None else out + layout.b_U.to(normed) @ weights


def _readings(
    run: FrozenRun, graph: AttributionGraph, held: str, scaled: Sequence[GraphNode], factor: float = 1.0
) -> Float[Tensor, "feature reader"]:
    """What every reader reads in runs of the model in which one feature is scaled and other MLP outputs are held."""
    n = max(1, len(scaled))
    edits = held_edits(run, n, held, scaled, factor)
    read = dict.fromkeys([*(basis.sites_in[0] for basis in run.transcoders.values()), Site("final_norm")])
    values = run.model.run(run.tokens.expand(n, -1), record=list(read), interventions=edits).values
    columns: list[Tensor] = []
    for layer, basis in sorted(run.transcoders.items()):
        nodes = [node for node in graph.features if node.layer == layer]
        if nodes:
            x = values[basis.sites_in[0]].to(run.dtype)[:, [node.position for node in nodes]]
            rows = basis.reads([node.feature for node in nodes]).to(run.dtype)
            pre = (x * rows).sum(-1) + basis.b_enc[[node.feature for node in nodes]].to(run.dtype)
            columns.append(pre - rows @ basis.b_dec[0].to(run.dtype) if basis.subtract_b_dec else pre)
    columns.append(_unembedded(run, values[Site("final_norm")][:, -1].to(run.dtype), graph))
    return torch.cat(columns, 1)


def _correlation(a: Float[Tensor, " n"], b: Float[Tensor, " n"]) -> Tensor:
    """NaN if one of both is the same everywhere."""
    a, b = a - a.mean(), b - b.mean()
    return (a @ b) / (a.norm() * b.norm())


def _ranks(values: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Ranks; ties have their mean."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1) / 2)[inverse]
