"""Circuits by contextual decomposition: `cd` (nodes, from the logits back) and `cd-edges` (one backward)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import mechinterp as mi
from mechinterp.analysis.contextual import contextual_decomposition
from mechinterp.discovery.cd import Search, between, readers_of
from mechinterp.discovery.method import METHODS
from mechinterp.pipeline import RunSpec, command_of, discover
from tests.support.models_tiny import ALL_FLOAT64, EVERY, SHAPES, pairs, snapshot, tiny

WITHOUT_POST_NORM = tuple(name for name in EVERY if name != "gemma2")


def near(name: str) -> float:
    return 1e-9 if name in ALL_FLOAT64 else 1e-5


def score(name: str, method: str, some: Any = None, **settings: Any) -> mi.Scores:
    model = tiny(name)
    some = pairs(4, padded=True) if some is None else some
    return mi.score_edges(model, mi.build_graph(model), some, method=method, **settings)


@pytest.mark.parametrize("name", WITHOUT_POST_NORM)
def test_the_edges_out_of_a_node_are_its_decomposition(name: str) -> None:
    """Under a post-norm a write is a share of the normed sum, in each run with its own scale; elsewhere it is z W_O."""
    some = pairs(4, padded=True)
    frozen = score(name, "cd-edges", some, attention="frozen")
    nodes = contextual_decomposition(tiny(name), some, "nodes", replacement="pair").scores().mean()
    torch.testing.assert_close(frozen.values.sum(0), nodes.values[:, 0], rtol=0, atol=near(name))


@pytest.mark.parametrize("name", WITHOUT_POST_NORM)
def test_halved_attention_is_the_relevance_of_attnlrp(name: str) -> None:
    some = pairs(4, padded=True)
    halved = score(name, "cd-edges", some, replacement="zero")
    graph = halved.graph
    heads = mi.relevance(tiny(name), some, "z", rules="attnlrp").scores.values.nansum(-2).mean(-1)
    for layer in range(graph.dims.n_layers):
        found = halved.values[:, graph.head_writers(layer)].sum(0)
        torch.testing.assert_close(found, heads[layer], rtol=0, atol=near(name))


@pytest.mark.parametrize("name", SHAPES)
def test_frozen_patterns_leave_nothing_to_queries_and_keys(name: str) -> None:
    scores = score(name, "cd-edges", attention="frozen")
    attended = torch.tensor([reader.endswith(("<q>", "<k>")) for reader in scores.graph.readers])
    assert bool((scores.values[attended] == 0).all())
    assert float(scores.values[~attended].abs().max()) > 0
    halved = score(name, "cd-edges")
    assert float(halved.values[attended].abs().max()) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("method", "settings"), [("cd-edges", {}), ("cd", {"top": 3}), ("cd", {"score": "l1"})])
def test_scores_depend_on_neither_batches_nor_padding(name: str, method: str, settings: dict[str, Any]) -> None:
    some = pairs(5, padded=True)
    before = snapshot(tiny(name).bridge)
    whole, one = (score(name, method, some, batch_size=size, **settings) for size in (5, 2))
    torch.testing.assert_close(whole.values, one.values, rtol=0, atol=1e-5)
    assert snapshot(tiny(name).bridge) == before
    assert dict(whole.parameters) == dict(METHODS.get(method).defaults) | settings
    assert whole.cost["forwards"] > 0


@pytest.mark.parametrize("name", ["gpt2", "neox", "llama", "attention-only"])
@pytest.mark.parametrize("preset", ["linear", "patch"])
def test_the_first_round_is_the_decomposition_to_the_logits(name: str, preset: str) -> None:
    """With every node kept, the scores of the edges into the logits are the nodes' relevances."""
    some = pairs(4)
    scores = score(name, "cd", some, preset=preset, top=100)
    assert set(mi.select(scores.graph, scores, threshold=0.0).nodes) == {*scores.graph.writers, "logits"}
    found = contextual_decomposition(tiny(name), some, "nodes", preset=preset, replacement="pair")
    torch.testing.assert_close(scores.values[-1], found.scores().mean().values[:, 0], rtol=0, atol=near(name))


def test_the_shares_of_the_linear_preset_sum_to_one_where_nothing_is_lost() -> None:
    """In layer 0 the input is all there is: by `dot` it has the whole of what a query is, but for constants."""
    scores = score("no-norm", "cd", top=100, preset="linear", channels="q")
    graph = scores.graph
    for head in range(4):
        strength = {name: max(abs(float(v)) for v in column) for name, column in _columns(scores)}
        share = abs(float(scores.values[graph.reader_index[f"a0.h{head}<q>"], 0])) / strength[f"a0.h{head}"]
        assert share == pytest.approx(1.0, abs=1e-9)


def _columns(scores: mi.Scores) -> list[tuple[str, list[float]]]:
    """Per writer, the score by which it was found first: that at the logits."""
    return [(name, [float(scores.values[-1, i])]) for i, name in enumerate(scores.graph.writers)]


@pytest.mark.slow
def test_the_circuit_is_every_edge_between_the_chosen_nodes() -> None:
    model = mi.load_model("bundled")
    some = mi.load_task("ioi").pairs(model, n=16, split="train", seed=0)
    graph = mi.build_graph(model)
    scores = mi.score_edges(model, graph, some, method="cd")
    circuit = mi.select(graph, scores, threshold=0.0)
    nodes = [name for name in circuit.nodes if name != "logits"]
    assert len(nodes) < len(graph.writers)
    assert not bool((circuit.kept & ~between(graph, nodes)).any())
    assert mi.evaluate(model, circuit, some).faithfulness > 0.8
    fewer = mi.score_edges(model, graph, some, method="cd", top=4)
    assert int((fewer.values != 0).sum()) < int((scores.values != 0).sum())
    with pytest.raises(mi.InputError, match="cannot be added"):
        _ = scores + scores


