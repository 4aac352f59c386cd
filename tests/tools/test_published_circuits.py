"""The published circuits: every count and role as the sources have them, and files that need no model."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mechinterp as mi
from mechinterp.base.canonical_json import render_json
from mechinterp.base.errors import FormatError, InputError, ModelNotAvailable
from mechinterp.circuit_file.schema import CircuitFile, circuit_sha256
from mechinterp.circuit_file.store import check_hashes, open_circuit_file, plain_content, seal
from mechinterp.circuit_file.verify.warnings import stated_warnings
from mechinterp.cli import app as cli
from mechinterp.graphs.graph import graph_of
from mechinterp.models.sites import Edge
from tests.support.known_circuits import FOLDER, known
from tools.published_circuits import tracr
from tools.published_circuits.entry import between, out_of
from tools.published_circuits.ioi import HEADS, KEPT_AT, MLPS, NAIVE, ROLE_EDGES
from tools.published_circuits.write import write_library

CIRCUITS = Path(__file__).parents[2] / "circuits"
# Edges (less those inside heads, which ACDC counts too), or for circuits of nodes how many nodes have a role.
COUNTS = {
    "docstring-heimersheim2023-edges": 24,
    "docstring-heimersheim2023-heads": 11,
    "greater-than-hanna2023-core": 188,
    "greater-than-hanna2023-extended": 235,
    "ioi-wang2022-edges-acdc": 963,
    "ioi-wang2022-edges-auto-circuit": 739,
    "ioi-wang2022-edges-heads": 124 + 45 + 13,
    "ioi-wang2022-heads": 26,
    "ioi-wang2022-naive": 13,
    "tracr-reverse-resample": 2,
    "tracr-reverse-zero": 11,
    "tracr-xproportion-resample": 3,
    "tracr-xproportion-zero": 7,
}


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def path_of(name: str) -> Path:
    return CIRCUITS / f"{name}.circuit.json"


def document(name: str) -> CircuitFile:
    return open_circuit_file(path_of(name)).document


def edges(name: str) -> set[str]:
    return {edge.name for edge in document(name).edges}


def kinds(names: set[str]) -> Counter[tuple[str, str]]:
    """How many edges go from one kind of node to another."""
    parsed = [Edge.parse(name) for name in names]
    return Counter((edge.writer.kind, edge.reader.kind) for edge in parsed)


def roles(name: str) -> dict[str, set[str]]:
    return {key: set(role.nodes) for key, role in document(name).roles.items()}


# -- the files ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_importer_writes_the_stored_files(tmp_path: Path) -> None:
    written = write_library(tmp_path)
    assert {path.name for path in written} == {path_of(name).name for name in COUNTS}
    for path in written:
        assert path.read_bytes() == (CIRCUITS / path.name).read_bytes()


def test_every_published_file_is_the_importer_s() -> None:
    found = [path.name.removesuffix(".circuit.json") for path in CIRCUITS.glob("*.circuit.json")]
    assert {name for name in found if document(name).status == "published"} == set(COUNTS)


@pytest.mark.parametrize("name", sorted(COUNTS))
def test_a_file_loads_without_a_model_and_has_its_count(name: str) -> None:
    opened = open_circuit_file(path_of(name))
    check_hashes(opened)
    circuit, stated = mi.load_circuit(path_of(name)), opened.document
    placed = [node for role in stated.roles.values() for node in role.nodes]
    assert len(placed) == len(set(placed))
    assert (len(placed) if circuit.graph.level == "node" else circuit.n_edges) == COUNTS[name]
    assert circuit.n_edges == len(stated.edges) and set(placed) <= set(circuit.nodes)
    assert circuit.selection["expansion"]
    assert stated.citation is not None and stated.citation.bibtex is not None and stated.derived_from
    assert all(origin.commit or not origin.path for origin in stated.derived_from)
    assert all(role.color and role.label for role in stated.roles.values()) and stated.roles
    assert not stated.evaluation and not stated.provenance.versions


@pytest.mark.parametrize("name", sorted(COUNTS))
def test_verify_checks_what_it_can_and_says_that_the_model_is_absent(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ModelNotAvailable, match=r"claims that need no model hold.*model not available offline"):
        mi.verify(path_of(name))
    if name in ("greater-than-hanna2023-core", "tracr-reverse-zero"):
        assert cli.main(["verify", name]) == cli.NO_MODEL == 3
        shown = capsys.readouterr()
        assert shown.err.count("\n") == 1 and "model not available offline" in shown.err
        assert "only hash-checked" in shown.out and "no evaluation" in shown.out and "verified" not in shown.out
        assert cli.main(["verify", name, "--strict"]) == 1  # what is warned of needs no model


PUBLISHED = {
    "no scores",
    "no evaluation",
    "self-declared status",
    "self-declared citation",
    "roles without predictions",
}


@pytest.mark.parametrize("name", sorted(COUNTS))
def test_a_published_circuit_is_warned_of_as_what_it_is(name: str) -> None:
    """Nothing of it was measured here, and its roles are the publication's words."""
    stated = document(name)
    more = set() if name.startswith("tracr") else {"weights not stated"}
    more |= {"model under a known name"} if name.startswith("docstring") else set()
    more |= {"numbers in words"} if "%" in stated.description else set()
    assert {warning.name for warning in stated_warnings(stated)} == PUBLISHED | more


