"""An SVG of two circuits on top of each other: what only one of them has, and what both have.

It is drawn without plotly, so that it is small and needs no script. Texts from files are escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import networkx as nx

from mechinterp.circuit_file.diff import CircuitDiff, Compared
from mechinterp.circuit_file.store import SUFFIX
from mechinterp.graphs.circuit import Circuit
from mechinterp.graphs.layered_layout import Drawing, Net, Strand, draw_layered
from mechinterp.models.sites import split_position

COLOURS = {"both": "#7d8790", "only A": "#2b6fd0", "only B": "#d9730d"}
FLIP_COLOUR = "#c2185b"
CLASSES = {"both": "both", "only A": "a", "only B": "b"}
ORDER = ("both", "only A", "only B")
"""Drawn in this order, so that what only one circuit has is on top."""
ROW_PIXELS, NODE_PIXELS = 74, 92
LEFT, TOP, BELOW = 92, 66, 34
MIN_PIXELS = 860
"""The minimum width, so that the legend fits."""
LONGEST_NAME = 44
WIDTHS = (0.8, 5.0)
"""Width of an edge in pixels, from score 0 to the largest absolute score of its file, linear."""
UNSCORED = 0.15
"""The size of an edge without a score, from 0 to 1."""
CROWDED = 250
"""With more lines than this, they are thinner and pass behind the nodes instead of around them."""
BOW = 0.11
"""How far such a line bends outwards, in node spacings per row that it passes."""
STEP = 2
"""One in so many points of an edge's curve is drawn."""
STYLE = f"""
.difference{{font:12px system-ui,sans-serif}} .difference .ground{{fill:#fff}} .difference text{{fill:#1c2126}}
.difference path{{fill:none;stroke-linecap:round}} .difference .both path{{stroke:{COLOURS["both"]}}}
.difference .a path{{stroke:{COLOURS["only A"]}}} .difference .b path{{stroke:{COLOURS["only B"]}}}
.difference .flip{{stroke-dasharray:6 4}} .difference .marks path{{stroke:{FLIP_COLOUR};stroke-width:2}}
.difference .edge:hover path{{stroke:#000}} .difference .node rect{{fill:#eef1f4;stroke:#5a6570}}
.difference .node.a rect{{fill:{COLOURS["only A"]};stroke:none}}
.difference .node.b rect{{fill:{COLOURS["only B"]};stroke:none}}
.difference .node.a text,.difference .node.b text{{fill:#fff}} .difference .soft{{fill:#5a6570}}
.difference .end{{text-anchor:end}} .difference .middle{{text-anchor:middle}}
"""


@dataclass(frozen=True)
class _Canvas:
    """Converts positions of the layout, `low` to `high`, to pixels."""

    low: float
    high: float
    n_rows: int

    def x(self, place: float | int) -> float:
        spare = max(0.0, MIN_PIXELS - LEFT - 20 - NODE_PIXELS * (self.high - self.low + 1)) / 2
        return LEFT + spare + NODE_PIXELS * (place - self.low + 0.5)

    def y(self, row: float | int) -> float:
        return TOP + ROW_PIXELS * (self.n_rows - 0.5 - row)

    @property
    def size(self) -> tuple[int, int]:
        width = max(MIN_PIXELS, LEFT + 20 + NODE_PIXELS * (self.high - self.low + 1))
        return round(width), TOP + ROW_PIXELS * self.n_rows + BELOW


@dataclass(frozen=True)
class _Line:
    """One edge as an SVG path, and the point at its middle."""

    path: str
    middle: tuple[float, float]


