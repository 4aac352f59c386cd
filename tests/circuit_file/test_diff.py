"""Two circuit files compared: what differs is told, what cannot be compared is said, and no text of a file is run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import rankdata

import mechinterp as mi
from mechinterp.base.canonical_json import render_json
from mechinterp.circuit_file.store import plain_content
from mechinterp.cli import app as cli
from mechinterp.graphs.circuit import Circuit
from mechinterp.graphs.select import select
from tests.support.toy_circuits import toy_circuit, toy_document

STORED = Path(__file__).parents[2] / "circuits"
EAP, CD, ACDC = (
    STORED / f"{name}.circuit.json" for name in ("ioi-bundled-eap-ig", "ioi-bundled-cd", "ioi-wang2022-edges-acdc")
)
MATTR, PRONOUN = (
    STORED / f"{name}-mattr.circuit.json" for name in ("ioi-bundled", "gendered_pronoun-SmolLM2-135M-Instruct.Q4_1")
)


def write(path: Path, circuit: Circuit, **changes: Any) -> Path:
    path.write_text(render_json(plain_content(toy_document(circuit, **changes))), "utf-8")
    return path


def test_a_file_does_not_differ_from_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = mi.diff_circuits(EAP, EAP)
    assert found.same_circuit and not found.differs and found.fields == () and found.changes() == ()
    assert list(found.overlap_frame().jaccard) == [1, 1]
    assert all(entry.n_flipped == 0 and entry.spearman == pytest.approx(1) for entry in found.scores)
    assert cli.main(["diff", "ioi-bundled-eap-ig", str(EAP)]) == 0
    assert "the same circuit\n" in capsys.readouterr().out


def test_edges_scores_and_ranks_are_those_of_the_files() -> None:
    """Against sets and tables that are made another way."""
    found, one, other = mi.diff_circuits(EAP, CD), mi.load_circuit(EAP), mi.load_circuit(CD)
    for where, edges in (
        ("both", set(one.edges) & set(other.edges)),
        ("only A", set(one.edges) - set(other.edges)),
        ("only B", set(other.edges) - set(one.edges)),
    ):
        assert {entry.name for entry in found.edges if entry.where == where} == edges and edges
    tables = [circuit.scores.to_dict() for circuit in (one, other) if circuit.scores is not None]
    values = [np.array(list(table.values())) for table in tables]
    ranks = [dict(zip(table, rankdata(-abs(v), "min"), strict=True)) for table, v in zip(tables, values, strict=True)]
    for entry in found.edges:
        assert (entry.score_a, entry.score_b) == (tables[0][entry.name], tables[1][entry.name])
        assert (entry.rank_a, entry.rank_b) == (ranks[0][entry.name], ranks[1][entry.name])
    everything = found.scores[1]
    assert everything.over == "all edges of the graph" and everything.n == one.graph.n_edges
    ordered = [rankdata(v) for v in values]
    assert everything.spearman == pytest.approx(np.corrcoef(*ordered)[0, 1])
    assert everything.pearson == pytest.approx(np.corrcoef(*values)[0, 1])
    assert everything.n_flipped == int((values[0] * values[1] < 0).sum())
    assert len(found.to_frame()) == len(found.edges) + len(found.nodes)


def test_frequencies_stand_beside_the_scores_and_core_edges_are_compared() -> None:
    found = mi.diff_circuits(MATTR, PRONOUN)
    files = [json.loads(path.read_text("utf-8")) for path in (MATTR, PRONOUN)]
    often = [{edge["name"]: edge["frequency"] for edge in file["edges"]} for file in files]
    for entry in found.edges:
        assert (entry.frequency_a, entry.frequency_b) == tuple(side.get(entry.name) for side in often)
    assert found.core is not None
    sizes = [file["stability"]["n_core"] for file in files]
    assert (found.core.both + found.core.only_a, found.core.both + found.core.only_b) == tuple(sizes)
    assert mi.diff_circuits(MATTR, EAP).core is None
    assert {*often[0]} <= {*mi.diff_circuits(MATTR, EAP).to_frame().dropna(subset=["frequency_a"]).name}


def test_the_other_way_round_is_the_mirror_image() -> None:
    one, other = mi.diff_circuits(EAP, CD).to_frame(), mi.diff_circuits(CD, EAP).to_frame()
    swapped = {"score_a": "score_b", "score_b": "score_a", "rank_a": "rank_b", "rank_b": "rank_a"}
    other = other.rename(columns=swapped).replace({"only A": "only B", "only B": "only A"})[list(one.columns)]
    assert one.equals(other)


def test_scores_that_were_made_differently_are_said_to_be(tmp_path: Path) -> None:
    found = mi.diff_circuits(EAP, CD)
    assert not found.scored_alike and any("method eap-ig / cd" in note for note in found.notes)
    by_rank = [abs((entry.rank_a or 0) - (entry.rank_b or 0)) for entry in found.changes()]
    assert by_rank == sorted(by_rank, reverse=True) and len(by_rank) > 50
    fields = {row.field: (row.a, row.b) for row in found.fields}
    assert fields["discovery.method"] == ("eap-ig", "cd") and "model.weights_sha256" not in fields


def test_different_graphs_and_models_come_first() -> None:
    notes = mi.diff_circuits(EAP, ACDC).notes
    assert notes[0].startswith("different graphs: edges are compared by name; ")
    assert notes[1].startswith("different models") and "no scores in B" in notes[2]


def test_edges_without_a_sidecar_are_compared_over_what_both_have(tmp_path: Path) -> None:
    circuit = toy_circuit()
    assert circuit.scores is not None
    negated = type(circuit.scores)(circuit.graph, -circuit.scores.total, 10, "eap", "logit_diff", "corrupt")
    smaller = select(circuit.graph, negated, edges=30, by="magnitude")
    found = mi.diff_circuits(write(tmp_path / "a.circuit.json", circuit), write(tmp_path / "b.circuit.json", smaller))
    (agreement,) = found.scores
    assert agreement.over == "edges in both circuits" and agreement.n == len(set(circuit.edges) & set(smaller.edges))
    assert agreement.n_flipped == agreement.n and agreement.pearson == pytest.approx(-1)
    assert all(entry.score_b is None for entry in found.edges if entry.where == "only A")
    assert any("does not say" in note or "do not say" in note for note in found.notes)


def test_roles_and_fields(tmp_path: Path) -> None:
    circuit = toy_circuit()
    heads = [name for name in circuit.nodes if name.startswith("a")]
    old = {"m": {"label": "mover", "nodes": heads[:2]}, "x": {"label": "old", "nodes": heads[3:4]}}
    new = {"m": {"label": "mover", "nodes": heads[1:3]}, "x": {"label": "new", "nodes": heads[3:4]}}
    a = write(tmp_path / "a.circuit.json", circuit, roles=old)
    b = write(tmp_path / "b.circuit.json", circuit, roles=new, title="another")
    found = mi.diff_circuits(a, b)
    assert {row.node: row.change for row in found.roles} == {heads[0]: "lost", heads[2]: "gained", heads[3]: "moved"}
    assert (found.roles_removed, found.roles_added) == (("old",), ("new",))
    assert found.same_circuit and [(row.field, row.a, row.b) for row in found.fields] == [("title", "toy", "another")]


def test_an_evaluation_by_another_metric_is_not_held_against_this_one(tmp_path: Path) -> None:
    circuit = toy_circuit()
    record = toy_document(circuit).evaluation[0].model_dump(mode="json", exclude_none=True)
    other = {**record, "metric": {"name": "prob", "direction": "higher is better", "unit": "probability"}}
    a = write(tmp_path / "a.circuit.json", circuit)
    found = mi.diff_circuits(a, write(tmp_path / "b.circuit.json", circuit, evaluation=[other]))
    rows = {row.field: (row.a, row.b) for row in found.fields}
    assert rows["evaluation[logit_diff, corrupt]"][1] is None and rows["evaluation[prob, corrupt]"][0] is None
    assert not any(name.startswith("evaluation") and name.endswith("faithfulness") for name in rows)


@pytest.mark.parametrize("ending", ["html", "svg"])
def test_what_is_drawn_has_every_edge_once_and_runs_nothing(
    ending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nasty = '</style><script>alert("x")</script>'
    circuit, other = toy_circuit(edges=60), toy_circuit(edges=40, seed=1)
    head = next(name for name in circuit.nodes if name.startswith("a"))
    a = write(tmp_path / "a&b<c.circuit.json", circuit, title=nasty, roles={"m": {"label": nasty, "nodes": [head]}})
    b = write(tmp_path / "b.circuit.json", other)
    out = tmp_path / f"out.{ending}"
    assert cli.main(["diff", str(a), str(b), "--out", str(out)]) == 1
    assert "wrote" in capsys.readouterr().out
    page, found = out.read_text("utf-8"), mi.diff_circuits(a, b)
    assert page.count('<g class="edge">') == len(found.edges)
    for where, name in (("only A", "a"), ("only B", "b"), ("both", "both")):
        group = re.search(rf'<g class="edges {name}"[^>]*>(.*?)(?=<g class="(?:edges|marks))', page, re.DOTALL)
        n_here = sum(entry.where == where for entry in found.edges)
        assert group is not None and group[1].count("<path") == n_here
    n_flipped = sum(bool(entry.flipped) for entry in found.edges)
    assert page.count('class="flip"') == n_flipped
    assert "<script" not in page and "a&b<c" not in page and "unsafe" not in page and str(tmp_path) not in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "").replace("http-equiv", "")


@pytest.mark.slow
def test_many_edges_and_mixed_graphs_can_be_drawn(tmp_path: Path) -> None:
    out = tmp_path / "many.svg"
    assert cli.main(["diff", str(ACDC), str(STORED / "ioi-wang2022-naive.circuit.json"), "--out", str(out)]) == 1
    assert out.stat().st_size < 1_500_000 and out.read_text("utf-8").count('<g class="node') > 60


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing", "STORED"], "nothing"),
        (["STORED", "BROKEN"], "was changed after it was written"),
        (["STORED", "STORED", "--out", "x.png"], "NAME.html or NAME.svg"),
        (["STORED", "STORED", "--top", "0"], "--top"),
        (["STORED"], "B"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads(EAP.read_text("utf-8"))
    content["title"] = "changed"
    broken = tmp_path / "broken.circuit.json"
    broken.write_text(json.dumps(content), "utf-8")
    names = {"STORED": str(EAP), "BROKEN": str(broken)}
    assert cli.main(["diff", *(names.get(word, word) for word in arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and words in err
    assert [path.name for path in tmp_path.iterdir()] == [broken.name]


def test_texts_of_a_file_cannot_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    circuit = toy_circuit()
    a = write(tmp_path / "a.circuit.json", circuit)
    b = write(tmp_path / "b.circuit.json", circuit, title="[bold red]x[/]\x1b]0;owned\x07")
    assert cli.main(["diff", str(a), str(b)]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "[bold red]x[/]" in out
