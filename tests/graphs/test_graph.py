"""The graph: what can exist, counted by hand, and the paths in it."""

from __future__ import annotations

import itertools
from dataclasses import asdict

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mechinterp.base.errors import InputError, UnsupportedError
from mechinterp.circuit_file.limits import MAX_GRAPH_CELLS
from mechinterp.circuit_file.schema import DimsRecord
from mechinterp.graphs.circuit import on_paths, to_networkx
from mechinterp.graphs.graph import LEVELS, MOST_CELLS, Graph, build_graph, graph_of
from mechinterp.models.layout import Dims
from mechinterp.models.sites import Edge, Node
from tests.support.models_tiny import EVERY, N_HEADS, N_LAYERS, tiny


def dims(
    n_layers: int, n_heads: int, n_kv_heads: int | None = None, *, has_mlp: bool = True, parallel: bool = False
) -> Dims:
    kv = n_heads if n_kv_heads is None else n_kv_heads
    return Dims(n_layers, n_heads, kv, 8, 4, 10, 10, 16, has_mlp, parallel, True)


@pytest.mark.parametrize(
    ("shape", "writers", "readers", "edges"),
    [
        (dims(12, 12), 157, 445, 32_491),  # GPT-2 small, as ACDC's successors count it
        # Qwen2.5-0.5B: 24 layers, 14 heads, 2 KV heads. Per layer l there are 1 + 15 l writers before attention, read
        # by 14 q, 2 k and 2 v, and 15 + 15 l before the MLP: sum of 18 (1 + 15 l) + 15 (l + 1), and 361 into logits.
        # MIB's 179,749 counts k and v once per query head, with 42 readers in place of 18.
        (dims(24, 14, 2), 361, 24 * 19 + 1, 79_813),
        (dims(24, 14), 361, 24 * 43 + 1, 179_749),
        # Gemma-2-2B: 26 layers, 8 heads, 4 KV heads: sum of 16 (1 + 9 l) + 9 (l + 1), and 235 into logits (24 in place
        # of 16 when k and v are counted once per query head).
        (dims(26, 8, 4), 235, 26 * 17 + 1, 50_610),
        (dims(26, 8), 235, 26 * 25 + 1, 74_218),
        (dims(2, 3, has_mlp=False), 7, 19, 9 * 1 + 9 * 4 + 7),
        (dims(2, 2, parallel=True), 7, 15, 7 * 1 + 7 * 4 + 7),  # the MLP does not read its layer's heads
    ],
)
def test_counts(shape: Dims, writers: int, readers: int, edges: int) -> None:
    graph = graph_of(shape)
    assert (len(graph.writers), len(graph.readers), graph.n_edges) == (writers, readers, edges)
    assert len(set(graph.writers)) == writers
    assert len(set(graph.readers)) == readers


def test_the_split_input_adds_one_edge_per_reader() -> None:
    shape = dims(12, 12)
    one, two = graph_of(shape), graph_of(shape, split_input=True)
    assert two.n_edges == one.n_edges + len(one.readers) == 32_936
    assert two.inputs == ("embed", "pos_embed")


def slow_edges(shape: Dims) -> set[str]:
    """The edges by the definition: a writer reaches every reader that is computed after it."""
    grouped = shape.n_heads != shape.n_kv_heads
    found = set[str]()
    before = ["input"]
    for layer in range(shape.n_layers):
        heads = [f"a{layer}.h{h}" for h in range(shape.n_heads)]
        shared = [f"a{layer}.{'kv' if grouped else 'h'}{h}" for h in range(shape.n_kv_heads)]
        found |= {f"{w}->{r}<q>" for w in before for r in heads}
        found |= {f"{w}->{r}<{c}>" for w in before for r in shared for c in "kv"}
        if shape.has_mlp:
            found |= {f"{w}->m{layer}" for w in (before if shape.parallel else before + heads)}
        before += heads + ([f"m{layer}"] if shape.has_mlp else [])
    return found | {f"{w}->logits" for w in before}


@pytest.mark.parametrize("name", EVERY)
def test_edges_are_those_of_the_definition(name: str) -> None:
    graph = build_graph(tiny(name))
    assert set(graph.edge_names()) == slow_edges(tiny(name).dims)
    assert len(graph.edge_names()) == graph.n_edges


