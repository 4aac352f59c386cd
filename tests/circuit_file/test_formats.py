"""Writing circuits for other tools: what is written is theirs, whatever strangers wrote into the circuit file."""

import csv
import io
import json
import re
from pathlib import Path

import networkx as nx
import pytest
import torch

from mechinterp.base.errors import FormatError, InputError, UnsupportedError
from mechinterp.circuit_file.circuit_file import load_circuit, save_circuit
from mechinterp.circuit_file.formats import mib
from mechinterp.circuit_file.formats.dot import quoted
from mechinterp.circuit_file.formats.eap_ig_json import to_eap_ig_json
from mechinterp.circuit_file.formats.eap_ig_pt import to_eap_ig_pt
from mechinterp.circuit_file.formats.exports import export_circuit, write_export
from mechinterp.circuit_file.formats.imports import import_circuit
from mechinterp.circuit_file.formats.latex import latex_text
from mechinterp.circuit_file.formats.names import EXPORTS, IMPORTS
from mechinterp.circuit_file.formats.score_origin import Made
from mechinterp.circuit_file.schema import CircuitFile
from mechinterp.graphs.circuit import Circuit
from mechinterp.graphs.graph import graph_of
from tests.support import models_tiny as tiny
from tests.support.foreign_files import EAP_IG, LOSS, dims_of, one_line, random_circuit, unscored
from tests.support.toy_circuits import toy_document

HOSTILE = '"];}\\N\\"\' <b>&amp;</b> \\end{table}$\\input{/etc/passwd}% {_^~#} \x00\x1b[2J\u202e\n]]>--><!-- é 漢'


# -- MIB ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_mib(monkeypatch: pytest.MonkeyPatch) -> None:
    """MIB with two tiny models, each with a task."""
    monkeypatch.setattr(mib, "MODELS", {"gpt2": (2, 2, 16), "llama3": (3, 2, 16)})


def of_model(circuit: Circuit, name: str) -> CircuitFile:
    plain = toy_document(circuit).model_dump(mode="json")["model"]
    return toy_document(circuit, model={**plain, "name": name})


def test_mib_folder(tmp_path: Path, small_mib: None) -> None:
    circuit = random_circuit(graph_of(dims_of(2, 2)))
    document = of_model(circuit, "gpt2")
    assert write_export(tmp_path, export_circuit(circuit, document, "mib")) == (tmp_path / "ioi_gpt2/importances.json",)
    again = import_circuit(tmp_path / "ioi_gpt2", "mib", dims=circuit.graph.dims, made=LOSS)
    assert again.edges == circuit.edges and again.scores.to_dict() == circuit.scores.to_dict()
    few = mib.mib_problems(tmp_path)
    assert len(few) == 2 and all("at least 2" in problem for problem in few)
    other = random_circuit(graph_of(dims_of(3, 2)))
    empty = Circuit(other.graph, torch.zeros_like(other.kept), 0)
    write_export(tmp_path, mib.mib_circuits([empty] * 9, document, "arc-easy", "llama3"))
    assert mib.mib_problems(tmp_path) == ()
    with pytest.raises(FormatError, match="holds 9"):
        import_circuit(tmp_path / "arc-easy_llama3", "mib")
    with pytest.raises(InputError, match=r"more than 0.1 %"):
        mib.mib_circuits([other] * 9, document, "arc-easy", "llama3")


def test_mib_problems_are_found(tmp_path: Path, small_mib: None) -> None:
    circuit = random_circuit(graph_of(dims_of(2, 2)))
    document = toy_document(circuit)
    good, bare = to_eap_ig_json(circuit, document), to_eap_ig_json(unscored(circuit), document)
    bad = {
        "ioi_gpt2/importances.json": (bare, "must have scores"),
        "ioi_llama3/importances.pt": (to_eap_ig_pt(circuit, document), "those of llama3"),
        "mcqa_llama3/importances.json": (b"{}", "lacks the key"),
        "arc-easy_llama3/readme.txt": (b"", "has 0 .json"),
        "mcqa_gpt2/importances.json": (good, "of a task and model of MIB"),
        "importances.json": (good, "of a task and model of MIB"),
    }
    write_export(tmp_path, {name: content for name, (content, _) in bad.items()})
    for i in range(9):
        write_export(
            tmp_path / f"arc-challenge_llama3/{i}.json",
            to_eap_ig_json(random_circuit(graph_of(dims_of(3, 2))), document),
        )
    problems = mib.mib_problems(tmp_path)
    for words in [*(words for _, words in bad.values()), "for 0.1 % has", "for 20 % has"]:
        assert any(words in problem for problem in problems), words
    assert len(mib.mib_problems(tmp_path / "nowhere")) == 1


