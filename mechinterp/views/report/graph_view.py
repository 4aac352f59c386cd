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
from mechinterp.graphs.layered_layout import POINTS_PER_ROW, Net, draw_grid, draw_layered
from mechinterp.models.sites import node_of, split_position
from mechinterp.views.plots.circuit import CHANNEL_LABELS, KINDS, kind_of, merged, node_kinds
from mechinterp.views.report.diagrams import diagrams
from mechinterp.views.report.measured_sizes import MeasuredSize, measured_sizes
from mechinterp.views.report.prompt_example import PromptExample

CHANNELS = tuple(CHANNEL_COLOURS)
MAX_LINES = 150_000
MAX_LED, MAX_ROWS = 700, 30
"""With more lines or rows than this, a node stands at its layer and number, and no line is led past other nodes."""
Line = tuple[str, str, str]
"""Writer, reader, name of the edge. An edge into a shared key or value head is one line to each of its heads."""


def graph_view(circuit: Circuit, document: CircuitFile, example: PromptExample | None = None) -> dict[str, Any]:
    """Everything that the script draws, as JSON values.

    `nodes` and `lines` (columns: writer, reader, channel, name of the reader, score, share of resamples) are numbered.
    Each of the `stops` of the slider (one per measured size) gives its lines as ranges of these numbers. The `drawing`
    has the place of every node, the same for all sizes, and for each line its x in every row that it passes; none in
    a grid, with more than `MAX_LED` lines or `MAX_ROWS` rows. If nodes were chosen, one line stands for all edges
    between two of them.

    Of more than `MAX_LINES` lines the strongest are drawn, and `about` says so. `diagrams` are boxes by role or layer.

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
    members = [_lines(net) for net in nets]
    lines = _numbered(members)
    data = {line: found for some in members for line, found in some.items()}
    nodes = {name: i for i, name in enumerate(dict.fromkeys(end for line in lines for end in line[:2]))}
    shares = {edge.name: edge.frequency for edge in document.edges}
    return {
        "nodes": [_node(name, document.roles) for name in nodes],
        "lines": _columns(lines, nodes, data, shares),
        "roles": _roles(document.roles),
        "diagrams": diagrams(own, document, example),
        "drawing": _drawing(_union(shown, data), nodes, lines),
        "stops": [
            _stop(net, some, stop, circuit, document, lines)
            for net, some, stop in zip(nets, members, stops or [None], strict=True)
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
    if net.number_of_edges() <= MAX_LINES:
        return net
    edges = sorted(net.edges(keys=True, data="score", default=0.0), key=lambda edge: -abs(edge[3]))
    kept: Any = [(writer, reader, key) for writer, reader, key, _ in edges[:MAX_LINES]]
    return net.edge_subgraph(kept)


def _lines(net: Net) -> dict[Line, Mapping[str, Any]]:
    return {(str(a), str(b), found["name"]): found for a, b, found in net.edges(data=True)}


def _numbered(members: Sequence[Mapping[Line, Any]]) -> dict[Line, int]:
    """All lines, those of the smallest size first, so that each size is a few ranges of numbers."""
    every = dict.fromkeys(line for some in members for line in sorted(some))
    return {line: i for i, line in enumerate(every)}


def _union(own: Net, data: Mapping[Line, Mapping[str, Any]]) -> Net:
    """The lines of all sizes: so a node has one place, at whatever size it is drawn."""
    whole: Net = nx.MultiDiGraph(**own.graph)
    for line, found in data.items():
        whole.add_edge(line[0], line[1], **found)
    return whole


def _columns(
    lines: Mapping[Line, int],
    nodes: Mapping[str, int],
    data: Mapping[Line, Mapping[str, Any]],
    shares: Mapping[str, float | None],
) -> dict[str, list[Any]]:
    """The lines as columns; the name of a line is that of its writer, an arrow, and that of its reader."""
    readers = {name: i for i, name in enumerate(dict.fromkeys(line[2].partition("->")[2] for line in lines))}
    channels = [data[line]["channel"] or ("logits" if line[1] == "logits" else "mlp") for line in lines]
    frequencies = [shares.get(line[2]) for line in lines]
    return {
        "from": [nodes[line[0]] for line in lines],
        "to": [nodes[line[1]] for line in lines],
        "channel": [CHANNELS.index(channel) for channel in channels],
        "channels": list(CHANNELS),
        "reader": [readers[line[2].partition("->")[2]] for line in lines],
        "readers": list(readers),
        "score": [data[line].get("score") for line in lines],
        "frequency": frequencies if any(share is not None for share in frequencies) else [],
    }


def _drawing(net: Net, nodes: Mapping[str, int], lines: Mapping[Line, int]) -> dict[str, Any]:
    n_rows = len({(node_of(str(name)).layer, node_of(str(name)).in_mlp) for name in net.nodes})
    led = net.number_of_edges() <= MAX_LED and n_rows <= MAX_ROWS
    drawing = draw_layered(net) if led else draw_grid(net)
    low, high = drawing.x_range
    return {
        "rows": drawing.rows,
        "columns": [[name, round(x, 3)] for name, x in drawing.columns.items()],
        "places": {nodes[name]: [round(x, 3), round(y, 2)] for name, (x, y) in drawing.places.items()},
        # The curve goes through one point per row; the script draws the same curve from these.
        "knots": {
            lines[strand.writer, strand.reader, strand.name]: [
                round(x, 3) for x, _ in (*strand.curve[:-1:POINTS_PER_ROW], strand.curve[-1])
            ]
            for strand in drawing.strands
        },
        "led": led,
        "range": [math.floor(low * 100) / 100, math.ceil(high * 100) / 100],
    }


def _node(name: str, roles: Mapping[str, Role]) -> dict[str, Any]:
    bare, position = split_position(name)
    number = next((i for i, role in enumerate(roles.values()) if name in role.nodes), -1)
    kind = kind_of(name)
    return {"name": name, "bare": bare, "position": position, "kind": kind, "what": KINDS[kind].label, "role": number}


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
    members: Mapping[Line, Any],
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
        "edges": _ranges(lines[line] for line in members),
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
