"""The diagrams by role and by layer: every edge is in one arrow, boxes stand where the file says, arrows go up."""

from __future__ import annotations

import itertools
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from mechinterp.circuit_file.circuit_file import circuit_of
from mechinterp.circuit_file.schema import CircuitFile
from mechinterp.circuit_file.store import open_circuit_file
from mechinterp.graphs.circuit import Circuit
from mechinterp.models.sites import node_of
from mechinterp.views.report.asked import asked_section
from mechinterp.views.report.diagrams import MAX_BESIDE, MAX_BLOCKS
from mechinterp.views.report.graph_view import graph_view
from mechinterp.views.report.prompt_example import PromptExample
from tests.support.toy_circuits import scores_of, toy_circuit, toy_document

STORED = Path(__file__).parents[2] / "circuits"
EXAMPLE = PromptExample(
    "evaluation",
    0,
    ("<bos>", "␣Ann", "␣Bo", "␣to"),
    ("<bos>", "␣Cy", "␣Bo", "␣to"),
    {"A": 1, "end": 3},
    3,
    ("␣Ann",),
    (),
)


def stored(name: str) -> tuple[Circuit, CircuitFile]:
    opened = open_circuit_file(STORED / f"{name}.circuit.json")
    return circuit_of(opened), opened.document


def diagram(circuit: Circuit, document: CircuitFile, example: PromptExample | None = None) -> Any:
    (found,) = graph_view(circuit, document, example)["diagrams"]
    return found


def box(found: Any, label: str) -> Any:
    return next(one for one in found["boxes"] if one["label"] == label)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_an_arrow_is_the_sum_of_the_edges_between_its_boxes(kv_heads: int) -> None:
    """Against a sum over the edges by name; an edge into a shared head counts once for every box that it enters."""
    circuit = toy_circuit(3, 4, kv_heads, 60)
    heads = [name for name in circuit.nodes if name.startswith("a")]
    roles = {"x": {"label": "x", "nodes": heads[:3]}, "y": {"label": "y", "nodes": heads[3:5]}}
    found = diagram(circuit, toy_document(circuit, roles=roles))
    of_node = {name: i for i, one in enumerate(found["boxes"]) for name in one["nodes"]}
    assert set(of_node) == set(circuit.nodes)
    scores, expected = scores_of(circuit).to_dict(), dict[tuple[int, int, str], dict[str, float]]()
    for a, b, data in circuit.to_networkx().edges(data=True):
        channel = data["channel"] or ("logits" if b == "logits" else "mlp")
        expected.setdefault((of_node[a], of_node[b], channel), {})[data["name"]] = scores[data["name"]]
    assert {(a["from"], a["to"], a["inputs"][0]) for a in found["arrows"]} == set(expected)
    for arrow in found["arrows"]:
        edges = expected[arrow["from"], arrow["to"], arrow["inputs"][0]]
        assert arrow["n"] == len(edges) and arrow["weight"] == pytest.approx(sum(edges.values()), rel=1e-4, abs=1e-4)
    assert found["total"] == circuit.n_edges and 0 < found["inside"] < found["total"]


def test_the_published_circuit_is_drawn_as_in_its_paper() -> None:
    """Wang et al. 2022, figure 2: the columns are positions in the order of the prompt, 15 edges between roles."""
    found = diagram(*stored("ioi-wang2022-heads"))
    assert found["claimed"] and found["stated"] == 15
    assert [column["name"] for column in found["columns"]] == ["IO", "S1", "S1+1", "S2", "end"]
    places = {one["label"]: (one["column"], one["level"]) for one in found["boxes"] if one["kind"] == "role"}
    assert places == {
        "previous token": ("S1+1", 1),
        "duplicate token": ("S2", 1),
        "induction": ("S2", 2),
        "S-inhibition": ("end", 3),
        "name mover": ("end", 4),
        "negative name mover": ("end", 4),
        "backup name mover": ("end", 4),
    }
    arrows = {
        (found["boxes"][a["from"]]["label"], found["boxes"][a["to"]]["label"], a["at"], tuple(a["inputs"]))
        for a in found["arrows"]
    }
    assert {
        ("input", "name mover", "IO", ("k", "v")),
        ("input", "duplicate token", "S1", ("k", "v")),
        ("input", "duplicate token", "S2", ("q",)),
        ("induction", "S-inhibition", "", ("k", "v")),
    } <= arrows


def test_positions_come_from_roles_where_nodes_have_none() -> None:
    found = diagram(*stored("ioi-wang2022-edges-heads"))
    assert box(found, "induction")["column"] == "S2"  # what it sends is read there
    found = diagram(*stored("ioi-bundled-mattr"))
    assert box(found, "attends S2 -> S1 (duplicate-token-like)")["column"] == "S2"
    assert box(found, "heads that write toward the answer")["column"] == "end" == box(found, "logits")["column"]
    assert box(found, "induction heads")["column"] == ""  # measured on random tokens
    assert [column["name"] for column in found["columns"]] == ["", "S1", "S1+1", "S2", "end"]


