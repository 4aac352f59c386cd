"""Supernodes, aggregated graphs and notes on features: sums stay exact, and what was planted is found."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest
import torch

import mechinterp as mi
from mechinterp.analysis.attribution_graph.supernodes import _together
from mechinterp.base.errors import InputError
from mechinterp.features.dictionary import transcoder
from tests.analysis.test_attribution_graph import PROMPT, F, a_set, drawn
from tests.support.models_tiny import D_MODEL, N_LAYERS, tiny, tokens


def halved(copies: int = 2):
    """The transcoders of `a_set`, in which every feature is there twice, each writing half."""
    return [
        transcoder(
            f"mlp_in.{i}", f"mlp_out.{i}", drawn(D_MODEL, F, seed=i).repeat(1, copies),
            drawn(F, D_MODEL, seed=i + 9).repeat(copies, 1) / copies,
            b_enc=drawn(F, seed=20).repeat(copies), b_dec=drawn(D_MODEL, seed=i + 30),
        )
        for i in range(N_LAYERS)
    ]  # fmt: skip


def matrix(edges: pd.DataFrame) -> dict[tuple[str, str], float]:
    return {(source, target): weight for source, target, weight in edges.itertuples(index=False)}


@pytest.mark.parametrize("texts", [None, tokens(6)])
def test_halves_of_a_feature_are_found_and_their_sum_is_the_feature(texts):
    """A feature that is there twice: its halves are one supernode, whose edges are those of the feature."""
    model = tiny("gpt2")
    whole = mi.attribution_graph(model, PROMPT[:4], a_set(), targets=[3, 4])
    halves = mi.attribution_graph(model, PROMPT[:4], halved(), targets=[3, 4])
    groups = mi.find_supernodes(model, halves, halved(), texts=texts, similarity=0.999)
    members = {frozenset(group.members) for group in groups}
    pair = {node.name: node.name.replace(f".f{node.feature}@", f".f{node.feature + F}@") for node in whole.features}
    assert members == {frozenset(both) for both in pair.items()}
    first = set(pair)
    named = [mi.Supernode(f"both {next(n for n in g.members if n in first)}", g.members) for g in groups]
    found, expected = matrix(halves.with_supernodes(named).collapsed_edges()), matrix(whole.edges())
    assert len(found) == len(expected)
    for (source, target), weight in expected.items():
        a, b = (f"both {name}" if name in first else name for name in (source, target))
        readers = 2 if target in first else 1  # both halves read what the feature reads
        assert found[a, b] == pytest.approx(readers * weight, rel=1e-9, abs=1e-12)


def test_firing_together_is_counted_behind_the_first_token():
    """The first token is the same in every text, so that what fires on it alone would all fire together."""
    model, bases = tiny("gpt2"), a_set()
    texts = tokens(6)
    keys = [(basis.name, i) for basis in bases[:2] for i in range(4)]
    found = _together(model, {basis.name: basis for basis in bases}, keys, texts, 4, 1)
    run = model.run(texts, record=bases[:2])
    active = torch.stack([run.values[basis][:, 1:, i].flatten() for basis in bases[:2] for i in range(4)], 1)
    expected = active.T @ active / active.norm(dim=0).clamp(min=1e-12) / active.norm(dim=0).clamp(min=1e-12)[:, None]
    torch.testing.assert_close(found, expected)
    with pytest.raises(InputError, match="more than 1 token"):
        _together(model, {basis.name: basis for basis in bases}, keys, texts[:, :1], 4, 1)


def test_a_collapsed_graph_has_the_sums_of_the_graph():
    model, bases = tiny("gpt2"), a_set()
    graph = mi.attribution_graph(model, PROMPT, bases, targets=[3, 4])
    names = [node.name for node in graph.features]
    assert matrix(graph.collapsed_edges()) == matrix(graph.edges())
    groups = [mi.Supernode("early", tuple(names[:20])), mi.Supernode("late", tuple(names[30:]))]
    grouped = graph.with_supernodes(groups)
    edges = matrix(grouped.collapsed_edges())
    early, late = slice(graph.n_leaves, graph.n_leaves + 20), slice(30, len(names))
    assert edges["early", "late"] == pytest.approx(float(graph.weights[late, early].sum()), rel=1e-9)
    assert edges["late", "late"] == pytest.approx(float(graph.weights[late, graph.n_leaves + 30 :].sum()))
    assert sum(edges.values()) == pytest.approx(float(graph.weights.sum()), rel=1e-9)
    for wrong in ("late", "bias"):
        with pytest.raises(InputError, match="rename"):
            graph.with_supernodes([replace(groups[0], label=wrong), groups[1]]).collapsed_edges()


def test_what_is_not_alike_stays_apart():
    model, bases = tiny("gpt2"), a_set()
    graph = mi.attribution_graph(model, PROMPT, bases, targets=[3])
    assert mi.find_supernodes(model, graph, bases, similarity=1.0) == ()
    groups = mi.find_supernodes(model, graph, bases, similarity=0.3)
    position = {node.name: node.position for node in graph.features}
    assert groups and all(len({position[name] for name in group.members}) == 1 for group in groups)
    across = mi.find_supernodes(model, graph, bases, similarity=1.0, across_positions=True)
    assert across and all(len({name.partition("@")[0] for name in group.members}) == 1 for group in across)
    graph.with_supernodes(across)  # no node in two
    with pytest.raises(InputError, match="cosine"):
        mi.find_supernodes(model, graph, bases, similarity=0.0)
    with pytest.raises(InputError, match="same transcoders"):
        mi.find_supernodes(model, graph, bases[:1])


def graphs(n: int = 3) -> list[mi.AttributionGraph]:
    model, bases = tiny("gpt2"), a_set()
    return [mi.attribution_graph(model, prompt, bases, targets=[3, 4]).pruned(0.9) for prompt in tokens(n)]


def test_the_aggregate_of_one_graph_is_that_graph():
    (graph,) = graphs(1)
    one = mi.aggregate_graphs([graph], positions="kept")
    assert matrix(one.edges[["source", "target", "weight"]]) == matrix(graph.edges())
    frame = graph.to_frame().set_index("node")
    assert set(one.nodes["node"]) == set(frame.index)
    for name, influence, value in one.nodes[["node", "influence", "value"]].itertuples(index=False):
        assert (influence, value) == (frame.loc[name, "influence"], frame.loc[name, "value"])
    assert (one.nodes["frequency"] == 1).all() and not one.edges["sd"].any()
    summed = mi.aggregate_graphs([graph])
    assert summed.edges["weight"].sum() == pytest.approx(float(graph.weights.sum()))
    assert summed.nodes["influence"].sum() == pytest.approx(one.nodes["influence"].sum())
    assert len(summed.nodes) < len(one.nodes)


@pytest.mark.parametrize("positions", ["kept", "summed"])
def test_aggregates_are_linear_and_count_what_is_there(positions):
    several = graphs()
    whole = mi.aggregate_graphs(iter(several), positions=positions)
    parts = [mi.aggregate_graphs(some, positions=positions) for some in (several[:1], several[1:])]
    for column, key in (("weight", ["source", "target"]), ("frequency", ["source", "target"])):
        tables = [part.edges.set_index(key)[column] for part in parts]
        mean = tables[0].mul(1 / 3).add(tables[1].mul(2 / 3), fill_value=0)
        pd.testing.assert_series_equal(
            whole.edges.set_index(key)[column].sort_index(), mean.sort_index(), check_names=False
        )
    tables = [part.nodes.set_index("node")["influence"] for part in parts]
    mean = tables[0].mul(1 / 3).add(tables[1].mul(2 / 3), fill_value=0)
    pd.testing.assert_series_equal(
        whole.nodes.set_index("node")["influence"].sort_index(), mean.sort_index(), check_names=False
    )
    often = whole.frequent(1.0)
    assert 0 < len(often.edges) < len(whole.edges) and (often.edges["frequency"] == 1).all()
    name = often.edges["source"][0]
    assert all(any(node.name.startswith(name.partition("@")[0]) for node in g.nodes) for g in several)


def test_graphs_that_differ_are_not_aggregated():
    (graph,) = graphs(1)
    for wrong in ([graph, replace(graph, model="other")], [], [graph, replace(graph, about={"held": "nothing"})]):
        with pytest.raises(InputError, match="graphs"):
            mi.aggregate_graphs(wrong)
    with pytest.raises(InputError, match="positions"):
        mi.aggregate_graphs([graph], positions="dropped")


def test_notes_are_those_of_describe():
    model = mi.load_model("bundled")
    bases = mi.load_bases("bundled:transcoders", model=model, check=False)
    texts = mi.load_task("ioi").pairs(model, n=16, seed=0)
    notes = mi.feature_notes(model, bases, [("m1", 100), ("m0", 225), ("m1", 7)], texts=texts, batch_size=5)
    assert set(notes) == {"m1.f100", "m0.f225", "m1.f7"}
    for basis, i in ((bases[0], 225), (bases[1], 7)):
        note, expected = (
            notes[f"{basis.name}.f{i}"],
            mi.describe(model, basis, i, by=("vocab", "examples"), texts=texts),
        )
        assert expected.vocab is not None and expected.examples is not None
        by_side = expected.vocab.groupby("side")["text"].agg(list)
        assert list(note.raises) == by_side["top"][:6] and list(note.lowers) == by_side["bottom"][:6]
        assert (note.fired, note.tokens) == (expected.examples.fired, expected.examples.tokens)
        values = [one.value for one in expected.examples.strongest[:4]]
        assert [one.value for one in note.examples] == pytest.approx(values)
        assert all(one in expected.examples.strongest or one.value == values[-1] for one in note.examples)
    assert not mi.feature_notes(model, bases, [("m1", 100)])["m1.f100"].tokens
    with pytest.raises(InputError, match="feature basis"):
        mi.feature_notes(model, bases, [("m9", 1)])
