"""What roles are given on: measurements of a circuit's heads and MLPs, the expensive ones for few nodes only.

What one forward gives for all nodes is measured on all pairs: direct effects, attention between named positions,
detectors. Patched runs are made on the first `n_patched` pairs, and only for nodes that could have a role and whose
first-order estimate (EAP) is not too small; one backward gives all estimates.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.analysis.activation_patching import activation_patching
from mechinterp.analysis.compensation import compensation
from mechinterp.analysis.head_detectors import attention_between, detector_scores
from mechinterp.analysis.path_patching import path_patching
from mechinterp.base.batches import over_batches
from mechinterp.base.errors import InputError, UnsupportedError
from mechinterp.base.keep import Keep, compute_always
from mechinterp.base.progress import Progress
from mechinterp.engines.edge_attribution import edge_gradients
from mechinterp.engines.readout import FINAL, metric_readout
from mechinterp.evaluation.ablation import AblationSetup
from mechinterp.evaluation.direct_effects import direct_effects
from mechinterp.graphs.circuit import Circuit
from mechinterp.graphs.graph import Graph, build_graph
from mechinterp.models.direction_readout import Explained, explained
from mechinterp.models.hook_manager import HookManager
from mechinterp.models.sites import Node, split_position
from mechinterp.tasks.metrics import get_metric
from mechinterp.tasks.pairs import Pairs

DETECTOR_LENGTH = 25
SCREEN = 1 / 3
"""Nodes are screened at this share of a limit: first-order estimates of small effects are often too small."""
MOST_SENDERS = 12
"""How many heads have their paths into the movers' queries patched, those of the largest estimates."""
ByNode = Mapping[str, float]
"""A number per node."""


@dataclass(frozen=True)
class Numbers:
    """A number per node: its mean over the examples and the standard error of that mean (infinite for one example)."""

    mean: ByNode = field(default_factory=dict[str, float])
    error: ByNode = field(default_factory=dict[str, float])

    @staticmethod
    def of(names: Sequence[str], values: Float[Tensor, "node example"]) -> Numbers:
        """The numbers of the nodes, from their values on every example."""
        n = values.shape[1]
        wide = values.double()
        errors = wide.std(1) / n**0.5 if n > 1 else torch.full((len(names),), torch.inf)
        means = values.mean(1)  # as a Grid's mean, so that a stored number is measured again to the last digit
        return Numbers(dict(zip(names, means.tolist(), strict=True)), dict(zip(names, errors.tolist(), strict=True)))

    def __bool__(self) -> bool:
        return bool(self.mean)


@dataclass(frozen=True)
class Screen:
    """First-order estimates on the patched pairs, in logits: of replacing nodes and of patching edges."""

    graph: Graph
    edges: Float[Tensor, "reader writer"]

    @property
    def nodes(self) -> ByNode:
        """The estimated cost of replacing each node: its edges together."""
        return dict(zip(self.graph.writers, self.edges.sum(0).tolist(), strict=True))

    def into(self, receivers: Sequence[str]) -> ByNode:
        """The estimated cost of patching the edges from each node to the receivers."""
        rows = [self.graph.reader_index[name] for name in receivers]
        return dict(zip(self.graph.writers, self.edges[rows].sum(0).tolist(), strict=True))


