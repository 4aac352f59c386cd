"""The figure of a circuit as a layered graph."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import networkx as nx
import plotly.graph_objects as go

from mechinterp.circuit_file.schema import Role
from mechinterp.circuit_file.summary import NO_ROLE, coloured
from mechinterp.graphs.circuit import Circuit
from mechinterp.graphs.colours import CHANNEL_COLOURS, LEFT_PIXELS, NODE_LOOKS, SEVERAL, NodeLook, look
from mechinterp.graphs.layered_layout import Drawing, Net, Strand, draw_layered
from mechinterp.models.sites import node_of, split_position

CHANNEL_LABELS = {"q": "into query", "k": "into key", "v": "into value", "mlp": "into MLP", "logits": "into logits"}
CHANNEL_LABELS["router"], CHANNEL_LABELS["in"] = "into router", "into feature"
CHANNEL_LABELS[SEVERAL] = "into several inputs"
WIDTHS = (0.7, 6.0)
"""Width of an edge in pixels, from score 0 to the largest absolute score, linear."""
ROW_PIXELS = 78
NODE_PIXELS = 116
NARROW_PIXELS = 58
"""The same if positions have columns: there are more nodes, and edges may pass over them."""
MIN_WIDTH = 5.0
"""The minimum width of a drawing in node spacings, so that the legend fits."""
STEP, HOVER_STEP = 2, 10
"""One in so many points of an edge's curve is drawn, and shows its text on hover."""


KINDS = NODE_LOOKS
MAX_EDGES_DRAWN = 400
"""More edges cannot be told apart, and slow down a browser."""


def node_kinds(roles: Mapping[str, Role]) -> dict[str, NodeLook]:
    """The look of nodes without a role, by kind: grey if other nodes have roles, so that every colour is a role."""
    if not roles:
        return KINDS
    without = {
        kind: replace(group, label=f"{group.label} without a role", colour=NO_ROLE)
        for kind, group in KINDS.items()
        if group.named
    }
    return {**KINDS, **without}


def circuit_figure(circuit: Circuit, roles: Mapping[str, Role] | None = None) -> go.Figure:
    """The circuit as a graph, input at the bottom and logits at the top; nodes without an edge are not drawn.

    The colour of an edge is the channel that it enters, its width the size of its score; it is dashed if the score is
    negative (it works against the task). Without scores all edges are equally wide. Of more than `MAX_EDGES_DRAWN`
    edges only the strongest are drawn. If nodes were chosen, one line stands for all edges between two of them, with
    the score of the writer. Every named position has its own columns. The trace of an edge has its name and its two
    nodes in `meta`.

    Args:
        circuit: the circuit to draw.
        roles: roles of nodes, as in a circuit file; nodes are coloured by role, those without one by kind.
    """
    net = circuit.to_networkx()
    drawing = draw_layered(_strongest(merged(net) if circuit.graph.level == "node" else net))
    figure = go.Figure()
    largest = max((abs(strand.score or 0.0) for strand in drawing.strands), default=0.0)
    ordered = sorted(drawing.strands, key=lambda strand: abs(strand.score or 0.0))  # strong edges on top
    for strand in ordered:
        figure.add_trace(_edge_trace(strand, largest))
    shown = {_colour_key(strand) for strand in ordered}
    for key in CHANNEL_COLOURS:
        if key in shown:
            figure.add_trace(_legend_line(key))
    figure.add_trace(_hover_trace(ordered))
    for group, names in _node_groups(drawing, roles or {}).items():
        figure.add_trace(_node_trace(circuit, drawing, group, names))
    low, high = drawing.x_range
    pixels = NARROW_PIXELS if drawing.columns else NODE_PIXELS
    return figure.update_layout(
        **look(below=5, height=int(90 + ROW_PIXELS * len(drawing.rows)), showlegend=True),
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.0, "xanchor": "left", "x": 0},
        width=int(LEFT_PIXELS + 20 + pixels * max(high - low + 0.8, MIN_WIDTH)),
        xaxis={"visible": False, "range": _widened(low - 0.4, high + 0.4)},
        yaxis={
            "tickvals": list(range(len(drawing.rows))),
            "ticktext": list(drawing.rows),
            "showgrid": False,
            "zeroline": False,
            "range": [-0.5, len(drawing.rows) - 0.5],
        },
        hovermode="closest",
        annotations=[
            {"x": x, "y": -0.5, "text": f"<b>{html.escape(name)}</b>", "showarrow": False, "yshift": 8}
            for name, x in drawing.columns.items()
        ],
    )


def merged(net: Net) -> Net:
    """One edge between any two nodes, for circuits in which nodes were chosen and single edges mean nothing."""
    out: Net = nx.MultiDiGraph(**net.graph)
    for writer, reader in dict.fromkeys(net.edges()):
        several = [data for data in net.get_edge_data(writer, reader).values()]
        channels = {data["channel"] for data in several}
        channel = channels.pop() if len(channels) == 1 else SEVERAL
        out.add_edge(writer, reader, **{**several[0], "name": f"{writer} -> {reader}", "channel": channel})
    return out


def _strongest(net: Net) -> Net:
    edges = sorted(net.edges(keys=True, data="score", default=0.0), key=lambda edge: -abs(edge[3]))
    kept: Any = [(writer, reader, key) for writer, reader, key, _ in edges[:MAX_EDGES_DRAWN]]
    return net.edge_subgraph(kept)


