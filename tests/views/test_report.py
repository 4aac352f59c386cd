"""The report page: whole, harmless whatever the file says, and needing nothing but a browser."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from mechinterp.circuit_file.circuit_file import load_circuit
from mechinterp.circuit_file.store import open_circuit_file
from mechinterp.circuit_file.summary import METRIC_WORDS, finding, ranked_edges, ranked_nodes
from mechinterp.graphs.circuit import Circuit
from mechinterp.graphs.layered_layout import POINTS_PER_ROW, draw_layered
from mechinterp.graphs.select import select
from mechinterp.tasks import metrics
from mechinterp.views.report.page import render_report, write_report
from tests.support.toy_circuits import curve_of, scores_of, toy_circuit, toy_document

STORED = Path(__file__).parents[2] / "circuits"
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """All elements with their attributes, the text outside scripts and styles, and the texts of the scripts."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append((self.elements[-1][1], data))
        elif not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    @property
    def data(self) -> Any:
        (text,) = (text for attributes, text in self.scripts if attributes.get("type") == "application/json")
        return json.loads(text)

    def lines(self, stop: Any) -> list[tuple[str, str, str]]:
        """(writer, reader, name) of every line that a stop of the slider draws."""
        lines = self.all_lines
        return [lines[i][:3] for first, last in stop["edges"] for i in range(first, last + 1)]

    @property
    def all_lines(self) -> list[tuple[str, str, str, float | None]]:
        """(writer, reader, name, score) of every line, from the columns."""
        graph = self.data["graph"]
        lines, nodes = graph["lines"], [node["name"] for node in graph["nodes"]]
        ends = [(nodes[a], nodes[b]) for a, b in zip(lines["from"], lines["to"], strict=True)]
        names = [f"{a}->{lines['readers'][r]}" for (a, _), r in zip(ends, lines["reader"], strict=True)]
        return [(*end, name, score) for end, name, score in zip(ends, names, lines["score"], strict=True)]


@pytest.fixture(scope="module")
def circuit() -> Circuit:
    return toy_circuit()


def page_of(circuit: Circuit, path: str = "out/toy.circuit.json", **changes: Any) -> tuple[Page, str]:
    text = render_report(circuit, toy_document(circuit, **changes), path)
    return Page(text), text


def test_every_metric_has_words() -> None:
    """A title says "of the logit difference"; a metric's bare name is no English."""
    assert {one.name for one in vars(metrics).values() if isinstance(one, metrics.Metric)} <= set(METRIC_WORDS)


def test_the_title_is_the_finding(circuit: Circuit) -> None:
    page, _ = page_of(circuit)
    words = f"{circuit.n_edges} of {circuit.graph.n_edges} edges recover 93 % [91, 95] of the logit difference"
    assert finding(toy_document(circuit)) == words
    assert words in page.text


def test_the_page_is_whole_and_small(circuit: Circuit) -> None:
    page, text = page_of(circuit)
    assert text.startswith("<!doctype html>")
    assert len(text.encode()) < 3e5
    assert {name for name, _ in page.elements} >= {"html", "head", "title", "main", "figure", "table", "aside"}
    for name in ("circuit", "sizes", "heads"):
        assert any(attributes.get("id") == f"figure-{name}" for _, attributes in page.elements)
    assert page.data["curve"] and page.data["heat"]


