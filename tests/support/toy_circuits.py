"""Circuits and circuit files that need no model: random scores on the graph of given dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from mechinterp.circuit_file.circuit_file import edge_records, graph_record
from mechinterp.circuit_file.schema import CircuitFile
from mechinterp.circuit_file.store import seal
from mechinterp.evaluation.faithfulness import Ablation
from mechinterp.graphs.circuit import Circuit
from mechinterp.graphs.graph import graph_of
from mechinterp.graphs.scores import Scores
from mechinterp.graphs.select import EmptyCircuit, select
from mechinterp.models.layout import Dims

SHA = "a" * 64
METRIC = {"name": "logit_diff", "direction": "higher is better", "unit": "logits"}


def toy_circuit(
    layers: int = 3, heads: int = 4, kv_heads: int | None = None, edges: int = 60, seed: int = 0
) -> Circuit:
    """A circuit of the best edges by magnitude under random scores of both signs."""
    dims = Dims(layers, heads, kv_heads or heads, 16, 4, 50, 50, 32, has_mlp=True, parallel=False, causal=True)
    graph = graph_of(dims)
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(graph.possible.shape, generator=generator) * graph.possible
    table[:, 0] *= 2  # so that even a small part of a large graph has paths from the input
    table[-1] *= 2  # and to the logits
    scores = Scores(graph, table * 10, 10, "eap", "logit_diff", "corrupt")
    return select(graph, scores, edges=edges, by="magnitude")


def toy_document(circuit: Circuit, **changes: Any) -> CircuitFile:
    """A circuit file about it, with invented results; `changes` replace fields of the file."""
    n_edges, n_graph = circuit.n_edges, circuit.graph.n_edges
    evaluation = {
        "pairs": "evaluation",
        "metric": METRIC,
        "ablation": asdict(Ablation()),
        "n_examples": 200,
        "n_edges": n_edges,
        "n_edges_graph": n_graph,
        "circuit_value": 3.1,
        "full_value": 3.4,
        "empty_value": -0.2,
        "faithfulness": 0.9261,
        "faithfulness_ci": (0.9083, 0.9514),
        "ci_level": 0.95,
        "example_quartiles": (0.8, 0.9, 1.0),
        "n_ratio": 198,
        "kl": 0.12,
        "accuracy": 0.97,
        "accuracy_full": 0.995,
        "random_faithfulness": (0.02, -0.01, 0.05),
        "seed": 0,
        "tolerance": {"relative": 1e-4, "absolute": 1e-5},
    }
    made = {"kind": "task", "seed": 0, "prepend_bos": True}
    content: dict[str, Any] = {
        "schema_version": 1,
        "kind": "circuit",
        "id": "toy",
        "title": "toy",
        "status": "discovered",
        "model": {
            "name": "toy",
            "origin": "memory",
            "weights_sha256": SHA,
            "architecture": "GPT2LMHeadModel",
            "dims": {name: value for name, value in asdict(circuit.graph.dims).items() if value != ()},
            "processing": "raw",
            "dtype": "float32",
            "loader": "transformer_lens 4.3.0",
        },
        "graph": graph_record(circuit.graph),
        "nodes": circuit.nodes,
        "edges": edge_records(circuit),
        "task": {
            "kind": "task",
            "name": "ioi",
            "version": 1,
            "sha256": SHA,
            "title": "Indirect object identification",
            "source": "Wang et al. 2022",
            "bundled": True,
        },
        "pairs": {
            name: {"n": 200, "sha256": SHA, "made_from": {**made, "split": split}}
            for name, split in (("discovery", "train"), ("evaluation", "test"))
        },
        "selection": {"parameters": dict(circuit.selection), "n_selected": circuit.n_selected, "n_edges": n_edges},
        "evaluation": [evaluation],
        "curve": {
            "pairs": "discovery",
            "metric": "logit_diff",
            "replacement": "corrupt",
            "points": [{"n_selected": n, "n_edges": n, "faithfulness": n / n_graph} for n in (0, 10, n_graph)],
        },
        "provenance": {"versions": {"torch": "2.13"}, "device": "cpu", "command": "discover-circuit run ioi"},
    }
    return seal({**content, **changes}, None)


def curve_of(circuit: Circuit, sizes: Sequence[int]) -> dict[str, Any]:
    """The curve of a file with the edges that the circuit's rule selects at these sizes, and invented values."""
    points: list[dict[str, Any]] = []
    for size in sizes:
        try:
            made = select(circuit.graph, scores_of(circuit), edges=size, by="magnitude")
            n_edges = made.n_edges
        except EmptyCircuit:
            n_edges = 0
        points.append({"n_selected": size, "n_edges": n_edges, "faithfulness": round(n_edges**0.5 / 40, 6)})
    return {"pairs": "discovery", "metric": "logit_diff", "replacement": "corrupt", "points": points}


def scores_of(circuit: Circuit) -> Scores:
    """Its scores, which a toy circuit always has."""
    assert circuit.scores is not None
    return circuit.scores
