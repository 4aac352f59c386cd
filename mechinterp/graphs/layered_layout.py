"""Where to draw the nodes and edges of a circuit: rows in the order of computation, edges that pass between nodes.

Lengths are in node spacings: neighbours of a row stand at least 1 apart, rows are 1 apart.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

import networkx as nx

from mechinterp.graphs.graph import REST
from mechinterp.models.sites import Node, node_of, split_position

Point = tuple[float, float]

if TYPE_CHECKING:
    Net = nx.MultiDiGraph[str]
else:
    Net = nx.MultiDiGraph  # the class takes no type arguments at run time

SWEEPS = 12
POINTS_PER_ROW = 10
CLEARANCE = 0.27
"""An edge keeps this far from the middle of a node that is not one of its ends."""
STRAND = 0.06
"""Edges that pass through one gap between nodes keep this far from each other, while there is room."""
BUNDLE = 1.5
"""Edges that pass beside the outermost node of a row take no more room than this, however many they are."""
NODE_HEIGHT = 0.2
PORTS = {"q": -0.09, "k": 0.0, "v": 0.09}
"""Where an edge enters a head: the query on the left, the value on the right."""
OUTPUT_ROW = 2**31


@dataclass(frozen=True)
class Strand:
    """One edge of the drawing: its name, its ends, the channel, its score (None without), and its curve."""

    name: str
    writer: str
    reader: str
    channel: str
    score: float | None
    curve: tuple[Point, ...]


@dataclass(frozen=True)
class Drawing:
    """Places of the nodes, labels of the rows from the input (row 0) up to the logits, and all edges."""

    places: Mapping[str, Point]
    rows: tuple[str, ...]
    strands: tuple[Strand, ...]
    columns: Mapping[str, float] = field(default_factory=dict[str, float])
    """The x of the middle of every named position; empty where nodes have none."""

    @property
    def x_range(self) -> tuple[float, float]:
        """The leftmost and the rightmost x of anything drawn."""
        xs = [x for x, _ in self.places.values()] + [x for strand in self.strands for x, _ in strand.curve]
        return min(xs), max(xs)


def draw_layered(net: Net) -> Drawing:
    """The drawing of a circuit: one row for the inputs, two per layer (heads, then MLP), one for the logits.

    Rows without a node are left out. A node stands near the weighted mean of its neighbours, and an edge weighs by
    its score, so that the strong edges are the straight ones. An edge goes past the nodes between its ends.

    At named positions every position has columns of its own instead, in the order of the graph.
    """
    rows, labels = _rows({str(name): node_of(str(name)) for name in net.nodes})
    columns = dict[str, float]()
    if any(split_position(str(name))[1] for name in net.nodes):
        rows, places, columns = _in_columns(net, rows)
    else:
        places = _places(rows, _neighbours(net))
    return Drawing(places, labels, _strands(net, rows, places), columns)


def draw_grid(net: Net) -> Drawing:
    """Places without curves, for circuits with too many edges to be led past each other; linear in the edges.

    One row per layer: the heads at their numbers, then the MLP, half a row higher, and its parts. A node has the same
    place in every circuit of the model. At named positions the places are those of `draw_layered`.
    """
    nodes = {str(name): node_of(str(name)) for name in net.nodes}
    if any(split_position(name)[1] for name in nodes):
        rows, labels = _rows(nodes)
        _, places, columns = _in_columns(net, rows)
        return Drawing(places, labels, (), columns)
    layers = sorted({node.layer for node in nodes.values() if node.kind != "logits"})
    height = {layer: float(row) for row, layer in enumerate(layers)}
    n_heads = 1 + max((node.head for node in nodes.values() if node.kind == "head"), default=0)
    places, parts = dict[str, Point](), dict[int, int]()
    for name, node in sorted(nodes.items(), key=lambda entry: entry[1]):
        if node.kind == "logits":
            places[name] = ((n_heads - 1) / 2, float(len(layers)))
        elif node.layer < 0:
            place = parts[node.layer] = parts.get(node.layer, -1) + 1
            places[name] = ((n_heads - 1) / 2 + place, height[node.layer])
        elif node.in_mlp:
            place = parts[node.layer] = parts.get(node.layer, -1) + 1
            places[name] = (n_heads + 0.2 + place, height[node.layer] + 0.45)
        else:
            places[name] = (float(node.head), height[node.layer])
    return Drawing(places, (*("input" if layer < 0 else f"layer {layer}" for layer in layers), "output"), ())


def spread(wanted: Sequence[float], apart: float = 1.0, low: float = -math.inf, high: float = math.inf) -> list[float]:
    """The increasing places nearest to `wanted` (least squares), `apart` from each other, from `low` to `high`.

    Isotonic regression by pooling adjacent violators, on the places less their rank.

    >>> spread([0.0, 0.0, 5.0])
    [-0.5, 0.5, 5.0]
    """
    pools: list[tuple[float, int]] = []  # (sum, count)
    for rank, place in enumerate(wanted):
        pools.append((place - rank * apart, 1))
        while len(pools) > 1 and pools[-2][0] / pools[-2][1] > pools[-1][0] / pools[-1][1]:
            (total, count), (more, others) = pools[-2], pools[-1]
            pools[-2:] = [(total + more, count + others)]
    highest = high - (len(wanted) - 1) * apart
    means = [min(max(total / count, low), highest) for total, count in pools for _ in range(count)]
    return [mean + rank * apart for rank, mean in enumerate(means)]


def smooth(points: Sequence[Point]) -> tuple[Point, ...]:
    """A curve through points of increasing y, vertical at both ends, that never swings out beyond its points.

    Source: monotone cubic interpolation, Fritsch & Carlson 1980, with harmonic means as slopes.
    """
    steps = [(x1 - x0) / (y1 - y0) for (x0, y0), (x1, y1) in pairwise(points)]
    inner = [2 * a * b / (a + b) if a * b > 0 else 0.0 for a, b in pairwise(steps)]
    slopes = [0.0, *inner, 0.0]
    curve: list[Point] = []
    for i, ((x0, y0), (x1, y1)) in enumerate(pairwise(points)):
        height = y1 - y0
        for step in range(POINTS_PER_ROW):
            t = step / POINTS_PER_ROW
            x = (2 * t**3 - 3 * t**2 + 1) * x0 + (t**3 - 2 * t**2 + t) * height * slopes[i]
            x += (3 * t**2 - 2 * t**3) * x1 + (t**3 - t**2) * height * slopes[i + 1]
            curve.append((x, y0 + t * height))
    return (*curve, points[-1])


def _places(rows: Sequence[list[str]], neighbours: Mapping[str, Mapping[str, float]]) -> dict[str, Point]:
    x = {name: i - (len(row) - 1) / 2 for row in rows for i, name in enumerate(row)}
    for sweep in range(SWEEPS):
        for row in rows if sweep % 2 == 0 else reversed(rows):
            wanted = {name: _mean(neighbours[name], x, x[name]) for name in row}
            row.sort(key=lambda name: wanted[name])
            x.update(zip(row, spread([wanted[name] for name in row]), strict=True))
    return {name: (x[name], float(height)) for height, row in enumerate(rows) for name in row}


def _in_columns(net: Net, rows: list[list[str]]) -> tuple[list[list[str]], dict[str, Point], dict[str, float]]:
    """The rows from left to right, the places, and the middle of each position's columns."""
    place_of = {name: split_position(name)[1] for row in rows for name in row}
    for name, position in place_of.items():
        if not position:  # the logits are where what enters them is
            place_of[name] = next((place_of[str(writer)] for writer in net.predecessors(name)), "")
    known = [*net.graph.get("positions", ()), *place_of.values()]
    order = sorted(dict.fromkeys(place_of.values()), key=lambda position: (position == REST, known.index(position)))
    width = {p: max(sum(place_of[name] == p for name in row) for row in rows) for p in order}
    columns, places, left = dict[str, float](), dict[str, Point](), 0.0
    for position in order:
        columns[position] = left + (width[position] - 1) / 2
        left += width[position] + 0.5
    arranged: list[list[str]] = []
    for height, row in enumerate(rows):
        here = sorted(row, key=lambda name: order.index(place_of[name]))
        for position in order:
            mine = [name for name in here if place_of[name] == position]
            for i, name in enumerate(mine):
                places[name] = (columns[position] + i - (len(mine) - 1) / 2, float(height))
        arranged.append(here)
    return arranged, places, columns