def difference_svg(diff: CircuitDiff, a: Circuit, b: Circuit) -> str:
    """One `<svg>` of both circuits, input at the bottom: edges and nodes only in A, only in B, and in both.

    The width of an edge is the size of its score relative to its own file (the larger of the two); it is dashed, with a
    mark, if the signs differ. If nodes were chosen in both files, one line stands for all edges between two of them.
    Scores and ranks are shown on hover.
    """
    known = {entry.name: entry for entry in diff.edges}
    net = _union(diff, known, (a, b))
    drawing = draw_layered(net)
    crowded = len(drawing.strands) > CROWDED
    xs = [x for x, _ in drawing.places.values()]
    swing = BOW * len(drawing.rows) * 3 / 4
    low, high = (min(xs) - swing, max(xs) + swing) if crowded else drawing.x_range
    canvas = _Canvas(low, high, len(drawing.rows))
    where = {(writer, reader, data["name"]): data["where"] for writer, reader, data in net.edges(data=True)}
    drawn = sorted(drawing.strands, key=lambda strand: strand.score or 0.0)
    paths = {strand: (_across if crowded else _around)(strand, canvas) for strand in drawn}
    groups: list[str] = []
    for kind in ORDER:
        lines = [
            _edge(strand, known[strand.name], kind, paths[strand], 0.4 if crowded else 1.0)
            for strand in drawn
            if where[strand.writer, strand.reader, strand.name] == kind
        ]
        opacity = (0.45 if crowded else 0.55) if kind == "both" else 0.8
        groups.append(f'<g class="edges {CLASSES[kind]}" opacity="{opacity}">{"".join(lines)}</g>')
    marks = dict.fromkeys(ORDER, "")
    for strand in drawn:
        if known[strand.name].flipped:
            marks[where[strand.writer, strand.reader, strand.name]] += _mark(*paths[strand].middle)
    signs = (f'<g class="marks edges {CLASSES[kind]}">{marked}</g>' for kind, marked in marks.items())
    nodes = {entry.name: entry for entry in diff.nodes}
    boxes = (_node(nodes[name], drawing, canvas) for name in drawing.places)
    width, height = canvas.size
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="difference" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}"><style>{STYLE}</style><rect class="ground" width="{width}" height="{height}"/>'
        f"{''.join(_legend(diff))}{''.join(_labels(drawing, canvas))}{''.join(groups)}"
        f"{''.join(signs)}{''.join(boxes)}</svg>\n"
    )


def _union(diff: CircuitDiff, known: Mapping[str, Compared], circuits: Sequence[Circuit]) -> Net:
    """The edges of both circuits, each once, with `where` they are and their size (0 to 1) as `score`."""
    largest = [max((abs(score) for score in scores if score is not None), default=0.0) for scores in _scores(diff)]
    merged = all(circuit.graph.level == "node" for circuit in circuits)
    positions = dict.fromkeys(name for circuit in circuits for name in circuit.graph.positions)
    out: Net = nx.MultiDiGraph(positions=tuple(positions))
    for where, circuit in zip(("only A", "only B"), circuits, strict=True):
        for writer, reader, data in circuit.to_networkx().edges(data=True):
            name: str = data["name"]
            key = "" if merged else name
            if not out.has_edge(writer, reader, key):
                size = _size(known[name], largest)
                channel = "" if merged else data["channel"]
                out.add_edge(writer, reader, key, name=name, channel=channel, where=where, score=size)
            elif out.edges[writer, reader, key]["where"] != where:
                out.edges[writer, reader, key]["where"] = "both"
    return out


def _scores(diff: CircuitDiff) -> tuple[list[float | None], list[float | None]]:
    return [entry.score_a for entry in diff.edges], [entry.score_b for entry in diff.edges]


def _size(entry: Compared, largest: Sequence[float]) -> float:
    """The absolute score relative to the largest in its file; the larger value if both circuits have the edge."""
    used = {"only A": (0,), "only B": (1,), "both": (0, 1)}[entry.where]
    scores = (entry.score_a, entry.score_b)
    found = [abs(scores[i] or 0.0) / largest[i] for i in used if scores[i] is not None and largest[i]]
    return max(found, default=UNSCORED)