def test_mib_has_no_such_circuit(small_mib: None) -> None:
    circuit = random_circuit(graph_of(dims_of(3, 2)))
    for name, words in (("bundled", "Unknown model of MIB"), ("gpt2", "those of gpt2 are")):
        with pytest.raises(InputError, match=words):
            export_circuit(circuit, of_model(circuit, name), "mib")
    with pytest.raises(UnsupportedError, match="has no scores"):
        export_circuit(unscored(circuit), of_model(circuit, "gpt2"), "mib")


# -- formats to look at ------------------------------------------------------------------------------------------------

GRAPHS = {
    "plain": graph_of(dims_of(2, 3)),
    "grouped": graph_of(dims_of(2, 4, 2)),
    "no MLP": graph_of(dims_of(2, 2, has_mlp=False)),
    "split input": graph_of(dims_of(2, 2), split_input=True),
    "positions": graph_of(dims_of(2, 2), positions=['S2"&\\', "end"]),
    "nodes": graph_of(dims_of(2, 2), level="node"),
    "neurons": graph_of(dims_of(2, 2), neurons=[[3, 7], []]),
}
DRAWN = ("dot", "graphml", "cytoscape", "neuronpedia", "csv", "latex", "tikz")


def drawn(kind: str, text: str = "title", scored: bool = True) -> tuple[Circuit, CircuitFile]:
    """A circuit on that graph with its file, whose title and role say `text`."""
    circuit = random_circuit(GRAPHS[kind])
    circuit = circuit if scored else unscored(circuit)
    role = {"label": text, "color": "#2f5f8f", "nodes": circuit.nodes[1:3]}
    return circuit, toy_document(circuit, title=text, roles={"r": role})


@pytest.mark.parametrize("kind", [kind for kind in GRAPHS if kind != "plain"])
def test_what_eap_ig_cannot_say_is_named(kind: str) -> None:
    words = {"grouped": "grouped-query", "no MLP": "without an MLP", "split input": "separate token", "nodes": "as one"}
    circuit, document = drawn(kind)
    for name in EAP_IG:
        with pytest.raises(UnsupportedError, match=words.get(kind, kind)):
            export_circuit(circuit, document, name)


@pytest.mark.parametrize("kind", GRAPHS)
@pytest.mark.parametrize("name", DRAWN)
def test_every_circuit_is_written_and_always_alike(name: str, kind: str) -> None:
    for scored in (True, False):
        texts = {export_circuit(*drawn(kind, HOSTILE, scored), name) for _ in range(2)}
        assert len(texts) == 1
        letters = set(texts.pop().decode("utf-8")) - {"\n"}
        assert all(
            letter >= " " if name in ("cytoscape", "neuronpedia") else letter.isprintable() for letter in letters
        )


def test_bytes_of_tables_are_always_alike() -> None:
    for name in EAP_IG:
        assert export_circuit(*drawn("plain"), name) == export_circuit(*drawn("plain"), name)


