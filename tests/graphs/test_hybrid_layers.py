"""Hybrid models: layers without heads, without an MLP, or whose heads cannot be told apart, as nodes of the graph.

The contract of families runs for these shapes in `test_node_families.py`, and the comparison with plain Hugging Face
hooks in `tests/models/test_families.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import mechinterp as mi
from mechinterp.base.errors import FormatError, InputError, UnsupportedError
from mechinterp.engines.edge_attribution import edge_gradients
from mechinterp.engines.edge_patching import run_edges
from mechinterp.engines.mask_gradients import mask_gradients
from mechinterp.engines.replacement import corrupt_replacement, record_writes
from mechinterp.graphs.graph import build_graph, graph_of
from mechinterp.models.layout import Dims, LayerDims
from mechinterp.models.sites import Site
from mechinterp.tasks.metrics import get_metric
from mechinterp.views.plots.circuit import circuit_figure
from mechinterp.views.plots.measures import head_heatmap
from mechinterp.views.report.charts import heat_view
from tests.support.models_tiny import HYBRIDS, build, pairs, tiny
from tests.support.odd_models import WHOLE, odd

LOGIT_DIFF = get_metric("logit_diff")
EXACT = {"rtol": 1e-4, "atol": 2e-5}  # norms and state-space layers compute in float32


def values_of(model: mi.HookManager, ids: mi.Pairs, edits: Any) -> torch.Tensor:
    logits = model.run(ids.clean, ids.mask, interventions=edits).logits
    assert logits is not None
    return LOGIT_DIFF(logits.gather(1, ids.answer_pos[..., None].expand(-1, -1, logits.shape[-1])), ids)


@pytest.mark.parametrize("name", HYBRIDS)
def test_an_edge_into_a_layer_without_heads_changes_its_input_and_nothing_else(name: str) -> None:
    model, ids = tiny(name), pairs(3, 6, padded=True)
    graph = build_graph(model)
    now, then = (record_writes(model, graph, tokens, ids).values for tokens in (ids.clean, ids.corrupt))
    mixers = [layer for layer in range(model.dims.n_layers) if model.dims.layer(layer).mixer]
    last = mixers[-1]
    writers = graph.writers_of(graph.families[1])
    for edge, first in ((f"input->a{last}", 0), (f"{graph.writers[writers.start]}->a{last}", 1)):
        family = graph.families[first]
        change = (family.writes(model, now).dense() - family.writes(model, then).dense())[0]
        stream = model.run(ids.clean, ids.mask, record=[Site("resid_pre", last)]).values[Site("resid_pre", last)]
        given = model.layout.read_mixer(last, stream - change)
        expected = values_of(model, ids, {Site("attn_in", last): lambda value, given=given: given.to(value)})
        found = run_edges(model, graph, ids, graph.mask_of([edge]))
        torch.testing.assert_close(found, expected.to(found), **EXACT)
        clean = values_of(model, ids, ())
        assert float((found - clean).abs().max()) > 1e-4


@pytest.mark.parametrize("name", HYBRIDS)
def test_the_gradient_at_no_cut_is_minus_the_score_and_positions_and_batches_agree(name: str) -> None:
    model, ids = tiny(name), pairs(3, 6, padded=True, positions={"a": [1, 2, 1], "end": [5, 4, 3]})
    graph = build_graph(model, positions=("a", "end"))
    values = corrupt_replacement(model, graph).on(ids)
    kept = torch.zeros(1, *graph.possible.shape, dtype=torch.float64)
    slopes = mask_gradients(model, graph, ids, kept, values, lambda logits: LOGIT_DIFF(logits[0], ids)[None])[1][0]
    scores = edge_gradients(model, graph, ids, LOGIT_DIFF)
    torch.testing.assert_close(-slopes, scores, **EXACT)
    alone = sum(edge_gradients(model, graph, ids[row : row + 1], LOGIT_DIFF) for row in range(3))
    torch.testing.assert_close(alone, scores, **EXACT)
    together = build_graph(model)
    rows = torch.tensor([together.reader_index[reader.partition("@")[0]] for reader in graph.readers])
    merged = torch.zeros_like(edge_gradients(model, together, ids, LOGIT_DIFF)).index_add(0, rows, scores)
    torch.testing.assert_close(merged, edge_gradients(model, together, ids, LOGIT_DIFF), **EXACT)


@pytest.mark.parametrize("name", WHOLE)
def test_attention_whose_heads_cannot_be_told_apart_is_one_node(name: str) -> None:
    model, ids = mi.load_model(odd(name)), pairs(3)
    graph = build_graph(model)
    mixers = [layer for layer in range(model.dims.n_layers) if model.dims.layer(layer).mixer]
    assert mixers and {f"a{layer}" for layer in mixers} <= set(graph.writers) & set(graph.readers)
    ends = run_edges(model, graph, ids, torch.stack([torch.zeros_like(graph.possible), graph.possible]))
    swapped = mi.Pairs(clean=ids.corrupt, corrupt=ids.clean, right=ids.right, wrong=ids.wrong)
    expected = [values_of(model, one, ()) for one in (ids, swapped)]
    torch.testing.assert_close(ends, torch.stack(expected).to(ends), **EXACT)
    for kind in ("q", "z", "pattern"):
        assert not model.has(Site(kind, mixers[0]))
    with pytest.raises((InputError, UnsupportedError), match=r"no heads|read as a whole|has no site"):
        mi.activation_patching(model, ids, [f"a{mixers[0]}.h0"])


def test_methods_through_heads_refuse_a_layer_without_them_by_name() -> None:
    model, ids = tiny("lfm2"), pairs(3)
    graph = build_graph(model)
    for method in ("relp", "cd-edges", "gim", "cd"):
        with pytest.raises((InputError, UnsupportedError), match=r"[Ll]ayer 0 .*no heads|has no site") as caught:
            mi.score_edges(model, graph, ids, method=method)
        assert "\n" not in str(caught.value), method
    assert float(mi.score_edges(model, graph, ids, method="eap-ig").values[:, graph.writer_index["a0"]].abs().max()) > 0
    circuit = mi.select(graph, mi.score_edges(model, graph, ids, method="eap"), edges=10)
    with pytest.raises(UnsupportedError, match=r"layers differ\. Leave roles out"):
        mi.measured_roles(model, circuit, ids, ids)
    assert mi.activation_patching(model, ids, "z").labels["layer"] == ("1",)
    assert mi.activation_patching(model, ids, ["a0", "a2", "m1"]).labels["node"] == ("a0", "a2", "m1")


@pytest.mark.parametrize("name", HYBRIDS)
def test_parts_of_the_logit_add_up_and_nodes_are_scored_as_in_the_graph(name: str) -> None:
    model, ids = tiny(name), pairs(3)
    parts = mi.direct_logit_attribution(model, ids)
    assert "a0" in parts.labels[parts.axes[0]]
    torch.testing.assert_close(parts.values.sum(0).flatten(), values_of(model, ids, ()).to(parts.values), **EXACT)
    nodes, graph = mi.node_attribution(model, ids), build_graph(model, level="node")
    scores = mi.score_edges(model, graph, ids, method="eap").values
    own = nodes.values.sum(1).mean(-1)
    for number, node in enumerate(nodes.labels["node"]):
        row = graph.writer_index[node]
        assert float(own[number]) == pytest.approx(float(scores[-1, row]), rel=1e-4, abs=2e-5), node


def test_a_circuit_of_a_hybrid_model_is_stored_read_verified_and_drawn(tmp_path: Path) -> None:
    model, ids = build("nemotron-h", dtype=torch.float32), pairs(4)
    graph = build_graph(model)
    assert graph.writers == ("input", "a0", "m1", "a2", "m3") and graph.readers == ("a0", "m1", "a2", "m3", "logits")
    circuit = mi.select(graph, mi.score_edges(model, graph, ids, method="eap"), edges=8)
    path = tmp_path / "x.circuit.json"
    mi.save_circuit(path, circuit, model=model, title="x")
    read = mi.load_circuit(path)
    assert read.graph.digest() == graph.digest() and read.graph.dims == model.dims
    assert torch.equal(read.kept, circuit.kept)
    document = json.loads(path.read_text("utf-8"))
    assert document["schema_version"] == 2 and len(document["model"]["dims"]["layers"]) == 4
    document["model"]["dims"]["layers"][1]["mlp"] = False
    path.write_text(json.dumps(document), "utf-8")
    with pytest.raises(FormatError):
        mi.load_circuit(path)
    figure = circuit_figure(circuit)
    assert {"a0", "m1"} <= {text for trace in figure.data for text in trace.text or () if isinstance(text, str)}


def test_cells_of_layers_that_lack_something_are_empty() -> None:
    model, ids = tiny("lfm2"), pairs(3)
    graph = build_graph(model)
    circuit = mi.select(graph, mi.score_edges(model, graph, ids, method="eap"), edges=20)
    heat = heat_view(circuit)
    assert heat is not None
    assert [name for name, _ in heat["rows"][0]] == ["a0"] * 4 + ["m0"]
    assert [name for name, _ in heat["rows"][1]] == ["a1.h0", "a1.h1", "a1.h2", "a1.h3", "m1"]
    own = (LayerDims(2, 1, False, False), LayerDims(4, 2, False, True), LayerDims(0, 0, False, True))
    other = graph_of(Dims(3, 4, 2, 8, 4, 9, 9, 9, True, False, True, own))
    names = [[None if row is None else other.writers[row] for row in other.cells(layer)] for layer in range(3)]
    assert names[0] == ["a0.h0", "a0.h1", None, None, None] and names[2] == [None] * 4 + ["m2"]
    assert other.readers[:4] == ("a0.h0<q>", "a0.h1<q>", "a0.kv0<k>", "a0.kv0<v>")
    assert head_heatmap(circuit.scores).data[0].customdata[0][0] == "a0"  # type: ignore[union-attr]