def _strands(net: Net, rows: Sequence[Sequence[str]], places: Mapping[str, Point]) -> tuple[Strand, ...]:
    edges = [(str(a), str(b), data) for a, b, data in net.edges(data=True)]
    stops: list[dict[int, float]] = [{} for _ in edges]  # per edge: row -> x
    for height in range(1, len(rows) - 1):
        row = [places[name][0] for name in rows[height]]
        passing: dict[int, list[tuple[float, int]]] = defaultdict(list)
        for i, (writer, reader, _) in enumerate(edges):
            (x0, y0), (x1, y1) = places[writer], places[reader]
            if y0 < height < y1:
                before = stops[i].get(height - 1, x0)
                wanted = before + (x1 - before) / (y1 - height + 1)
                passing[_gap(row, wanted)].append((wanted, i))
        for gap, those in passing.items():
            low = row[gap - 1] + CLEARANCE if gap else -math.inf
            high = row[gap] - CLEARANCE if gap < len(row) else math.inf
            those.sort()
            apart = min(STRAND, min(high - low, BUNDLE) / len(those))
            for (_, i), x in zip(those, spread([x for x, _ in those], apart, low, high), strict=True):
                stops[i][height] = x
    found: list[Strand] = []
    for (writer, reader, data), between in zip(edges, stops, strict=True):
        (x0, y0), (x1, y1) = places[writer], places[reader]
        end = (x1 + PORTS.get(data["channel"], 0.0), y1 - NODE_HEIGHT)
        points = [(x0, y0 + NODE_HEIGHT), *((x, float(y)) for y, x in sorted(between.items())), end]
        strand = Strand(data["name"], writer, reader, data["channel"], data.get("score"), smooth(points))
        found.append(strand)
    return tuple(found)