def resealed(path: Path, folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    content = json.loads(path.read_text("utf-8"))
    change(content)
    content["selection"]["n_edges"] = len(content["edges"])
    del content["integrity"]
    target = folder / path.name
    target.write_text(render_json(plain_content(seal(content, None))), "utf-8")
    return target


@pytest.mark.slow
def test_an_edge_too_few_is_a_failed_claim(tmp_path: Path) -> None:
    def drop(name: str) -> Callable[[dict[str, Any]], None]:
        return lambda content: content.update(edges=[edge for edge in content["edges"] if edge["name"] != name])

    def failed(name: str, edge: str) -> set[str]:
        return {claim.name for claim in mi.verify(resealed(path_of(name), tmp_path, drop(edge))).failed}

    # Where edges were chosen, one less only changes their number, unless it leaves others behind on no path. Where
    # nodes were chosen, one edge less is no choice of nodes.
    assert failed("ioi-wang2022-edges-heads", "a7.h3->a10.h0<q>") == {"selection.n_selected", "model"}
    assert failed("greater-than-hanna2023-core", "m11->logits") >= {"paths", "model"}
    assert failed("ioi-wang2022-naive", "a7.h3->a9.h9<q>@end") == {"edges", "model"}  # nodes are whole or not there


def test_a_changed_file_is_a_failed_claim(tmp_path: Path) -> None:
    path = Path(shutil.copy(path_of("greater-than-hanna2023-core"), tmp_path))
    path.write_text(path.read_text("utf-8").replace("188 edges", "189 edges"), "utf-8")
    assert {claim.name for claim in mi.verify(path).failed} == {"file hash", "model"}


def test_a_file_verifies_with_its_model() -> None:
    for program in ("reverse", "xproportion"):
        model = known(f"{program}_published").model
        for ablation in ("zero", "resample"):
            found = mi.verify(path_of(f"tracr-{program}-{ablation}"), model=model)
            assert found.ok and "model.weights_sha256" in {claim.name for claim in found.claims}
    other = known("xproportion_published").model
    assert not mi.verify(path_of("tracr-reverse-zero"), model=other).ok


# -- the schema --------------------------------------------------------------------------------------------------------


def test_only_a_published_file_without_results_may_leave_the_weights_out(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="weights_sha256 is missing"):
        resealed(path_of("ioi-wang2022-naive"), tmp_path, lambda content: content.update(status="discovered"))


def test_without_weights_the_hash_to_cite_tells_models_apart() -> None:
    one = document("ioi-wang2022-naive")
    other = one.model_copy(update={"model": one.model.model_copy(update={"revision": "f" * 40})})
    assert circuit_sha256(one) != circuit_sha256(other)


def test_a_role_edge_between_unknown_roles_is_refused(tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["role_edges"][0]["target"] = "name mover"

    with pytest.raises(FormatError, match="names 'name mover', which is neither a role nor 'logits'"):
        resealed(path_of("ioi-wang2022-heads"), tmp_path, change)


# -- indirect object identification ------------------------------------------------------------------------------------


def test_ioi_has_26_heads_in_7_roles_at_their_positions() -> None:
    sizes = {
        **{"name-mover": 3, "backup-name-mover": 8, "negative-name-mover": 2, "s-inhibition": 4},
        **{"induction": 4, "duplicate-token": 3, "previous-token": 2},
    }
    assert {key: len(some) for key, some in HEADS.items()} == sizes
    stated = document("ioi-wang2022-heads")
    assert stated.graph.positions == ("S1+1", "S2", "end", "rest") and stated.graph.answers == "end"
    assert roles("ioi-wang2022-heads") == {k: {f"{h}@{KEPT_AT[k]}" for h in some} for k, some in HEADS.items()}
    writing = {name for name in stated.nodes if name.startswith("a")}
    assert len(writing) == 26  # no head is kept at another position
    assert set(stated.graph.positions) - {"rest"} <= set(mi.load_task("ioi").spec.positions)


def test_the_naive_circuit_is_a_part_of_it() -> None:
    assert {key: len(some) for key, some in NAIVE.items()} == {
        **{"name-mover": 3, "s-inhibition": 4, "induction": 2, "duplicate-token": 2, "previous-token": 2}
    }
    assert all(set(some) <= set(HEADS[key]) for key, some in NAIVE.items())
    assert edges("ioi-wang2022-naive") < edges("ioi-wang2022-heads")


def test_a_circuit_of_nodes_keeps_what_a_kept_head_reads() -> None:
    """Each head reads the input and the MLPs before it: query at its own position, keys and values everywhere."""
    found, stated = edges("ioi-wang2022-heads"), document("ioi-wang2022-heads")
    into = [name for name in found if "->a9.h9<" in name and name.startswith(("m", "input"))]
    assert len(into) == (1 + 2 * 4) * (1 + 9)  # q at end; k and v at four positions; the input and nine MLPs
    assert {name.rpartition("@")[2] for name in into if "<q>" in name} == {"end"}
    assert not any("->a9.h8<" in name for name in found)
    assert stated.selection.n_selected > len(stated.edges)


def test_the_15_role_edges() -> None:
    assert len(ROLE_EDGES) == 15 == len(document("ioi-wang2022-edges-acdc").role_edges or ())
    assert not any(edge.target == "induction" and "q" in edge.inputs for edge in ROLE_EDGES)
    used = {place for edge in ROLE_EDGES for place in (edge.positions or {}).values()}
    assert used == {"IO", "S1", "S1+1", "S2", "end"}


def test_124_edges_between_heads_are_in_every_expansion() -> None:
    literal, acdc = edges("ioi-wang2022-edges-heads"), edges("ioi-wang2022-edges-acdc")
    auto_circuit = edges("ioi-wang2022-edges-auto-circuit")
    between_heads = {name for name in literal if kinds({name}) == {("head", "head"): 1}}
    of_role = {head: key for key, some in HEADS.items() for head in some}
    parsed = [Edge.parse(name) for name in between_heads]
    assert Counter((of_role[str(e.writer)], of_role[str(e.reader)], e.channel) for e in parsed) == {
        ("s-inhibition", "backup-name-mover", "q"): 32,
        ("s-inhibition", "name-mover", "q"): 12,
        ("s-inhibition", "negative-name-mover", "q"): 8,
        **{("induction", "s-inhibition", channel): 16 for channel in "kv"},
        **{("duplicate-token", "s-inhibition", channel): 12 for channel in "kv"},
        **{("previous-token", "induction", channel): 8 for channel in "kv"},
    }
    assert len(between_heads) == 124
    for names in (acdc, auto_circuit):
        assert {name for name in names if kinds({name}) == {("head", "head"): 1}} == between_heads
        assert literal < names


def test_the_963_edges_of_acdc() -> None:
    names = edges("ioi-wang2022-edges-acdc")
    assert kinds(names) == {
        **{("head", "head"): 124, ("mlp", "head"): 567, ("head", "mlp"): 123, ("mlp", "mlp"): 66},
        **{("input", "head"): 45, ("input", "mlp"): 12, ("mlp", "logits"): 12, ("head", "logits"): 13},
        ("input", "logits"): 1,
    }
    assert len(names) + 3 * 26 == 1041  # with the links inside heads
    assert "m0->a5.h5<q>" in names  # though no role edge says so


def test_acdc_s_rule_as_it_is_worded() -> None:
    """All edges among the members, less input to head, head to head, head to logits; then the role edges."""
    graph = mi.load_circuit(path_of("ioi-wang2022-edges-acdc")).graph
    heads = [head for some in HEADS.values() for head in some]
    readers = [*MLPS, "logits", *(f"{head}<{channel}>" for head in heads for channel in "qkv")]
    members = between(graph, ("input", *MLPS, *heads), readers)
    taken = {("input", "head"), ("head", "head"), ("head", "logits")}
    left = {name for name in members if not set(kinds({name})) & taken}
    assert edges("ioi-wang2022-edges-acdc") == left | edges("ioi-wang2022-edges-heads")


def test_why_auto_circuit_s_739_are_fewer() -> None:
    acdc, auto_circuit = edges("ioi-wang2022-edges-acdc"), edges("ioi-wang2022-edges-auto-circuit")
    assert auto_circuit < acdc
    assert {name for name in auto_circuit if name.endswith("->logits")} == {
        name for name in edges("ioi-wang2022-edges-heads") if name.endswith("->logits")
    }
    of_role = {head: key for key, some in HEADS.items() for head in some}
    asked = {(edge.target, channel) for edge in ROLE_EDGES for channel in edge.inputs}
    for name in auto_circuit:
        edge = Edge.parse(name)
        assert edge.reader.kind != "head" or (of_role[str(edge.reader)], edge.channel) in asked
    assert not any("m11" in name for name in auto_circuit)


# -- greater-than, docstring, Tracr ------------------------------------------------------------------------------------


def test_greater_than() -> None:
    core, extended = edges("greater-than-hanna2023-core"), edges("greater-than-hanna2023-extended")
    assert core < extended and len(extended) + 3 * 9 == 262  # with the links inside heads
    assert set(kinds(extended - core)) == {("mlp", "mlp"), ("mlp", "head")}
    assert all("<" not in name or "<q>" in name for name in extended - core)
    assert roles("greater-than-hanna2023-core") == {
        "early-heads-3-5": {"a0.h3", "a0.h5"},
        "early-head-1": {"a0.h1"},
        "early-mlps": {"m0", "m1", "m2", "m3"},
        "middle-heads": {"a5.h5", "a6.h1", "a6.h9", "a7.h10", "a8.h11", "a9.h1"},
        "late-mlps": {"m8", "m9", "m10", "m11"},
    }
    assert "a8.h11->m8" in core and "a8.h11->a9.h1<q>" not in core and "a0.h3->m0" not in core


def test_docstring() -> None:
    six = {"a0.h5", "a1.h2", "a1.h4", "a2.h0", "a3.h0", "a3.h6"}
    names = edges("docstring-heimersheim2023-edges")
    assert set().union(*roles("docstring-heimersheim2023-edges").values()) == six
    heads_and_inputs = {(str(e.reader), e.channel) for e in map(Edge.parse, names) if e.reader.kind == "head"}
    assert len(names) + len(heads_and_inputs) == 37  # ACDC's list has one more entry for each input of a head
    eleven = set().union(*roles("docstring-heimersheim2023-heads").values())
    assert eleven == six | {"a0.h2", "a0.h4", "a1.h0", "a0.h1", "a2.h3"}
    assert names < edges("docstring-heimersheim2023-heads")


@pytest.mark.parametrize("program", ["reverse", "xproportion"])
def test_tracr_s_truths_are_those_that_the_test_models_come_with(program: str) -> None:
    truths = json.loads((FOLDER / f"{program}_published.json").read_text("utf-8"))["truth"]
    for ablation, key in (("zero", "published_acdc"), ("resample", "published_miller_resample")):
        assert edges(f"tracr-{program}-{ablation}") == {our_name(*edge) for edge in truths[key]["edges"]}


def our_name(source: str, channel: str) -> str:
    node, _, part = channel.rpartition(".")
    reader = "logits" if channel == "output" else node if part == "in" else f"{node}<{part}>"
    return f"{'input' if '|' in source else source}->{reader}"


@pytest.mark.parametrize("program", ["reverse", "xproportion"])
@pytest.mark.parametrize("ablation", ["zero", "resample"])
def test_tracr_s_circuits_do_the_whole_task_under_their_own_ablation(program: str, ablation: str) -> None:
    """The compiled model itself says so: with all other edges replaced its outputs stay."""
    this, circuit = known(f"{program}_published"), mi.load_circuit(path_of(f"tracr-{program}-{ablation}"))
    replacement = {"zero": "zero", "resample": "corrupt"}[ablation]
    result = mi.evaluate(this.model, circuit, this.pairs, metric="l2_to_clean", replacement=replacement)
    assert result.circuit_value == pytest.approx(0, abs=1e-5)  # float32
    assert result.empty_value > 0.1


# -- what the importer refuses -----------------------------------------------------------------------------------------


def test_edges_on_no_path_and_unknown_nodes_are_refused() -> None:
    entry = next(entry for entry in tracr.entries() if entry.name == "tracr-reverse-resample")
    more = entry.chosen | entry.graph.mask_of(["m0->m1"])
    with pytest.raises(InputError, match="1 of the edges lie on no path"):
        type(entry)(**{**vars(entry), "chosen": more}).circuit()
    with pytest.raises(InputError, match=r"no node 'a9\.h99@end'"):
        out_of(graph_of(entry.graph.dims, level="node"), ["a9.h99@end"])


def test_all_edges_out_of_a_node_are_those_that_the_graph_has() -> None:
    graph = graph_of(known("reverse_published").model.dims, level="node", positions=("end",))
    chosen = out_of(graph, ["m1@end", "input@rest"])
    names = {graph.edge_name(r, w) for r, w in chosen.nonzero().tolist()}
    expected = {n for n in graph.edge_names() if n.startswith("m1->") and (n.endswith(("@end", "->logits")))}
    expected |= {n for n in graph.edge_names() if n.startswith("input->") and n.endswith("@rest")}
    assert names == expected and torch.equal(chosen, chosen & graph.possible)