@pytest.mark.slow
def test_pruning_drops_nodes_and_keeps_the_metric() -> None:
    model = mi.load_model("bundled")
    some = mi.load_task("ioi").pairs(model, n=16, split="train", seed=0)
    graph = mi.build_graph(model)
    plain, pruned = (
        mi.score_edges(model, graph, some, method="cd", preset="authors-gpt", top=8, prune=prune)
        for prune in (False, True)
    )
    big, small = (mi.select(graph, scores, threshold=0.0) for scores in (plain, pruned))
    assert set(small.nodes) < set(big.nodes)
    before, after = (mi.evaluate(model, circuit, some).faithfulness for circuit in (big, small))
    assert after > before - 0.05


@pytest.mark.parametrize("channels", ["qkv", "v", "z"])
def test_channels_say_which_inputs_are_scored(channels: str) -> None:
    scores = score("llama", "cd", channels=channels, top=100)
    for reader, row in scores.graph.reader_index.items():
        if reader.endswith(">"):
            has = bool((scores.values[row] != 0).any())
            assert has == (channels in ("qkv", "z") or reader.endswith("<v>"))


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("cd", {"preset": "best"}, "preset"),
        ("cd", {"score": "l2"}, "score"),
        ("cd", {"top": 0}, "top must be a whole number"),
        ("cd", {"channels": "qq"}, "channels"),
        ("cd", {"replacement": "noise"}, "replacement"),
        ("cd", {"tolerance": float("nan")}, "tolerance must be a number"),
        ("cd", {"tolerance": "x"}, "tolerance must be a number"),
        ("cd", {"prune": "no"}, "prune must be true or false"),
        ("cd", {"metric": "prob_diff"}, "metric is 'logit_diff'"),
        ("cd-edges", {"attention": "thawed"}, "attention"),
        ("cd-edges", {"metric": "kl_to_clean"}, "no relevance at the clean run"),
        ("cd-edges", {"steps": 5}, "no parameter 'steps'"),
    ],
)
def test_bad_settings_get_one_clear_line(method: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(mi.InputError, match=message):
        score("gpt2", method, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("replacement=mean",), "option of its own"),
        (("top",), "NAME=VALUE"),
        (("size=3",), "size"),
        (("top=many",), "must be a whole number"),
        (("mlps=yes",), "true or false"),
    ],
)
def test_bad_settings_on_the_command_line_get_one_clear_line(
    tmp_path: Path, settings: tuple[str, ...], message: str
) -> None:
    with pytest.raises(mi.InputError, match=message):
        discover(RunSpec("ioi", method="cd", settings=settings, out=tmp_path))


@pytest.mark.slow
def test_a_circuit_by_cd_is_saved_and_verified_like_any_other(tmp_path: Path) -> None:
    spec = RunSpec(
        "ioi",
        method="cd",
        examples=12,
        validation_examples=24,
        test_examples=12,
        settings=("top=6", "preset=authors-gpt"),
        roles=False,
        out=tmp_path,
    )
    found = discover(spec)
    assert "--set top=6 --set preset=authors-gpt" in command_of(spec)
    assert found.circuit.scores is not None
    assert found.circuit.scores.parameters["top"] == 6 and found.circuit.selection["threshold"] == 0.0
    assert found.curve.points[-1].n_selected == int((found.circuit.scores.values != 0).sum())
    assert mi.verify(found.path, rescore=True).ok


def test_a_shared_key_is_scored_with_the_strongest_head_that_it_feeds() -> None:
    """Gemma-2's key/value heads feed two query heads, which may be found in different rounds."""
    model = tiny("gemma2")
    graph = mi.build_graph(model)
    settings = METHODS.get("cd").defaults
    table = torch.zeros(graph.possible.shape)
    search = Search(model, graph, pairs(2), settings, lambda done, total: None, graph.writers, table, {})
    search.strength = {"a0.h1": -0.7, "a0.h0": 0.05, "a1.h2": 0.3}
    later = {graph.readers[row]: strength for row, (_, strength) in readers_of(search, ["a0.h0", "a1.h2"]).items()}
    assert later == {"a0.h0<q>": 0.05, "a1.h2<q>": 0.3, "a1.kv1<k>": 0.3, "a1.kv1<v>": 0.3}
    first = {graph.readers[row]: strength for row, (_, strength) in readers_of(search, ["a0.h0", "a0.h1"]).items()}
    assert first == {"a0.h0<q>": 0.05, "a0.h1<q>": -0.7, "a0.kv0<k>": -0.7, "a0.kv0<v>": -0.7}


@pytest.mark.slow
@pytest.mark.parametrize("channels", ["v", "q"])
def test_pruning_measures_the_circuit_that_it_returns(channels: str) -> None:
    some = pairs(4)
    plain, pruned = (
        score("gpt2", "cd", some, channels=channels, prune=prune, tolerance=0.05) for prune in (False, True)
    )
    graph = plain.graph
    cut = [graph.possible & (scores.values == 0) for scores in (plain, pruned)]
    before, after, full, empty = (
        float(mi.run_edges(tiny("gpt2"), graph, some, mask).mean())
        for mask in (*cut, torch.zeros_like(graph.possible), graph.possible)
    )
    n_dropped = len(mi.select(graph, plain, threshold=0.0).nodes) - len(mi.select(graph, pruned, threshold=0.0).nodes)
    assert after >= before - 0.05 * abs(full - empty) * max(1, n_dropped) - 1e-9
