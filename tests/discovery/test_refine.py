"""The last exact pass: the same as one edge after another by plain runs, and what it starts and ends with."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import mechinterp as mi
from mechinterp.base import checkpoint
from mechinterp.circuit_file.verify.verification import verify
from mechinterp.engines.edge_patching import edge_logits, run_edges, run_prefix
from mechinterp.engines.replacement import corrupt_replacement
from mechinterp.graphs.circuit import on_paths
from mechinterp.graphs.select import sized
from tests.support.known_circuits import known
from tests.support.models_tiny import SHAPES, build, pairs, small_cut, tiny

GRAPHS: dict[str, tuple[str, dict[str, Any]]] = {
    "edges": ("gpt2", {}),
    "grouped query": ("llama", {}),
    "post-norm": ("gemma2", {"level": "node"}),
    "positions": ("llama", {"positions": ("a", "end")}),
    "nodes at positions": ("gpt2", {"level": "node", "positions": ("a", "end")}),
    "neurons": ("gpt2", {"level": "node", "neurons": {0: [1, 5]}}),
}
DEEP = ("post-norm", "neurons")
LAYERS = {"gpt2": {"n_layer": 1}, "llama": {"num_hidden_layers": 1}}
"""Of all other kinds."""


def some() -> mi.Pairs:
    return pairs(3, 5, padded=True, positions={"a": [1, 2, 1], "end": [4, 3, 2]})


def unit_masks(graph: mi.Graph) -> list[torch.Tensor]:
    return [graph.unit == unit for unit in range(graph.n_units)]


def by_hand(
    model: mi.HookManager, circuit: mi.Circuit, examples: mi.Pairs, tau: float, drop: int, add: int
) -> tuple[torch.Tensor, list[float]]:
    """(kept edges, the loss after each accepted change), one run at a time, everything outside cut."""
    graph, scores = circuit.graph, circuit.scores
    assert scores is not None
    masks = unit_masks(graph)
    strength = {u: float(scores.values[masks[u]][0].abs()) for u in range(graph.n_units)}
    own = [u for u in range(graph.n_units) if bool((circuit.kept & masks[u]).any())]
    weakest = sorted(own, key=lambda u: strength[u])[:drop]
    strongest = sorted(set(range(graph.n_units)) - set(own), key=lambda u: -strength[u])[:add]

    def loss(chosen: torch.Tensor) -> float:
        cut = graph.possible & ~on_paths(graph, chosen)
        return float(run_edges(model, graph, examples, cut, metric="kl_to_clean").double().mean())

    kept = circuit.members.clone()
    losses = [loss(kept)]
    for u in weakest:
        then = loss(kept & ~masks[u])
        if then - losses[-1] < tau:
            kept, losses = kept & ~masks[u], [*losses, then]
    for u in strongest:
        then = loss(kept | masks[u])
        if losses[-1] - then > tau:
            kept, losses = kept | masks[u], [*losses, then]
    return kept, losses


@pytest.mark.slow
@pytest.mark.parametrize("kind", GRAPHS)
def test_it_does_what_one_trial_after_another_does(kind: str) -> None:
    name, how = GRAPHS[kind]
    model = tiny(name) if kind in DEEP else build(name, **LAYERS[name])
    examples, graph = some(), mi.build_graph(model, **how)
    scores = mi.score_edges(model, graph, examples, method="random", seed=1)  # no ties, and no good order
    circuit = mi.select(graph, scores, **sized(graph, "60%"))
    drop, add = circuit.n_units - 1, graph.n_units
    expected, losses = by_hand(model, circuit, examples, 0.003, drop, add)
    told: list[tuple[int, int]] = []
    for at_once, batch_size in ((1, 3), (7, 2)):
        told.clear()
        found = mi.refine_circuit(
            model,
            circuit,
            examples,
            tau=0.003,
            drop=drop,
            add=add,
            at_once=at_once,
            batch_size=batch_size,
            progress=lambda *done: told.append(done),
        )
        assert torch.equal(found.kept, on_paths(graph, expected))
        assert told[0][0] == 0 and told[-1][0] == told[-1][1] and found.n_selected == int(expected.sum())
        assert found.selection["dropped"] > 0 and found.selection["added"] > 0  # type: ignore[operator]
    raised = [after - before for before, after in pairwise(losses)]
    assert max(raised) < 0.003  # no accepted change costs tau
    alone = run_edges(model, graph, examples, found.cut, metric="kl_to_clean").mean()
    assert float(alone) == pytest.approx(losses[-1], abs=1e-6)


@pytest.mark.parametrize(("name", "tau"), [("gpt2", 0.05), ("llama", 0.2)])
def test_of_the_whole_graph_it_is_acdc(name: str, tau: float) -> None:
    model, examples = build(name, **LAYERS[name]), pairs(3, 5)
    graph = mi.build_graph(model)
    scores = mi.score_edges(model, graph, examples, method="eap-ig", metric="kl_to_clean")
    whole = mi.Circuit(graph, graph.possible, graph.n_edges, {}, scores)
    refined = mi.refine_circuit(model, whole, examples, tau=tau)
    acdc = mi.score_edges(model, graph, examples, method="acdc", metric="kl_to_clean", tau=tau, order="score")
    kept = acdc.values != 0
    assert 0 < int(kept.sum()) < graph.n_edges
    assert torch.equal(refined.kept, on_paths(graph, kept)) and refined.n_selected == int(kept.sum())


@pytest.mark.parametrize("name", ["pair_balance", "sort"])
def test_it_finds_the_known_circuit_from_a_superset(name: str) -> None:
    this = known(name)
    graph = mi.build_graph(this.model, split_input=True)
    truth = graph.mask_of(this.truth("derived_resample"))
    more = truth | small_cut(graph, share=0.4)
    assert int(more.sum()) > 2 * int(truth.sum())
    scores = mi.score_edges(this.model, graph, this.pairs[:1], method="random")
    start = mi.Circuit(graph, more, int(more.sum()), {}, scores)
    found = mi.refine_circuit(this.model, start, this.pairs, metric="l2_to_clean", tau=1e-3, batch_size=64)
    assert torch.equal(found.kept, on_paths(graph, truth))


def test_it_adds_the_edge_that_is_missing() -> None:
    this = known("shift_by_1")
    graph = mi.build_graph(this.model, split_input=True)
    truth = graph.mask_of(this.truth("derived_resample"))
    scores = mi.score_edges(this.model, graph, this.pairs[:1], method="random")
    missing = truth.nonzero()[-1]
    less = truth.clone()
    less[tuple(missing)] = False
    start = mi.Circuit(graph, less, int(less.sum()), {}, scores)
    how: dict[str, Any] = {"metric": "l2_to_clean", "tau": 1e-3, "batch_size": 64}
    found = mi.refine_circuit(this.model, start, this.pairs, drop=0, add=graph.n_units, **how)
    assert torch.equal(found.kept, truth) and found.selection["added"] == 1 and found.selection["dropped"] == 0


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("layer", [1, 2, 3])
def test_a_prefix_with_cut_edges_changes_no_logit(name: str, layer: int) -> None:
    """The layers before the first in which the masks differ run once for all."""
    model, examples = tiny(name), some()
    graph = mi.build_graph(model, positions=("a", "end"))
    values = corrupt_replacement(model, graph).on(examples)
    first = graph.channel_readers(layer, "q").start if layer < 3 else len(graph.readers) - 1
    cut = small_cut(graph)
    other = cut.clone()
    other[first:] = small_cut(graph, seed=1)[first:]
    masks = torch.stack([cut, other]).float()
    prefix = run_prefix(model, graph, examples, values, layer, masks[1])
    plain = list(edge_logits(model, graph, examples, masks, values))
    shared = list(edge_logits(model, graph, examples, masks, values, prefix=prefix))
    for one, another in zip(plain, shared, strict=True):
        torch.testing.assert_close(one, another, rtol=0, atol=1e-5)
    without = run_prefix(model, graph, examples, values, layer)
    shared = list(edge_logits(model, graph, examples, masks, values, prefix=without))  # another beginning: not used
    torch.testing.assert_close(shared[0], plain[0], rtol=0, atol=0)


def test_a_killed_pass_goes_on_to_the_same_circuit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "EVERY_SECONDS", 0.0)
    model, examples = build("gpt2", n_layer=1), pairs(3, 5)
    graph = mi.build_graph(model)
    circuit = mi.select(graph, mi.score_edges(model, graph, examples, method="eap"), edges="70%")
    keywords: dict[str, Any] = {"tau": 0.02, "add": 8}
    whole = mi.refine_circuit(model, circuit, examples, **keywords)

    def kill(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    state = tmp_path / "state"
    with pytest.raises(KeyboardInterrupt):
        mi.refine_circuit(model, circuit, examples, resume=state, progress=kill, **keywords)
    with pytest.raises(mi.InputError, match="another run"):
        mi.refine_circuit(model, circuit, examples, resume=state, tau=0.03, add=8)
    told: list[int] = []
    again = mi.refine_circuit(
        model, circuit, examples, resume=state, progress=lambda done, total: told.append(done), **keywords
    )
    assert told[0] > 10 and torch.equal(again.kept, whole.kept)
    assert {**again.selection, "forwards": 0} == {**whole.selection, "forwards": 0}
    assert list(tmp_path.iterdir()) == []


def test_the_file_states_it(tmp_path: Path) -> None:
    model, examples = tiny("gpt2"), pairs(3, 5)
    graph = mi.build_graph(model, level="node")
    circuit = mi.select(graph, mi.score_edges(model, graph, examples, method="eap"), nodes=12)
    refined = mi.refine_circuit(model, circuit, examples, tau=0.02, add=2)
    path = tmp_path / "refined.circuit.json"
    mi.save_circuit(path, refined, model=model)
    read = mi.load_circuit(path)
    assert read.edges == refined.edges and read.selection == refined.selection
    assert read.selection["refined"] == "kl_to_clean" and read.selection["nodes"] == 12
    verification = verify(path, model=model)
    assert verification.ok and any(warning.name == "selection not applied" for warning in verification.warnings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tau": 0.0}, "tau must be"),
        ({"drop": True}, "drop must be a whole number"),
        ({"add": -1}, "add must be"),
        ({"at_once": 0}, "at_once"),
        ({"batch_size": 0}, "batch_size"),
        ({"replacement": "noise"}, "replacement 'noise'"),
        ({"metric": "kl"}, "metric 'kl'"),
        ({"tau": 1e6}, "smaller tau"),
    ],
)
def test_bad_settings_get_one_clear_line(settings: dict[str, Any], message: str) -> None:
    model, examples = build("gpt2", n_layer=1), pairs(2, 4)
    graph = mi.build_graph(model, level="node")
    circuit = mi.select(graph, mi.score_edges(model, graph, examples, method="random"), nodes=4)
    with pytest.raises(mi.InputError, match=message):
        mi.refine_circuit(model, circuit, examples, **settings)


def not_a_number(logits: torch.Tensor, _: Any) -> torch.Tensor:
    return logits[:, -1, 0] * torch.nan


def infinite_after_the_first(logits: torch.Tensor, _: Any) -> torch.Tensor:
    """Infinite for every run but the first."""
    calls.append(len(logits))
    return logits[:, -1, 0] / (1.0 if len(calls) <= 1 else 0.0)


calls: list[int] = []


@pytest.mark.parametrize("metric", [not_a_number, infinite_after_the_first])
def test_a_loss_that_is_no_number_is_an_error(metric: Any) -> None:
    """Compared with `tau` it would keep every edge, as if each were needed."""
    model, examples = build("gpt2", n_layer=1), pairs(2, 4)
    graph = mi.build_graph(model, level="node")
    calls.clear()
    scores = mi.score_edges(model, graph, examples, method="random")
    with pytest.raises(mi.InputError, match=rf"the metric '{metric.__name__}' is (nan|-?inf) .*another metric"):
        mi.refine_circuit(model, mi.select(graph, scores, nodes=4), examples, metric=metric)
    with pytest.raises(mi.InputError, match=r"is (nan|-?inf) .*another metric"):
        mi.score_edges(model, graph, examples, method="acdc", metric=metric)


def test_an_order_is_needed() -> None:
    model, examples = build("gpt2", n_layer=1), pairs(2, 4)
    graph = mi.build_graph(model, level="node")
    bare = mi.Circuit(graph, graph.possible, graph.n_edges)
    with pytest.raises(mi.InputError, match="no scores to order"):
        mi.refine_circuit(model, bare, examples)
    other = mi.build_graph(model)
    scores = mi.score_edges(model, other, examples, method="random")
    with pytest.raises(mi.InputError, match="another graph"):
        mi.refine_circuit(model, bare, examples, scores=scores)
