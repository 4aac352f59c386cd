"""Features as nodes, held against the model with features edited by hand, against neurons, and against attribution."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import mechinterp as mi
from mechinterp.base.errors import InputError, UnsupportedError
from mechinterp.discovery.features import top_features
from mechinterp.engines.edge_attribution import edge_gradients
from mechinterp.engines.edge_patching import run_edges
from mechinterp.engines.mask_gradients import mask_gradients
from mechinterp.engines.replacement import corrupt_replacement, record_writes
from mechinterp.evaluation.masks import knock_out
from mechinterp.graphs.graph import Graph, build_graph
from mechinterp.models.hook_manager import HookManager
from mechinterp.models.sites import Site
from mechinterp.tasks.metrics import get_metric
from mechinterp.views.plots.circuit import circuit_figure
from mechinterp.views.report.charts import heat_view
from tests.support.models_tiny import D_MODEL, build, pairs, tiny

LOGIT_DIFF = get_metric("logit_diff")
EXACT = {"rtol": 1e-9, "atol": 1e-9}


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def a_transcoder(layer: int = 1, n: int = 12, **more: Any) -> mi.FeatureBasis:
    weights = drawn(D_MODEL, n, seed=1), 0.3 * drawn(n, D_MODEL, seed=2)
    return mi.transcoder(f"mlp_in.{layer}", f"mlp_out.{layer}", *weights, b_enc=0.1 * drawn(n, seed=3), **more)


def an_sae(site: str, n: int = 12, **more: Any) -> mi.FeatureBasis:
    return mi.sae(site, drawn(D_MODEL, n, seed=4), drawn(n, D_MODEL, seed=5), b_dec=drawn(D_MODEL, seed=6), **more)


def edited(model: HookManager, ids: mi.Pairs, site: Site, change: torch.Tensor) -> torch.Tensor:
    """The metric with a change added at a site."""
    logits = model.run(ids.clean, ids.mask, interventions={site: lambda value: value + change.to(value)}).logits
    assert logits is not None
    return LOGIT_DIFF(logits.gather(1, ids.answer_pos[..., None].expand(-1, -1, logits.shape[-1])), ids)


@pytest.mark.parametrize("activation", [mi.Relu(), mi.TopK(4), mi.Gated(*(0.3 * drawn(3, 12, seed=8)))], ids=str)
def test_an_edge_into_a_feature_changes_what_it_encodes_and_nothing_else(activation: Any) -> None:
    model, ids = tiny("gpt2"), pairs(3, 6, padded=True)
    basis = a_transcoder(activation=activation)
    whole = build_graph(model)
    now, then = (record_writes(model, whole, tokens, ids).values for tokens in (ids.clean, ids.corrupt))
    change = now[Site("resid_pre", 0)] - then[Site("resid_pre", 0)]
    resid = model.run(ids.clean, ids.mask, record=["resid_mid.1"]).values["resid_mid.1"]
    own, changed = (model.layout.read_mlp(1, seen) for seen in (resid, resid - change))
    moved = basis.encode(changed).values - basis.encode(own).values
    one, other = moved.abs().flatten(0, 1).amax(0).argsort()[-2:].tolist()
    graph = build_graph(model, features={basis: [one, other]})
    mlp = model.mlp(1, changed) - model.mlp(1, own)
    parts = {n: moved[..., n, None] * basis.writes([n])[0] for n in (one, other)}
    ports = [f"m1.f{n}<in>" for n in (one, other)]
    cases = {(ports[0],): parts[one], ("m1",): mlp - parts[one] - parts[other]}
    cases |= {tuple(ports): parts[one] + parts[other], ("m1", *ports): mlp}
    for readers, expected in cases.items():
        cut = graph.mask_of([f"input->{reader}" for reader in readers])
        torch.testing.assert_close(
            run_edges(model, graph, ids, cut), edited(model, ids, Site("mlp_out", 1), expected), **EXACT
        )
    cut_whole = run_edges(model, whole, ids, whole.mask_of(["input->m1"]))
    torch.testing.assert_close(edited(model, ids, Site("mlp_out", 1), mlp), cut_whole, **EXACT)
    assert all(float(part.abs().max()) > 0.01 for part in parts.values())  # both features are moved


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_slopes_in_the_mask_are_minus_the_scores_and_finite_differences(name: str) -> None:
    model, ids = tiny(name), pairs(3, 6, padded=True)
    graph = build_graph(
        model,
        features={a_transcoder(1): [0, 2, 5], an_sae("attn_out.0"): [1], an_sae("mlp_out.2"): [3]},
    )
    values = corrupt_replacement(model, graph).on(ids)
    cut = 0.1 + 0.8 * torch.rand(graph.possible.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    masks = torch.stack([cut * graph.possible, torch.zeros_like(cut)])
    found, slopes = mask_gradients(
        model, graph, ids, masks, values, lambda logits: torch.stack([LOGIT_DIFF(row, ids) for row in logits])
    )
    # gemma2's norms compute in float32.
    near = EXACT if name == "gpt2" else {"rtol": 1e-4, "atol": 2e-5}
    torch.testing.assert_close(found, run_edges(model, graph, ids, masks), **near)
    torch.testing.assert_close(-slopes[1], edge_gradients(model, graph, ids, LOGIT_DIFF), **near)
    direction = drawn(*cut.shape, seed=9).clamp(-2, 2) * graph.possible
    step = 1e-6 if name == "gpt2" else 3e-3
    up, down = (run_edges(model, graph, ids, masks[0] + s * step * direction).sum() for s in (1, -1))
    slope = float((slopes[0] * direction).sum())
    assert slope == pytest.approx(float(up - down) / (2 * step), rel=1e-4 if name == "gpt2" else 2e-2, abs=1e-3)


def test_features_and_error_are_the_node_as_attribution_has_them() -> None:
    """A feature's edges add up to its own score by attribution patching, and with the rest to that of the MLP."""
    model, ids, basis = tiny("gpt2"), pairs(4), a_transcoder()
    graph, whole = build_graph(model, level="node", features=[basis]), build_graph(model, level="node")
    for edges, method, more in (("eap", "atp", {}), ("eap-ig", "eap-ig-inputs", {"quadrature": "midpoint"})):
        settings = {} if edges == "eap" else {"schedule": "midpoint"}
        found = mi.score_edges(model, graph, ids, method=edges, **settings).values[-1].double()
        node = mi.score_edges(model, whole, ids, method=edges, **settings).values[-1].double()
        grid = mi.attribution_patching(model, ids, basis, method=method, **more).values
        own = grid[:-1].sum(1).mean(-1)
        rows = [graph.writer_index[f"m1.f{number}"] for number in range(basis.n_features)]
        torch.testing.assert_close(found[rows], own, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(
            found[rows].sum() + found[graph.writer_index["m1"]], node[whole.writer_index["m1"]], rtol=1e-6, atol=1e-7
        )
        rest = float(found[graph.writer_index["m1"]])
        assert rest == pytest.approx(float(grid[-1].sum(0).mean()), rel=1e-6, abs=1e-7)
    # Exactly: a feature that is replaced is the feature patched.
    cuts = torch.stack([knock_out(graph, [f"m1.f{number}"]) for number in (2, 5)])
    full = run_edges(model, graph, ids, torch.zeros_like(graph.possible))
    patched = mi.activation_patching(model, ids, ["m1.f2", "m1.f5"], features=[basis]).values
    found = full - run_edges(model, graph, ids, cuts)
    torch.testing.assert_close(found, patched.flatten(0, -2).reshape(2, -1).to(found), rtol=1e-6, atol=1e-7)


def test_the_identity_dictionary_is_the_graph_of_neurons() -> None:
    model, ids = tiny("gemma2"), pairs(3)
    features = build_graph(model, features={mi.neuron_basis("mlp_post.1", 32, label="m1"): [3, 8]})
    neurons = build_graph(model, neurons={1: [3, 8]})
    assert [name.replace("f", "n") for name in features.writers] == list(neurons.writers)
    cut = drawn(*neurons.possible.shape).gt(0) & neurons.possible
    assert torch.equal(*(edge_gradients(model, graph, ids, LOGIT_DIFF) for graph in (features, neurons)))
    torch.testing.assert_close(*(run_edges(model, graph, ids, cut) for graph in (features, neurons)), rtol=0, atol=0)


def test_a_transcoder_that_is_the_mlp_has_no_error_and_is_the_graph_of_neurons() -> None:
    model, ids = build("gpt2", activation_function="relu", n_inner=20), pairs(3)
    maps = model.layout.neurons(1)
    assert maps.b_in is not None and maps.b_out is not None
    basis = mi.transcoder("mlp_in.1", "mlp_out.1", maps.W_in, maps.W_out, b_enc=maps.b_in, b_dec=maps.b_out)
    features, neurons = build_graph(model, features=[basis]), build_graph(model, neurons={1: range(20)})
    scores, expected = (edge_gradients(model, graph, ids, LOGIT_DIFF) for graph in (features, neurons))
    inputs = torch.tensor([name.endswith("<in>") for name in features.readers])
    rest = features.reader_index["m1"]
    torch.testing.assert_close(scores[~inputs][:, :], torch.where(_row(neurons, "m1"), 0, expected), **EXACT)
    torch.testing.assert_close(scores[inputs].sum(0), expected[rest], **EXACT)
    assert float(scores[rest].abs().max()) < 1e-9 and float(scores[:, features.mlp_writer(1)].abs().max()) < 1e-9
    values = run_edges(model, features, ids, features.mask_of([f"input->m1.f{i}<in>" for i in range(20)]))
    torch.testing.assert_close(values, run_edges(model, neurons, ids, neurons.mask_of(["input->m1"])), **EXACT)


def _row(graph: Graph, reader: str) -> torch.Tensor:
    return (torch.arange(len(graph.readers)) == graph.reader_index[reader])[:, None]


def test_top_features_are_those_that_attribution_ranks_first() -> None:
    model, ids = tiny("gpt2"), pairs(5)
    bases = [a_transcoder(0, label="m0"), an_sae("mlp_out.1")]
    scores = {
        (b, i): float(value)
        for b, basis in enumerate(bases)
        for i, value in enumerate(
            mi.attribution_patching(model, ids, basis, method="eap-ig-inputs").values[:-1].sum(1).mean(-1)
        )
    }
    best = sorted(scores, key=lambda key: -abs(scores[key]))[:6]
    found = top_features(model, ids, bases, 6, batch_size=2)
    assert {(bases.index(basis), i) for basis, own in found.items() for i in own} == set(best)
    assert all(list(own) == sorted(own) for own in found.values())
    graph = build_graph(model, features=found)
    assert len(graph.writers) == len(build_graph(model).writers) + 6
    silent = replace(bases[0], b_enc=torch.full((12,), -1e4, dtype=torch.float64))
    with pytest.raises(InputError, match="No feature of 'm0' has an effect"):
        top_features(model, ids, [silent], 3)


def test_methods_take_features_or_refuse_by_name() -> None:
    model, ids = tiny("gpt2"), pairs(3)
    graph = build_graph(model, features={a_transcoder(): [2, 5]})
    taken = 0
    for name, method in mi.METHODS.importable().items():
        if method.graphs == "plain":
            with pytest.raises(InputError, match=f"Method {name!r} scores edges.*neurons, experts and features take"):
                mi.score_edges(model, graph, ids, method=name)
        elif name in ("eap", "relp", "gim", "eap-gp", "cd-edges"):
            scores = mi.score_edges(model, graph, ids, method=name)
            whole = mi.score_edges(model, build_graph(model), ids, method=name).to_dict()
            split = scores.to_dict()
            assert whole["input->m1"] == pytest.approx(
                sum(split[f"input->{reader}"] for reader in ("m1", "m1.f2<in>", "m1.f5<in>")), rel=1e-6, abs=1e-9
            )
            taken += 1
    assert taken == 5


REFUSED: dict[str, tuple[Any, str]] = {
    "a state of the stream": (lambda: {an_sae("resid_pre.1"): [0]}, "a state of the residual stream"),
    "the attention's input": (
        lambda: [mi.transcoder("resid_pre.1", "mlp_out.1", drawn(D_MODEL, 3), drawn(3, D_MODEL))],
        "reads 'resid_pre.1' and writes to 'mlp_out.1'.*read 'mlp_in' or 'resid_mid'",
    ),
    "inside attention": (lambda: [an_sae("q.1")], "as nodes of a graph they write to mlp_out"),
    "no layer in the name": (lambda: {a_transcoder(label="mine"): [0]}, "does not say its layer, 1"),
    "another width": (
        lambda: [mi.transcoder("mlp_in.1", "mlp_out.1", drawn(D_MODEL, 3), drawn(3, 5))],
        "writes vectors of 5 numbers to 'mlp_out.1', which has 16",
    ),
    "both sides": (
        lambda: {a_transcoder(1): [0], an_sae("mlp_out.1", label="out.1"): [0]},
        "'m1' and 'out.1' split m1",
    ),
    "twice": (lambda: {a_transcoder(1): [0, 0]}, "named twice"),
    "absent": (lambda: {a_transcoder(1): [99]}, "has features 0 to 11; got 99"),
    "another layer": (lambda: [a_transcoder(9)], "layers 0 to 2"),
    "no basis": (lambda: ["bundled:m1"], "`features` are bases"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_features_that_cannot_be_nodes_are_refused_by_name(case: str) -> None:
    make, message = REFUSED[case]
    with pytest.raises((InputError, UnsupportedError), match=message) as caught:
        build_graph(tiny("gpt2"), features=make())
    assert "\n" not in str(caught.value)


def test_a_circuit_with_features_is_evaluated_and_drawn() -> None:
    model, ids = tiny("gpt2"), pairs(6)
    graph = build_graph(model, features={a_transcoder(1): [0, 2, 5], an_sae("attn_out.0"): [1, 3]})
    assert {"a0", "a0.f1", "m1.f2"} <= set(graph.writers) and "a0.h0<q>" in graph.readers
    circuit = mi.select(graph, mi.score_edges(model, graph, ids, method="eap-ig"), edges=40)
    found = mi.evaluate(model, circuit, ids)
    assert found.n_examples == 6
    heat = heat_view(circuit)  # the attention that is one writer has its own value, not that of a feature
    assert heat is not None and [name for name, _ in heat["rows"][0]] == ["a0"] * 4 + ["m0"]
    assert [name for name, _ in heat["rows"][1]] == ["a1.h0", "a1.h1", "a1.h2", "a1.h3", "m1"]
    drawn_names = {text for trace in circuit_figure(circuit).data for text in trace.text or () if isinstance(text, str)}
    assert {name for name in circuit.nodes if ".f" in name} & drawn_names


def test_runs_side_by_side_and_from_a_shared_prefix_are_runs_one_by_one() -> None:
    """`exact` cuts edges one at a time, sharing the layers before them; here by whole runs."""
    model, ids = tiny("gpt2"), pairs(3, 6, padded=True)
    graph = build_graph(model, features={a_transcoder(1): [2, 5], an_sae("attn_out.2"): [1]})
    scores = mi.score_edges(model, graph, ids, method="exact").values
    full = run_edges(model, graph, ids, torch.zeros_like(graph.possible))
    names = ["input->m1.f2<in>", "a0.h1->m1.f5<in>", "m1.f5->m2", "m1.f2->a2.h0<k>", "a2.f1->logits", "m1->a2.h1<q>"]
    for name in names:
        alone = run_edges(model, graph, ids, graph.mask_of([name]))
        assert float(scores[graph.edge_index(name)]) == pytest.approx(float((full - alone).mean()), rel=1e-6, abs=1e-7)
    several = torch.stack([graph.mask_of([name]) for name in names])
    together = run_edges(model, graph, ids, several)
    one_by_one = torch.stack([run_edges(model, graph, ids, mask) for mask in several])
    torch.testing.assert_close(together, one_by_one, **EXACT)
    torch.testing.assert_close(run_edges(model, graph, ids, several, batch_size=2), together, **EXACT)