@pytest.mark.parametrize("kind", GRAPHS)
def test_graphml_and_cytoscape_are_read_by_networkx(kind: str) -> None:
    circuit, document = drawn(kind, HOSTILE)
    shown = "".join(letter if letter.isprintable() else "?" for letter in " ".join(HOSTILE.split()))
    ours = circuit.to_networkx()
    lines = sorted((s, t, d["name"], d["channel"], d["score"]) for s, t, d in ours.edges(data=True))
    graphml = nx.parse_graphml(export_circuit(circuit, document, "graphml").decode("utf-8"), force_multigraph=True)
    cyto = nx.cytoscape_graph(json.loads(export_circuit(circuit, document, "cytoscape")))
    for theirs, role in ((graphml, shown), (cyto, HOSTILE)):
        assert theirs.is_directed() and set(theirs) == set(ours)
        edges = [(s, t, d["name"], d.get("channel", ""), d["score"]) for s, t, d in theirs.edges(data=True)]
        assert sorted(edges) == lines
        assert all(theirs.nodes[name]["role"] == role for name in circuit.nodes[1:3])
    assert graphml.graph["title"] == shown


DOT_TOKEN = re.compile(r'"((?:[^"\\]|\\.)*)"|(->|[{}\[\];=,])|([A-Za-z_][A-Za-z0-9_]*|-?[0-9.]+)|(\s+)')


def dot_tokens(text: str) -> list[str]:
    """The tokens of a DOT file, texts in quotes with their quotes; all of the file is a token."""
    tokens, place = [], 0
    while place < len(text):
        found = DOT_TOKEN.match(text, place)
        assert found, text[place : place + 40]
        place = found.end()
        if not found[4]:
            tokens.append(found[0])
    return tokens


@pytest.mark.parametrize("kind", GRAPHS)
def test_dot_is_well_formed(kind: str) -> None:
    circuit, document = drawn(kind, HOSTILE)
    tokens = dot_tokens(export_circuit(circuit, document, "dot").decode("utf-8"))
    assert tokens.count("->") == circuit.to_networkx().number_of_edges()
    assert tokens.count("{") == tokens.count("}") and tokens.count("[") == tokens.count("]")
    labels = {
        tokens[i + 4]
        for i, token in enumerate(tokens[:-4])
        if re.fullmatch("n[0-9]+", token) and tokens[i + 2] == "label"
    }
    assert len(labels) == circuit.to_networkx().number_of_nodes()
    assert quoted(circuit.nodes[0]) in labels
    assert quoted('a\\"&b') == '"a\\\\\\"&amp;b"'


def test_csv_holds_every_edge_and_score() -> None:
    circuit, document = drawn("positions")
    rows = list(csv.reader(io.StringIO(export_circuit(circuit, document, "csv").decode("utf-8"))))
    scores = circuit.scores.to_dict()
    assert [(row[0], float(row[3])) for row in rows[1:]] == [(name, scores[name]) for name in circuit.edges]
    assert all("->".join(row[1:3]) == row[0] for row in rows[1:])


LATEX_COMMANDS = """usepackage begin end centering caption toprule midrule bottomrule texttt to times multicolumn node
draw sffamily scriptsize textbackslash textasciitilde textasciicircum textless textgreater textbar textquotedbl
textasciigrave textquotesingle"""


def balanced(text: str) -> bool:
    """Whether the braces of a LaTeX text match, those that are escaped or in comments left out."""
    depth = 0
    for found in re.finditer(r"\\[\\{}%]|%.*|[{}]", text):
        depth += {"{": 1, "}": -1}.get(found[0], 0)
        if depth < 0:
            return False
    return depth == 0


@pytest.mark.parametrize("kind", GRAPHS)
@pytest.mark.parametrize("name", ["latex", "tikz"])
def test_latex_says_what_strangers_wrote_and_does_not_run_it(name: str, kind: str) -> None:
    text = export_circuit(*drawn(kind, HOSTILE), name).decode("utf-8")
    assert balanced(text) and "\\input" not in text and "漢" not in text
    assert text.count("\\begin{") == text.count("\\end{")
    assert set(re.findall(r"\\([a-zA-Z]+)", text)) <= set(LATEX_COMMANDS.split())


