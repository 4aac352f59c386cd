"""Reading other tools' files: the same circuit comes back, and nothing hostile gets in."""

import io
import json
import pickle
import re
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mechinterp.base.errors import FormatError, UnsupportedError, clipped
from mechinterp.base.safe_torch import load_plain
from mechinterp.circuit_file.formats.acdc import circuit_of_acdc, from_acdc
from mechinterp.circuit_file.formats.eap_ig_json import from_eap_ig_json, to_eap_ig_json
from mechinterp.circuit_file.formats.eap_ig_pt import from_eap_ig_pt, to_eap_ig_pt
from mechinterp.circuit_file.formats.edge_pruning import from_edge_pruning
from mechinterp.circuit_file.formats.score_origin import Made
from mechinterp.graphs.circuit import Circuit
from mechinterp.graphs.graph import graph_of
from mechinterp.models.layout import Dims
from tests.support.foreign_files import EAP_IG, LOSS, dims_of, one_line, random_circuit, unscored
from tests.support.toy_circuits import toy_document

SHAPES = st.builds(
    dims_of, layers=st.integers(1, 3), heads=st.integers(1, 3), parallel=st.booleans(), has_mlp=st.just(True)
)


# -- EAP-IG ------------------------------------------------------------------------------------------------------------


def eap_ig_edges(layers: int, heads: int, parallel: bool) -> list[str]:
    """Their edges, built as `Graph.from_model` builds them."""
    stream, edges = ["input"], []
    for layer in range(layers):
        own = [f"a{layer}.h{head}" for head in range(heads)]
        edges += [f"{node}->{head}<{letter}>" for node in stream for head in own for letter in "qkv"]
        edges += [f"{node}->m{layer}" for node in (stream if parallel else stream + own)]
        stream += [*own, f"m{layer}"]
    return edges + [f"{node}->logits" for node in stream]


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(SHAPES, st.integers(0, 99), st.sampled_from((torch.float32, torch.float64)))
def test_eap_ig_round_trip(dims: Dims, seed: int, dtype: torch.dtype) -> None:
    circuit = random_circuit(graph_of(dims), seed, dtype=dtype)
    document = toy_document(circuit)
    for write, read in EAP_IG.values():
        for given_dims in (dims, None):
            again = read(write(circuit, document), given_dims, LOSS)
            assert again.edges == circuit.edges and again.nodes == circuit.nodes
            assert again.scores is not None and again.scores.to_dict() == circuit.scores.to_dict()
        assert again.graph.digest() == circuit.graph.digest() and again.graph.dims.n_ctx == 0
        bare = read(write(circuit if seed % 2 else unscored(circuit), document), dims)
        assert bare.edges == circuit.edges and bare.scores is None and bare.graph.dims == dims
        turned = read(write(circuit, document), dims, Made("m", "kl", "zero", 7, "performance")).scores
        assert turned.to_dict() == pytest.approx({name: -score for name, score in circuit.scores.to_dict().items()})
        assert (turned.method, turned.metric, turned.replacement, turned.count) == ("m", "kl", "zero", 7)


@pytest.mark.parametrize("parallel", [False, True])
def test_eap_ig_files_are_theirs(parallel: bool) -> None:
    circuit = random_circuit(graph_of(dims_of(2, 3, parallel=parallel)))
    content = json.loads(to_eap_ig_json(circuit, toy_document(circuit)))
    assert sorted(content["edges"]) == sorted(eap_ig_edges(2, 3, parallel))
    assert content["cfg"] == {"n_layers": 2, "n_heads": 3, "parallel_attn_mlp": parallel, "d_model": 16}
    assert {name for name, entry in content["nodes"].items() if entry["in_graph"]} == set(circuit.nodes)
    tables = torch.load(io.BytesIO(to_eap_ig_pt(circuit, toy_document(circuit))), weights_only=True)
    for layer, head, i in ((0, 1, 0), (1, 2, 1), (1, 0, 2)):  # their forward_index and backward_index
        row, column = 1 + layer * 4 + head, layer * 10 + 3 * i + head
        assert tables["src_nodes"][row] == f"a{layer}.h{head}"
        assert tables["dst_nodes"][column] == f"a{layer}.h{head}<{'qkv'[i]}>"
    for name, entry in content["edges"].items():
        writer, _, reader = name.partition("->")
        place = tables["src_nodes"].index(writer), tables["dst_nodes"].index(reader)
        assert float(tables["edges_scores"][place]) == entry["score"]
        assert bool(tables["edges_in_graph"][place]) == entry["in_graph"]


