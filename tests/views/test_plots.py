"""Figures: what is drawn is what is in the circuit, and the drawing can be read."""

from __future__ import annotations

from itertools import chain, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mechinterp.base.errors import InputError
from mechinterp.circuit_file.schema import Role
from mechinterp.graphs.layered_layout import CLEARANCE, draw_grid, draw_layered, smooth, spread
from mechinterp.graphs.scores import Scores
from mechinterp.models.sites import Node
from mechinterp.views.plots import MAX_EDGES_DRAWN, circuit_figure, faithfulness_figure, head_heatmap
from tests.support.toy_circuits import toy_circuit, toy_document

SHAPES = [(1, 1, 1, 4), (3, 4, 4, 60), (3, 4, 2, 60), (12, 12, 12, 300)]


@given(
    st.lists(st.floats(-50, 50), min_size=1, max_size=12).map(sorted),
    st.floats(0.01, 2),
    st.floats(-60, 0),
    st.floats(0, 60),
)
def test_spread_keeps_apart_and_inside(wanted: list[float], apart: float, low: float, room: float) -> None:
    high = low + apart * (len(wanted) - 1) + room
    places = spread(wanted, apart, low, high)
    assert all(b - a >= apart - 1e-9 for a, b in pairwise(places))
    assert places[0] >= low - 1e-9 and places[-1] <= high + 1e-9


@given(st.lists(st.floats(-50, 50), min_size=1, max_size=12).map(sorted))
def test_spread_leaves_what_is_apart_already(wanted: list[float]) -> None:
    apart = [place + rank for rank, place in enumerate(wanted)]
    assert spread(apart) == pytest.approx(apart)


def test_spread_is_the_nearest_in_the_sense_of_least_squares() -> None:
    wanted = [0.0, 0.1, 0.2, 3.0]
    best = spread(wanted)
    generator = torch.Generator().manual_seed(0)
    distance = sum((a - b) ** 2 for a, b in zip(best, wanted, strict=True))
    for _ in range(2000):
        steps = 1 + torch.rand(4, generator=generator, dtype=torch.float64) * 2
        start = -2 + 4 * torch.rand((), generator=generator, dtype=torch.float64)
        other = (start + steps.cumsum(0)).tolist()
        assert sum((a - b) ** 2 for a, b in zip(other, wanted, strict=True)) >= distance - 1e-9


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=8))
def test_a_smooth_curve_goes_up_and_stays_between_its_points(xs: list[float]) -> None:
    points = [(x, float(y)) for y, x in enumerate(xs)]
    curve = smooth(points)
    assert all(b[1] > a[1] for a, b in pairwise(curve))
    for x, y in curve:
        below, above = points[min(int(y), len(points) - 2)], points[min(int(y), len(points) - 2) + 1]
        assert min(below[0], above[0]) - 1e-9 <= x <= max(below[0], above[0]) + 1e-9


@pytest.mark.parametrize(("layers", "heads", "kv_heads", "edges"), SHAPES)
def test_nodes_are_apart_and_rows_follow_the_computation(layers: int, heads: int, kv_heads: int, edges: int) -> None:
    drawing = draw_layered(toy_circuit(layers, heads, kv_heads, edges).to_networkx())
    places = list(drawing.places.items())
    for i, (_, (x, y)) in enumerate(places):
        assert all(abs(x - other[0]) >= 1 - 1e-9 for _, other in places[:i] if other[1] == y)
    for strand in drawing.strands:
        assert drawing.places[strand.writer][1] < drawing.places[strand.reader][1]
    assert drawing.places["input"][1] == 0
    assert drawing.places["logits"][1] == len(drawing.rows) - 1