def test_latex_letters() -> None:
    assert latex_text("a_b & 50% #1 {x} $y$ \\z") == r"a\_b \& 50\% \#1 \{x\} \$y\$ \textbackslash{}z"
    assert latex_text("x--y") == "x{-}{-}y"
    circuit = random_circuit(graph_of(dims_of(3, 4)))
    rows = export_circuit(circuit, toy_document(circuit), "latex").decode("utf-8")
    scores = circuit.scores.to_dict()
    strongest = max(circuit.edges, key=lambda name: abs(scores[name]))
    assert f"1 & \\texttt{{{latex_text(strongest.partition('->')[0])}}}" in rows and "and " in rows


def test_neuronpedia_obeys_its_schema() -> None:
    """The required keys and the types of `graph-schema.json`, version 1.0.0."""
    node_types = {"node_id": str, "feature": type(None), "layer": str, "ctx_idx": int, "feature_type": str}
    node_types |= {"jsNodeId": str, "clerp": str}
    for kind in GRAPHS:
        circuit, document = drawn(kind, HOSTILE)
        content = json.loads(export_circuit(circuit, document, "neuronpedia"))
        assert set(content) == {"metadata", "qParams", "nodes", "links"}
        assert {"slug", "scan", "prompt_tokens", "prompt"} <= set(content["metadata"])
        assert re.fullmatch("[a-z0-9-]+", content["metadata"]["slug"])
        ids = {node["node_id"] for node in content["nodes"]}
        for node in content["nodes"]:
            assert all(type(node[key]) is wanted for key, wanted in node_types.items())
            assert 0 <= node["ctx_idx"] < len(content["metadata"]["prompt_tokens"])
        pairs = [(link["source"], link["target"]) for link in content["links"]]
        assert len(set(pairs)) == len(pairs) and {end for pair in pairs for end in pair} == ids
        total = sum(data["score"] for *_, data in circuit.to_networkx().edges(data=True))
        assert sum(link["weight"] for link in content["links"]) == pytest.approx(total)


# -- the registries ----------------------------------------------------------------------------------------------------


def test_the_registries() -> None:
    circuit, document = drawn("plain")
    assert all(EXPORTS.get(name).lost.startswith("Lost: ") and EXPORTS.get(name).lost.endswith(".") for name in EXPORTS)
    with pytest.raises(InputError, match="Did you mean 'graphml'"):
        export_circuit(circuit, document, "graphlm")
    with pytest.raises(InputError, match="another circuit"):
        export_circuit(random_circuit(GRAPHS["plain"], seed=1), document, "csv")
    with pytest.raises(InputError, match="Did you mean 'eap-ig-json'"):
        import_circuit("x", "eap-ig-jsn")
    with pytest.raises(InputError, match="at least 1"):
        Made("eap", "logit_diff", "corrupt", 0, "loss")


@pytest.mark.parametrize("name", IMPORTS.names())
def test_files_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    assert "x" in one_line(lambda: import_circuit(tmp_path / "x", name, dims=dims_of()))
    if not IMPORTS.get(name).has_sizes:
        (tmp_path / "x").write_bytes(b"[]")
        with pytest.raises(InputError, match="give dims="):
            import_circuit(tmp_path / "x", name)


def test_what_was_read_is_saved_and_read_again(tmp_path: Path) -> None:
    model = tiny.tiny("gpt2")
    circuit = random_circuit(graph_of(model.dims))
    (tmp_path / "a.json").write_bytes(EAP_IG["eap-ig-json"][0](circuit, toy_document(circuit)))
    for made in (None, LOSS):
        found = import_circuit(tmp_path / "a.json", "eap-ig-json", dims=model.dims, made=made)
        save_circuit(tmp_path / "a.circuit.json", found, model=model, status="imported")
        again = load_circuit(tmp_path / "a.circuit.json")
        assert again.edges == circuit.edges and again.selection["rule"] == "imported"
        assert (again.scores is None) == (made is None)


def test_import_reads_what_export_writes(tmp_path: Path) -> None:
    circuit, document = drawn("plain")
    for name in EAP_IG:
        (path,) = write_export(tmp_path / f"a{EXPORTS.get(name).suffix}", export_circuit(circuit, document, name))
        assert import_circuit(path, name, dims=circuit.graph.dims).edges == circuit.edges
