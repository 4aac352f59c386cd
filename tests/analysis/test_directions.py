"""Directions: found, judged beside their controls, read as a metric by every method, and explained exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mechinterp as mi
from mechinterp.analysis.causal_inner_product import CausalInnerProduct
from mechinterp.analysis.directions import direction_values
from mechinterp.analysis.text_span import span_of
from mechinterp.base.errors import InputError, UnsupportedError
from mechinterp.models.sites import Site
from mechinterp.tasks.pairs import Pairs
from tests.support.models_tiny import EVERY, SHAPES, pairs, tiny, tokens

NAMED = {"S": [1, 2, 0, 1]}


def prompts(n: int = 4) -> Pairs:
    return pairs(n, 6, padded=True, positions=NAMED)


@pytest.mark.parametrize("batch_size", [None, 3])
def test_the_values_are_those_at_the_position(batch_size: int | None) -> None:
    model, p = tiny("gpt2"), prompts()
    sites = [Site("resid_pre", 1), Site("mlp_out", 0)]
    found = direction_values(model, p, sites, ["S", -1], batch_size=batch_size)
    whole = model.run(p.corrupt, p.mask, record=sites).values
    for site in sites:
        for position, at in (("S", p.positions["S"]), (-1, p.lengths - 1)):
            expected = whole[site][torch.arange(4), at]
            torch.testing.assert_close(found[site, position][1], expected, rtol=0, atol=1e-12)


def test_adding_one_moves_a_prompt_to_the_other_mean() -> None:
    model, p = tiny("gpt2"), prompts()
    direction = mi.find_direction(model, p, "resid_pre.2", "S")
    clean, corrupt = direction_values(model, p, [direction.site], ["S"])[direction.site, "S"]
    torch.testing.assert_close(direction.write, clean.mean(0) - corrupt.mean(0))
    edit = mi.add_features(direction.basis, {0: 1.0}, pairs=p, positions="S")
    after = model.run(p.corrupt, p.mask, record=["resid_pre.2"], interventions=[edit]).values["resid_pre.2"]
    torch.testing.assert_close(after[torch.arange(4), p.positions["S"]].mean(0), clean.mean(0), atol=1e-9, rtol=0)


def concept_pairs(n: int, seed: int) -> Pairs:
    """The concept is the last token: 10 to 14 in clean prompts, 20 to 24 in corrupt ones."""
    generator = torch.Generator().manual_seed(seed)
    clean = tokens(n, 5, seed=seed)
    corrupt = clean.clone()
    clean[:, -1], corrupt[:, -1] = (torch.randint(low, low + 5, (n,), generator=generator) for low in (10, 20))
    return Pairs(clean=clean, corrupt=corrupt)


def test_probes_find_a_planted_concept_and_nothing_where_there_is_none() -> None:
    """In the residual stream of a model without attention to it, position 0 says nothing about the last token."""
    model, train, test = tiny("gpt2"), concept_pairs(60, 1), concept_pairs(60, 2)
    found = mi.probe_directions(model, train, test, ["resid_pre.0", "resid_pre.2"], [0, -1], "lda", shuffles=8)
    table = found.to_frame().set_index(["site", "pos"])
    # The same tokens at position 0 in both prompts, and no later token reaches it: no direction at all.
    assert not table.index.isin([("resid_pre.2", "0")]).any() and "same mean" in str(found.grid.about)
    own = table.loc[("resid_pre.2", "-1")]
    assert own["accuracy"] > 0.75 and own["auroc"] > 0.8 and own["embeddings"] > 0.95
    # Ten tokens in 16 dimensions can have any labels, so accuracy on the embeddings has no selectivity.
    assert table.loc[("resid_pre.0", "-1")]["control"] > 0.95
    assert abs(own["shuffled"] - 0.5) < 0.15
    assert own["selectivity"] == pytest.approx(own["accuracy"] - own["control"])
    assert own["gap"] == pytest.approx(1, abs=0.4)
    assert found.best().site in (Site("resid_pre", 0), Site("resid_pre", 2))
    with pytest.raises(InputError, match="also in `train`"):
        mi.probe_directions(model, train, train[:10], "resid_pre.1")


def test_random_labels_give_probes_at_chance() -> None:
    """Both prompts are drawn alike, so held-out accuracy is chance, however well the fit separates its own prompts."""
    model = tiny("gpt2")
    train, test = (Pairs(clean=tokens(60, 5, seed=s), corrupt=tokens(60, 5, seed=s + 1)) for s in (11, 21))
    row = mi.probe_directions(model, train, test, "resid_pre.2", -1, "lda", shrinkage=0.0).to_frame().iloc[0]
    assert abs(row["accuracy"] - 0.5) < 0.15 and row["train"] > 0.6


@pytest.mark.parametrize("name", EVERY)
def test_the_writes_of_all_parts_add_up_to_the_reading(name: str) -> None:
    model, p = tiny(name), prompts()
    direction = mi.find_direction(model, p, "resid_pre.2", "S")
    readout = mi.read_direction(model, direction)
    own = direction.pairs(p)
    parts = mi.direct_logit_attribution(readout, own, 0)
    value = model.run(p.clean, p.mask, record=["resid_pre.2"]).values["resid_pre.2"]
    reading = direction.reading(value)[torch.arange(4), p.positions["S"]]
    torch.testing.assert_close(parts.values.sum(0), reading.to(parts.values), rtol=1e-6, atol=1e-6)
    assert not any(node.startswith(("a2", "m2")) for node in parts.labels["node"])
    run = readout.run(p.clean, p.mask)
    torch.testing.assert_close(run.logits[..., 0], direction.reading(value).to(run.logits), rtol=1e-6, atol=1e-6)  # type: ignore[index]


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("site", ["resid_pre.2", "resid_final"])
def test_a_direction_is_a_metric_of_the_engines(name: str, site: str) -> None:
    """Kept edges: the clean reading. Cut edges: the corrupt one. The gradient is the derivative of the exact runs."""
    model, p = tiny(name), prompts()
    direction = mi.find_direction(model, p, site)
    readout, own = mi.read_direction(model, direction), direction.pairs(p)
    graph = mi.build_graph(readout)
    clean, corrupt = (
        direction.reading(part) for part in direction_values(model, p, [direction.site], [-1])[direction.site, -1]
    )
    cut = mi.run_edges(readout, graph, own, graph.possible, metric="direction")
    kept = mi.run_edges(readout, graph, own, torch.zeros_like(graph.possible), metric="direction")
    torch.testing.assert_close(kept, clean.to(kept), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(cut, corrupt.to(cut), rtol=1e-5, atol=1e-5)
    # The direction is linear, so the edges into it are exact in first order.
    scores = mi.score_edges(readout, graph, own, method="eap", metric="direction").values
    exact = mi.score_edges(readout, graph, own, method="exact", metric="direction").values
    last = graph.readers.index("logits") if "logits" in graph.readers else len(scores) - 1
    torch.testing.assert_close(scores[last], exact[last], rtol=1e-5, atol=1e-6)


def test_every_method_and_analysis_takes_the_direction() -> None:
    model = mi.load_model("bundled")
    p = mi.load_task("subject_verb_agreement").pairs(model, n=8)
    direction = mi.find_direction(model, p, "resid_pre.3", "end")
    readout, own = mi.read_direction(model, direction), direction.pairs(p)
    graph = mi.build_graph(readout)
    assert readout.dims.n_layers == 3 and not readout.has("z.3") and readout.has("z.2")
    scores = mi.score_edges(readout, graph, own, method="eap-ig", metric="direction")
    circuit = mi.select(graph, scores, edges=30)
    result = mi.evaluate(readout, circuit, own, metric="direction")
    assert result is not None
    patched = mi.activation_patching(readout, own, "z", positions=[-1], metric="direction")
    assert patched.labels["layer"] == ("0", "1", "2")
    paths = mi.path_patching(readout, own, "heads", "logits", meaning="direct", positions=-1, metric="direction")
    parts = [
        mi.direct_logit_attribution(readout, own, 0, prompt=prompt).at(node="a1.h0").values
        for prompt in ("clean", "corrupt")
    ]
    torch.testing.assert_close(
        paths.at(layer=1, head=0).values.flatten(), (parts[0] - parts[1]).to(paths.values), atol=1e-4, rtol=1e-4
    )
    loss = readout.run(p.clean, p.mask, grads=["resid_pre.2"], loss=lambda logits: logits[:, -1, 0])
    assert loss.grads["resid_pre.2"].abs().sum() > 0
    refusals: list[tuple[Any, type[Exception], str]] = [
        (lambda: mi.activation_patching(model, own, "z", metric="direction"), InputError, "read_direction"),
        (lambda: mi.activation_patching(readout, p, "z", metric="direction"), InputError, "direction.pairs"),
        (lambda: readout.run(p.clean, p.mask, record=["z.3"]), InputError, "layers 0 to 2"),
        (lambda: readout.run(p.clean, p.mask, record=["final_norm"]), UnsupportedError, "without the final norm"),
        (lambda: mi.read_direction(readout, direction), InputError, "already"),
        (lambda: mi.find_direction(model, p, "z.1"), InputError, "one vector per token"),
        (lambda: mi.read_direction(model, mi.find_direction(model, p, "mlp_out.1", "S")), InputError, "S"),
    ]
    for call, kind, message in refusals:
        with pytest.raises(kind, match=message):
            call()


def test_the_causal_inner_product_is_that_of_whitened_vectors_and_of_every_basis() -> None:
    model = tiny("gpt2")
    product = mi.causal_inner_product(model)
    gamma = model.layout.W_U.double().T
    white = product.whiten(gamma)
    torch.testing.assert_close(torch.cov(white.T, correction=0), torch.eye(16).double(), atol=1e-8, rtol=0)
    a, b = gamma[3] - gamma[5], gamma[7] - gamma[1]
    torch.testing.assert_close(product.of(a, b), product.whiten(a) @ product.whiten(b))
    # The model written in another basis: unembeddings A gamma; the inner product is the same.
    generator = torch.Generator().manual_seed(3)
    matrix = torch.randn(16, 16, generator=generator, dtype=torch.float64)
    other = CausalInnerProduct(matrix @ product.covariance @ matrix.T)
    torch.testing.assert_close(other.of(matrix @ a, matrix @ b), product.of(a, b))
    found = mi.concept_direction(model, [(3, 5), (7, 1), (9, 2)])
    read, write = found.direction.read.double(), found.direction.write.double()
    torch.testing.assert_close(write, product.dual(read))
    torch.testing.assert_close(product.of(read, read), torch.ones(()).double())
    # Adding the embedding direction changes a logit difference by the causal product with it, exactly.
    p = tokens(2, 4)
    edit = mi.add_features(found.direction.basis, {0: 1.0})
    before, after = (model.run(p, interventions=edits).logits[0, -1].double() for edits in ((), (edit,)))  # type: ignore[index]
    change = (after - before)[5] - (after - before)[3]
    torch.testing.assert_close(change, product.of(gamma[5] - gamma[3], read), atol=1e-6, rtol=1e-6)
    assert found.agreement.labels["kind"] == ("held out", "random")
    with pytest.raises(InputError, match="at least two pairs"):
        mi.concept_direction(model, [(3, 5)])


def test_a_text_span_recovers_planted_tokens_and_loses_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    texts = torch.randn(50, 16, generator=generator, dtype=torch.float64)
    amounts = torch.randn(200, 2, generator=generator, dtype=torch.float64) * torch.tensor([3.0, 1.0])
    units = texts[[7, 31]] / texts[[7, 31]].norm(dim=1, keepdim=True)
    values = amounts @ units + 5
    found = span_of(values, texts, 2)
    assert found.tokens.tolist() == [7, 31] and float(found.explained.sum()) == pytest.approx(1)
    torch.testing.assert_close(found.mean + found.span + found.remainder, values)
    torch.testing.assert_close(found.directions @ found.directions.T, torch.eye(2).double())
    assert float(found.remainder.abs().max()) < 1e-9
    more = span_of(values + torch.randn(200, 16, generator=generator, dtype=torch.float64), texts, 9)
    torch.testing.assert_close(more.directions @ more.directions.T, torch.eye(9).double())
    assert float((more.remainder @ more.directions.T).abs().max()) < 1e-9
    assert float(more.explained.sum()) == pytest.approx(
        float(more.span.square().sum() / (more.span + more.remainder).square().sum())
    )
    model, p = tiny("gpt2"), prompts()
    span = mi.text_span(model, p, "a1.h2", rank=3)
    assert span.to_frame()["cumulative"].is_monotonic_increasing
    z = model.run(p.clean, p.mask, record=["z.1"]).values["z.1"][torch.arange(4), p.lengths - 1][:, 2]
    torch.testing.assert_close((span.mean + span.span + span.remainder)[:4], z @ model.layout.attention[1].W_O[2])
    with pytest.raises(InputError, match="head or an MLP"):
        mi.text_span(model, p, "a9.h2")
