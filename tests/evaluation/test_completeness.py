"""Completeness and minimality: by their definitions, by what a knockout means, and where the values are known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import mechinterp as mi
from mechinterp.base.progress import no_progress
from mechinterp.engines.replacement import build_replacement
from mechinterp.evaluation.ablation import AblationSetup
from mechinterp.evaluation.completeness import Completeness, completeness, greedy_completeness
from mechinterp.evaluation.faithfulness import faithfulness_curve
from mechinterp.evaluation.masks import knock_out, mask_values, writers_of
from mechinterp.evaluation.minimality import edge_minimality, node_minimality
from mechinterp.graphs.circuit import Circuit, on_paths
from mechinterp.models.sites import Site
from tests.support.known_circuits import NAMES, known
from tests.support.models_tiny import SHAPES, pairs, small_cut, tiny


def circuit_of(name: str, share: float = 0.6) -> Circuit:
    graph = mi.build_graph(tiny(name))
    kept = on_paths(graph, small_cut(graph, share, seed=1))
    return Circuit(graph, kept, int(kept.sum()))


def whole(name: str) -> Circuit:
    graph = mi.build_graph(tiny(name))
    return Circuit(graph, graph.possible, graph.n_edges)


def setup_of(name: str, some: mi.Pairs, **settings: Any) -> AblationSetup:
    defaults = {"metric": "logit_diff", "replacement": "corrupt", "reference": None, "batch_size": 32}
    graph, settings = mi.build_graph(tiny(name)), {**defaults, "progress": no_progress, **settings}
    return AblationSetup.of(tiny(name), graph, some, **settings)


def without(circuit: Circuit, nodes: tuple[str, ...]) -> torch.Tensor:
    """The circuit's mask of cut edges plus every edge that leaves one of the nodes, from the edges' names."""
    cut = circuit.cut.clone()
    for name in circuit.graph.edge_names():
        if name.split("->")[0] in nodes:
            cut[circuit.graph.edge_index(name)] = True
    return cut


def numbers(found: Completeness) -> torch.Tensor:
    return torch.tensor([[k.circuit_value, k.model_value, k.standard_error] for k in found.sets], dtype=torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_both_sides_are_runs_without_the_nodes(name: str) -> None:
    model, circuit, some = tiny(name), circuit_of(name), pairs(5, padded=True)
    found = completeness(model, circuit, some, sets={"role": ["a0.h1", "m1"]}, n_random=3, batch_size=2)
    assert [k.kind for k in found.sets] == ["empty", "given", *["random"] * 3]
    assert found.sets[1].nodes == ("a0.h1", "m1") and found.n_examples == 5
    for k in found.sets:
        cuts = torch.stack([without(circuit, k.nodes), without(whole(name), k.nodes)])
        ours, models = mi.run_edges(model, circuit.graph, some, cuts).double()
        assert (k.circuit_value, k.model_value) == pytest.approx((float(ours.mean()), float(models.mean())), abs=1e-6)
        assert k.incompleteness == pytest.approx(float((ours - models).mean().abs()), abs=1e-6)
        assert k.standard_error == pytest.approx(float((ours - models).std() / 5**0.5), abs=1e-6)
    evaluated = mi.evaluate(model, circuit, some, n_random=0)
    gap = abs(evaluated.full_value - evaluated.empty_value)
    frame = found.to_frame()
    assert frame.share.tolist() == pytest.approx((frame.incompleteness / gap).tolist(), rel=1e-4)
    assert frame.incompleteness[0] == pytest.approx(abs(evaluated.circuit_value - evaluated.full_value), abs=1e-5)
    assert found.worst.incompleteness == frame.incompleteness.max()
    assert frame.attrs["metric"] == "logit_diff" and frame.attrs["ablation"]["value"] == "corrupt"


@pytest.mark.parametrize("name", ["gpt2", "neox", "llama", "qwen2"])  # gemma2's head writes share one norm
def test_a_node_knocked_out_of_the_model_writes_what_it_writes_in_the_corrupt_run(name: str) -> None:
    model, circuit, some = tiny(name), whole(name), pairs(4)
    sites = [Site("z", 1), Site("mlp_out", 0)]
    corrupt = model.run(some.corrupt, record=sites).values

    def edit_z(value: torch.Tensor) -> torch.Tensor:
        value = value.clone()
        value[:, :, 2] = corrupt[sites[0]][:, :, 2]
        return value

    edits = [mi.Intervention(sites[0], edit_z), mi.Intervention(sites[1], lambda value: corrupt[sites[1]])]
    last = Site("resid_final")
    logits = model.layout.unembed(model.run(some.clean, interventions=edits, record=[last]).values[last][:, -1])
    expected = logits.gather(1, some.right) - logits.gather(1, some.wrong)
    found = completeness(model, circuit, some, sets={"both": ["a1.h2", "m0"]}, n_random=0).sets[1]
    assert found.model_value == pytest.approx(float(expected.mean()), abs=1e-5)


def test_the_whole_graph_is_complete_and_so_is_a_circuit_with_all_nodes_knocked_out() -> None:
    model, some = tiny("gpt2"), pairs(4)
    everything = completeness(model, whole("gpt2"), some, n_random=6)
    assert everything.to_frame().incompleteness.max() == pytest.approx(0, abs=1e-9)
    circuit = circuit_of("gpt2", 0.9)
    assert set(circuit.nodes) == {*circuit.graph.writers, "logits"}
    none = completeness(model, circuit, some, sets={"all": list(circuit.graph.writers)}, n_random=0)
    assert none.sets[0].incompleteness > 0.01  # the circuit is not the model
    assert none.sets[1].incompleteness == pytest.approx(0, abs=1e-9)
    assert none.sets[1].model_value == pytest.approx(none.empty_value, abs=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_a_true_circuit_is_complete_and_every_node_of_it_counts(name: str) -> None:
    this = known(name)
    graph, some = mi.build_graph(this.model, split_input=True), this.pairs[:6]
    kept = graph.mask_of(sorted(this.truth("derived_resample")))
    truth = Circuit(graph, kept, int(kept.sum()))
    found = completeness(this.model, truth, some, n_random=8, metric="l2_to_clean")
    assert found.worst.incompleteness == pytest.approx(0, abs=1e-3)  # the truth's own threshold
    worth = node_minimality(this.model, truth, some, metric="l2_to_clean").to_frame()
    assert worth.effect.min() > 1e-3


@pytest.mark.slow
def test_random_sets_hold_half_of_the_components_and_follow_the_seed() -> None:
    model, circuit, some = tiny("gpt2"), circuit_of("gpt2"), pairs(2)
    found = completeness(model, circuit, some, n_random=24, seed=4)
    components = [name for name in circuit.nodes if name not in ("input", "logits")]
    drawn = [k.nodes for k in found.sets[1:]]
    assert all(set(nodes) <= set(components) and nodes for nodes in drawn)
    share = sum(map(len, drawn)) / (24 * len(components))
    assert share == pytest.approx(0.5, abs=4 * 0.5 / (24 * len(components)) ** 0.5)  # 4 standard errors
    again = completeness(model, circuit, some, n_random=24, seed=4, batch_size=1)
    assert [k.nodes for k in again.sets[1:]] == drawn
    assert torch.allclose(numbers(again), numbers(found), atol=1e-6)
    assert [k.nodes for k in completeness(model, circuit, some, n_random=3, seed=5).sets[1:]] != drawn[:3]


@pytest.mark.slow
def test_each_greedy_step_takes_the_worst_node() -> None:
    model, circuit, some = tiny("gpt2"), circuit_of("gpt2"), pairs(3)
    found = greedy_completeness(model, circuit, some, steps=2)
    components = [name for name in circuit.nodes if name not in ("input", "logits")]
    taken: tuple[str, ...] = ()
    for k in found.sets[1:]:
        sets = {name: [*taken, name] for name in components if name not in taken}
        worst = completeness(model, circuit, some, sets=sets, n_random=0).sets[1:]
        best = max(worst, key=lambda one: one.incompleteness)
        assert k.nodes == best.nodes and k.kind == "greedy"
        assert k.incompleteness == pytest.approx(best.incompleteness, abs=1e-6)
        taken = k.nodes
    assert numbers(found)[0].tolist() == pytest.approx(
        numbers(completeness(model, circuit, some, n_random=0))[0].tolist(), abs=1e-6
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_a_node_is_worth_what_the_circuit_loses_without_it(name: str) -> None:
    model, circuit, some = tiny(name), circuit_of(name, 0.3), pairs(3, padded=True)
    first, second, *_, later, last = writers_of(circuit, inputs=False)
    given = {later: [first, second], last: [second, first]}
    found = node_minimality(model, circuit, some, given=given, batch_size=3)
    assert {row.name for row in found.removals} == set(writers_of(circuit, inputs=True))
    assert [row.change for row in found.removals] == sorted((row.change for row in found.removals), reverse=True)
    frame = found.to_frame().set_index("name")
    every = {later, last, first, "input"}
    for name_of, row in frame[frame.index.isin(every)].iterrows():
        others = tuple(given.get(str(name_of), ()))
        cuts = [without(circuit, others), without(circuit, (*others, str(name_of)))]
        before, after = mi.run_edges(model, circuit.graph, some, torch.stack(cuts)).double().mean(1).tolist()
        assert (row.before, row.after, row.effect) == pytest.approx((before, after, before - after), abs=1e-6)
        assert row.edges == int((cuts[1] & ~cuts[0]).sum())
        kept = [circuit.graph.possible & ~cut for cut in cuts]
        expected = faithfulness_curve(model, kept, circuit.graph, some)
        assert (row.faithfulness_before, row.faithfulness_after) == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert row.share == pytest.approx(abs(expected[0] - expected[1]), rel=1e-3, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["logit_diff", "kl_to_clean"])
def test_edges_of_the_whole_graph_are_worth_their_exact_score(metric: str) -> None:
    model, some = tiny("gpt2"), pairs(2, 5)
    circuit = whole("gpt2")
    frame = edge_minimality(model, circuit, some, metric=metric).to_frame()
    scores = mi.score_edges(model, circuit.graph, some, method="exact", metric=metric).to_dict()
    assert len(frame) == circuit.n_edges and set(frame.edges) == {1}
    assert frame.effect.tolist() == pytest.approx([scores[name] for name in frame.name], abs=1e-5)


def test_an_edge_that_is_a_node_s_only_one_is_worth_as_much_as_the_node() -> None:
    model, circuit, some = tiny("llama"), circuit_of("llama", 0.25), pairs(3)
    graph = circuit.graph
    lonely = [w for w in range(len(graph.writers)) if int(circuit.kept[:, w].sum()) == 1]
    assert lonely
    nodes = node_minimality(model, circuit, some).to_frame().set_index("name")
    edges = edge_minimality(model, circuit, some).to_frame().set_index("name")
    for w in lonely:
        edge = graph.edge_name(int(circuit.kept[:, w].nonzero()), w)
        assert nodes.after[graph.writers[w]] == pytest.approx(edges.after[edge], abs=1e-9)


def test_many_masks_are_those_masks_one_by_one() -> None:
    model, some = tiny("qwen2"), pairs(3, padded=True)
    graph = mi.build_graph(model)
    cuts = [small_cut(graph, seed=i) for i in range(66)]  # more than the engine gets at once
    calls: list[tuple[int, int]] = []
    settings: dict[str, Any] = {"metric": "prob_diff", "replacement": "mean", "batch_size": 2}
    table = mask_values(setup_of("qwen2", some, **settings, progress=lambda *call: calls.append(call)), cuts)
    values = build_replacement("mean", model, graph, some)
    for i in (0, 63, 64, 65):
        alone = mi.run_edges(model, graph, some, cuts[i], metric="prob_diff", replacement=values)
        assert torch.allclose(table[:, i], alone.double(), atol=1e-6)
    assert calls[0] == (0, 198) and calls[-1] == (198, 198)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, c, p: completeness(m, c, p, sets={"x": ["a0.h9"]}), "Unknown node of the circuit"),
        (lambda m, c, p: completeness(m, c, p, sets={"x": ["logits"]}), "Unknown node of the circuit"),
        (lambda m, c, p: completeness(m, c, p, sets={"x": ["m0", "m0"]}), "named twice"),
        (lambda m, c, p: completeness(m, c, p, sets={"x": []}), "names no node"),
        (lambda m, c, p: node_minimality(m, c, p, given={"m0": ["m0"]}), "contains 'm0' itself"),
        (lambda m, c, p: node_minimality(m, c, p, given={"m0O": []}), "Did you mean 'm0'"),
        (lambda m, c, p: greedy_completeness(m, c, p, steps=0), "steps must be"),
        (lambda m, c, p: mask_values(setup_of("gpt2", p), []), "at least one mask"),
        (lambda m, c, p: mask_values(setup_of("gpt2", p, batch_size=0), [c.cut]), "batch_size must be at least 1"),
        (lambda m, c, p: knock_out(c.graph, ["logits"]), "Unknown node that writes"),
        (lambda m, c, p: completeness(m, c, replace(p, corrupt=p.clean)), "alike"),
    ],
)
def test_invalid_arguments_are_refused_with_one_clear_line(call: Any, message: str) -> None:
    with pytest.raises(mi.InputError, match=message):
        call(tiny("gpt2"), circuit_of("gpt2"), pairs(3))