@pytest.mark.parametrize("name", EVERY)
def test_slices_and_names_agree(name: str) -> None:
    graph = build_graph(tiny(name))
    d = graph.dims
    for layer in range(d.n_layers):
        assert graph.writers[graph.head_writers(layer)] == tuple(f"a{layer}.h{h}" for h in range(d.n_heads))
        for channel in "qkv":
            rows = graph.readers[graph.channel_readers(layer, channel)]
            assert len(rows) == (d.n_heads if channel == "q" else d.n_kv_heads)
            assert all(row.startswith(f"a{layer}.") and row.endswith(f"<{channel}>") for row in rows)
        if d.has_mlp:
            assert (
                graph.writers[graph.mlp_writer(layer)] == f"m{layer}" == graph.readers[graph.mlp_readers(layer).start]
            )
            n_before = graph.n_writers_before(layer, mlp=True)
            assert n_before == int(graph.possible[graph.mlp_readers(layer)].sum())
        first = graph.channel_readers(layer, "q").start
        assert graph.n_writers_before(layer, mlp=False) == int(graph.possible[first].sum())
    for name in graph.edge_names():
        r, w = graph.edge_index(name)
        assert graph.edge_name(r, w) == name == str(Edge.parse(name))
    group = d.n_heads // d.n_kv_heads
    for r, reader in enumerate(graph.readers[:-1]):
        node = Node.parse(reader.partition("<")[0])
        fed = [graph.writers[int(w)] for w in graph.feeds[r].nonzero()]
        heads = range(node.head * group, node.head * group + group)
        expected = [f"a{node.layer}.h{h}" for h in heads] if node.kind == "kv_head" else [str(node)]
        assert fed == expected


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a0.h9->logits", r"Did you mean 'a0\.h"),
        ("input->a1.h0", "Unknown reader"),
        ("m1->a1.h0<q>", "not computed before"),
        ("a0.h0->a0.h1<q>", "not computed before"),
        ("logits->m0", "Unknown writer"),
        ("nonsense", "Unknown"),
    ],
)
def test_edges_that_are_not_there_are_refused(name: str, message: str) -> None:
    graph = build_graph(tiny("gpt2"))
    with pytest.raises(InputError, match=message):
        graph.edge_index(name)
    with pytest.raises(InputError, match=message):
        graph.mask_of([name])


def test_masks_of_names() -> None:
    graph = build_graph(tiny("gpt2"))
    names = ["input->m0", "a0.h1->logits"]
    mask = graph.mask_of(names)
    assert [graph.edge_name(int(r), int(w)) for r, w in mask.nonzero()] == names
    with pytest.raises(InputError, match="named twice"):
        graph.mask_of([*names, "input->m0"])


def test_the_digest_tells_graphs_apart() -> None:
    shapes = [dims(2, 2), dims(2, 2, parallel=True), dims(2, 2, 1), dims(2, 2, has_mlp=False), dims(3, 2)]
    graphs = [graph_of(shape) for shape in shapes] + [graph_of(dims(2, 2), split_input=True)]
    assert len({graph.digest() for graph in graphs}) == len(graphs)
    assert graph_of(dims(2, 2)).digest() == graph_of(dims(2, 2)).digest()


def test_the_input_can_be_split_where_it_is_a_sum() -> None:
    for name in ("gpt2", "no-norm", "attention-only"):
        assert build_graph(tiny(name), split_input=True).inputs == ("embed", "pos_embed")
    for name in ("neox", "llama", "gemma2", "qwen2"):
        with pytest.raises(UnsupportedError, match="pos_embed"):
            build_graph(tiny(name), split_input=True)


def test_shapes_of_the_tiny_models() -> None:
    """The fixtures are what the other tests take them for."""
    assert tiny("neox").dims.parallel
    assert tiny("llama").dims.n_kv_heads == 2
    assert not tiny("attention-only").dims.has_mlp
    assert tiny("gemma2").layout.soft_cap
    assert tiny("gemma2").layout.attention[0].post.kind == "rms"
    assert tiny("no-norm").layout.attention[0].norm.kind == "none"
    assert all(
        len(tiny(name).layout.attention.maps) == N_LAYERS and tiny(name).dims.n_heads == N_HEADS for name in EVERY
    )


# -- paths -------------------------------------------------------------------------------------------------------


def slow_on_paths(graph: Graph, mask: torch.Tensor) -> set[str]:
    """Every edge of every path from an input to the logits, each path walked on its own."""
    edges = [(graph.writers[int(w)], int(r)) for r, w in mask.nonzero()]
    found = set[str]()

    def walk(writer: str, behind: tuple[str, ...]) -> None:
        for source, r in edges:
            if source != writer:
                continue
            path = (*behind, f"{source}->{graph.readers[r]}")
            if graph.readers[r] == "logits":
                found.update(path)
            for fed in graph.feeds[r].nonzero().flatten().tolist():
                walk(graph.writers[fed], path)

    for source in graph.inputs:
        walk(source, ())
    return found


SMALL = (dims(2, 2), dims(2, 2, 1), dims(2, 2, parallel=True), dims(3, 1, has_mlp=False))