def _gap(row: Sequence[float], wanted: float) -> int:
    """How many nodes of the row an edge leaves on its left when it passes nearest to where it wants to."""
    return bisect_left(row, wanted)


def _rows(nodes: Mapping[str, Node]) -> tuple[list[list[str]], tuple[str, ...]]:
    """The nodes of every row from the input up, and its label."""
    rows: dict[tuple[int, int], list[str]] = defaultdict(list)
    for name in sorted(nodes, key=lambda name: nodes[name]):
        rows[_row_key(nodes[name])].append(name)
    occupied = sorted(rows)
    return [rows[key] for key in occupied], tuple(_row_label(key) for key in occupied)


def _row_key(node: Node) -> tuple[int, int]:
    if node.kind == "logits":
        return (OUTPUT_ROW, 0)
    return (node.layer, int(node.in_mlp))


def _row_label(key: tuple[int, int]) -> str:
    layer, kind = key
    if layer == OUTPUT_ROW:
        return "output"
    if layer < 0:
        return "input"
    return f"MLP {layer}" if kind else f"heads {layer}"


def _neighbours(net: Net) -> dict[str, dict[str, float]]:
    """Per node the weight of each neighbour, in and out."""
    largest = max((abs(data.get("score", 1.0)) for *_, data in net.edges(data=True)), default=1.0) or 1.0
    found: dict[str, dict[str, float]] = {str(name): {} for name in net.nodes}
    for one, other, data in net.edges(data=True):
        weight = 0.1 + abs(data.get("score", 1.0)) / largest
        for a, b in ((one, other), (other, one)):
            found[a][b] = found[a].get(b, 0.0) + weight
    return found


def _mean(weights: Mapping[str, float], x: Mapping[str, float], default: float) -> float:
    total = sum(weights.values())
    return sum(weight * x[name] for name, weight in weights.items()) / total if total else default