def test_edges_on_no_path_are_counted_and_dropped() -> None:
    graph = graph_of(dims_of(2, 2))
    content = json.loads(to_eap_ig_json(random_circuit(graph, share=0), toy_document(random_circuit(graph, share=0))))
    for name in ("a0.h0->m0", "m1->logits"):
        content["edges"][name]["in_graph"] = True
    circuit = from_eap_ig_json(json.dumps(content).encode())
    assert circuit.edges == ("input->logits",) and circuit.n_selected == 3
    content["edges"]["input->logits"]["in_graph"] = False
    with pytest.raises(FormatError, match="none of the 2 edges lies on a path"):
        from_eap_ig_json(json.dumps(content).encode())
    for name in ("a0.h0->m0", "m1->logits"):
        content["edges"][name]["in_graph"] = False
    alone = from_eap_ig_json(json.dumps(content).encode(), made=LOSS)  # a file of scores alone
    assert alone.n_edges == 0 and alone.scores is not None
    assert "if made= says" in one_line(from_eap_ig_json, json.dumps(content).encode())


def changed(*place: str, to: Any) -> Any:
    def change(content: dict[str, Any]) -> None:
        for key in place[:-1]:
            content = content[key]
        content[place[-1]] = to

    return change


EDGE = ("edges", "input->m0")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.pop("nodes"), "lacks the key 'nodes'"),
        (changed("neurons", to={}), "not of neurons or nodes"),
        (changed("more", to={}), "unknown key: 'more'"),
        (changed("cfg", to=[]), "cfg must be a mapping"),
        (changed("cfg", "n_layers", to=10**9), "too large"),
        (changed("cfg", "n_layers", to=10**18), "cfg.n_layers"),
        (changed("cfg", "n_layers", to=True), "cfg.n_layers"),
        (changed("cfg", "n_heads", to=0), "cfg.n_heads"),
        (changed("cfg", "n_heads", to=2.0), "cfg.n_heads"),
        (changed("cfg", "parallel_attn_mlp", to=1), "parallel_attn_mlp"),
        (changed("cfg", "n_key_value_heads", to=1), "key and value heads"),
        (changed("nodes", to=[]), "nodes must be"),
        (changed("nodes", "a9.h9", to={"in_graph": True}), "no node 'a9.h9'"),
        (changed("nodes", "m0", to={"in_graph": True, "score": 1.0}), "not of nodes"),
        (changed("nodes", "m0", to={"in_graph": 1}), "true or false"),
        (changed("nodes", "m0", to={"in_graph": True, "neurons": [True]}), "not of neurons or nodes"),
        (changed("edges", to=[]), "edges must be"),
        (changed("edges", "input->m9", to={"in_graph": True}), "edge 'input->m9' has a reader"),
        (changed("edges", "m1->m0", to={"in_graph": True}), "'m1->m0' is not an edge"),
        (changed("edges", "input->a0.h0", to={"in_graph": True}), "Did you mean"),
        (changed("edges", "x" * 10**5, to={"in_graph": True}), "has a writer"),
        (changed("edges", "input->m0\n", to={"in_graph": True}), "has a reader"),
        (changed(*EDGE, to=True), "must be a mapping"),
        (changed(*EDGE, "in_graph", to="yes"), "in_graph must be"),
        (changed(*EDGE, "score", to="1"), "score must be a number"),
        (changed(*EDGE, "score", to=True), "score must be a number"),
        (changed(*EDGE, "score", to=None), "score must be a number"),
        (changed(*EDGE, "weight", to=1.0), "unknown key: 'weight'"),
        (lambda c: c["edges"]["input->m0"].pop("score"), "all or none"),
        (lambda c: c["edges"].pop("input->m0"), "all or none"),
    ],
)
def test_hostile_eap_ig_json(change: Any, words: str) -> None:
    circuit = random_circuit(graph_of(dims_of(2, 2)))
    content = json.loads(to_eap_ig_json(circuit, toy_document(circuit)))
    change(content)
    assert words in one_line(from_eap_ig_json, json.dumps(content).encode())


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"[" * 10**5, b'{"a": NaN}', b'{"a": 1e999}', b'{"a": 1, "a": 2}', b"\xff\xfe"],
)
def test_what_is_no_json_of_theirs(content: bytes) -> None:
    one_line(from_eap_ig_json, content)
    one_line(from_edge_pruning, content, dims_of())