def _colour_key(strand: Strand) -> str:
    return strand.channel or ("logits" if strand.reader == "logits" else "mlp")


def _width(score: float | None, largest: float) -> float:
    thin, wide = WIDTHS
    return 1.5 if score is None or largest == 0.0 else thin + (wide - thin) * abs(score) / largest


def _widened(low: float, high: float) -> list[float]:
    """The range, widened on both sides to `MIN_WIDTH`."""
    more = max(0.0, MIN_WIDTH - (high - low)) / 2
    return [low - more, high + more]


def _edge_trace(strand: Strand, largest: float) -> go.Scatter:
    key, points = _colour_key(strand), (*strand.curve[:-1:STEP], strand.curve[-1])
    return go.Scatter(
        x=[round(x, 3) for x, _ in points],
        y=[round(y, 3) for _, y in points],
        mode="lines",
        line={
            "color": CHANNEL_COLOURS[key],
            "width": round(_width(strand.score, largest), 2),
            "dash": "5px,4px" if (strand.score or 0.0) < 0 else "solid",
        },
        opacity=0.75,
        hoverinfo="skip",
        legendgroup=key,
        showlegend=False,
        meta=[strand.name, strand.writer, strand.reader],
    )


def _legend_line(key: str) -> go.Scatter:
    line = {"color": CHANNEL_COLOURS[key], "width": 3}
    return go.Scatter(x=[None], y=[None], mode="lines", line=line, name=CHANNEL_LABELS[key], legendgroup=key)


def _hover_trace(strands: Sequence[Strand]) -> go.Scatter:
    """Invisible points on the edges, which show their text on hover."""
    points = [(point, strand) for strand in strands for point in strand.curve[HOVER_STEP // 2 :: HOVER_STEP]]
    return go.Scatter(
        x=[round(x, 3) for (x, _), _ in points],
        y=[round(y, 3) for (_, y), _ in points],
        mode="markers",
        marker={"size": 9, "opacity": 0, "color": [CHANNEL_COLOURS[_colour_key(strand)] for _, strand in points]},
        text=[_edge_text(strand) for _, strand in points],
        hovertemplate="%{text}<extra></extra>",
        showlegend=False,
    )


def _edge_text(strand: Strand) -> str:
    if strand.score is None:
        return f"<b>{html.escape(strand.name)}</b>"
    against = "<br>works against the task" if strand.score < 0 else ""
    return f"<b>{html.escape(strand.name)}</b><br>score {strand.score:.4g}{against}"


def _node_groups(drawing: Drawing, roles: Mapping[str, Role]) -> dict[NodeLook, list[str]]:
    """The nodes grouped by role, those without one by kind."""
    of_node: dict[str, NodeLook] = {}
    for role, colour in coloured(roles):
        of_node.update({name: NodeLook(role.label, colour, "circle", named=True) for name in role.nodes})
    groups, kinds = dict[NodeLook, list[str]](), node_kinds(roles)
    for name in drawing.places:
        groups.setdefault(of_node.get(name, kinds[kind_of(name)]), []).append(name)
    return groups


def _node_trace(circuit: Circuit, drawing: Drawing, group: NodeLook, names: Sequence[str]) -> go.Scatter:
    return go.Scatter(
        x=[round(drawing.places[name][0], 3) for name in names],
        y=[drawing.places[name][1] for name in names],
        mode="markers+text",
        text=[_label(drawing, name) for name in names],
        textfont={"size": 11, "color": "#ffffff"},
        marker={
            "size": [max(32.0, 6.4 * len(_label(drawing, name)) + 8) for name in names],
            "symbol": group.symbol,
            "color": group.colour,
            "opacity": 1,
            "line": {"width": 1, "color": "#ffffff"},
        },
        customdata=names,
        hovertext=[_node_text(circuit, drawing, group, name) for name in names],
        hovertemplate="%{hovertext}<extra></extra>",
        name=html.escape(group.label),
        showlegend=group.named,
    )


def _label(drawing: Drawing, name: str) -> str:
    """The name, without its position if the columns show that."""
    return split_position(name)[0] if drawing.columns else name


def kind_of(name: str) -> str:
    """The key of `KINDS` for a node; its name may include a position."""
    kind = node_of(name).kind
    return "input" if kind in ("embed", "pos_embed") else kind


def _node_text(circuit: Circuit, drawing: Drawing, group: NodeLook, name: str) -> str:
    entering = [strand for strand in drawing.strands if strand.reader == name]
    # An edge into a shared K or V head is drawn to each head of the group; it leaves its writer once.
    leaving = {strand.name: strand.score for strand in drawing.strands if strand.writer == name}
    lines = [
        f"<b>{html.escape(name)}</b> ({html.escape(group.label)})",
        f"{len(entering)} edges in, {len(leaving)} out",
    ]
    if circuit.scores is not None and leaving:
        if circuit.graph.level == "node":
            lines.append(f"score: {next(iter(leaving.values())) or 0.0:.4g}")
        else:
            total = sum(score or 0.0 for score in leaving.values())
            lines.append(f"scores of its edges in the circuit: {total:.4g}")
    return "<br>".join(lines)