def _around(strand: Strand, canvas: _Canvas) -> _Line:
    """The edge as in the layout, around the nodes between its ends."""
    points = [(canvas.x(x), canvas.y(y)) for x, y in (*strand.curve[:-1:STEP], strand.curve[-1])]
    return _Line("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points), points[len(points) // 2])


def _across(strand: Strand, canvas: _Canvas) -> _Line:
    """The edge as one curve behind the nodes, which saves space; longer edges bend further outwards."""
    (x0, y0), (x3, y3) = ((canvas.x(x), canvas.y(y)) for x, y in (strand.curve[0], strand.curve[-1]))
    rows = strand.curve[-1][1] - strand.curve[0][1]
    out = BOW * NODE_PIXELS * (rows - 1) * (1 if x3 >= x0 else -1)
    x1, y1, x2, y2 = x0 + out, y0 - (y0 - y3) / 3, x3 + out, y3 + (y0 - y3) / 3
    curve = f"M{x0:.1f} {y0:.1f}C{x1:.1f} {y1:.1f} {x2:.1f} {y2:.1f} {x3:.1f} {y3:.1f}"
    return _Line(curve, ((x0 + 3 * x1 + 3 * x2 + x3) / 8, (y0 + 3 * y1 + 3 * y2 + y3) / 8))


def _edge(strand: Strand, entry: Compared, where: str, line: _Line, thin: float) -> str:
    low, high = WIDTHS
    width = max(0.7, thin * (low + (high - low) * (strand.score or 0.0)))
    flip = ' class="flip"' if entry.flipped else ""
    title = escape(f"{strand.name}, {where}{_numbers(entry)}")
    return f'<g class="edge"><title>{title}</title><path{flip} stroke-width="{width:.2f}" d="{line.path}"/></g>'


def _mark(x: float, y: float) -> str:
    return f'<path d="M{x - 3.5:.1f} {y - 3.5:.1f}l7 7m0 -7l-7 7"/>'


def _node(entry: Compared, drawing: Drawing, canvas: _Canvas) -> str:
    x, y = drawing.places[entry.name]
    label = split_position(entry.name)[0] if drawing.columns else entry.name
    width, left, top = max(40.0, 7.2 * len(label) + 12), canvas.x(x), canvas.y(y)
    return (
        f'<g class="node {CLASSES[entry.where]}"><title>{escape(entry.name)}, {entry.where}{_numbers(entry)}</title>'
        f'<rect x="{left - width / 2:.1f}" y="{top - 12:.1f}" width="{width:.1f}" height="24" rx="5"/>'
        f'<text class="middle" x="{left:.1f}" y="{top + 4:.1f}">{escape(label)}</text></g>'
    )


def _numbers(entry: Compared) -> str:
    """The scores and ranks for the tooltip."""
    parts = [
        f"; score in {letter} {score:.4g} (rank {rank:,})"
        for letter, score, rank in (("A", entry.score_a, entry.rank_a), ("B", entry.score_b, entry.rank_b))
        if score is not None
    ]
    return "".join(parts) + ("; of opposite signs" if entry.flipped else "")


def _legend(diff: CircuitDiff) -> Iterable[str]:
    names = {"only A": f"only in A: {short(diff.a)}", "only B": f"only in B: {short(diff.b)}", "both": "in both"}
    for i, (where, words) in enumerate(names.items()):
        n_edges = sum(entry.where == where for entry in diff.edges)
        n_nodes = sum(entry.where == where for entry in diff.nodes)
        x, y = (16, 22 + 22 * i) if i < 2 else (MIN_PIXELS - 250, 22)
        yield (
            f'<g class="{CLASSES[where]}"><path stroke-width="4" d="M{x} {y - 4}h26"/></g>'
            f'<text x="{x + 34}" y="{y}">{escape(words)} <tspan class="soft">({n_edges:,} edges, {n_nodes:,} nodes)'
            "</tspan></text>"
        )
    n_flipped = sum(bool(entry.flipped) for entry in diff.edges)
    x = MIN_PIXELS - 250
    yield f'<g class="marks"><path d="M{x + 9.5} 36.5l7 7m0 -7l-7 7"/></g>'
    yield f'<text x="{x + 34}" y="44">scores of opposite signs <tspan class="soft">({n_flipped:,} edges)</tspan></text>'


def short(path: Path) -> str:
    """The name of a circuit file without its ending, shortened if it is long."""
    name = path.name.removesuffix(SUFFIX)
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 3]}..."


def _labels(drawing: Drawing, canvas: _Canvas) -> Iterable[str]:
    for row, label in enumerate(drawing.rows):
        yield f'<text class="soft end" x="{LEFT - 14}" y="{canvas.y(row) + 4:.1f}">{escape(label)}</text>'
    for name, place in drawing.columns.items():
        shown = escape(name or "all positions")
        yield f'<text class="middle" x="{canvas.x(place):.1f}" y="{canvas.size[1] - 12}">{shown}</text>'
