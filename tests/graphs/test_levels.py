"""Nodes, neurons and named positions: the same engine on other graphs, held against patching of the run itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import mechinterp as mi
from mechinterp.base.errors import FormatError, InputError, UnsupportedError
from mechinterp.discovery.neurons import top_neurons
from mechinterp.engines.edge_attribution import edge_gradients
from mechinterp.engines.edge_patching import run_edges
from mechinterp.engines.mask_gradients import mask_gradients
from mechinterp.engines.replacement import build_replacement, corrupt_replacement
from mechinterp.evaluation.masks import knock_out, writers_of
from mechinterp.graphs.circuit import on_paths
from mechinterp.graphs.graph import build_graph, graph_of
from mechinterp.tasks.metrics import get_metric
from tests.support.models_tiny import ALL_FLOAT64, EVERY, SHAPES, as_installed, pairs, small_cut, tiny

NAMED = ("a", "end")
NEURONS = {0: [1, 5], 2: [0]}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "positions": {"positions": NAMED},
    "neurons": {"neurons": NEURONS},
    "both": {"positions": NAMED, "neurons": NEURONS},
}
PRE_NORM = tuple(name for name in SHAPES if name != "gemma2")
"""Under a post-norm a patched head changes the scale of the others; cutting its edges does not."""


def some(n: int = 3) -> mi.Pairs:
    """Pairs of 6, 5 and 4 tokens with two named positions."""
    return pairs(n, 6, padded=True, positions={"a": [1, 2, 1][:n], "end": [5, 4, 3][:n]})


def close(name: str) -> dict[str, float]:
    # the others' norms compute in float32
    return {"rtol": 1e-9, "atol": 1e-9} if name in ALL_FLOAT64 else {"rtol": 1e-4, "atol": 2e-5}


def rows_at(graph: mi.Graph, plain: torch.Tensor) -> torch.Tensor:
    """A mask of the plain graph at every position."""
    return torch.cat([plain[:-1].repeat_interleave(graph.n_positions, 0), plain[-1:]])


@pytest.mark.parametrize("name", EVERY)
def test_a_cut_at_every_position_is_the_cut(name: str) -> None:
    model = tiny(name)
    plain, graph = build_graph(model), build_graph(model, positions=NAMED)
    cut = small_cut(plain).double()
    expected = run_edges(model, plain, some(), cut)
    torch.testing.assert_close(run_edges(model, graph, some(), rows_at(graph, cut)), expected, **close(name))
    assert graph.n_edges == 3 * (plain.n_edges - len(plain.writers)) + len(plain.writers)


@pytest.mark.parametrize("name", PRE_NORM)
def test_a_node_cut_at_a_position_is_patching_it_there(name: str) -> None:
    model, examples = tiny(name), some()
    graph = build_graph(model, level="node", positions=NAMED)
    scores = mi.score_edges(model, graph, examples, method="exact")
    found = dict(zip(graph.unit_names(), scores.values[tuple(graph.first_of_unit.T)].tolist(), strict=True))
    nodes = ["a0.h1@a", "a1.h2@a", "m0@a", "a1.h0@end", "m2@end"]
    grid = mi.activation_patching(model, examples, nodes)
    expected = grid.values.flatten(0, -2).mean(-1).tolist()
    assert [found[node] for node in nodes] == pytest.approx(expected, rel=1e-4, abs=2e-5)
    by_mask = run_edges(model, graph, examples, torch.stack([knock_out(graph, [node]) for node in nodes]))
    full = run_edges(model, graph, examples, torch.zeros_like(graph.possible))
    assert (full - by_mask).mean(-1).tolist() == pytest.approx(expected, rel=1e-4, abs=2e-5)


@pytest.mark.parametrize("name", PRE_NORM)
def test_a_neuron_cut_is_patching_it(name: str) -> None:
    model, examples = tiny(name), some()
    graph = build_graph(model, level="node", neurons=NEURONS)
    nodes = ["m0.n1", "m0.n5", "m2.n0"]
    cuts = torch.stack([knock_out(graph, [node]) for node in nodes])
    full = run_edges(model, graph, examples, torch.zeros_like(graph.possible))
    got = (full - run_edges(model, graph, examples, cuts)).mean(-1).tolist()
    grid = mi.activation_patching(model, examples, nodes)
    assert got == pytest.approx(grid.values.flatten(0, -2).mean(-1).tolist(), rel=1e-4, abs=2e-5)


@pytest.mark.parametrize("kind", ["corrupt", "mean", "zero"])
@pytest.mark.parametrize("name", [*SHAPES, "no-norm"])
def test_an_mlp_and_its_neurons_are_the_mlp(name: str, kind: str) -> None:
    model, examples = tiny(name), some()
    plain, graph = build_graph(model), build_graph(model, neurons=NEURONS)
    replaced = [build_replacement(kind, model, g, examples) for g in (plain, graph)]
    one, other = torch.zeros_like(plain.possible), torch.zeros_like(graph.possible)
    for reader in ("a1.h2<q>", "m2", "logits"):
        row = plain.reader_index[reader]
        one[row, plain.mlp_writer(0)] = True
        other[row, graph.mlp_writer(0)] = other[row, graph.neuron_writers(0)] = True
    expected = run_edges(model, plain, examples, one, replacement=replaced[0])
    torch.testing.assert_close(
        run_edges(model, graph, examples, other, replacement=replaced[1]), expected, **close(name)
    )


@pytest.mark.parametrize("name", SHAPES)
def test_estimates_add_up_over_positions_neurons_and_edges_of_a_node(name: str) -> None:
    model, examples, metric = tiny(name), some(), get_metric("logit_diff")
    plain = build_graph(model)
    expected = edge_gradients(model, plain, examples, metric)
    placed = edge_gradients(model, build_graph(model, positions=NAMED), examples, metric)
    summed = torch.cat([placed[:-1].unflatten(0, (-1, 3)).sum(1), placed[-1:]])
    torch.testing.assert_close(summed, expected, **close(name))
    graph = build_graph(model, neurons=NEURONS)
    whole = edge_gradients(model, graph, examples, metric)
    torch.testing.assert_close(
        whole[:, graph.mlp_writer(0)] + whole[:, graph.neuron_writers(0)].sum(1),
        expected[:, plain.mlp_writer(0)],
        **close(name),
    )
    by_node = mi.score_edges(model, build_graph(model, level="node"), examples, method="eap").values
    sums = expected.sum(0) / len(examples)
    torch.testing.assert_close(by_node[-1], sums.to(by_node.dtype), **close(name))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", EVERY)
def test_gradients_in_the_mask(name: str, kind: str) -> None:
    """The values are those of `run_edges`; the slope at no cut is minus the EAP score; elsewhere finite differences."""
    model, examples, metric = tiny(name), some(), get_metric("logit_diff")
    if "neurons" in KINDS[kind] and not model.dims.has_mlp:
        pytest.skip("no MLP")
    graph = build_graph(model, **KINDS[kind])
    values = corrupt_replacement(model, graph).on(examples)
    generator = torch.Generator().manual_seed(0)
    cut = (0.1 + 0.8 * torch.rand(graph.possible.shape, generator=generator, dtype=torch.float64)) * graph.possible
    masks = torch.stack([cut, torch.zeros_like(cut)])
    found, slopes = mask_gradients(
        model, graph, examples, masks, values, lambda logits: torch.stack([metric(row, examples) for row in logits])
    )
    torch.testing.assert_close(found, run_edges(model, graph, examples, masks), **close(name))
    torch.testing.assert_close(-slopes[1], edge_gradients(model, graph, examples, metric), **close(name))
    direction = torch.randn(cut.shape, generator=generator, dtype=torch.float64) * graph.possible
    step = 1e-5 if name in ALL_FLOAT64 else 3e-3
    up, down = (run_edges(model, graph, examples, cut + s * step * direction.clamp(-3, 3)).sum() for s in (1, -1))
    slope = float((slopes[0] * direction.clamp(-3, 3)).sum())
    assert slope == pytest.approx(float(up - down) / (2 * step), rel=1e-5 if name in ALL_FLOAT64 else 2e-2, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    ["exact", "eap-ig", "acdc", "random", "edge-pruning", "relp", "clean-corrupted", "ensemble", "gim", "eap-gp"],
)
def test_scores_do_not_depend_on_the_batch(method: str) -> None:
    model, examples = tiny("gpt2"), some()
    graph = build_graph(model, level="node", **KINDS["both"])
    settings: dict[str, Any] = {"edge-pruning": {"learning_steps": 3}, "acdc": {"tau": 0.05}}.get(method, {})
    one, other = (
        mi.score_edges(model, graph, examples, method=method, batch_size=size, **settings).values for size in (3, 2)
    )
    assert bool((one != 0).any())
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    units = graph.unit[graph.possible]
    table = one[graph.possible]
    for unit in (0, graph.n_units // 2, graph.n_units - 1):
        assert len(table[units == unit].unique()) == 1


def test_nodes_are_selected_whole() -> None:
    model, examples = tiny("gpt2"), some()
    graph = build_graph(model, level="node", positions=NAMED)
    scores = mi.score_edges(model, graph, examples, method="eap")
    circuit = mi.select(graph, scores, nodes=20)
    order = scores.values[tuple(graph.first_of_unit.T)].abs().argsort(descending=True, stable=True)[:20]
    chosen = torch.isin(graph.unit, order)
    assert torch.equal(circuit.kept, on_paths(graph, chosen)) and circuit.selection["nodes"] == 20
    assert circuit.n_selected == int(chosen.sum()) and circuit.n_units <= 20
    assert all("@" in node for node in circuit.nodes if node != "logits")
    with pytest.raises(InputError, match="give nodes="):
        mi.select(graph, scores, edges=20)
    with pytest.raises(InputError, match="give edges="):
        mi.select(build_graph(model), mi.score_edges(model, build_graph(model), examples, method="eap"), nodes=3)


def test_paths_at_positions_follow_the_stream_and_the_heads() -> None:
    """A key at one position serves its head elsewhere; everything else stays where it is."""
    graph = build_graph(tiny("gpt2"), positions=NAMED)
    good = ["input->a0.h0<k>@a", "a0.h0->m1@end", "m1->logits"]
    assert torch.equal(on_paths(graph, graph.mask_of(good)), graph.mask_of(good))
    for bad in (["input->a0.h0<q>@a", "a0.h0->m1@end", "m1->logits"], ["input->m0@a", "m0->logits"]):
        assert not on_paths(graph, graph.mask_of(bad)).any()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["positions", "neurons", "both"])
def test_a_file_states_its_graph_and_verifies(kind: str, tmp_path: Path) -> None:
    model, examples = tiny("gpt2"), some()
    graph = build_graph(model, level="node", **KINDS[kind])
    scores = mi.score_edges(model, graph, examples, method="eap-ig")
    circuit = mi.select(graph, scores, nodes=14)
    path = tmp_path / "levels.circuit.json"
    document = mi.save_circuit(path, circuit, model=model, result=mi.evaluate(model, circuit, examples, n_random=2))
    assert document.graph.granularity == document.evaluation[0].ablation.granularity == "node"
    again = mi.load_circuit(path)
    assert again.graph.digest() == graph.digest() and again.edges == circuit.edges
    result = mi.verify(path, model=model, rescore=True)
    assert result.ok, str(result)
    changed = path.read_text().replace('"granularity": "node"', '"granularity": "edge"', 1)
    path.write_text(changed)
    assert not mi.verify(path, model=model).ok


def test_top_neurons_are_those_that_attribution_ranks_first() -> None:
    model, examples = tiny("llama"), some()
    grid = mi.attribution_patching(model, examples, "mlp_post", method="eap-ig-inputs", steps=5)
    effect = grid.values.nansum(2).sum(-1).abs()
    best = effect.flatten().argsort(descending=True)[:5].tolist()
    found = top_neurons(model, examples, 5, batch_size=2)
    assert {(layer, n) for layer, ns in found.items() for n in ns} == {divmod(i, effect.shape[1]) for i in best}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"positions": ["nowhere"]}, "nowhere"),
        ({"positions": ["a", "a"]}, "different names"),
        ({"positions": "end"}, "different names"),
        ({"positions": ["a@b"]}, "position's name"),
        ({"positions": ["a"], "answers": "end"}, "answers"),
        ({"positions": ["a"], "answers": "a"}, "answer at 'rest'"),
        ({"positions": ["end", "last"]}, "same token"),
        ({"level": "neuron"}, "level"),
        ({"neurons": {0: [99]}}, "neurons 0 to"),
        ({"neurons": {7: [0]}}, "no layer 7"),
        ({"neurons": {0: [1, 1]}}, "once"),
    ],
)
def test_nonsense_is_refused(arguments: dict[str, Any], message: str) -> None:
    examples = pairs(3, 6, positions={"a": [1, 2, 1], "end": [5, 5, 5], "last": [4, 5, 5]})
    with pytest.raises(InputError, match=message):
        model = tiny("gpt2")
        graph = as_installed(build_graph)(model, **arguments)
        mi.score_edges(model, graph, examples, method="eap")


@pytest.mark.parametrize("method", ["cd", "path-patching", "eap-ig-activations", "weight-magnitude"])
def test_methods_of_the_plain_graph_say_so(method: str) -> None:
    graph = build_graph(tiny("gpt2"), level="node")
    with pytest.raises(InputError, match=r"take one of: .*exact"):
        mi.score_edges(tiny("gpt2"), graph, some(), method=method)


def test_a_table_that_does_not_fit_is_refused_with_its_size() -> None:
    model = tiny("gpt2")
    many = {layer: range(64) for layer in range(3)}
    names = [f"p{i}" for i in range(40_000)]
    with pytest.raises(InputError, match="GiB"):
        build_graph(model, neurons=many, positions=names)


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("n", [3, 5, 8])
def test_a_ratio_counts_nodes_where_nodes_are_chosen(n: int, ratio: float) -> None:
    graph = build_graph(tiny("gpt2"), level="node")
    scores = mi.score_edges(tiny("gpt2"), graph, some(), method="exact")
    value = scores.values[tuple(graph.first_of_unit.T)]
    first = value.argsort(descending=True, stable=True)[: int(ratio * n)]
    first = first[value[first] > 0].tolist()
    rest = [i for i in value.abs().argsort(descending=True, stable=True).tolist() if i not in first]
    chosen = torch.isin(graph.unit, torch.tensor([*first, *rest[: n - len(first)]]))
    kept = on_paths(graph, chosen)
    if not kept.any():
        with pytest.raises(InputError, match="path"):
            mi.select(graph, scores, nodes=n, ratio=ratio)
        return
    assert torch.equal(mi.select(graph, scores, nodes=n, ratio=ratio).kept, kept)


def test_nodes_at_positions_overlap_by_name() -> None:
    graph = build_graph(tiny("gpt2"), level="node", positions=NAMED)
    scores = mi.score_edges(tiny("gpt2"), graph, some(), method="eap")
    small, large = (mi.select(graph, scores, nodes=n) for n in (20, 32))
    found = mi.stability([small, large])
    both, either = set(small.nodes) & set(large.nodes), set(small.nodes) | set(large.nodes)
    assert float(found.node_jaccard[0, 1]) == pytest.approx(len(both) / len(either)) and len(both) < len(either)


def test_a_head_that_only_shares_a_key_is_no_member() -> None:
    """Under grouped queries an edge into a shared key feeds every head of the group; one may write nothing."""
    graph = build_graph(tiny("llama"))
    names = ["input->a0.kv0<k>", "a0.h0->logits"]
    circuit = mi.Circuit(graph, graph.mask_of(names), 2)
    assert "a0.h1" in circuit.nodes and writers_of(circuit, inputs=True) == ("input", "a0.h0")


def test_the_model_without_a_circuit_of_nodes_has_none_of_their_edges() -> None:
    model, graph = tiny("gpt2"), build_graph(tiny("gpt2"), level="node")
    scores = mi.score_edges(model, graph, some(), method="eap")
    circuit = mi.select(graph, scores, nodes=8)
    writers = {graph.writer_index[name] for name in circuit.nodes if name != "logits"}
    whole = graph.possible.clone()
    whole[:, [w for w in range(len(graph.writers)) if w not in writers]] = False
    assert torch.equal(circuit.members, whole) and int(whole.sum()) > circuit.n_edges
    for test in (mi.sufficiency_test, mi.necessity_test, mi.minimality_test, mi.edge_minimality):
        with pytest.raises(UnsupportedError, match=r"node"):
            test(model, circuit, some())


@pytest.mark.parametrize("test", ["equivalence_test", "completeness", "node_minimality"])
def test_the_axes_are_those_of_the_graph(test: str) -> None:
    model, examples = tiny("gpt2"), pairs(5, 6, positions={"a": [1] * 5, "end": [5] * 5})
    graph = build_graph(model, level="node", positions=NAMED)
    circuit = mi.select(graph, mi.score_edges(model, graph, examples, method="eap"), nodes=24)
    stated = getattr(mi, test)(model, circuit, examples).ablation
    assert stated.positions == "a, end, rest"
    assert stated.granularity == (
        "node" if test == "equivalence_test" else "node; knocked out nodes by all their outgoing edges"
    )


def test_a_file_of_nodes_has_whole_nodes(tmp_path: Path) -> None:
    model, examples = tiny("gpt2"), some()
    graph = build_graph(model, level="node")
    whole = mi.select(graph, mi.score_edges(model, graph, examples, method="eap"), nodes=9)
    part = whole.kept.clone()
    part[tuple(part.nonzero()[0])] = False
    path = tmp_path / "part.circuit.json"
    mi.save_circuit(path, mi.Circuit(graph, on_paths(graph, part), 9), model=model)
    with pytest.raises(FormatError, match="some of the edges between them are missing"):
        mi.load_circuit(path)


def test_neurons_of_another_model_are_refused() -> None:
    model = tiny("gpt2")
    graph = graph_of(model.dims, neurons=[[10**6], [], []])
    with pytest.raises(InputError, match="neurons 0 to"):
        run_edges(model, graph, some(), torch.zeros_like(graph.possible))


@pytest.mark.parametrize("positions", [["rest"], ["x" * 31], [""]])
def test_positions_that_say_nothing_are_refused(positions: list[str]) -> None:
    with pytest.raises(InputError, match="osition"):
        build_graph(tiny("gpt2"), positions=positions)


def test_gradients_under_an_intervention_are_those_of_one_mask_at_a_time() -> None:
    model, examples, metric = tiny("gpt2"), some(), get_metric("logit_diff")
    graph = build_graph(model)
    masks = torch.stack([small_cut(graph, seed=seed).double() * 0.5 for seed in (0, 1)])
    with model.intervene(
        mi.Intervention("z.1", torch.zeros_like(model.run(examples.clean, record=["z.1"]).values["z.1"]))
    ):
        values = corrupt_replacement(model, graph).on(examples)

        def gradients(several: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return mask_gradients(
                model,
                graph,
                examples,
                several,
                values,
                lambda logits: torch.stack([metric(x, examples) for x in logits]),
            )

        found, slopes = gradients(masks)
        torch.testing.assert_close(found, run_edges(model, graph, examples, masks))
        torch.testing.assert_close(slopes[1:], gradients(masks[1:])[1])