@dataclass(frozen=True)
class Evidence:
    """Measurements by node; empty where something could not be measured (`notes` say why)."""

    nodes: tuple[str, ...]
    """All heads of the model, and the MLPs whose neurons are not separate nodes."""
    names: Mapping[str, Sequence[str]]
    """The nodes of the circuit, with their names in it (several if the graph has named positions)."""
    patched_pairs: Pairs
    """The train pairs on which patched runs are made."""
    direct: Numbers
    """The direct effect of every node: logits toward the right answers, or of the difference of two readings."""
    explained: Explained
    """What direct effects are on: the answers, or the reading of a direction."""
    total: float
    """The sum of all direct effects: the logit difference of the whole model, or the difference of the readings."""
    detectors: Mapping[str, Numbers]
    """For each kind of detector, the scores of all heads."""
    detector_length: int
    """How many random tokens the detectors repeat; fewer than usual if the context or the vocabulary is small."""
    attention: Mapping[tuple[str, str], Numbers]
    """For each query position and earlier key position, the mean attention of all heads."""
    notes: tuple[str, ...]
    screen: Screen | None = None
    effects: ByNode = field(default_factory=dict[str, float])
    """The logit difference that replacing a node's output by the corrupt one costs, for those that were run."""
    span: float = 0.0
    """|logit difference on clean prompts - logit difference on corrupt prompts|."""
    movers: tuple[str, ...] = ()
    """The heads whose queries are the receivers of `paths`, and which are replaced for `changes`."""
    paths: Numbers = field(default_factory=Numbers)
    """The cost of patching a head's paths into the movers' queries, for those that were run."""
    path_control: tuple[str, ...] = ()
    """The heads in `paths` that are there as controls."""
    changes: Numbers = field(default_factory=Numbers)
    """How much the direct effect of every node rises when the movers are replaced."""

    @property
    def heads(self) -> tuple[str, ...]:
        """All heads of the model."""
        return self.of_kind("head")

    def of_kind(self, kind: str) -> tuple[str, ...]:
        """The nodes of a kind: `head` or `mlp`."""
        return tuple(node for node in self.nodes if Node.parse(node).kind == kind)

    def own(self) -> tuple[str, ...]:
        """The nodes of the circuit."""
        return tuple(node for node in self.nodes if node in self.names)

    def strongest(self, head: str, query: str | None = None) -> tuple[str, str] | None:
        """The (query, key) positions between which the head attends most; None if no attention was measured."""
        some = [pair for pair in self.attention if query in (None, pair[0])]
        return max(some, key=lambda pair: self.attention[pair].mean[head], default=None)

    def estimate(self, node: str) -> float | None:
        """What replacing the node costs: as measured, else as estimated; None if neither."""
        if node in self.effects:
            return self.effects[node]
        return None if self.screen is None else self.screen.nodes[node]

    def to_frame(self, role_of: Mapping[str, str]) -> pd.DataFrame:
        """One row per head and MLP of the circuit, with its role ("" for none); empty cells were not measured."""
        estimates = {} if self.screen is None else self.screen.nodes
        rows: list[dict[str, object]] = []
        for node in self.own():
            row: dict[str, object] = {"node": node, "role": role_of.get(node, "")}
            if self.direct:
                row |= {"direct effect": self.direct.mean[node], "replacing it": self.effects.get(node)}
                row |= {"replacing it, first order": estimates.get(node)} if estimates else {}
            if self.movers:
                row["into the movers' queries"] = self.paths.mean.get(node)
                row["direct effect, change without the movers"] = self.changes.mean.get(node)
            row |= {kind.replace("_", " "): values.mean.get(node) for kind, values in self.detectors.items()}
            pair = self.strongest(node) if node in self.heads else None
            row |= {"attends": None, "attention": None} if self.attention else {}
            if pair is not None:
                row |= {"attends": " -> ".join(pair), "attention": self.attention[pair].mean[node]}
            rows.append(row)
        return pd.DataFrame(rows)