def test_a_file_of_another_model_is_refused() -> None:
    circuit = random_circuit(graph_of(dims_of(2, 2)))
    for write, read in EAP_IG.values():
        content = write(circuit, toy_document(circuit))
        assert "of another model" in one_line(read, content, dims_of(2, 2, parallel=True))
        assert "of another model" in one_line(read, content, dims_of(3, 2))
        for dims, part in ((dims_of(2, 2, 1), "grouped-query"), (dims_of(2, 2, has_mlp=False), "without an MLP")):
            with pytest.raises(UnsupportedError, match=part):
                read(content, dims)


# -- files of torch.save -----------------------------------------------------------------------------------------------


WAS_HERE = Path(tempfile.gettempdir()) / "mechinterp-a-file-was-run"


class Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (WAS_HERE,))


def saved(value: Any, **options: Any) -> bytes:
    out = io.BytesIO()
    torch.save(value, out, **options)
    return out.getvalue()


def rezipped(content: bytes, compression: int = zipfile.ZIP_STORED, **replace: bytes) -> bytes:
    """The archive made again, entries replaced by the last part of their names."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w", compression) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, replace.get(Path(entry.filename).name.replace(".", "_"), old.read(entry)))
    return out.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a file of torch.save"),
        (b"PK\x03\x04", "damaged"),
        (pickle.dumps({"a": 1}), "never read"),
        (pickle.dumps(Evil()), "never read"),
        (saved({"a": torch.zeros(3)}, _use_new_zipfile_serialization=False), "never read"),
        (saved(Evil()), "more than plain values"),
        (saved({"a": Path("x")}), "more than plain values"),
        (saved(torch.nn.Linear(1, 1)), "more than plain values"),
        (saved({"a": torch.zeros(3).to_sparse()}), "more than plain values"),
        (saved({"a": torch.zeros(3, dtype=torch.int16)}), "more than plain values"),
        (saved({"a": torch.zeros(3, device="meta")}), "more than plain values"),
        (saved({"a": torch.zeros(300)})[:-200], "damaged"),
        (rezipped(saved({"a": torch.zeros(10**5)}), zipfile.ZIP_DEFLATED), "too many entries"),
        (rezipped(saved({"a": torch.zeros(3)}), zipfile.ZIP_DEFLATED), ""),
        (rezipped(saved({"a": torch.zeros(300)}), **{"0": b"\x00" * 8}), "missing values"),
        (rezipped(saved({"a": 1}), data_pkl=pickle.dumps(Evil())), "more than plain values"),
        (rezipped(saved({"a": 1}), data_pkl=b"garbage"), ""),
        (rezipped(saved({"a": 1}), data_pkl=b"\x80\x02"), "damaged"),
    ],
    ids=range(18),
)
def test_hostile_torch_files(content: bytes, words: str) -> None:
    for read in (load_plain, from_eap_ig_pt):
        assert words in (one_line(read, content, "x") if read is load_plain else one_line(read, content))
    assert not WAS_HERE.exists()


def test_a_storage_is_as_long_as_it_says() -> None:
    """Also when another tuple is put on the stack in its place."""
    good = saved({"a": torch.zeros(4)})
    with zipfile.ZipFile(io.BytesIO(good)) as archive:
        pickled = archive.read("archive/data.pkl")
    assert b"K\x04tq\x07Q" in pickled
    longer = pickled.replace(b"K\x04tq\x07Q", b"J\x00\x00\x01\x00tq\x07Q")
    swapped = pickled.replace(b"K\x04tq\x07Q", b"J\x00\x00\x01\x00tq\x070" + b"Q")
    for bad in (longer, swapped):
        one_line(load_plain, rezipped(good, data_pkl=bad), "x")


def test_no_depth_breaks_the_reader() -> None:
    good = saved({"a": 1})
    deep, wide = b"N" + b"\x85" * 10**5, b"(" + b"N" * 9 + b"tq\x00" + (b"(" + b"h\x00" * 9 + b"tq\x00") * 3
    lists = b"X\x03\x00\x00\x00cfg}(X\x08\x00\x00\x00n_layers" + b"]" * 10**5 + b"a" * 99_999 + b"u"
    for pickled, words in (
        (b"\x80\x02}(" + deep + b"Nu.", "holds a tuple"),
        (b"\x80\x02}(" + wide + b"Nu.", "holds a tuple"),
        (b"\x80\x02}(" + lists + b"u.", "lacks"),
    ):
        assert words in one_line(from_eap_ig_pt, rezipped(good, data_pkl=pickled))
    assert len(clipped([[[[["x" * 10**6]]]]] * 10**6)) <= 100


def test_plain_values_come_back() -> None:
    value = OrderedDict([(("a", (None, None, 3)), True), ("b", [1, -5, 10**12, 0.5, "é", None, False])])
    found = load_plain(saved({"v": value, "t": torch.arange(6.0).reshape(2, 3).T}), "x")
    assert found["v"] == value and torch.equal(found["t"], torch.arange(6.0).reshape(2, 3).T)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("edges_scores", torch.zeros(3, 3), "edges_scores must be"),
        ("edges_scores", torch.zeros(1).expand(10**6, 10**6), "edges_scores must be"),
        ("edges_scores", torch.full((7, 15), float("nan")), "NaN"),
        ("edges_scores", torch.ones(7, 15), "would run backwards"),
        ("edges_scores", [[0.0]], "got list"),
        ("edges_in_graph", torch.ones(7, 15, dtype=torch.bool), "would run backwards"),
        ("edges_in_graph", torch.zeros(7, 15), "edges_in_graph must be"),
        ("nodes_in_graph", torch.zeros(8, dtype=torch.bool), "nodes_in_graph must be"),
        ("src_nodes", ["input"], "7 names"),
        ("src_nodes", "input", "7 names"),
        ("dst_nodes", ["x"] * 15, "got 'x' where"),
        ("cfg", {"n_layers": 10**6, "n_heads": 10**6, "d_model": 1, "parallel_attn_mlp": False}, "too large"),
        ("neurons_scores", torch.zeros(7, 16), "not of neurons or nodes"),
        ("nodes_scores", torch.zeros(7), "not of neurons or nodes"),
        ("more", 1, "unknown key"),
    ],
)
def test_hostile_tables(key: str, value: Any, words: str) -> None:
    circuit = random_circuit(graph_of(dims_of(2, 2)))
    content = torch.load(io.BytesIO(to_eap_ig_pt(circuit, toy_document(circuit))), weights_only=True)
    assert words in one_line(from_eap_ig_pt, saved({**content, key: value}))


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_damage_is_one_error_or_none(data: st.DataObject) -> None:
    circuit = random_circuit(graph_of(dims_of(1, 2)))
    write, read = EAP_IG[data.draw(st.sampled_from(sorted(EAP_IG)))]
    content = bytearray(write(circuit, toy_document(circuit)))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    try:
        assert isinstance(read(bytes(content)), Circuit)
    except FormatError as error:
        assert "\n" not in str(error)


# -- ACDC and Edge-Pruning ---------------------------------------------------------------------------------------------


def acdc_edges(dims: Dims, circuit: Circuit | None = None, *, split: bool = False, mlp_in: str = "hook_mlp_in") -> Any:
    """Their dictionary, built as `TLACDCCorrespondence.setup_from_model` builds the graph; all that `circuit` lacks is
    False (None: nothing is)."""
    found: OrderedDict[Any, bool] = OrderedDict()
    last, later = dims.n_layers - 1, []

    def add(receiver: Any, sender: Any, ours: str = "") -> None:
        found[(*receiver, *sender)] = circuit is None or not ours or ours in circuit.edges

    later.append(((f"blocks.{last}.hook_resid_post", (None,)), "logits"))
    for layer in range(last, -1, -1):
        if dims.has_mlp:
            out, into = (f"blocks.{layer}.hook_mlp_out", (None,)), (f"blocks.{layer}.{mlp_in}", (None,))
            for receiver, name in later:
                add(receiver, out, f"m{layer}->{name}")
            add(out, into)
            later.append((into, f"m{layer}"))
        heads = []
        for head in range(dims.n_heads):
            at = (None, None, head)
            out = (f"blocks.{layer}.attn.hook_result", at)
            for receiver, name in later:
                add(receiver, out, f"a{layer}.h{head}->{name}")
            for letter in "qkv":
                inner, into = (f"blocks.{layer}.attn.hook_{letter}", at), (f"blocks.{layer}.hook_{letter}_input", at)
                add(out, inner)
                add(inner, into)
                heads.append((into, f"a{layer}.h{head}<{letter}>"))
        later += heads
    names = {"hook_embed": "embed", "hook_pos_embed": "pos_embed"} if split else {"blocks.0.hook_resid_pre": "input"}
    for hook, writer in names.items():
        for receiver, name in later:
            add(receiver, (hook, (None,)), f"{writer}->{name}")
    return found


@settings(max_examples=15, deadline=None)
@given(
    st.builds(dims_of, layers=st.integers(1, 3), heads=st.integers(1, 3), has_mlp=st.booleans()),
    st.integers(0, 99),
    st.booleans(),
    st.booleans(),
)
def test_acdc_dictionaries(dims: Dims, seed: int, split: bool, as_after_a_run: bool) -> None:
    circuit = random_circuit(graph_of(dims, split_input=split), seed)
    edges = acdc_edges(dims, circuit, split=split, mlp_in="hook_mlp_in" if seed % 2 else "hook_resid_mid")
    if as_after_a_run:  # what is cut is not listed any more
        edges = OrderedDict((key, True) for key, value in edges.items() if value)
    again = from_acdc(saved(edges), dims)
    assert again.edges == circuit.edges and again.n_selected == circuit.n_edges
    assert again.graph.digest() == circuit.graph.digest() and again.scores is None
    assert circuit_of_acdc(acdc_edges(dims, split=split), dims).n_edges == circuit.graph.n_edges


@pytest.mark.parametrize("gone", [False, True])
def test_an_input_that_acdc_cut_inside_its_head_takes_no_edges(gone: bool) -> None:
    dims, at = dims_of(2, 2), (None, None, 1)
    edges = acdc_edges(dims)
    key = ("blocks.1.attn.hook_q", at, "blocks.1.hook_q_input", at)
    edges[key] = False
    if gone:
        del edges[key]
    everything, less = graph_of(dims), circuit_of_acdc(edges, dims)
    assert set(everything.edge_names()) - set(less.edges) == {
        name for name in everything.edge_names() if name.endswith("->a1.h1<q>")
    }


AT = (None, None, 0)


@pytest.mark.parametrize(
    ("edges", "words"),
    [
        ({}, "no edge"),
        ({1: True}, "a key is"),
        ({("a", "b"): True}, "a key is"),
        ({("blocks.0.hook_mlp_in", (None,), "blocks.0.hook_resid_pre", (None, 1)): True}, "a key is"),
        ({("blocks.0.hook_mlp_in", (None,), "blocks.0.hook_resid_pre", (None, None, True)): True}, "a key is"),
        ({("blocks.0.hook_mlp_in", (None,), "blocks.0.hook_resid_pre", (None, None, -1)): True}, "a key is"),
        ({("blocks.0.hook_mlp_in", (None,), "blocks.0.hook_resid_pre", (None,)): 1}, "true or false"),
        ({("blocks.0.hook_mlp_in", (None,), "blocks.0.hook_resid_pre", (None,)): True}, "inside a component"),
        ({("blocks.0.hook_nothing", (None,), "blocks.0.hook_resid_pre", (None,)): True}, "not an edge of ACDC's graph"),
        ({("blocks.9.attn.hook_q", AT, "blocks.9.hook_q_input", AT): True}, "not an edge of ACDC's graph"),
        ({("blocks.0.attn.hook_q", AT, "blocks.0.hook_k_input", AT): True}, "not an edge of ACDC's graph"),
        ({("blocks.0.attn.hook_q", AT, "blocks.0.hook_q_input", (None, None, 1)): True}, "not an edge of ACDC's graph"),
        (
            {
                **acdc_edges(dims_of(2, 2)),
                ("blocks.0.hook_q_input", (None, None, 7), "blocks.0.hook_resid_pre", (None,)): True,
            },
            "has a reader",
        ),
        (
            {**acdc_edges(dims_of(2, 2)), ("blocks.0.hook_q_input", AT, "blocks.0.hook_mlp_out", (None,)): True},
            "'m0->a0.h0<q>' is not an edge",
        ),
        ({**acdc_edges(dims_of(2, 2)), **acdc_edges(dims_of(2, 2), mlp_in="hook_resid_mid")}, "named twice"),
        ({**acdc_edges(dims_of(2, 2)), **acdc_edges(dims_of(2, 2), split=True)}, "has one of them"),
    ],
    ids=range(16),
)
def test_hostile_acdc_dictionaries(edges: Mapping[object, object], words: str) -> None:
    assert words in one_line(circuit_of_acdc, edges, dims_of(2, 2))


def edge_pruning_rows(circuit: Circuit, inputs: Mapping[str, str]) -> list[list[str]]:
    rows = [list(name.partition("->")[::2]) for name in circuit.edges]
    readers = [re.sub(r"<(.)>", r".\1", reader.replace("logits", "resid_post")) for _, reader in rows]
    return [[inputs.get(writer, writer), reader] for (writer, _), reader in zip(rows, readers, strict=True)]


@settings(max_examples=15, deadline=None)
@given(SHAPES.filter(lambda dims: not dims.parallel), st.integers(0, 99), st.booleans())
def test_edge_pruning_lists(dims: Dims, seed: int, split: bool) -> None:
    circuit = random_circuit(graph_of(dims, split_input=split), seed)
    inputs = {"embed": "tok_embeds", "pos_embed": "pos_embeds", "input": "embeds"}
    rows = edge_pruning_rows(circuit, inputs)
    again = from_edge_pruning(json.dumps(rows).encode(), dims)
    assert again.edges == circuit.edges and again.graph.digest() == circuit.graph.digest()


def test_edge_pruning_without_embeddings_keeps_every_input_edge() -> None:
    circuit = from_edge_pruning(b'[["a0.h1", "m1"], ["m1", "resid_post"]]', dims_of(2, 2))
    assert {name for name in circuit.edges if not name.startswith("input")} == {"a0.h1->m1", "m1->logits"}
    # of the edges out of input, those into heads and MLPs that reach nothing lie on no path
    assert {name for name in circuit.edges if name.startswith("input")} == {
        *(f"input->a0.h1<{letter}>" for letter in "qkv"),
        *("input->m1", "input->logits"),
    }
    assert circuit.n_selected == 2 + circuit.graph.possible[:, 0].sum()
    assert "never cut" in str(circuit.selection["embeddings"])


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "non-empty list"),
        ({}, "non-empty list"),
        ({"original": [], "extra": []}, "do not name their heads"),
        ([1], "[writer, reader]"),
        ([["m0"]], "[writer, reader]"),
        ([["m0", 1]], "[writer, reader]"),
        ([["m0", "resid_post"], ["m0", "resid_post"]], "named twice"),
        ([["m0", "logits"]], "has a reader"),
        ([["m0", "a1.h0"]], "has a reader"),
        ([["m0", "a1.h0<q>x"]], "has a reader"),
        ([["m9", "resid_post"]], "has a writer"),
        ([["m1", "m0"]], "is not computed before"),
        ([["embeds", "m0"], ["tok_embeds", "m0"]], "one or the other"),
        ([["x" * 10**5, "m0"]], "has a writer"),
    ],
)
def test_hostile_edge_pruning_lists(rows: Any, words: str) -> None:
    assert words in one_line(from_edge_pruning, json.dumps(rows).encode(), dims_of(2, 2))


@pytest.mark.parametrize("dims", [dims_of(2, 2, 1), dims_of(2, 2, parallel=True)], ids=["grouped", "parallel"])
def test_models_that_acdc_and_edge_pruning_cannot_say(dims: Dims) -> None:
    for read, nothing in ((circuit_of_acdc, {}), (from_edge_pruning, b"")):
        with pytest.raises(UnsupportedError, match="does not support"):
            read(nothing, dims)