@pytest.mark.parametrize("name", ["ioi-wang2022-heads", "ioi-bundled-mattr", "greater-than-hanna2023-core"])
def test_arrows_of_the_first_view_go_up_and_no_row_is_too_wide(name: str) -> None:
    found = diagram(*stored(name))
    boxes, beside = found["boxes"], defaultdict[tuple[int, str], int](int)
    top = max(one["level"] for one in boxes)
    for one in boxes:
        assert (one["level"] == 0) == (one["kind"] == "input") and (one["level"] == top) == (one["kind"] == "logits")
        beside[one["level"], one["column"]] += one["kind"] == "role"
    assert max(beside.values()) <= MAX_BESIDE
    layers = [[node_of(node).layer for node in one["nodes"]] for one in boxes]
    for arrow in found["arrows"]:
        a, b = layers[arrow["from"]], layers[arrow["to"]]
        kinds = {boxes[arrow["from"]]["kind"], boxes[arrow["to"]]["kind"]}
        if arrow["main"] and kinds == {"role"} and max(a) < min(b):
            assert boxes[arrow["from"]]["level"] < boxes[arrow["to"]]["level"]


def test_a_large_circuit_without_roles_is_drawn_by_layer() -> None:
    circuit = toy_circuit(14, 4, 4, 700)
    found = diagram(circuit, toy_document(circuit))
    assert found["by"] == "layers"
    members = [name for one in found["boxes"] for name in one["nodes"]]
    assert sorted(members) == sorted(circuit.nodes)
    assert len({one["level"] for one in found["boxes"]}) <= MAX_BLOCKS + 2
    scores = scores_of(circuit).to_dict()
    total = sum(scores[name] for name in circuit.edges)
    assert sum(arrow["weight"] for arrow in found["arrows"]) == pytest.approx(total, rel=1e-3)
    small = toy_circuit()
    assert graph_view(small, toy_document(small))["diagrams"] == []


def test_columns_are_in_the_order_of_the_prompt_with_its_tokens() -> None:
    circuit = toy_circuit()
    head = next(name for name in circuit.nodes if name.startswith("a"))
    document = toy_document(circuit, roles={"x": {"label": "x", "nodes": [head]}})
    columns = diagram(circuit, document, EXAMPLE)["columns"]
    assert columns[-2:] == [{"name": "A", "token": "␣Ann"}, {"name": "end", "token": "␣to"}]


def test_what_was_asked_is_the_prompt_with_its_positions_and_answers() -> None:
    section = asked_section(toy_document(toy_circuit()), EXAMPLE)
    rows = section.partition("<tbody>")[2].split("</tr>")
    assert "<th>A</th>" in section and "<th>end</th>" in section
    assert '<td class="changed">Ann</td>' in rows[0] and '<td class="changed">Cy</td>' in rows[1]
    assert "right answer <b>Ann</b>" in rows[0] and "wrong" not in rows[0]
    assert "the logit difference" in section and "what it carries on the corrupt prompt" in section


def test_without_a_model_the_task_shows_a_template() -> None:
    _, document = stored("ioi-bundled-mattr")
    section = asked_section(document, None)
    assert "<q>As {IO} and {S} left the {PLACE}, {S} decided to give a {OBJECT} to</q>" in section
    assert "right answer <code>{IO}</code>" in section and "wrong answer <code>{S}</code>" in section
    _, published = stored("ioi-wang2022-heads")
    assert "no task and no prompts" in asked_section(published, None)
    hostile = EXAMPLE.__class__("<p>", 0, ("<b>", "x"), ("<b>", "y"), {"<i>": 0}, 1, ("<u>",), ("<s>",))
    made = asked_section(toy_document(toy_circuit()), hostile)
    assert not any(tag in made for tag in ("<p><", "<i>", "<u>", "<s>", "<td><b>"))


def test_nodes_at_positions_stand_in_their_columns_and_read_the_input_there() -> None:
    circuit, document = stored("ioi-wang2022-naive")
    found = diagram(circuit, document)
    assert not found["claimed"] and found["weights"] == "edges"  # a score of a node is not one of its edges
    columns = {one["label"]: one["column"] for one in found["boxes"] if one["kind"] == "role"}
    assert columns["name mover"] == "end" and columns["induction"] == "S2" and columns["previous token"] == "S1+1"
    for arrow in found["arrows"]:
        assert bool(arrow["at"]) == (found["boxes"][arrow["from"]]["kind"] == "input")
    names = [column["name"] for column in found["columns"]]
    assert names[-1] == "rest" and {"S1+1", "S2", "end"} < set(names)
    heads = diagram(*stored("docstring-heimersheim2023-heads"))
    assert {one["column"] for one in heads["boxes"]} == {""} and [c["name"] for c in heads["columns"]] == [""]


def test_a_thousand_roles_are_not_drawn() -> None:
    circuit = toy_circuit()
    head = next(name for name in circuit.nodes if name.startswith("a"))
    many = {f"r{i}": {"label": f"role {i}", "nodes": [head]} for i in range(1000)}
    assert graph_view(circuit, toy_document(circuit, roles=many))["diagrams"] == []


def test_every_pair_of_boxes_and_input_has_one_arrow() -> None:
    circuit = toy_circuit()
    heads = [name for name in circuit.nodes if name.startswith("a")]
    found = diagram(circuit, toy_document(circuit, roles={"x": {"label": "heads from A to B", "nodes": heads}}))
    keys = [(a["from"], a["to"], *a["inputs"], a["at"]) for a in found["arrows"]]
    assert all(a != b for a, b in itertools.combinations(keys, 2))
    assert box(found, "attends A -> B")["nodes"] == tuple(heads)