def measure_evidence(setup: AblationSetup, circuit: Circuit, n_patched: int) -> Evidence:
    """What forwards of the model and one backward give about all nodes, on the pairs of the setup.

    Cost: a forward for direct effects and one for attention; on `n_patched` pairs two forwards and a backward; the
    detectors run once on tokens of their own.
    """
    model, dims, batch_size = setup.model, setup.model.dims, setup.batch_size
    if dims.layers:
        raise UnsupportedError(
            f"Roles are measured in models whose layers all have the same heads; in {model.info.architecture} layers "
            "differ. Leave roles out, or look at single heads with activation_patching and head_scores."
        )
    heads = tuple(f"a{layer}.h{head}" for layer in range(dims.n_layers) for head in range(dims.n_heads))
    names: dict[str, list[str]] = {}
    for name in circuit.nodes:
        names.setdefault(split_position(name)[0], []).append(name)
    mlps = [f"m{layer}" for layer in range(dims.n_layers) if dims.has_mlp]
    split = circuit.graph.split_writers
    nodes = (*heads, *(name for name in mlps if name not in split))
    notes: list[str] = []
    if split:
        notes.append(f"No roles for {', '.join(split)}, parts of which are separate nodes, nor for those parts.")

    def of_heads(values: Tensor) -> Numbers:
        return Numbers.of(heads, values.flatten(0, 1))

    direct, total, what = Numbers(), 0.0, explained(model)
    try:
        parts = direct_effects(model, setup.pairs, batch_size)
        direct = Numbers.of(nodes, torch.stack([parts.at(node=node).values for node in nodes]))
        total = float(parts.mean().values.sum())
    except (InputError, UnsupportedError) as error:
        notes.append(f"Direct effects were not measured: {error}")
    setup.progress(1, 4)
    detectors: dict[str, Numbers] = {}
    length = min(DETECTOR_LENGTH, (dims.n_ctx - 1) // 2, dims.d_vocab // 2)
    try:
        scores = detector_scores(model, length=length, batch_size=batch_size)
        detectors = {kind: of_heads(grid.values) for kind, grid in scores.items()}
    except (InputError, UnsupportedError) as error:
        notes.append(f"Detectors were not measured: {error}")
    setup.progress(2, 4)
    attention: dict[tuple[str, str], Numbers] = {}
    try:
        grid = attention_between(model, setup.pairs, batch_size=batch_size)
        for query, key in _earlier_keys(setup.pairs):
            attention[query, key] = of_heads(grid.at(query=query, key=key).values)
    except (InputError, UnsupportedError) as error:
        notes.append(f"Attention between named positions was not measured: {error}")
    setup.progress(3, 4)
    patched, screen = setup.pairs[:n_patched], None
    if direct:
        try:
            screen = first_order(model, patched, batch_size)
        except (InputError, UnsupportedError) as error:
            notes.append(f"No node was screened, every patched run is made: {error}")
    setup.progress(4, 4)
    return Evidence(nodes, names, patched, direct, what, total, detectors, length, attention, tuple(notes), screen)


def first_order(model: HookManager, pairs: Pairs, batch_size: int) -> Screen:
    """The estimates of every edge and node from one backward (EAP, in logits, or of the reading)."""
    graph, metric = build_graph(model), get_metric(explained(model).metric)

    def scored(batch: Pairs, _: slice) -> dict[str, Tensor]:
        return {"edges": edge_gradients(model, graph, batch, metric).double().cpu()}

    edges = over_batches(pairs.to(model.device), batch_size, scored, {"edges": "sum"})["edges"] / len(pairs)
    return Screen(graph, edges)


def with_effects(
    evidence: Evidence, setup: AblationSetup, nodes: Sequence[str], matters: float, keep: Keep = compute_always
) -> Evidence:
    """The evidence with the exact cost of replacing each of the nodes that is not estimated to cost next to nothing.

    A node whose estimate is below a third of `matters`, as a share of the span, is not run.
    """
    if not evidence.direct or not nodes:
        return evidence
    model, pairs, batch_size = setup.model, evidence.patched_pairs, setup.batch_size
    metric = evidence.explained.metric
    span = abs(_clean_minus_corrupt(model, pairs, batch_size))
    screen = None if evidence.screen is None else evidence.screen.nodes
    run = [node for node in nodes if screen is None or abs(screen[node]) >= SCREEN * matters * span]
    if not run:
        return replace(evidence, span=span)

    def measure() -> dict[str, Tensor]:
        costs = activation_patching(
            model, pairs, run, metric=metric, batch_size=batch_size, progress=per_batch(setup, pairs)
        )
        return {"effects": costs.mean().values[:, 0]}

    costs = keep(f"roles: effects of {', '.join(run)}", measure)["effects"]
    return replace(evidence, span=span, effects=dict(zip(run, costs.tolist(), strict=True)))


def _clean_minus_corrupt(model: HookManager, pairs: Pairs, batch_size: int) -> float:
    """The mean logit difference (or reading) on clean prompts minus that on corrupt ones. Two forwards."""
    metric = get_metric(explained(model).metric)

    def run(batch: Pairs, _: slice) -> dict[str, Tensor]:
        readout = metric_readout(model, batch, metric)
        runs = [model.run(tokens, batch.mask, record=[FINAL], stop=FINAL) for tokens in (batch.clean, batch.corrupt)]
        clean, corrupt = (readout.of_resid(run.values[FINAL]).double().sum().cpu() for run in runs)
        return {"difference": clean - corrupt}

    found = over_batches(pairs.to(model.device), batch_size, run, {"difference": "sum"})
    return float(found["difference"]) / len(pairs)


def per_batch(setup: AblationSetup, pairs: Pairs) -> Progress:
    """The progress of an analysis that reports it batch by batch."""
    n_batches, finished = -(-len(pairs) // setup.batch_size), 0

    def over_all_batches(done: int, total: int, /) -> None:
        nonlocal finished
        setup.progress(finished * total + done, n_batches * total)
        finished += done == total

    return over_all_batches


def with_movers(
    evidence: Evidence,
    setup: AblationSetup,
    movers: Sequence[str],
    least: float,
    quantile: float,
    keep: Keep = compute_always,
) -> Evidence:
    """The evidence with paths into the movers' queries, and with direct effects while the movers are replaced.

    Paths are patched from the circuit's heads of the largest estimates, at least a third of `least` (in logits), and
    from the control: the head at the quantile of the estimates of all heads that could send.
    """
    if not movers:
        return evidence
    model, pairs, batch_size, notes = setup.model, evidence.patched_pairs, setup.batch_size, list(evidence.notes)
    changes, metric = Numbers(), evidence.explained.metric
    try:
        parts = compensation(model, pairs, movers, batch_size=batch_size)
        others = [node for node in evidence.nodes if node not in movers]
        changes = Numbers.of(others, torch.stack([parts.at(node=node).values for node in others]))
    except (InputError, UnsupportedError) as error:
        notes.append(f"Compensation for the movers was not measured: {error}")
    paths, control = Numbers(), tuple[str, ...]()
    queries = [f"{mover}<q>" for mover in movers]
    last = max(Node.parse(mover).layer for mover in movers)
    before = [head for head in evidence.heads if Node.parse(head).layer < last and head not in movers]
    try:
        if before:
            senders, control = _senders(evidence, before, queries, least, quantile)
            some = list(dict.fromkeys([*senders, *control]))
            if senders:

                def measure() -> dict[str, Tensor]:
                    report = per_batch(setup, pairs)
                    grid = path_patching(
                        model, pairs, some, queries, metric=metric, batch_size=batch_size, progress=report
                    )
                    return {"paths": grid.values[:, 0]}

                name = f"roles: paths from {', '.join(some)} to {', '.join(queries)}"
                paths = Numbers.of(some, keep(name, measure)["paths"])
    except (InputError, UnsupportedError) as error:
        notes.append(f"Paths into the movers' queries were not patched: {error}")
    return replace(
        evidence, movers=tuple(movers), changes=changes, paths=paths, path_control=control, notes=tuple(notes)
    )


def _senders(
    evidence: Evidence, before: Sequence[str], queries: Sequence[str], least: float, quantile: float
) -> tuple[list[str], tuple[str, ...]]:
    """The heads of the circuit whose paths are patched, and the control."""
    own = [head for head in before if head in evidence.names]
    if evidence.screen is None:
        return own, (before[0],) if before[0] not in own else ()
    estimates = evidence.screen.into(queries)
    strong = [head for head in own if estimates[head] >= SCREEN * least]
    strong = sorted(strong, key=lambda head: -estimates[head])[:MOST_SENDERS]
    return strong, tuple(at_quantile({h: estimates[h] for h in before if h not in strong}, quantile))


def at_quantile(values: ByNode, quantile: float) -> list[str]:
    """The node at the quantile of the values, in a list; empty for no values."""
    order = sorted(values, key=lambda node: values[node])
    return order[int(quantile * (len(order) - 1)) :][:1]


def _earlier_keys(pairs: Pairs) -> Iterable[tuple[str, str]]:
    """Every (query, key) of named positions with the key earlier than the query in every example."""
    order = torch.stack(list(pairs.positions.values()))
    for q, query in enumerate(pairs.positions):
        for k, key in enumerate(pairs.positions):
            if bool((order[q] > order[k]).all()):
                yield query, key
