"""What is measured on the nodes of a circuit to say what they do: direct effects, detectors, attention, replacement."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import pandas as pd
import torch
from torch import Tensor

from mechinterp.analysis.activation_patching import activation_patching
from mechinterp.analysis.direct_logit_attribution import direct_logit_attribution
from mechinterp.analysis.head_detectors import TARGETS, attention_between, head_scores
from mechinterp.circuit import Circuit
from mechinterp.discovery.method import Progress, no_progress
from mechinterp.errors import InputError, UnsupportedError
from mechinterp.hooks import HookManager
from mechinterp.sites import Node, split_position
from mechinterp.tasks.pairs import Pairs

DETECTOR_LENGTH = 25
Values = Mapping[str, float]
"""A number per node."""


@dataclass
class Evidence:
    """Means over the examples, by node; empty where something could not be measured (`notes` say why)."""

    nodes: tuple[str, ...]
    """All heads of the model, and the MLPs that are whole."""
    names: dict[str, list[str]]
    """Those that the circuit has, with their names in it (several where positions are told apart)."""
    direct: Values = field(default_factory=dict[str, float])
    """Of all nodes: logits toward the right answers."""
    logit_diff: float = 0.0
    """Of the whole model: what all direct effects sum to."""
    effects: Values = field(default_factory=dict[str, float])
    """Of the circuit's nodes: what replacing the node by its value on the corrupt prompt costs in logit difference."""
    span: float = 0.0
    """|logit difference on clean less on corrupt prompts|."""
    detectors: dict[str, Values] = field(default_factory=dict[str, Values])
    """Per kind of detector, of all heads."""
    detector_length: int = DETECTOR_LENGTH
    """Of the random tokens that are said twice: fewer where the context or the vocabulary is small."""
    attention: dict[tuple[str, str], Values] = field(default_factory=dict[tuple[str, str], Values])
    """Per query and earlier key, of all heads."""
    notes: list[str] = field(default_factory=list[str])

    @property
    def heads(self) -> tuple[str, ...]:
        """All heads of the model."""
        return self.of_kind("head")

    def of_kind(self, kind: str) -> tuple[str, ...]:
        """The nodes that are heads, or MLPs (`mlp`)."""
        return tuple(node for node in self.nodes if Node.parse(node).kind == kind)

    def strongest(self, head: str) -> tuple[str, str] | None:
        """(query, key) of the named positions between which the head attends most; None where none are measured."""
        return max(self.attention, key=lambda pair: self.attention[pair][head], default=None)

    def to_frame(self, role_of: Mapping[str, str]) -> pd.DataFrame:
        """One row a head or MLP of the circuit, with its role ("" for none)."""
        rows: list[dict[str, object]] = []
        for node in (node for node in self.nodes if node in self.names):
            row: dict[str, object] = {"node": node, "role": role_of.get(node, "")}
            if self.direct:
                row["direct effect"] = self.direct[node]
                row["replacing it"] = self.effects[node]
            row |= {kind.replace("_", " "): values.get(node) for kind, values in self.detectors.items()}
            pair = self.strongest(node) if node in self.heads else None
            row |= {"attends": None, "attention": None} if self.attention else {}
            if pair is not None:
                row |= {"attends": " -> ".join(pair), "attention": self.attention[pair][node]}
            rows.append(row)
        return pd.DataFrame(rows)


def measure_evidence(
    model: HookManager, circuit: Circuit, pairs: Pairs, batch_size: int, progress: Progress = no_progress
) -> Evidence:
    """The evidence on these pairs. Cost: three forwards, one patched run per head and MLP of the circuit; detectors
    have tokens of their own.
    """
    dims = model.dims
    heads = tuple(f"a{layer}.h{head}" for layer in range(dims.n_layers) for head in range(dims.n_heads))
    names: dict[str, list[str]] = {}
    for name in circuit.nodes:
        names.setdefault(split_position(name)[0], []).append(name)
    mlps = [f"m{layer}" for layer in range(dims.n_layers) if dims.has_mlp]
    split = circuit.graph.split_mlps
    found = Evidence((*heads, *(name for name in mlps if name not in split)), names)
    if split:
        found.notes.append(f"No roles for {', '.join(split)} and the neurons taken out of them.")

    found.detector_length = min(DETECTOR_LENGTH, (dims.n_ctx - 1) // 2, dims.d_vocab // 2)

    def of_heads(values: Tensor) -> Values:
        return dict(zip(heads, values.flatten().tolist(), strict=True))

    try:
        _measure_effects(found, model, pairs, batch_size, progress)
    except (InputError, UnsupportedError) as error:
        found.direct, found.effects = {}, {}
        found.notes.append(f"Direct effects were not measured: {error}")
    try:
        for kind in TARGETS:
            scores = head_scores(model, kind, length=found.detector_length, batch_size=batch_size)
            found.detectors[kind] = of_heads(scores.mean().values)
    except (InputError, UnsupportedError) as error:
        found.notes.append(f"Detectors were not measured: {error}")
    try:
        grid = attention_between(model, pairs, batch_size=batch_size).mean()
        for query, key in _backward(pairs):
            found.attention[query, key] = of_heads(grid.at(query=query, key=key).values)
    except (InputError, UnsupportedError) as error:
        found.notes.append(f"Attention between named positions was not measured: {error}")
    return found


def _measure_effects(found: Evidence, model: HookManager, pairs: Pairs, batch_size: int, progress: Progress) -> None:
    parts = direct_logit_attribution(model, pairs, batch_size=batch_size).mean()
    found.direct = {node: float(parts.at(node=node)) for node in found.nodes}
    found.logit_diff = float(parts.values.sum())
    own = [node for node in found.nodes if node in found.names]
    if own:
        n_batches, finished = -(-len(pairs) // batch_size), 0

        def count(done: int, total: int) -> None:
            nonlocal finished
            progress(finished * total + done, n_batches * total)
            finished += done == total

        effects = activation_patching(model, pairs, own, batch_size=batch_size, progress=count)
        found.effects = dict(zip(own, effects.mean().values[:, 0].tolist(), strict=True))
        found.span = abs(float(effects.about["clean_value"]) - float(effects.about["corrupt_value"]))


def _backward(pairs: Pairs) -> Iterable[tuple[str, str]]:
    """Every (query, key) of named positions of which the key is earlier in every example."""
    order = torch.stack(list(pairs.positions.values()))
    for q, query in enumerate(pairs.positions):
        for k, key in enumerate(pairs.positions):
            if bool((order[q] > order[k]).all()):
                yield query, key
