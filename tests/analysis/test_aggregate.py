"""Aggregated graphs of pairs: their prompts and targets, what they will take, their file and their page."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import mechinterp as mi
from mechinterp.base.errors import FormatError, InputError
from mechinterp.views.report import aggregate_page
from mechinterp.views.report.aggregate_page import aggregate_sizes, render_aggregate_page
from tests.analysis.test_attribution_graph import a_set
from tests.analysis.test_supernodes import graphs as made_anew
from tests.support.models_tiny import tiny
from tests.views.test_attribution_page import data_of

graphs = functools.cache(made_anew)  # nothing here changes them


def test_the_prompts_of_pairs_end_where_the_answer_is_read() -> None:
    pairs = mi.Pairs(
        clean=[[5, 6, 7, 8], [5, 8, 9]], corrupt=[[5, 9, 7, 8], [5, 9, 9]], right=[[6, 3], [8, -1]],
        wrong=[[9, -1], [4, 2]], answer_pos=[2, 2],
    )  # fmt: skip
    found = [(prompt.tolist(), targets) for prompt, targets in mi.graph_prompts(pairs)]
    assert found == [
        ([5, 6, 7], {"right - wrong": {6: 0.5, 3: 0.5, 9: -1.0}}),
        ([5, 8, 9], {"right - wrong": {8: 1.0, 4: -0.5, 2: -0.5}}),
    ]
    prompt, targets = mi.graph_prompts(pairs)[0]
    model = tiny("gpt2")
    graph = mi.attribution_graph(model, prompt, a_set(), targets=targets)
    found_logits = model.run(prompt[None]).logits
    assert found_logits is not None
    logits = found_logits[0, -1]
    assert graph.targets[0].pre == pytest.approx(float((logits[6] + logits[3]) / 2 - logits[9]), abs=1e-6)
    without = mi.Pairs(clean=[[5, 6], [5, 7]], corrupt=[[5, 9], [5, 9]], right=[8, 8])
    assert mi.graph_prompts(without)[0][1] == {"right": {8: 1.0}}
    for wrong in (mi.Pairs(clean=[[5, 6], [5, 7]], corrupt=[[5, 9], [5, 9]]), pairs.read_at([[0, 1], [0, 1]])):
        with pytest.raises(InputError, match="right answer"):
            mi.graph_prompts(wrong)


def test_the_size_of_a_graph_is_that_of_the_graph_that_is_made() -> None:
    model, prompt = tiny("gpt2"), torch.tensor([5, 6, 7, 8])
    for most in (10_000, 7):
        size = mi.graph_size(model, prompt, a_set(), targets=[3], max_features=most)
        graph = mi.attribution_graph(model, prompt, a_set(), targets=[3], max_features=most)
        assert (size.positions, size.active) == (4, graph.about["active_features"])
        assert size.expanded == len(graph.features) and graph.about["bytes"] < size.bytes
        mi.attribution_graph(model, prompt, a_set(), targets=[3], max_features=most, max_bytes=size.bytes)
        with pytest.raises(InputError, match="limit"):
            mi.attribution_graph(model, prompt, a_set(), targets=[3], max_features=most, max_bytes=size.bytes - 1)


@pytest.mark.parametrize("positions", ["summed", "kept"])
def test_an_aggregate_says_what_it_is_of_and_comes_back_from_its_file(positions: str, tmp_path: Path) -> None:
    several = graphs()
    found = mi.aggregate_graphs(several, positions=positions)
    assert found.words == tuple(graph.words for graph in several) and found.bases == several[0].bases
    by_name = found.nodes.set_index("node")
    for graph in several:
        for node in graph.features:
            row = by_name.loc[node.name if positions == "kept" else node.name.partition("@")[0]]
            assert (row["basis"], row["layer"], row["feature"]) == (node.basis, node.layer, node.feature)
            assert row["position"] == (node.position if positions == "kept" else -1)
    path = tmp_path / "x.graphs.json"
    mi.save_aggregated_graph(path, found)
    again = mi.load_aggregated_graph(path)
    pd.testing.assert_frame_equal(again.nodes, found.nodes, check_dtype=False)
    pd.testing.assert_frame_equal(again.edges, found.edges, check_dtype=False)
    assert replace(again, nodes=found.nodes, edges=found.edges).__dict__ == found.__dict__


def test_the_share_of_errors_is_that_before_pruning() -> None:
    """Pruning drops errors, too, so their share of a pruned graph is not what the transcoders miss."""
    model = tiny("gpt2")
    whole = mi.attribution_graph(model, torch.tensor([5, 6, 7, 8]), a_set(), targets=[3])
    small = whole.pruned(0.5)
    assert small.scores.of_errors != pytest.approx(whole.scores.of_errors, rel=1e-3)
    for graph in (whole, small, small.pruned(0.9)):
        assert mi.aggregate_graphs([graph]).of_errors == (whole.scores.of_errors,)


def test_summed_values_are_sums_over_positions_and_means_over_the_prompts_that_have_them() -> None:
    """The brute force of `value`: of a feature its activations summed, then the mean where it is there."""
    several = graphs()
    found = mi.aggregate_graphs(several).nodes.set_index("node")["value"]
    sums: dict[str, list[float]] = {}
    for graph in several:
        own: dict[str, float] = {}
        for node in graph.features:
            name = node.name.partition("@")[0]
            own[name] = own.get(name, 0.0) + node.value
        for name, value in own.items():
            sums.setdefault(name, []).append(value)
    assert any(len(values) == 1 for values in sums.values())
    for name, values in sums.items():
        assert found[name] == pytest.approx(sum(values) / len(values))


def a_file(tmp_path: Path, **changes: Any) -> Path:
    path = tmp_path / "x.json"
    mi.save_aggregated_graph(path, mi.aggregate_graphs(graphs(2)))
    content = json.loads(path.read_text("utf-8"))
    for name, value in changes.items():
        table, _, column = name.partition("__")
        if column:
            content[table][column][0] = value
        else:
            content[table] = value
    path.write_text(json.dumps(content), "utf-8")
    return path


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": "else"}, "is not an aggregated"),
        ({"version": 2}, "version"),
        ({"more": 1}, "keys"),
        ({"graphs": True}, "number of graphs"),
        ({"graphs": 3}, "2 values|values"),
        ({"held": ["norms"]}, "held"),
        ({"bases": [1]}, "bases"),
        ({"words": [["a"], "b"]}, "words"),
        ({"nodes": {"node": []}}, "nodes must have"),
        ({"nodes__layer": 1.5}, "layer must be"),
        ({"nodes__layer": 10**12}, "layer is a number"),
        ({"nodes__influence": "1"}, "influence must be"),
        ({"nodes__frequency": 2.0}, "frequency"),
        ({"nodes__kind": "head"}, "kinds"),
        ({"nodes__node": "m0.f1"}, "not a node|same name"),
        ({"edges__source": "nobody"}, "not a node"),
    ],
)
def test_files_that_are_no_aggregate_are_refused_in_one_line(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(FormatError, match=words) as caught:
        mi.load_aggregated_graph(a_file(tmp_path, **changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("positions", ["summed", "kept"])
def test_every_size_of_the_page_is_what_so_many_prompts_have(positions: str) -> None:
    found = mi.aggregate_graphs(graphs(4), positions=positions)
    content = render_aggregate_page(found)
    data = data_of(content)
    assert [size["says"] for size in data["sizes"]] == [
        "in all prompts", "in at least 3 of 4 prompts", "in at least 2 of 4 prompts", "in any prompt",
    ]  # fmt: skip
    names = [node["name"] for node in data["nodes"]]
    for bit, least in enumerate((4, 3, 2, 1)):
        part = found.frequent(least / 4)
        assert [name for name, node in zip(names, data["nodes"], strict=True) if node["sizes"] >> bit & 1] == list(
            part.nodes["node"]
        )
        edges = {
            (names[a], names[b])
            for a, b, of in zip(*(data["edges"][key] for key in ("from", "to", "sizes")), strict=True)
            if of >> bit & 1
        }
        assert edges == set(zip(part.edges["source"], part.edges["target"], strict=True))
    columns = len(data["words"])
    if positions == "kept":
        assert columns == max(map(len, found.words)) and not any("column" in node for node in data["nodes"])
    else:
        assert all(node["column"] < columns for node in data["nodes"] if node["kind"] not in ("bias", "rest"))
    assert "not tested" in content and content.count("<tr><td>") == 4


def test_the_page_says_what_it_leaves_out_and_wants_a_check_for_every_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    found = mi.aggregate_graphs(graphs(2))
    monkeypatch.setattr(aggregate_page, "MAX_EDGES", len(found.frequent(1.0).edges))
    assert [share for share, _ in aggregate_sizes(found)[0]] == [1.0]
    assert "What is in any prompt is too much" in render_aggregate_page(found)
    monkeypatch.setattr(aggregate_page, "MAX_EDGES", 0)
    with pytest.raises(InputError, match="prune"):
        render_aggregate_page(found)
    model, bases = tiny("gpt2"), a_set()
    check = mi.validate_graph(model, mi.attribution_graph(model, torch.tensor([5, 6]), bases, targets=[3]), bases, n=2)
    with pytest.raises(InputError, match="every prompt"):
        render_aggregate_page(mi.aggregate_graphs(graphs(2)), checks=[check])
    monkeypatch.undo()
    for checks, says in (([check, check], 0), ([check, None], 4)):
        content = render_aggregate_page(found, checks=checks)
        assert f"r = {check.pearson:.2f}" in content and content.count(">not tested<") == says
        assert ("1 of 2 prompts were tested" in content) == (says > 0)
