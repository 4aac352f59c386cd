"""Attribution graphs in Neuronpedia's JSON: what is written is read again, and what is no graph is refused."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch

import mechinterp as mi
from mechinterp.analysis.attribution_graph.graph import AttributionGraph, GraphNode, Supernode
from mechinterp.base.errors import FormatError
from mechinterp.circuit_file.formats.attribution_graphs import as_neuronpedia, from_neuronpedia


def a_graph() -> AttributionGraph:
    """Two tokens, the bias, an error of layer 0 and 1, three features, a target and a combination of tokens."""
    nodes = (
        GraphNode("token", -1, 0, 7, text="a"),
        GraphNode("token", -1, 1, 8, text=" b"),
        GraphNode("bias"),
        GraphNode("error", 0, 1),
        GraphNode("error", 1, 1),
        GraphNode("rest"),
        GraphNode("feature", 0, 0, 1, "m0", "names", 2.0, 1.5),
        GraphNode("feature", 0, 1, 0, "m0", "", 1.0, 1.0),
        GraphNode("feature", 1, 1, 5, "mine", "", 3.0, 3.0),
        GraphNode("target", -1, 1, 9, "", " c", 0.75, 4.0, 0.75),
        GraphNode("target", -1, 1, -1, "", "d - e", 0.0, 1.0, 0.25),
    )
    weights = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    weights[:2, 6:] = 0
    weights[2, 8] = 0
    weights[0, 1] = 0
    groups = (Supernode("subject", ("m0.f1@0", "m0.f0@1")),)
    about = {"targets": {" c": {"9": 1.0}, "d - e": {"1": 1.0, "2": -1.0}}, "gap": 0.0, "pinned": ["m0.f1@0"]}
    return AttributionGraph((7, 8), ("a", " b"), nodes, weights, "toy", {"m0": "aa", "mine": "bb"}, groups, about)


def test_what_is_written_is_read_again(tmp_path):
    graph, path = a_graph(), tmp_path / "toy.graph.json"
    mi.save_attribution_graph(path, graph)
    again = mi.load_attribution_graph(path)
    assert again.nodes == graph.nodes and torch.equal(again.weights, graph.weights)
    assert again.supernodes == graph.supernodes and again.bases == graph.bases and again.model == "toy"
    assert again.tokens == graph.tokens and again.words == graph.words
    assert again.about == {**graph.about, "format": "neuronpedia"}


def test_it_obeys_their_schema():
    content = as_neuronpedia(a_graph())
    ids = [node["node_id"] for node in content["nodes"]]
    assert len(set(ids)) == len(ids) and {"0_err_1", "1_err_1", "0_1_0", "0_0_1"} <= set(ids)
    assert re.fullmatch("[a-z0-9-]+", content["metadata"]["slug"])
    for node in content["nodes"]:
        assert type(node["layer"]) is type(node["clerp"]) is type(node["feature_type"]) is str
        assert 0 <= node["ctx_idx"] < 2 and type(node["feature"]) is int
    assert {end for link in content["links"] for end in (link["source"], link["target"])} <= set(ids)
    assert content["qParams"]["supernodes"] == [["subject", "0_1_0", "0_0_1"]]


def of_circuit_tracer() -> dict:
    """A file as circuit-tracer writes it: its ids, its types, no keys of ours."""

    def node(node_id, kind, layer, pos, feature, **more):
        return {"node_id": node_id, "feature_type": kind, "layer": layer, "ctx_idx": pos, "feature": feature,
                "jsNodeId": node_id, "clerp": "", "influence": 0.1, "activation": None, **more}  # fmt: skip

    return {
        "metadata": {"slug": "x", "scan": "gemma-2-2b", "prompt_tokens": ["<bos>", "a"], "prompt": "a"},
        "qParams": {"linkType": "both", "supernodes": [], "pinnedIds": ["3_40_1"]},
        "nodes": [
            node("E_2_0", "embedding", "E", 0, 0),
            node("E_17_1", "embedding", "E", 1, 1),
            node("3_40_1", "cross layer transcoder", "3", 1, 43 * 44 // 2 + 40, activation=2.5, clerp="a letter"),
            node("0_5_1", "mlp reconstruction error", "5", 1, -1),
            node("27_17_1", "logit", "27", 1, 17, token_prob=0.6, is_target_logit=True, clerp='Output "b"'),
        ],
        "links": [
            {"source": "E_17_1", "target": "3_40_1", "weight": 1.5},
            {"source": "3_40_1", "target": "27_17_1", "weight": 0.5},
            {"source": "0_5_1", "target": "27_17_1", "weight": -0.25},
        ],
    }


def test_files_of_circuit_tracer_are_read():
    graph = from_neuronpedia(of_circuit_tracer(), "x")
    assert graph.tokens == (2, 17) and graph.about["pinned"] == ["m3.f40@1"]
    (feature,) = graph.features
    assert (feature.name, feature.value, feature.text) == ("m3.f40@1", 2.5, "a letter")
    assert [node.name for node in graph.nodes if node.kind == "error"] == ["m5.err@1"]
    assert graph.targets[0].weight == 0.6 and graph.n_edges == 3
    assert graph.scores.replacement == pytest.approx(0.5 / 0.75)
    unnamed = of_circuit_tracer()
    unnamed["nodes"][2]["node_id"] = "f"
    for link in unnamed["links"]:
        link["source"], link["target"] = (link[end].replace("3_40_1", "f") for end in ("source", "target"))
    assert from_neuronpedia(unnamed, "x").features[0].feature == 40  # from their pairing of layer and number


def changed(change) -> dict:
    content = copy.deepcopy(of_circuit_tracer())
    change(content)
    return content


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c["nodes"].append({**c["nodes"][2], "node_id": "0_5_1"}), "two nodes have the id"),
        (lambda c: c["links"].append({"source": "a", "target": "3_40_1", "weight": 1}), "a node is missing"),
        (lambda c: c["links"].append(c["links"][0]), "given twice"),
        (lambda c: c["links"].append({"source": "27_17_1", "target": "3_40_1", "weight": 1}), "is not an edge"),
        (lambda c: c["links"].append({"source": "3_40_1", "target": "3_40_1", "weight": 1}), "is not an edge"),
        (lambda c: c["nodes"][2].update(ctx_idx=9), "position 9 of 2"),
        (lambda c: c["nodes"][2].update(feature_type="lorsa"), "not known"),
        (lambda c: c["nodes"][2].update(layer="x"), "is not an attribution graph"),
        (lambda c: c["nodes"][2].pop("layer"), "is not an attribution graph"),
        (lambda c: c["nodes"].append(3), "is not an attribution graph"),
        (lambda c: c.pop("links"), "it has no 'links'"),
        (lambda c: c["links"][0].update(weight="many"), "is not an attribution graph"),
        (lambda c: c["qParams"].update(supernodes=[["a", "nobody"]]), "is not an attribution graph"),
        (lambda c: c["nodes"].append({**c["nodes"][2], "node_id": "3_40_01"}), "same name"),
    ],
)
def test_what_is_no_graph_is_refused_in_one_line(change, said, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(changed(change)), "utf-8")
    with pytest.raises(FormatError, match=said) as caught:
        mi.load_attribution_graph(path)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_graphs(tmp_path):
    for text in ("[]", "3", '{"metadata": 1, "nodes": 2, "links": 3}', "{", '{"nodes": NaN}'):
        (tmp_path / "x.json").write_text(text, "utf-8")
        with pytest.raises(FormatError):
            mi.load_attribution_graph(tmp_path / "x.json")
    with pytest.raises(FormatError):
        mi.load_attribution_graph(tmp_path / "missing.json")
