"""Features that read the stream before the MLP's norm as nodes: plain hooks, whole MLPs, and features behind a norm."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

import mechinterp as mi
from mechinterp.base.errors import UnsupportedError
from mechinterp.engines import write_table
from mechinterp.engines.edge_attribution import activation_path_gradients, edge_gradients
from mechinterp.engines.edge_patching import run_edges
from mechinterp.engines.mask_gradients import mask_gradients
from mechinterp.engines.replacement import corrupt_replacement
from mechinterp.engines.window_table import WindowTable
from mechinterp.features.dictionary import Dictionary, cross_layer_features
from mechinterp.graphs.graph import Graph, build_graph, graph_of
from mechinterp.models.hook_manager import HookManager
from mechinterp.models.sites import Site
from tests.support.engine_tables import LOGIT_DIFF, check_slopes
from tests.support.models_tiny import ALL_FLOAT64, D_MODEL, N_LAYERS, pairs, small_cut, tiny

MORE = [pytest.mark.slow, pytest.mark.exhaustive]
"""Of cases of which other tests have the shape."""
NAMES = ("gpt2", pytest.param("llama", marks=MORE), pytest.param("gemma2", marks=MORE))
CROSS = ("gpt2", "gemma2")
"""Where the transcoder is a cross-layer one; on gemma2 of what is before the post-norm. Else it is one a layer."""


def close(name: str) -> dict[str, float]:
    return {"rtol": 1e-9, "atol": 1e-9} if name in ALL_FLOAT64 else {"rtol": 1e-4, "atol": 2e-5}  # norms in float32


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def bases(name: str, read: str = "resid_mid", *, size: float = 0.3) -> list[Dictionary]:
    """A transcoder of every layer with random weights, of which about half of the features are active."""
    out, found = "mlp_raw" if name == "gemma2" else "mlp_out", list[Dictionary]()
    for layer in range(N_LAYERS):
        last = N_LAYERS if name in CROSS else layer + 1
        found.append(
            cross_layer_features(
                f"{read}.{layer}",
                [f"{out}.{i}" for i in range(layer, last)],
                drawn(D_MODEL, 6, seed=layer),
                size * drawn(6, last - layer, D_MODEL, seed=10 + layer),
                b_enc=0.1 * drawn(6, seed=20 + layer),
                b_dec=drawn(D_MODEL, seed=30 + layer),
            )
        )
    return [replace(basis, label=f"m{layer}") for layer, basis in enumerate(found)]


def graph_for(name: str, read: str = "resid_mid", **more: Any) -> Graph:
    return build_graph(tiny(name), features={basis: [1, 4] for basis in bases(name, read, **more)})


def some() -> mi.Pairs:
    return pairs(3, 6, padded=True)


def answered(model: HookManager, ids: mi.Pairs, edits: dict[Any, Any], tokens: torch.Tensor) -> torch.Tensor:
    logits = model.run(tokens, ids.mask, interventions=edits).logits
    assert logits is not None
    return LOGIT_DIFF(logits.gather(1, ids.answer_pos[..., None].expand(-1, -1, logits.shape[-1])), ids).double()


def adding(change: torch.Tensor) -> Any:
    return lambda value: value + change.to(value)


@pytest.mark.parametrize("name", ["gpt2", pytest.param("llama", marks=MORE), "gemma2"])
def test_edges_into_a_feature_and_into_the_mlp_by_plain_hooks(name: str) -> None:
    """The stream that the MLP bypasses stays as it is, and what the rest lacks are the features of what m1 sees."""
    model, ids, graph = tiny(name), some(), graph_for(name)
    basis, out = bases(name)[1], "mlp_raw" if name == "gemma2" else "mlp_out"
    run, other = (
        model.run(tokens, ids.mask, record=["resid_pre.0", "resid_mid.1", "mlp_in.1"]).values
        for tokens in (ids.clean, ids.corrupt)
    )
    own, seen = run["resid_mid.1"], run["resid_mid.1"] - (run["resid_pre.0"] - other["resid_pre.0"])
    into = model.layout.read_mlp(1, seen)
    moved = basis.encode(seen).values - basis.encode(own).values
    parts = {n: [moved[..., n, None] * row for row in basis.W_dec[n]] for n in (1, 4)}
    assert min(float(part[0].abs().max()) for part in parts.values()) > 0.01

    def features(signs: dict[int, int]) -> dict[Site, Any]:
        changes = [sum(sign * parts[n][i] for n, sign in signs.items()) for i in range(len(basis.sites_out))]
        return {site: adding(change) for site, change in zip(basis.sites_out, changes, strict=True)}

    f1, f4 = "input->m1.f1<in>", "input->m1.f4<in>"
    cases: dict[tuple[str, ...], list[dict[Any, Any]]] = {
        (f4,): [features({4: 1})],
        (f1, f4): [features({1: 1, 4: 1})],
        ("input->m1",): [{Site("mlp_in", 1): lambda value: into.to(value)}, features({1: -1, 4: -1})],
        ("input->m1", f4): [{Site("mlp_in", 1): lambda value: into.to(value)}, features({1: -1})],
        ("input->m1", f1, f4): [{Site("mlp_in", 1): lambda value: into.to(value)}],
    }
    clean = answered(model, ids, {}, ids.clean)
    cuts = torch.stack([graph.mask_of(list(names)) for names in cases])
    together = run_edges(model, graph, ids, cuts)
    for i, (names, edits) in enumerate(cases.items()):
        assert out in {site.kind for site in basis.sites_out}
        by_hand = answered(model, ids, {site: edit for part in edits for site, edit in part.items()}, ids.clean)
        found = run_edges(model, graph, ids, graph.mask_of(list(names)))
        torch.testing.assert_close(found, by_hand.to(found), **close(name))
        torch.testing.assert_close(together[i], found, **close(name))
        assert float((found - clean).abs().max()) > 1e-3


def merged(graph: Graph, table: torch.Tensor) -> torch.Tensor:
    """All MLPs with their features in one column, and the readers of features added to that of their MLP."""
    names = ["mlps" if name.startswith("m") else name for name in graph.writers]
    row = {name: i for i, name in enumerate(dict.fromkeys(names))}
    columns = table.new_zeros(len(table), len(row)).index_add(1, torch.tensor([row[name] for name in names]), table)
    readers = [re.sub(r"\.f\d+<in>", "", name) for name in graph.readers]
    row = {name: i for i, name in enumerate(dict.fromkeys(readers))}
    index = torch.tensor([row[name] for name in readers])
    return table.new_zeros(len(row), columns.shape[1]).index_add(0, index, columns)


@pytest.mark.parametrize("name", NAMES)
def test_features_and_rests_are_the_mlps_and_the_ends_the_clean_and_the_corrupt_run(name: str) -> None:
    model, ids, graph, whole = tiny(name), some(), graph_for(name), build_graph(tiny(name))
    ends = run_edges(model, graph, ids, torch.stack([torch.zeros_like(graph.possible), graph.possible]))
    by_hand = [answered(model, ids, {}, tokens) for tokens in (ids.clean, ids.corrupt)]
    torch.testing.assert_close(ends, torch.stack(by_hand).to(ends), **close(name))
    for alphas in ((1.0,), (0.25, 0.75)):
        split, node = (merged(g, edge_gradients(model, g, ids, LOGIT_DIFF, alphas=alphas)) for g in (graph, whole))
        torch.testing.assert_close(split, node, **close(name))
    split, node = (merged(g, activation_path_gradients(model, g, ids, LOGIT_DIFF, (0.5,))) for g in (graph, whole))
    torch.testing.assert_close(split, node, **close(name))
    for into in (False, True):  # every edge out of, or into, an MLP and its features
        cuts = []
        for g in (graph, whole):
            of = torch.tensor([own.startswith("m") for own in (g.readers if into else g.writers)])
            cuts.append(g.possible & (of[:, None] if into else of))
        by_part, by_mlp = (run_edges(model, g, ids, cut) for g, cut in zip((graph, whole), cuts, strict=True))
        torch.testing.assert_close(by_part, by_mlp, **close(name))


@pytest.mark.parametrize("name", NAMES)
def test_slopes_in_the_mask_are_minus_the_scores_and_finite_differences(name: str) -> None:
    model, ids, graph = tiny(name), some(), graph_for(name)
    features = torch.tensor(["<in>" in reader for reader in graph.readers])
    mlps = torch.tensor([reader in ("m1", "m2") for reader in graph.readers])
    step, rel = (1e-6, 1e-4) if name == "gpt2" else (3e-3, 2e-2)
    check_slopes(model, graph, ids, (features[:, None], mlps[:, None]), close(name), step, rel)


@pytest.mark.slow
def test_where_there_is_no_norm_they_are_the_features_of_the_mlps_input() -> None:
    model, ids = tiny("no-norm"), some()
    tables = []
    for read in ("resid_mid", "mlp_in"):
        graph = graph_for("no-norm", read)
        cut = torch.stack([small_cut(graph, 0.1), small_cut(graph, 0.5, seed=1)]).double() * 0.8
        values = corrupt_replacement(model, graph).on(ids)
        slopes = mask_gradients(model, graph, ids, cut, values, lambda logits: logits[..., 1].sum(-1))[1]
        scores = [mi.score_edges(model, graph, ids, method=method).values.double() for method in ("exact", "cd-edges")]
        tables.append(
            (run_edges(model, graph, ids, cut), slopes, edge_gradients(model, graph, ids, LOGIT_DIFF), *scores)
        )
    for one, other in zip(*tables, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["gpt2", pytest.param("gemma2", marks=MORE)])
def test_features_that_write_nothing_change_nothing(name: str) -> None:
    model, ids, graph, plain = tiny(name), some(), graph_for(name, size=0.0), build_graph(tiny(name))
    cut = 0.8 * small_cut(graph, 0.5).double()
    readers = [graph.reader_index[reader] for reader in plain.readers]
    writers = [graph.writer_index[writer] for writer in plain.writers]
    found = run_edges(model, graph, ids, cut)
    torch.testing.assert_close(found, run_edges(model, plain, ids, cut[readers][:, writers]), **close(name))
    for method in ("eap", "relp", "gim", "cd-edges"):
        scores = mi.score_edges(model, graph, ids, method=method).values
        expected = mi.score_edges(model, plain, ids, method=method).values
        torch.testing.assert_close(scores[readers][:, writers], expected, rtol=1e-5, atol=1e-6)
        assert int((scores != 0).sum()) == int((expected != 0).sum())


def test_a_prefix_of_a_run_and_a_graph_without_its_bases() -> None:
    model, ids, graph = tiny("gpt2"), some(), graph_for("gpt2")
    names = ["input->m1", "m0.f1->m1", "m0.f4->m2.f1<in>", "m1->m2", "m1.f4->logits"]
    several = torch.stack([graph.mask_of([name]) for name in names])
    full = run_edges(model, graph, ids, torch.zeros_like(graph.possible))
    scores = mi.score_edges(model, graph, ids, method="exact").values
    for name, one in zip(names, several, strict=True):
        alone = float((full - run_edges(model, graph, ids, one)).mean())
        assert float(scores[graph.edge_index(name)]) == pytest.approx(alone, rel=1e-6, abs=1e-7)
    unloaded = graph_of(model.dims, parts=[replace(family, chosen=None) for family in graph.features])
    assert unloaded.digest() == graph.digest() and torch.equal(unloaded.feeds, graph.feeds)
    assert graph.digest() != graph_for("gpt2", "mlp_in").digest()


def test_windows_of_tokens_have_the_numbers_of_the_whole_table(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, graph = tiny("gpt2"), some(), graph_for("gpt2")
    values = corrupt_replacement(model, graph).on(ids)
    masks = torch.stack([small_cut(graph, 0.1), small_cut(graph, 0.5, seed=1)]).double() * 0.8
    used: list[int] = []
    sums = WindowTable.sums

    def counted(self: WindowTable, window: Any, *others: Any) -> torch.Tensor:
        used.append(window.tokens.stop - window.tokens.start)
        return sums(self, window, *others)

    def found() -> list[torch.Tensor]:
        slopes = mask_gradients(model, graph, ids, masks, values, lambda logits: logits[..., 1].sum(-1))
        return [run_edges(model, graph, ids, masks), *slopes]

    monkeypatch.setattr(WindowTable, "sums", counted)
    whole = found()
    assert not used
    monkeypatch.setattr(write_table, "TABLE_BUDGET_BYTES", 3 * len(graph.writers) * D_MODEL * 8)
    for one, other in zip(found(), whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)
    assert min(used) < 6


def test_in_a_parallel_layer_and_of_another_layer_they_are_refused() -> None:
    basis = mi.transcoder("resid_mid.1", "mlp_out.1", drawn(D_MODEL, 3), drawn(3, D_MODEL))
    with pytest.raises(UnsupportedError, match=r"'resid_mid\.1'.*read 'mlp_in' \(here attention and MLP read the same"):
        build_graph(tiny("neox"), features=[basis])
    with pytest.raises(UnsupportedError, match=r"reads 'resid_mid\.0'.*read 'mlp_in' or 'resid_mid'"):
        build_graph(tiny("gpt2"), features=[replace(basis, sites_in=(Site("resid_mid", 0),))])