@pytest.mark.parametrize(("layers", "heads", "kv_heads", "edges"), SHAPES)
def test_in_a_grid_nodes_are_apart_and_every_edge_goes_up(layers: int, heads: int, kv_heads: int, edges: int) -> None:
    net = toy_circuit(layers, heads, kv_heads, edges).to_networkx()
    places = draw_grid(net).places
    assert set(places) == set(net.nodes) and len(set(places.values())) == len(places)
    assert all(places[a][1] < places[b][1] for a, b in net.edges())
    smaller = draw_grid(toy_circuit(layers, heads, kv_heads, max(1, edges // 2)).to_networkx()).places
    assert {name: place[0] for name, place in smaller.items() if name[0] == "a"}.items() <= {
        name: place[0] for name, place in places.items()
    }.items()


@pytest.mark.parametrize(("layers", "heads", "kv_heads", "edges"), SHAPES)
def test_edges_pass_beside_the_nodes_that_are_not_theirs(layers: int, heads: int, kv_heads: int, edges: int) -> None:
    drawing = draw_layered(toy_circuit(layers, heads, kv_heads, edges).to_networkx())
    for strand in drawing.strands:
        for name, (x, y) in drawing.places.items():
            if name not in (strand.writer, strand.reader):
                # At the height of a node, where the curve goes through one of its own points.
                assert all(abs(cx - x) >= CLEARANCE - 1e-9 for cx, cy in strand.curve if cy == y), (strand.name, name)


@pytest.mark.parametrize(("layers", "heads", "kv_heads", "edges"), SHAPES)
def test_every_edge_and_node_of_the_circuit_is_drawn_and_no_other(
    layers: int, heads: int, kv_heads: int, edges: int
) -> None:
    circuit = toy_circuit(layers, heads, kv_heads, edges)
    figure = circuit_figure(circuit)
    drawn = {trace.meta[0] for trace in figure.data if trace.meta}
    named = {name for trace in figure.data for name in (trace.customdata if trace.customdata is not None else ())}
    assert drawn == set(circuit.edges)
    assert named == set(circuit.nodes)


def test_an_edge_is_as_wide_as_its_score_and_dashed_when_negative() -> None:
    circuit = toy_circuit()
    assert circuit.scores is not None
    scores = circuit.scores.to_dict()
    traces = [trace for trace in circuit_figure(circuit).data if trace.meta]
    by_score = sorted(traces, key=lambda trace: abs(scores[trace.meta[0]]))
    assert [trace.line.width for trace in by_score] == sorted(trace.line.width for trace in traces)
    assert by_score[0].line.width < by_score[-1].line.width
    assert {trace.meta[0] for trace in traces if trace.line.dash != "solid"} == {
        name for name in circuit.edges if scores[name] < 0
    }


@pytest.mark.slow
def test_of_too_many_edges_the_strongest_are_drawn() -> None:
    circuit = toy_circuit(6, 8, 8, 1500)
    assert circuit.n_edges > MAX_EDGES_DRAWN and circuit.scores is not None
    scores = circuit.scores.to_dict()
    drawn = {trace.meta[0] for trace in circuit_figure(circuit).data if trace.meta}
    strongest = sorted(circuit.edges, key=lambda name: -abs(scores[name]))[:MAX_EDGES_DRAWN]
    assert drawn == set(strongest)


def test_a_role_has_its_colour_and_a_harmless_label() -> None:
    circuit = toy_circuit()
    head = next(name for name in circuit.nodes if Node.parse(name).kind == "head")
    role = Role(label="<a href='https://x'>mover</a>", color="#123456", nodes=(head,))
    traces = [trace for trace in circuit_figure(circuit, {"mover": role}).data if trace.customdata is not None]
    (mine,) = (trace for trace in traces if head in trace.customdata)
    assert mine.marker.color == "#123456" and list(mine.customdata) == [head]
    assert "<" not in mine.name and "href" not in mine.hovertext[0].replace("&lt;a href", "")


def test_the_heatmap_sums_the_edges_that_leave_a_node() -> None:
    circuit = toy_circuit()
    assert circuit.scores is not None
    totals: dict[str, float] = {}
    for edge, score in circuit.scores.to_dict().items():
        writer = edge.partition("->")[0]
        totals[writer] = totals.get(writer, 0.0) + score
    cells, dots = head_heatmap(circuit.scores, circuit).data
    shown = dict(zip(chain(*cells.customdata), chain(*cells.z), strict=True))
    assert shown == pytest.approx({name: value for name, value in totals.items() if name != "input"}, abs=1e-5)
    assert cells.zmin == -cells.zmax and cells.zmax == pytest.approx(max(map(abs, shown.values())))
    assert len(dots.x) == len([name for name in circuit.nodes if name not in ("input", "logits")])


def test_a_heatmap_of_zeros_is_possible() -> None:
    scores = toy_circuit().scores
    assert scores is not None
    flat = Scores(scores.graph, torch.zeros_like(scores.total), 1, "eap", "logit_diff", "corrupt")
    assert head_heatmap(flat).data[0].zmax > 0


def test_the_curve_marks_the_circuit_with_its_interval() -> None:
    entry = toy_document(toy_circuit()).evaluation[0]
    figure = faithfulness_figure([0, 100, 10], [0.0, 0.99, 0.4], entry)
    curve, random, chosen = figure.data
    assert list(curve.x) == [10, 100] and list(curve.y) == [0.4, 0.99]  # in order, and no 0 on a log axis
    assert list(random.y) == list(entry.random_faithfulness)
    assert chosen.y[0] - chosen.error_y.arrayminus[0] == pytest.approx(entry.faithfulness_ci[0])
    assert chosen.y[0] + chosen.error_y.array[0] == pytest.approx(entry.faithfulness_ci[1])
    assert figure.layout.xaxis.type == "log"


def test_a_curve_needs_a_value_for_each_size() -> None:
    with pytest.raises(InputError, match="2 sizes and 1 values"):
        faithfulness_figure([1, 2], [0.5], toy_document(toy_circuit()).evaluation[0])