@settings(max_examples=60)
@given(
    shape=st.sampled_from(SMALL),
    split=st.booleans(),
    share=st.sampled_from((0.1, 0.25, 0.5)),
    seed=st.integers(0, 10**6),
)
def test_on_paths_is_every_path_walked(shape: Dims, split: bool, share: float, seed: int) -> None:
    graph = graph_of(shape, split_input=split)
    generator = torch.Generator().manual_seed(seed)
    mask = graph.possible & (torch.rand(graph.possible.shape, generator=generator) < share)
    before = mask.clone()
    kept = on_paths(graph, mask)
    assert {graph.edge_name(int(r), int(w)) for r, w in kept.nonzero()} == slow_on_paths(graph, mask)
    assert torch.equal(mask, before)
    assert torch.equal(on_paths(graph, kept), kept)


def networkx_on_paths(graph: Graph, mask: torch.Tensor) -> set[str]:
    """The same from networkx's reachability on the graph of nodes."""
    net = to_networkx(graph, mask)
    inputs = [node for node in net if node.partition("@")[0] in graph.inputs]
    reached = {node for source in inputs for node in (source, *nx.descendants(net, source))}
    useful = {"logits", *nx.ancestors(net, "logits")} if "logits" in net else set[str]()
    return {str(data["name"]) for start, end, data in net.edges(data=True) if start in reached and end in useful}


@settings(max_examples=80)
@given(
    shape=st.sampled_from((*SMALL, dims(3, 4, 2), dims(3, 4, 2, parallel=True))),
    split=st.booleans(),
    positions=st.sampled_from(((), ("a", "end"), ("a", "b"))),
    neurons=st.booleans(),
    level=st.sampled_from(LEVELS),
    share=st.sampled_from((0.05, 0.1, 0.3, 0.7)),
    seed=st.integers(0, 10**6),
)
def test_on_paths_is_what_networkx_reaches(
    shape: Dims,
    split: bool,
    positions: tuple[str, ...],
    neurons: bool,
    level: str,
    share: float,
    seed: int,
) -> None:
    own = [[2, 5], *[[0]] * (shape.n_layers - 1)] if neurons and shape.has_mlp else []
    graph = graph_of(shape, split_input=split, positions=positions, neurons=own, level=level)
    generator = torch.Generator().manual_seed(seed)
    if level == "node":
        chosen = torch.rand(graph.n_units, generator=generator) < share
        mask = chosen[graph.unit.clamp(min=0)] & graph.possible
    else:
        mask = graph.possible & (torch.rand(graph.possible.shape, generator=generator) < share)
    kept = on_paths(graph, mask)
    assert {graph.edge_name(r, w) for r, w in kept.nonzero().tolist()} == networkx_on_paths(graph, mask)


def test_everything_lies_on_a_path_in_the_full_graph() -> None:
    for shape in SMALL:
        graph = graph_of(shape)
        assert torch.equal(on_paths(graph, graph.possible), graph.possible)


def test_networkx_has_each_edge_once_per_head_it_feeds() -> None:
    graph = build_graph(tiny("llama"))
    net = to_networkx(graph, graph.mask_of(["input->a1.kv0<k>", "a0.h0->m2"]))
    assert sorted((u, v) for u, v, _ in net.edges) == [("a0.h0", "m2"), ("input", "a1.h0"), ("input", "a1.h1")]
    assert {data["channel"] for _, _, data in net.edges(data=True)} == {"k", ""}


@pytest.mark.parametrize(
    "text", ["a0.h0->a5.h5<q>", "m11->logits", "input->m0", "embed->a0.kv1<k>", "pos_embed->logits"]
)
def test_edge_text_round_trips(text: str) -> None:
    assert str(Edge.parse(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "m0",
        "m0->",
        "->m0",
        "m0->m1<q>",
        "a0.h0->a1.h1",
        "m0->input",
        "logits->m0",
        "a0.kv0->m1",
        "m0->m1->m2",
        "x->m0",
    ],
)
def test_text_that_is_no_edge_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"not an? (edge|node)"):
        Edge.parse(text)


def test_nodes_round_trip() -> None:
    for kind, layer, head in itertools.product(("head", "kv_head"), (0, 31), (0, 127)):
        assert Node.parse(str(Node(kind, layer, head))) == Node(kind, layer, head)
    assert Node.parse("m7") == Node("mlp", 7)


@pytest.mark.slow
def test_the_graph_of_a_70b_model_is_made_and_a_file_may_describe_it() -> None:
    """By its sizes alone: 80 layers of 64 heads in 8 groups, as Llama-3.1-70B."""
    sizes = dims(80, 64, 8)
    graph = graph_of(sizes)
    assert tuple(graph.possible.shape) == (1 + 80 * (64 + 16 + 1), 1 + 80 * 65)
    per_layer = 64 + 16  # the query, key and value inputs, which read what is before the layer
    before = [1 + 65 * layer for layer in range(80)]
    assert graph.n_edges == sum(per_layer * n + n + 64 for n in before) + 1 + 80 * 65 == 16_654_201
    DimsRecord(**{name: value for name, value in asdict(sizes).items() if name != "layers"})
    assert MOST_CELLS == MAX_GRAPH_CELLS  # what can be made can be saved
