"""Circuit files whose nodes are features: they name their dictionaries, and do not run with other bytes."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import mechinterp as mi
from mechinterp.base.canonical_json import render_json
from mechinterp.base.errors import FormatError, HubNotReached, InputError, UnsupportedError
from mechinterp.circuit_file import bases as stated
from mechinterp.circuit_file.formats.exports import export_circuit
from mechinterp.circuit_file.schema import CircuitFile, circuit_sha256
from mechinterp.circuit_file.store import file_sha256, open_circuit_file
from mechinterp.circuit_file.summary import ranked_nodes
from mechinterp.cli.app import main
from mechinterp.features.load import BUNDLED
from mechinterp.tasks.schema import checked
from mechinterp.views.report.write_page import write_page


@pytest.fixture(scope="module")
def model() -> mi.HookManager:
    return mi.load_model("bundled")


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory, model: mi.HookManager) -> Path:
    """A circuit with features of a copy of a bundled dictionary, which is beside it, and of one of the package."""
    folder = tmp_path_factory.mktemp("circuit")
    shutil.copytree(BUNDLED / "m3", folder / "dictionary")
    bases = [mi.load_basis(folder / "dictionary", model=model), mi.load_basis("bundled:a1", model=model)]
    task = mi.load_task("ioi")
    pairs = task.pairs(model, n=8)
    chosen = [mi.top_features(model, pairs, basis, 4, method="atp") for basis in bases]
    graph = mi.build_graph(model, features={**chosen[0], **chosen[1]})
    circuit = mi.select(graph, mi.score_edges(model, graph, pairs, method="eap"), edges=120)
    result = mi.evaluate(model, circuit, task.pairs(model, n=8, split="test"), n_random=1)
    path = folder / "x.circuit.json"
    mi.save_circuit(path, circuit, model=model, task=task, result=result, title="Features")
    return path


def copied(stored: Path, folder: Path) -> Path:
    """The circuit and its dictionary in another folder."""
    shutil.copytree(stored.parent, folder, dirs_exist_ok=True)
    return folder / stored.name


def test_a_file_with_features_has_version_2_and_reads_as_it_was(stored: Path, model: mi.HookManager) -> None:
    document = open_circuit_file(stored).document
    records = document.graph.features
    assert document.schema_version == 2 and records is not None
    assert [(one.basis, one.where, one.site_in, one.site_out) for one in records] == [
        ("a1", "bundled:a1", "attn_out.1", "attn_out.1"),
        ("m3", "dictionary", "mlp_in.3", "mlp_out.3"),
    ]
    assert records[1].sha256 == mi.load_basis("bundled:m3").sha256
    read = mi.load_circuit(stored)
    assert read.graph.digest() == document.graph.sha256 and read.nodes == document.nodes
    pairs = mi.load_task("ioi").pairs(model, n=4)
    with pytest.raises(InputError, match=r"features of the basis 'a1'.*not loaded.*load_circuit\(path, bases=True\)"):
        mi.evaluate(model, read, pairs)
    loaded = mi.load_circuit(stored, bases=True)
    assert mi.evaluate(model, loaded, pairs, n_random=1).n_examples == 4
    other = mi.load_circuit(stored, bases=["bundled:m3", mi.load_basis("bundled:a1")])
    assert other.digest() == loaded.digest() == read.digest()


def test_the_hash_to_cite_is_over_the_dictionary_and_not_over_where_it_is(stored: Path) -> None:
    document = open_circuit_file(stored).document
    records = document.graph.features or ()

    def with_first(**changed: Any) -> str:
        graph = document.graph.model_copy(update={"features": (records[0].model_copy(update=changed), *records[1:])})
        return circuit_sha256(document.model_copy(update={"graph": graph}))

    assert with_first() == document.integrity.circuit_sha256
    assert with_first(where="elsewhere", format="another", options={"k": 3}) == document.integrity.circuit_sha256
    assert with_first(sha256="0" * 64) != document.integrity.circuit_sha256
    assert with_first(numbers=(1,)) != document.integrity.circuit_sha256


@pytest.mark.slow
def test_it_verifies_and_its_dictionary_may_be_elsewhere(stored: Path, tmp_path: Path) -> None:
    found = mi.verify(stored)
    assert found.ok and {"basis a1", "basis m3"} <= {claim.name for claim in found.claims}
    assert any("dictionary of m3" in part.words for part in found.extent.recomputed)
    moved = copied(stored, tmp_path / "moved")
    (moved.parent / "dictionary").rename(moved.parent / "renamed")
    lost = mi.verify(moved)
    assert [claim.name for claim in lost.failed] == ["basis m3", "evaluation"]
    assert "give it: --features WHERE" in lost.failed[0].detail
    assert mi.verify(moved, features=[moved.parent / "renamed"]).ok
    assert mi.reevaluate(moved, features=["bundled:m3"], examples=4).evaluation.n_examples == 4
    other = mi.load_basis("bundled:m3").keep(range(200))  # of the same name: not passed over for the one of the file
    refused = mi.verify(stored, features=[other])
    assert [claim.name for claim in refused.failed] == ["basis m3", "evaluation"]
    assert "that was given is not the one of the circuit" in refused.failed[0].detail


@pytest.mark.slow
def test_one_changed_byte_of_the_dictionary_is_refused(stored: Path, tmp_path: Path) -> None:
    path = copied(stored, tmp_path)
    (tensors,) = (path.parent / "dictionary").glob("*.safetensors")
    content = bytearray(tensors.read_bytes())
    content[-1] ^= 1
    tensors.write_bytes(content)
    found = mi.verify(path)
    assert [claim.name for claim in found.failed] == ["basis m3", "evaluation"]
    assert "was changed after it was written" in found.failed[0].detail
    with pytest.raises(FormatError, match="was changed after it was written"):
        mi.load_circuit(path, bases=True)
    assert main(["verify", str(path)]) == 1
    # The folder written anew around the byte: a valid dictionary, but another one.
    content[-1] ^= 1
    tensors.write_bytes(content)
    basis = mi.load_basis(path.parent / "dictionary")
    mi.save_basis(path.parent / "dictionary", basis.keep(range(basis.n_features - 1)))
    found = mi.verify(path)
    assert [claim.name for claim in found.failed] == ["basis m3", "evaluation"]
    assert "is not the one of the circuit: it has sha256" in found.failed[0].detail


def test_a_dictionary_on_a_hub_that_is_not_reached_is_not_a_failure(
    stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreached(*_: Any, **__: Any) -> None:
        raise HubNotReached("The hub cannot be reached.")

    monkeypatch.setattr(stated, "load_bases", unreached)
    with pytest.raises(mi.circuit_file.verify.claims.UnverifiedModel, match="claims hold, the others are unchecked"):
        mi.verify(stored)


def test_a_dictionary_in_memory_cannot_be_named_in_a_file(model: mi.HookManager, tmp_path: Path) -> None:
    pairs, basis = mi.load_task("ioi").pairs(model, n=4), mi.load_basis("bundled:m3").keep(range(9))
    made = mi.transcoder("mlp_in.3", "mlp_out.3", basis.W_enc[0], basis.W_dec[:, 0])
    graph = mi.build_graph(model, features={made: [0, 1]})
    circuit = mi.select(graph, mi.score_edges(model, graph, pairs, method="eap"), edges=20)
    with pytest.raises(InputError, match=r"'m3' is in memory only.*mi\.save_basis\(folder, basis\)"):
        mi.save_circuit(tmp_path / "x.circuit.json", circuit, model=model)
    assert not list(tmp_path.iterdir())


def forged(stored: Path, target: Path, change: Any) -> Path:
    """The file with other content and hashes that fit it."""
    content = json.loads(stored.read_text("utf-8"))
    change(content)
    with suppress(InputError):  # of a document that the schema refuses there is none
        content["integrity"]["circuit_sha256"] = circuit_sha256(checked(CircuitFile, content, "forged"))
    content["integrity"]["file_sha256"] = file_sha256(content)
    target.write_text(render_json(content), "utf-8")
    return target


def first(**values: Any) -> Any:
    return lambda content: content["graph"]["features"][0].update(values)


FORGERIES: dict[str, tuple[Any, str]] = {
    "version 1": (lambda content: content.update(schema_version=1), "version is 2 if, and only if"),
    "no features": (lambda content: content["graph"].pop("features"), "version is 2 if, and only if"),
    "version 3": (lambda content: content.update(schema_version=3), "reads 1 and 2"),
    "no numbers": (first(numbers=[]), "numbers"),
    "not in order": (first(numbers=[3, 1]), "different whole numbers in order"),
    "too many": (
        lambda content: content["graph"]["features"][1].update(numbers=list(range(10**5))),
        "larger than this version reads",
    ),
    "another site": (first(site_out="nonsense.1"), "nonsense"),
    "a state of the stream": (first(site_in="resid_pre.1", site_out="resid_pre.1"), "state of the residual stream"),
    "a layer too many": (first(basis="a9", site_in="attn_out.9", site_out="attn_out.9"), "writes to layer 9"),
    "other options": (first(options={"trust": True}), "options"),
    "other features": (first(numbers=[0]), "writers, readers, edges"),
}


@pytest.mark.parametrize("case", FORGERIES)
def test_what_a_forged_file_says_of_features_is_refused_in_one_line(stored: Path, tmp_path: Path, case: str) -> None:
    change, message = FORGERIES[case]
    path = forged(stored, copied(stored, tmp_path), change)
    with pytest.raises(FormatError, match=message) as caught:
        mi.load_circuit(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize("where", ["/etc", "../dictionary", "a/../../b", "~/x"])
def test_a_file_does_not_choose_which_folders_are_opened(stored: Path, tmp_path: Path, where: str) -> None:
    path = forged(stored, copied(stored, tmp_path), lambda content: content["graph"]["features"][1].update(where=where))
    with pytest.raises(FormatError, match=r"outside the working folder.*give it: --features WHERE"):
        mi.load_circuit(path, bases=True)
    assert mi.load_circuit(path, bases=["bundled:m3"]).graph.features[1].chosen is not None


def test_foreign_formats_say_what_they_do_not_hold(stored: Path) -> None:
    circuit, document = mi.load_circuit(stored), open_circuit_file(stored).document
    for name in ("eap-ig-json", "eap-ig-pt"):
        with pytest.raises(UnsupportedError, match="does not support features of dictionaries as nodes"):
            export_circuit(circuit, document, name)
    for name in ("csv", "dot", "graphml", "cytoscape", "tikz", "latex"):
        assert export_circuit(circuit, document, name)
    written = export_circuit(circuit, document, "neuronpedia")
    assert isinstance(written, bytes)
    nodes = json.loads(written)["nodes"]
    own = {node["node_id"]: node["feature"] for node in nodes}
    assert {f"m3.f{n}": n for n in circuit.graph.features[1].numbers if f"m3.f{n}" in own}.items() <= own.items()


def test_edges_into_heads_count_for_the_attention_that_is_one_node(stored: Path) -> None:
    document = open_circuit_file(stored).document
    rows = {node.name: node for node in ranked_nodes(document)}
    into = [edge.name for edge in document.edges if "->a1.h" in edge.name]
    assert into and rows["a1"].n_in == len(into)
    assert rows["a2.h0"].n_in == sum("->a2.h0<" in edge.name for edge in document.edges)


def test_commands_show_and_draw_features(stored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(stored), "--top", "99"]) == 0
    shown = capsys.readouterr().out
    feature = next(name for name in mi.load_circuit(stored).nodes if name.startswith("m3.f"))
    assert feature in shown
    assert main(["diff", str(stored), "ioi-bundled-eap-ig"]) == 1  # they differ
    assert "different graphs" in capsys.readouterr().out
    page = write_page(stored, tmp_path / "x.html")
    top = mi.feature_tokens(mi.load_model("bundled"), mi.load_basis("bundled:m3"), [int(feature.partition(".f")[2])], 1)
    text = (tmp_path / "x.html").read_text("utf-8")
    assert f'"{feature}": "{top["text"][0].replace(" ", "␣")}' in text.replace('":"', '": "')
    assert not any("features" in note for note in page.notes)
    assert re.search(r'"fires": ?{[^}]*"(m3|a1)\.f\d+": ?"prompt 1: [^"]+ \d', text)


SMALL: dict[str, Any] = {
    "examples": 8,
    "validation_examples": 8,
    "test_examples": 8,
    "resamples": 0,
    "roles": False,
    "curve": False,
}


@pytest.mark.slow
def test_a_run_takes_the_strongest_features_and_its_file_verifies(tmp_path: Path) -> None:
    spec = mi.RunSpec("ioi", features=("bundled:m2", "bundled:m3"), top=5, level="feature", nodes=14, method="eap")
    made = mi.discover(replace(spec, **SMALL, out=tmp_path))
    assert made.path.name == "ioi-bundled-eap-features.circuit.json"
    graph = made.circuit.graph
    assert graph.level == "node" and sum(len(family.numbers) for family in graph.features) == 5
    bases = [mi.load_basis(f"bundled:m{layer}") for layer in (2, 3)]
    expected = mi.top_features(made.model, made.train, bases, 5)
    assert {family.sha256: family.numbers for family in graph.features} == {b.sha256: n for b, n in expected.items()}
    assert mi.verify(made.path).ok


@pytest.mark.slow
def test_a_file_with_features_of_the_stream_before_the_norm_verifies(model: mi.HookManager, tmp_path: Path) -> None:
    """The weights of a bundled transcoder, with ReLU, at another site; its folder beside the circuit file."""
    own = mi.load_basis("bundled:m2")
    basis = mi.transcoder("resid_mid.2", "mlp_out.2", own.W_enc[0], own.W_dec[:, 0], b_enc=own.b_enc)
    task, folder = mi.load_task("ioi"), tmp_path / "dictionary"
    pairs = task.pairs(model, n=8)
    mi.save_basis(folder, basis)
    graph = mi.build_graph(model, features=mi.top_features(model, pairs, mi.load_basis(folder), 4, method="atp"))
    circuit = mi.select(graph, mi.score_edges(model, graph, pairs, method="eap"), edges=120)
    assert any("<in>" in edge for edge in circuit.edges)
    result = mi.evaluate(model, circuit, task.pairs(model, n=8, split="test"), n_random=1)
    path = tmp_path / "x.circuit.json"
    mi.save_circuit(path, circuit, model=model, task=task, result=result, title="Before the norm")
    (record,) = open_circuit_file(path).document.graph.features or ()
    assert (record.site_in, record.site_out) == ("resid_mid.2", "mlp_out.2")
    assert [claim.detail for claim in mi.verify(path).failed] == []


def test_a_run_with_a_cross_layer_transcoder_verifies_and_states_all_its_sites(
    model: mi.HookManager, tmp_path: Path
) -> None:
    """The transcoders of two layers, of which the first writes in both; its folder beside the circuit file."""
    own, later = mi.load_basis("bundled:m2"), mi.load_basis("bundled:m3")
    W_dec = torch.stack([own.W_dec[:, 0], 0.2 * later.W_dec[: own.n_features, 0]], 1)
    made = mi.cross_layer_transcoder(
        own.sites_in, own.sites_out, own.W_enc, [own.W_dec], b_enc=own.b_enc[None], activation=own.activation
    )[0]
    basis = replace(
        made, sites_out=(*own.sites_out, *later.sites_out), W_dec=W_dec, b_dec=torch.zeros(2, len(W_dec[0, 0]))
    )
    mi.save_basis(tmp_path / "dictionary", basis)
    spec = mi.RunSpec("ioi", features=(str(tmp_path / "dictionary"),), top=4, nodes=10, method="eap", level="feature")
    run = mi.discover(replace(spec, **SMALL, out=tmp_path))
    (family,) = run.circuit.graph.features
    assert [str(site) for site in family.later] == ["mlp_out.3"] and run.circuit.graph.split_writers == ("m2", "m3")
    document = open_circuit_file(run.path).document
    (record,) = document.graph.features or ()
    assert (record.site_out, record.later_sites) == ("mlp_out.2", ("mlp_out.3",)) and document.schema_version == 2
    given = [tmp_path / "dictionary"]
    assert [claim.detail for claim in mi.verify(run.path, features=given).failed] == []
    assert mi.load_circuit(run.path, bases=given).digest() == run.circuit.digest()
    page = write_page(run.path, tmp_path / "x.html")
    assert not any("features" in note for note in page.notes)
    # A file that leaves the later layer out is another circuit, and does not run.
    path = forged(run.path, tmp_path / "forged.circuit.json", lambda content: first_of(content).pop("later_sites"))
    assert open_circuit_file(path).document.integrity.circuit_sha256 != document.integrity.circuit_sha256
    with pytest.raises(InputError, match="has other sites than the graph says"):
        mi.load_circuit(path, bases=given)
    assert not mi.verify(path, features=given).ok
    (tensors,) = (tmp_path / "dictionary").glob("*.safetensors")
    content = bytearray(tensors.read_bytes())
    content[-1] ^= 1
    tensors.write_bytes(content)
    with pytest.raises(FormatError, match="was changed after it was written"):
        mi.verify(run.path, features=given)


def first_of(content: Any) -> Any:
    return content["graph"]["features"][0]
