"""Data for the graph on the page: nodes, lines, their places, and which of them belong to each size."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import networkx as nx
import torch
from torch import Tensor

from mechinterp.base.canonical_json import six_digits
from mechinterp.circuit_file.schema import CircuitFile, Role
from mechinterp.circuit_file.summary import coloured
from mechinterp.evaluation.role_names import plain_role
from mechinterp.graphs.circuit import Circuit, to_networkx
from mechinterp.graphs.colours import CHANNEL_COLOURS
from mechinterp.graphs.layered_layout import POINTS_PER_ROW, Net, draw_layered
from mechinterp.models.sites import split_position
from mechinterp.views.plots.circuit import CHANNEL_LABELS, KINDS, kind_of, merged, node_kinds
from mechinterp.views.report.diagrams import diagrams
from mechinterp.views.report.measured_sizes import MAX_EDGES, MeasuredSize, measured_sizes
from mechinterp.views.report.prompt_example import PromptExample

Line = tuple[str, str, str]
"""Writer, reader, name of the edge. An edge into a shared key or value head is one line to each of its heads."""


def graph_view(circuit: Circuit, document: CircuitFile, example: PromptExample | None = None) -> dict[str, Any]:
    """Everything that the script draws, as JSON values.

    `nodes` and `edges` (writer, reader, channel, name, score, share of resamples) are numbered. Each of the `stops` of
    the slider (one per measured size) gives its edges as ranges of these numbers, and its drawing. A drawing has the
    place of every node and, for each edge, its x in every row that it passes. If nodes were chosen, one line stands for
    all edges between two of them.

    The circuit has a layout of its own; sizes with other edges share a second drawing. If there are more than
    `MAX_EDGES` lines, the strongest are drawn, and `about` says so. `diagrams` are boxes by role or by layer.

    Args:
        circuit: the circuit.
        document: its file.
        example: a pair of prompts, for the columns of the diagram of roles.
    """
    stops, about = measured_sizes(circuit, document)
    own = _net(circuit, circuit.kept)
    shown, total = _strongest(own), own.number_of_edges()
    if shown.number_of_edges() < total:
        which_lines = "The strongest" if circuit.scores is not None else "Without scores to choose by, the first"
        about = f"{which_lines} {shown.number_of_edges():,} of {total:,} lines are drawn. {about}"
    nets = [shown if torch.equal(stop.kept, circuit.kept) else _net(circuit, stop.kept) for stop in stops] or [shown]
    lines = _numbered(nets)
    nodes = {name: i for i, name in enumerate(dict.fromkeys(end for line in lines for end in line[:2]))}
    drawings, which = _drawings(shown, nets)
    data = {line: found for net in nets for line, found in _lines(net).items()}
    shares = {edge.name: edge.frequency for edge in document.edges}
    return {
        "nodes": [_node(name, document.roles) for name in nodes],
        "edges": [_edge(line, nodes, data[line], shares.get(line[2])) for line in lines],
        "roles": _roles(document.roles),
        "diagrams": diagrams(own, document, example),
        "drawings": [_drawing(net, nodes, lines) for net in drawings],
        "stops": [
            _stop(net, number, stop, circuit, document, lines)
            for net, number, stop in zip(nets, which, stops or [None], strict=True)
        ],
        "channels": {name: [CHANNEL_LABELS[name], colour] for name, colour in CHANNEL_COLOURS.items()},
        "kinds": {kind: [group.label, group.colour] for kind, group in node_kinds(document.roles).items()},
        "scored": circuit.scores is not None,
        "level": circuit.graph.level,
        "answers": circuit.graph.answers,
        "about": about,
    }


def _net(circuit: Circuit, kept: Tensor) -> Net:
    net = to_networkx(circuit.graph, kept)
    if circuit.scores is not None:
        values = circuit.scores.values
        for _, _, found in net.edges(data=True):
            found["score"] = six_digits(float(values[circuit.graph.edge_index(found["name"])]))
    return merged(net) if circuit.graph.level == "node" else net


def _strongest(net: Net) -> Net:
    edges = sorted(net.edges(keys=True, data="score", default=0.0), key=lambda edge: -abs(edge[3]))
    kept: Any = [(writer, reader, key) for writer, reader, key, _ in edges[:MAX_EDGES]]
    return net.edge_subgraph(kept)


def _lines(net: Net) -> dict[Line, Mapping[str, Any]]:
    return {(str(a), str(b), found["name"]): found for a, b, found in net.edges(data=True)}


def _numbered(nets: Sequence[Net]) -> dict[Line, int]:
    """All lines, those of the smallest size first, so that each size is a few ranges of numbers."""
    every = dict.fromkeys(line for net in nets for line in sorted(_lines(net)))
    return {line: i for i, line in enumerate(every)}


def _drawings(own: Net, nets: Sequence[Net]) -> tuple[list[Net], list[int]]:
    """The graphs to lay out, and the index of the one that each size is drawn in."""
    mine = _lines(own).keys()
    which = [0 if _lines(net).keys() <= mine else 1 for net in nets]
    if not any(which):
        return [own], which
    whole: Net = nx.MultiDiGraph(**own.graph)
    for line, found in {line: found for net in nets for line, found in _lines(net).items()}.items():
        whole.add_edge(line[0], line[1], **found)
    return [own, whole], which


def _drawing(net: Net, nodes: Mapping[str, int], lines: Mapping[Line, int]) -> dict[str, Any]:
    drawing = draw_layered(net)
    low, high = drawing.x_range
    return {
        "rows": drawing.rows,
        "columns": [[name, round(x, 3)] for name, x in drawing.columns.items()],
        "places": {nodes[name]: [round(x, 3), int(y)] for name, (x, y) in drawing.places.items()},
        # The curve goes through one point per row; the script draws the same curve from these.
        "knots": {
            lines[strand.writer, strand.reader, strand.name]: [
                round(x, 3) for x, _ in (*strand.curve[:-1:POINTS_PER_ROW], strand.curve[-1])
            ]
            for strand in drawing.strands
        },
        "range": [math.floor(low * 100) / 100, math.ceil(high * 100) / 100],
    }


def _node(name: str, roles: Mapping[str, Role]) -> dict[str, Any]:
    bare, position = split_position(name)
    number = next((i for i, role in enumerate(roles.values()) if name in role.nodes), -1)
    kind = kind_of(name)
    return {"name": name, "bare": bare, "position": position, "kind": kind, "what": KINDS[kind].label, "role": number}


def _edge(line: Line, nodes: Mapping[str, int], found: Mapping[str, Any], frequency: float | None) -> list[Any]:
    writer, reader, name = line
    channel = found["channel"] or ("logits" if reader == "logits" else "mlp")
    return [nodes[writer], nodes[reader], channel, name, found.get("score"), frequency]


def _roles(roles: Mapping[str, Role]) -> list[dict[str, Any]]:
    return [
        {
            "label": plain_role(role.label),
            "description": role.description,
            "colour": colour,
            "n": len(role.nodes),
        }
        for role, colour in coloured(roles)
    ]


def _stop(
    net: Net,
    drawing: int,
    stop: MeasuredSize | None,
    circuit: Circuit,
    document: CircuitFile,
    lines: Mapping[Line, int],
) -> dict[str, Any]:
    kept = circuit.kept if stop is None else stop.kept
    is_circuit = stop is None or torch.equal(kept, circuit.kept)
    entry = document.evaluation[0] if document.evaluation and is_circuit else None
    return {
        "n_selected": circuit.n_selected if stop is None else stop.n_selected,
        "n_edges": int(kept.sum()),
        "n_nodes": net.number_of_nodes(),
        "faithfulness": None if stop is None else stop.faithfulness,
        "held_out": entry and {"value": entry.faithfulness, "ci": entry.faithfulness_ci, "pairs": entry.pairs},
        "circuit": is_circuit,
        "drawing": drawing,
        "edges": _ranges(lines[line] for line in _lines(net)),
    }


def _ranges(numbers: Iterable[int]) -> list[list[int]]:
    """The numbers as ranges [first, last].

    >>> _ranges([3, 1, 2, 7])
    [[1, 3], [7, 7]]
    """
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return found