def test_nothing_is_fetched_and_nothing_but_the_pages_own_script_can_run(circuit: Circuit) -> None:
    page, text = page_of(circuit)
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "embed", "img", "base", "form")
        assert not {"src", "href", "srcset", "action", "style"} & set(attributes), (tag, attributes)
        assert not [name for name in attributes if name.startswith("on")]
    (policy,) = (a["content"] for t, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and "default-src 'none'" in policy and "http" not in policy and "unsafe" not in policy
    style = text.partition("<style>")[2].partition("</style>")[0]
    (script,) = (text for attributes, text in page.scripts if not attributes)
    for kind, content in (("style", style), ("script", script)):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy


def test_every_kept_edge_has_its_nodes_and_its_name_on_the_page(circuit: Circuit) -> None:
    page, _ = page_of(circuit)
    graph = page.data["graph"]
    (stop,) = graph["stops"]
    net = circuit.to_networkx()
    assert sorted(page.lines(stop)) == sorted((a, b, data["name"]) for a, b, data in net.edges(data=True))
    places = {graph["nodes"][int(i)]["name"] for i in graph["drawing"]["places"]}
    assert {node["name"] for node in graph["nodes"]} == places == set(circuit.nodes)
    scores = scores_of(circuit).to_dict()
    for _, _, name, score in page.all_lines:
        assert score == pytest.approx(scores[name], rel=1e-5) and name in page.text


SIZES = (1, 8, 20, 40, 60, 90, 150)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_every_stop_of_the_slider_is_what_select_selects(kv_heads: int) -> None:
    circuit = toy_circuit(3, 4, kv_heads, 50)
    curve = curve_of(circuit, SIZES)
    page, _ = page_of(circuit, curve=curve)
    stops = page.data["graph"]["stops"]
    (own,) = (stop for stop in stops if stop["circuit"])
    assert own["faithfulness"] is None and own["held_out"]["value"] == 0.9261  # no point of the curve is this circuit
    assert set(name for *_, name in page.lines(own)) == set(circuit.edges)
    measured = [stop for stop in stops if not stop["circuit"]]
    assert len(measured) == len(SIZES) and stops == sorted(stops, key=lambda stop: stop["n_edges"])
    for stop, point in zip(measured, curve["points"], strict=True):
        assert (stop["n_selected"], stop["n_edges"]) == (point["n_selected"], point["n_edges"])
        assert stop["faithfulness"] == point["faithfulness"] and stop["held_out"] is None
        names = {name for *_, name in page.lines(stop)}
        if stop["n_edges"]:
            chosen = select(circuit.graph, scores_of(circuit), edges=stop["n_selected"], by="magnitude")
            assert names == set(chosen.edges)
            drawn = page.data["graph"]["drawing"]["knots"]
            assert {str(i) for first, last in stop["edges"] for i in range(first, last + 1)} <= set(drawn)
        else:
            assert names == set()


def test_a_point_that_is_the_circuit_is_one_stop() -> None:
    circuit = toy_circuit(edges=40)
    page, _ = page_of(circuit, curve=curve_of(circuit, [20, 40]))
    assert [stop["circuit"] for stop in page.data["graph"]["stops"]] == [False, True]


def test_no_slider_where_the_curve_is_not_of_these_scores(circuit: Circuit) -> None:
    curve = curve_of(circuit, [20, 40])
    curve["points"][0]["n_edges"] += 1
    page, _ = page_of(circuit, curve=curve)
    assert len(page.data["graph"]["stops"]) == 1
    assert "There is no slider: the file states" in page.text
    for bad in (0, 10**6):
        page, _ = page_of(circuit, curve={**curve, "points": [{"n_selected": bad, "n_edges": 0, "faithfulness": 0.0}]})
        assert len(page.data["graph"]["stops"]) == 1 and "no slider" in page.text


def test_a_line_bends_where_the_layout_has_it(circuit: Circuit) -> None:
    page, _ = page_of(circuit)
    graph = page.data["graph"]
    knots = graph["drawing"]["knots"]
    for strand in draw_layered(circuit.to_networkx()).strands:
        (i,) = (i for i, (*_, name, _) in enumerate(page.all_lines) if name == strand.name)
        rows = [y for _, y in strand.curve[::POINTS_PER_ROW]]
        assert len(knots[str(i)]) == len(rows)
        assert knots[str(i)] == pytest.approx([x for x, _ in strand.curve[::POINTS_PER_ROW]], abs=1e-3)


HOSTILE = "</script></title><script>alert(1)</script><img src=https://evil.example/x onerror=alert(2)>\"'&{0}%s"


def test_hostile_texts_stay_texts(circuit: Circuit) -> None:
    usual, _ = page_of(circuit)
    document = toy_document(circuit)
    record = document.model_dump(mode="json", exclude_none=True)
    metric = {**record["evaluation"][0]["metric"], "name": HOSTILE, "unit": HOSTILE}
    evaluation = {**record["evaluation"][0], "pairs": HOSTILE, "metric": metric}
    head = next(name for name in circuit.nodes if name.startswith("a"))
    page, text = page_of(
        circuit,
        path=f"out/{HOSTILE}.circuit.json",
        title=HOSTILE,
        description=HOSTILE,
        model={**record["model"], "name": HOSTILE, "architecture": HOSTILE, "loader": HOSTILE},
        task={**record["task"], "name": HOSTILE, "title": HOSTILE},
        pairs={**record["pairs"], HOSTILE: record["pairs"]["evaluation"]},
        evaluation=[evaluation],
        provenance={"versions": {HOSTILE: HOSTILE}, "device": HOSTILE, "command": HOSTILE},
        roles={"mover": {"label": HOSTILE, "nodes": [head]}},
    )
    assert text.count("alert(1)") > 8
    assert [tag for tag, _ in page.elements if tag in ("script", "img")] == ["script"] * 2
    assert page.elements.count(("main", {})) == usual.elements.count(("main", {})) == 1
    assert not [text for attributes, text in page.scripts if attributes and "<" in text]
    assert page.data["graph"]["roles"][0]["label"] == HOSTILE  # whole, and only ever set as text


def test_the_numbers_of_the_evaluation_are_on_the_page(circuit: Circuit) -> None:
    page, _ = page_of(circuit)
    for words in (
        "0.926",
        "95% interval 0.908 to 0.951",
        "3.400 logits",
        "198 of 200",
        "0.020, -0.010, 0.050",
        "a" * 64,
    ):
        assert words in page.text
    for axis in ("granularity", "component", "value", "positions", "direction", "set"):
        assert axis in page.text
    assert "discover-circuit verify out/toy.circuit.json" in page.text


def test_the_command_is_quoted_for_a_shell(circuit: Circuit) -> None:
    page, _ = page_of(circuit, path="out/my circuit; rm.circuit.json")
    assert "discover-circuit verify 'out/my circuit; rm.circuit.json'" in page.text


def test_the_page_names_no_folder_of_this_machine(circuit: Circuit) -> None:
    folder = "/home/ann b/secret"
    record = toy_document(circuit).model_dump(mode="json", exclude_none=True)
    page, text = page_of(
        circuit,
        path=f"{folder}/toy.circuit.json",
        title=f"ioi in {folder.replace(' ', '')}/my-model",
        model={**record["model"], "name": f"{folder}/my-model", "origin": "directory"},
        provenance={
            "versions": {},
            "device": "cpu",
            "command": f"discover-circuit run ioi --model '{folder}/my-model'",
        },
        evaluation=[],
    )
    assert "secret" not in text and "ioi in my-model (no evaluation)" in page.text
    assert "discover-circuit verify toy.circuit.json" in page.text and "run ioi --model my-model" in page.text


def test_how_to_verify_says_what_the_command_does_for_this_file(circuit: Circuit) -> None:
    page, _ = page_of(circuit)
    assert "checks every hash and the graph, makes the examples again and repeats the evaluation." in page.text
    assert "was in memory" in page.text and "pip install" not in page.text and "beside the file" not in page.text
    known = open_circuit_file(STORED / "ioi-bundled-mattr.circuit.json")
    text = render_report(load_circuit(known.path), known.document, "x")
    assert "measures the predictions and their controls again" in text and "The model is in the package." in text
    assert "ioi-bundled-mattr.scores.safetensors" in text
    known = open_circuit_file(STORED / "ioi-wang2022-naive.circuit.json")
    text = render_report(load_circuit(known.path), known.document, "x")
    assert "The command checks every hash and the graph. " in text and "nothing that needs the model" in text


def test_a_circuit_without_scores_and_results_has_a_page(circuit: Circuit) -> None:
    bare = Circuit(circuit.graph, circuit.kept, circuit.n_selected)
    edges = [{"name": name} for name in bare.edges]
    page, _ = page_of(bare, evaluation=[], curve=None, edges=edges, title="A published circuit")
    assert "A published circuit" in page.text and "The file has no scores, so there is no slider" in page.text
    data = page.data
    assert data["curve"] is None and data["heat"] is None and not data["graph"]["scored"]
    (stop,) = data["graph"]["stops"]
    assert stop["faithfulness"] is None and stop["held_out"] is None


def test_writing_replaces_the_page_or_leaves_the_old_one(
    circuit: Circuit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "toy.report.html"
    path.write_text("old", "utf-8")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_report(path, circuit, toy_document(circuit), "toy.circuit.json")
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name] and path.read_text("utf-8") == "old"
    write_report(path, circuit, toy_document(circuit), "toy.circuit.json")
    assert path.read_text("utf-8").startswith("<!doctype html>")


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_nodes_are_counted_as_in_the_graph(kv_heads: int) -> None:
    circuit = toy_circuit(3, 4, kv_heads, 60)
    document, net = toy_document(circuit), circuit.to_networkx()
    nodes = {node.name: node for node in ranked_nodes(document)}
    assert set(nodes) == set(circuit.nodes)
    for name, node in nodes.items():
        assert node.n_in == net.in_degree(name)
        # An edge into a shared head leaves its writer once, however many heads it reaches.
        assert node.n_out == len({data["name"] for _, _, data in net.out_edges(name, data=True)})
    strengths = [abs(node.score or 0.0) for node in ranked_nodes(document)]
    assert strengths == sorted(strengths, reverse=True)


def test_edges_are_ranked_by_magnitude(circuit: Circuit) -> None:
    assert circuit.scores is not None
    scores = circuit.scores.to_dict()
    ranked = [edge.name for edge in ranked_edges(toy_document(circuit))]
    assert sorted(ranked) == list(circuit.edges)
    assert abs(scores[ranked[0]]) == max(abs(scores[name]) for name in circuit.edges)


def test_predictions_are_on_the_page_with_their_controls() -> None:
    circuit = toy_circuit()
    prediction = {
        "name": "p",
        "measure": {"kind": "copying", "head": "a0.h0"},
        "relation": ">=",
        "value": 0.25,
        "measured": 0.75,
        "statement": "<b>it copies</b>",
        "controls": [{"measure": {"kind": "copying", "head": "a0.h1"}, "measured": 0.125}],
    }
    page = render_report(circuit, toy_document(circuit, predictions=[prediction]), "toy.circuit.json")
    assert "&lt;b&gt;it copies&lt;/b&gt; (a0.h0&#x27;s copying score is &gt;= 0.25)" in page
    assert "a0.h1&#x27;s copying score is &lt; 0.25: 0.125" in page and '<td class="number">0.75</td>' in page
    assert "Predictions" not in render_report(circuit, toy_document(circuit), "toy.circuit.json")


# -- what could mislead ------------------------------------------------------------------------------------------------


def test_the_page_warns_of_what_the_file_gives_reason_for(circuit: Circuit) -> None:
    page, _ = page_of(circuit, evaluation=[], status="ground-truth", title="Recovers 99.9 %")
    assert "Recovers 99.9 % (no evaluation)" in page.text
    for name in ("no evaluation", "self-declared status", "numbers in words", "no scores"):
        assert f"{name} :" in page.text
    known = open_circuit_file(STORED / "ioi-bundled-eap-ig.circuit.json")
    text = render_report(load_circuit(known.path), known.document, "x")
    assert "What could mislead" not in text and "only hash-checked" in text


def test_the_page_says_how_far_verify_reaches(circuit: Circuit) -> None:
    page, _ = page_of(circuit)
    assert "recomputed by verify hashes; graph" in page.text and "free text, never checked id; title" in page.text


def test_the_page_ties_roles_to_predictions(circuit: Circuit) -> None:
    first, second = [name for name in circuit.nodes if name.startswith("a")][:2]
    control = {"measure": {"kind": "copying", "head": second}}
    prediction = {"measure": {"kind": "copying", "head": first}, "relation": ">=", "value": 0.3, "controls": [control]}
    roles = {"x": {"label": "copies <b>", "nodes": [first, second]}}
    page, _ = page_of(circuit, roles=roles, predictions=[{"name": "copies", **prediction}])
    row = f"copies <b> {first}, {second} {first}'s copying score is >= 0.3 {second}"
    assert row in page.text
