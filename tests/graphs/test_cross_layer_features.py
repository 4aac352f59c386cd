"""Features of a cross-layer transcoder as nodes, held against plain hooks, transcoders, attribution and whole MLPs."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

import mechinterp as mi
from mechinterp.base.errors import UnsupportedError
from mechinterp.discovery.cut_loss import CutLoss
from mechinterp.discovery.information_flow import edge_importances
from mechinterp.engines import edge_attribution, write_table
from mechinterp.engines.edge_attribution import activation_path_gradients, edge_gradients
from mechinterp.engines.edge_patching import run_edges
from mechinterp.engines.replacement import build_replacement, record_writes
from mechinterp.evaluation.masks import knock_out
from mechinterp.features.dictionary import Dictionary
from mechinterp.graphs.circuit import on_paths
from mechinterp.graphs.families import features
from mechinterp.graphs.families.write_block import less_parts
from mechinterp.graphs.graph import Graph, build_graph, graph_of
from mechinterp.graphs.write_rows import write_rows
from mechinterp.models.hook_manager import HookManager
from mechinterp.models.sites import Site
from tests.support.engine_tables import LOGIT_DIFF, check_batches, check_slopes, engine_tables
from tests.support.models_tiny import ALL_FLOAT64, D_MODEL, N_LAYERS, pairs, small_cut, tiny

EXACT = {"rtol": 1e-9, "atol": 1e-9}
MORE = [pytest.mark.slow, pytest.mark.exhaustive]
"""Of cases whose shape other tests have, too."""
NAMES = ("gpt2", "neox", "llama", "gemma2", "qwen2", "no-norm")
"""The shapes with MLPs: sequential, parallel, grouped query, post-norm, biased rotary, no norm."""


def close(name: str) -> dict[str, float]:
    return EXACT if name in ALL_FLOAT64 else {"rtol": 1e-4, "atol": 2e-5}  # norms in float32


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def a_transcoder(n: int = 6, *, out: str = "mlp_out", own_only: bool = False) -> tuple[Dictionary, ...]:
    """A cross-layer transcoder with random weights, a basis a layer; perhaps one that writes in its own layer only."""
    W_dec = [0.3 * drawn(n, N_LAYERS - layer, D_MODEL, seed=40 + layer) for layer in range(N_LAYERS)]
    for own in W_dec if own_only else ():
        own[:, 1:] = 0
    return mi.cross_layer_transcoder(
        [f"mlp_in.{layer}" for layer in range(N_LAYERS)],
        [f"{out}.{layer}" for layer in range(N_LAYERS)],
        drawn(N_LAYERS, D_MODEL, n, seed=50),
        W_dec,
        b_enc=0.1 * drawn(N_LAYERS, n, seed=51),
        b_dec=drawn(N_LAYERS, D_MODEL, seed=52),
    )


@cache
def graph_for(name: str, *, positions: bool = False, some: bool = True, level: str = "edge") -> Graph:
    """A graph with features of each layer (some: two a layer); of what is before the post-norm on gemma2."""
    bases = a_transcoder(out="mlp_raw" if name == "gemma2" else "mlp_out")
    if name == "gemma2":
        bases = tuple(replace(basis, label=f"m{layer}") for layer, basis in enumerate(bases))
    chosen = {basis: [1, 4] if some else range(6) for basis in bases}
    if name == "mixtral":  # of two layers
        chosen = {
            replace(basis, sites_out=basis.sites_out[:-1], W_dec=basis.W_dec[:, :-1], b_dec=basis.b_dec[:-1]): [1, 4]
            for basis in bases[:2]
        }
    more: dict[str, Any] = {"experts": True} if name == "mixtral" else {}
    return build_graph(tiny(name), features=chosen, level=level, positions=("a", "end") if positions else (), **more)


def some(n: int = 3, padded: bool = True) -> Any:
    return pairs(n, 6, padded=padded, positions={"a": [1, 2, 1][:n], "end": [5, 4, 3][:n] if padded else [5] * n})


def answered(model: HookManager, ids: Any, edits: dict[Any, Any], tokens: torch.Tensor | None = None) -> torch.Tensor:
    """The metric of the clean prompts under plain edits of the model."""
    logits = model.run(ids.clean if tokens is None else tokens, ids.mask, interventions=edits).logits
    assert logits is not None
    return LOGIT_DIFF(logits.gather(1, ids.answer_pos[..., None].expand(-1, -1, logits.shape[-1])), ids)


def adding(change: torch.Tensor) -> Any:
    return lambda value: value + change.to(value)


# -- the graph -----------------------------------------------------------------------------------------------------


def test_a_feature_is_one_writer_that_is_there_from_its_own_layer_on() -> None:
    graph = graph_for("gpt2")
    assert [w for w in graph.writers if ".f" in w] == ["m0.f1", "m0.f4", "m1.f1", "m1.f4", "m2.f1", "m2.f4"]
    assert graph.split_writers == ("m0", "m1", "m2")
    reach = {name: graph.possible[graph.reader_index[name], graph.writer_index["m0.f1"]] for name in graph.readers}
    assert not reach["m0"] and reach["a1.h0<q>"] and reach["m1.f4<in>"] and reach["logits"]
    rows = write_rows(graph)
    assert [w for w in rows.graph.writers if "m0.f1" in w] == ["m0.f1", "m0.f1>m1", "m0.f1>m2"]
    assert rows.graph.readers == graph.readers
    cut = rows.masks(graph.mask_of(["m0.f1->a2.h0<q>"]).double())  # the row that is later than the reader is not cut
    found = [rows.graph.edge_name(r, w) for r, w in cut.nonzero().tolist()]
    assert found == ["m0.f1->a2.h0<q>", "m0.f1>m1->a2.h0<q>"]
    assert float(rows.tables(cut).sum()) == 2
    plain = build_graph(tiny("gpt2"))
    assert write_rows(plain).graph is plain and write_rows(plain).masks(cut) is cut


def test_the_rest_of_a_later_mlp_depends_on_what_the_features_read() -> None:
    """So an edge into m0 is on a path through the rest of m2, even if m0 itself is not in the circuit."""
    graph = graph_for("gpt2")
    fed = {w for w in graph.writers if graph.feeds[graph.reader_index["m0"], graph.writer_index[w]]}
    assert fed == {"m0", "m1", "m2"}
    fed = {w for w in graph.writers if graph.feeds[graph.reader_index["m0.f1<in>"], graph.writer_index[w]]}
    assert fed == {"m0.f1"}
    unloaded = graph_of(tiny("gpt2").dims, parts=[replace(family, chosen=None) for family in graph.features])
    assert torch.equal(unloaded.feeds, graph.feeds) and unloaded.digest() == graph.digest()
    chosen = graph.mask_of(["input->m0", "m2->logits", "input->m0.f1<in>", "m0.f4->logits"])
    kept = on_paths(graph, chosen)
    assert {graph.edge_name(r, w) for r, w in kept.nonzero().tolist()} == {"input->m0", "m2->logits"}


# -- the stream ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_writes_add_up_and_the_ends_are_the_clean_and_the_corrupt_run(name: str) -> None:
    model, ids = tiny(name), some()
    graph = graph_for(name, positions=name in ("gpt2", "llama"))
    rows = write_rows(graph).graph
    streams = [family.stream for family in rows.families if family.ports]
    run = model.run(ids.clean, ids.mask, record=[*dict.fromkeys(streams), Site("resid_final")])
    recorded = record_writes(model, graph, ids.clean, ids).values
    blocks = {family: family.writes(model, recorded) for family in rows.families}
    for family in rows.families:
        parts = [blocks[part].total() for part in rows.parts_of(family)]
        blocks[family] = less_parts(blocks[family], {0: torch.stack(parts).sum(0)} if parts else {})
    whole = build_graph(model)
    biases = {}  # what no node writes: those of attentions
    for site, moment in [*((f.stream, f.reads) for f in rows.families if f.reads), (Site("resid_final"), (3, 0))]:
        of_parts = sum(block.total() for family, block in blocks.items() if family.written <= moment)
        of_whole = sum(f.writes(model, recorded).total() for f in whole.families if f.written <= moment)
        torch.testing.assert_close(of_parts, of_whole, **close(name))
        biases[moment] = (run.values[site].double() - of_parts).flatten(0, 1)
        assert rows.n_writers_at(moment) == sum(len(f.writers) for f in rows.families if f.written <= moment)
    if name in ALL_FLOAT64:  # the same at every token
        assert all(float((bias - bias[0]).abs().max()) < 1e-9 for bias in biases.values())
    for kind in ("corrupt", "mean"):
        ends = torch.stack([torch.zeros_like(graph.possible), graph.possible])
        clean, other = run_edges(model, graph, ids, ends, replacement=build_replacement(kind, model, graph, ids))
        torch.testing.assert_close(clean, answered(model, ids, {}).to(clean), **close(name))
        by_whole = build_replacement(kind, model, whole, ids)
        torch.testing.assert_close(
            other, run_edges(model, whole, ids, whole.possible, replacement=by_whole), **close(name)
        )
        if kind == "corrupt":
            torch.testing.assert_close(other, answered(model, ids, {}, ids.corrupt).to(other), **close(name))


# -- plain hooks ---------------------------------------------------------------------------------------------------


def test_edges_out_of_and_into_a_feature_by_plain_hooks() -> None:
    """Every sort of edge, with changes that are added by hand at all sites that the feature writes to."""
    model, ids, graph = tiny("gpt2"), some(), graph_for("gpt2")
    bases = [family.loaded().whole for family in graph.features]
    sites = [*(f"mlp_in.{layer}" for layer in range(3)), "resid_mid.0", "resid_mid.1", "embed"]
    now, then = (
        model.run(tokens, ids.mask, record=[*sites, "resid_pre.0", *bases]).values
        for tokens in (ids.clean, ids.corrupt)
    )
    change = now["resid_pre.0"] - then["resid_pre.0"]  # of the input
    moved = now[bases[0]][..., 4] - then[bases[0]][..., 4]  # of m0.f4
    into = [basis.W_dec[4] for basis in bases]  # [site, d]
    assert float(moved.abs().max()) > 0.1

    def features_moved(layer: int, seen: torch.Tensor, only: list[int]) -> dict[str, torch.Tensor]:
        """What changes where features write, if they see another stream."""
        basis = bases[layer]
        own = basis.encode(model.layout.read_mlp(layer, seen)).values - basis.encode(now[f"mlp_in.{layer}"]).values
        return {str(site): own[..., only] @ basis.W_dec[only, i] for i, site in enumerate(basis.sites_out)}

    seen = now["resid_mid.0"] - change
    f4 = features_moved(0, seen, [4])
    expected = {"input->m0.f4<in>": f4}
    mlp = model.mlp(0, model.layout.read_mlp(0, seen)) - model.mlp(0, now["mlp_in.0"])
    both = features_moved(0, seen, [1, 4])
    expected["input->m0"] = {site: (mlp if site == "mlp_out.0" else 0) - part for site, part in both.items()}
    expected["m0.f4->logits"] = {"resid_final": -moved[..., None] * into[0].sum(0)}
    seen = now["resid_mid.1"] - moved[..., None] * into[0][0]
    expected["m0.f4->m1.f4<in>"] = features_moved(1, seen, [4])
    both = features_moved(1, seen, [1, 4])
    mlp = model.mlp(1, model.layout.read_mlp(1, seen)) - model.mlp(1, now["mlp_in.1"])
    expected["m0.f4->m1"] = {site: (mlp if site == "mlp_out.1" else 0) - part for site, part in both.items()}
    resid = model.run(ids.clean, ids.mask, record=["resid_pre.2"]).values["resid_pre.2"]
    seen = resid - moved[..., None] * into[0][:2].sum(0)  # what it has written until there
    head = next(family for family in graph.families if family.writers[0] == "a2.h0")
    read = head.read(model, head.ports[0], seen.expand(4, *seen.shape))
    edit = {"q.2": lambda value: torch.cat([value[:, :, :1], read[:, :, 1:2].to(value), value[:, :, 2:]], 2)}

    scores = mi.score_edges(model, graph, ids, method="exact").values
    clean = answered(model, ids, {})
    for name, changes in expected.items():
        by_hand = answered(model, ids, {Site.parse(site): adding(part) for site, part in changes.items()})
        found = run_edges(model, graph, ids, graph.mask_of([name]))
        torch.testing.assert_close(found, by_hand, **EXACT)
        assert float((found - clean).abs().max()) > 1e-4
        assert float(scores[graph.edge_index(name)]) == pytest.approx(
            float((clean - by_hand).mean()), rel=1e-6, abs=1e-7
        )
    torch.testing.assert_close(
        run_edges(model, graph, ids, graph.mask_of(["m0.f4->a2.h1<q>"])), answered(model, ids, edit), **EXACT
    )
    # All edges out of it: the feature patched, at all its layers.
    patched = mi.activation_patching(model, ids, ["m0.f4", "m1.f1"], features=bases).values
    cuts = torch.stack([knock_out(graph, [part]) for part in ("m0.f4", "m1.f1")])
    found = clean - run_edges(model, graph, ids, cuts)
    torch.testing.assert_close(found, patched.flatten(0, -2).reshape(2, -1).to(found), rtol=1e-6, atol=1e-7)


# -- first order ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "positions"),
    [("gpt2", True), *(pytest.param(name, False, marks=MORE) for name in ("gpt2", "neox", "gemma2"))],
)
def test_slopes_in_the_mask_are_minus_the_scores_and_finite_differences(name: str, positions: bool) -> None:
    model, ids, graph = tiny(name), some(), graph_for(name, positions=positions)
    columns = torch.tensor([".f" in writer for writer in graph.writers])
    features = torch.tensor(["<in>" in reader for reader in graph.readers])
    among = (columns[None], features[:, None], graph.possible)
    step, rel = (1e-6, 1e-4) if name != "gemma2" else (3e-3, 2e-2)
    check_slopes(model, graph, ids, among, close(name), step, rel)


def merged(graph: Graph, table: torch.Tensor) -> torch.Tensor:
    """All MLPs with their features in one column, and the readers of features added to that of their MLP."""
    names = ["mlps" if name.startswith("m") else name for name in graph.writers]
    row = {name: i for i, name in enumerate(dict.fromkeys(names))}
    columns = table.new_zeros(len(table), len(row)).index_add(1, torch.tensor([row[name] for name in names]), table)
    readers = [re.sub(r"\.f\d+<in>|<router>", "", name) for name in graph.readers]
    row = {name: i for i, name in enumerate(dict.fromkeys(readers))}
    return table.new_zeros(len(row), columns.shape[1]).index_add(
        0, torch.tensor([row[name] for name in readers]), columns
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", [*NAMES, "mixtral"])
def test_features_and_rests_are_the_mlps(name: str) -> None:
    """Their scores add up to those of whole MLPs, and what is cut out of or into all of them is cut of the MLPs."""
    model, ids, graph, whole = tiny(name), some(), graph_for(name), build_graph(tiny(name))
    for alphas in ((1.0,), (0.25, 0.75)):
        split, node = (merged(g, edge_gradients(model, g, ids, LOGIT_DIFF, alphas=alphas)) for g in (graph, whole))
        torch.testing.assert_close(split, node, **close(name))
    split, node = (merged(g, activation_path_gradients(model, g, ids, LOGIT_DIFF, (0.5,))) for g in (graph, whole))
    torch.testing.assert_close(split, node, **close(name))
    for into in (False, True):
        cuts = []
        for g in (graph, whole):
            of = [
                own.startswith("m") and (not into or own.startswith("m0")) for own in (g.readers if into else g.writers)
            ]
            cuts.append(g.possible & (torch.tensor(of)[:, None] if into else torch.tensor(of)))
        torch.testing.assert_close(
            run_edges(model, graph, ids, cuts[0]), run_edges(model, whole, ids, cuts[1]), **close(name)
        )


def test_every_method_that_takes_nodes_takes_them() -> None:
    model, ids, graph, whole = tiny("gpt2"), pairs(3), graph_for("gpt2"), build_graph(tiny("gpt2"))
    for method in ("relp", "gim", "eap-gp", "cd-edges"):
        split, node = (merged(g, mi.score_edges(model, g, ids, method=method).values.double()) for g in (graph, whole))
        torch.testing.assert_close(split, node, rtol=1e-5, atol=1e-6)
    for method in ("information-flow", "weight-magnitude", "eap-ig-activations"):
        with pytest.raises(mi.InputError, match=f"Method '{method}' scores edges.*neurons, experts and features take"):
            mi.score_edges(model, graph, ids, method=method)


def test_a_feature_scores_as_attribution_has_it() -> None:
    model, ids = tiny("gpt2"), pairs(4)
    basis = a_transcoder()[0]
    graph = build_graph(model, level="node", features=[basis])
    for edges, method, more in (("eap", "atp", {}), ("eap-ig", "eap-ig-inputs", {"quadrature": "midpoint"})):
        settings = {} if edges == "eap" else {"schedule": "midpoint"}
        found = mi.score_edges(model, graph, ids, method=edges, **settings).values[-1].double()
        own = mi.attribution_patching(model, ids, basis, method=method, **more).values[:-1].sum(1).mean(-1)
        rows = [graph.writer_index[f"m0.f{number}"] for number in range(basis.n_features)]
        torch.testing.assert_close(found[rows], own, rtol=1e-6, atol=1e-7)
    best = mi.top_features(model, ids, a_transcoder(), 3, method="atp")
    assert sum(map(len, best.values())) == 3


# -- a transcoder a layer ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", *(pytest.param(name, marks=MORE) for name in ("neox", "no-norm"))])
def test_without_later_writes_it_is_a_transcoder_a_layer(name: str) -> None:
    model, ids = tiny(name), some()
    bases = a_transcoder(own_only=True)
    single = [
        mi.transcoder(
            basis.sites_in[0], basis.sites_out[0], basis.W_enc[0], basis.W_dec[:, 0], b_enc=basis.b_enc,
            b_dec=basis.b_dec[0],
        )
        for basis in bases
    ]  # fmt: skip
    graphs = [build_graph(model, features={basis: [1, 4] for basis in several}) for several in (bases, single)]
    assert graphs[0].writers == graphs[1].writers and graphs[0].readers == graphs[1].readers
    cuts = torch.stack([small_cut(graphs[0], share, seed=1).double() * size for share, size in ((0.1, 1), (0.5, 0.7))])
    tables = [engine_tables(model, graph, ids, cuts) for graph in graphs]
    for one, other in zip(*tables, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


# -- side by side --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", pytest.param("gemma2", marks=MORE)])
def test_a_batch_is_its_examples_one_by_one_and_padding_changes_nothing(name: str) -> None:
    check_batches(tiny(name), graph_for(name), some(), close(name))


@pytest.mark.parametrize("name", ["gpt2", pytest.param("gemma2", marks=MORE)])
def test_runs_from_a_shared_prefix_are_runs_from_the_start(name: str) -> None:
    """Also where edges are cut in the prefix, and features that they change write after it."""
    model, ids, graph = tiny(name), some(), graph_for(name)
    names = ["m0.f1->a2.h0<q>", "m0.f1->logits", "m1->a2.h1<q>", "m2.f1->logits", "m1.f4->m2.f1<in>", "m0->m2"]
    several = torch.stack([graph.mask_of([one]) for one in names])
    alone = torch.stack([run_edges(model, graph, ids, mask) for mask in several])
    torch.testing.assert_close(run_edges(model, graph, ids, several), alone, **close(name))
    torch.testing.assert_close(run_edges(model, graph, ids, several, batch_size=2), alone, **close(name))
    # From layer 2 on nothing sees m0.f1: what it writes in layers 1 and 2 is replaced where it is written.
    late = graph.possible.clone()
    late[: graph.readers_before[2]] = False
    late &= torch.arange(len(graph.writers)) == graph.writer_index["m0.f1"]
    at_once = run_edges(model, graph, ids, torch.stack([late, several[0]]))
    torch.testing.assert_close(at_once[0], run_edges(model, graph, ids, late.double() * (1 - 1e-12)), **close(name))
    loss = CutLoss.of(model, graph, ids, LOGIT_DIFF, "corrupt", 2)
    for begun in ([], ["input->m0.f1<in>"], ["input->m0", "a0.h1->m0.f4<in>"], ["input->a0.h0<q>"]):
        first = graph.mask_of(begun)
        masks = torch.stack([first | graph.mask_of([one]) for one in names[3:]])
        for layer in (1, 2):
            own = masks if layer == 1 else masks[:2]  # m0->m2 is not before layer 2
            found = loss.of_masks(own.double(), layer)
            expected = -run_edges(model, graph, ids, own).mean(-1)
            torch.testing.assert_close(found, expected.to(found), **close(name))


def test_rows_of_a_writer_that_are_summed_at_once_give_the_same_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, graph = tiny("gpt2"), some(), graph_for("gpt2", positions=True)
    cut, fewer = (0.1 + 0.2 * drawn(*graph.possible.shape).abs().clamp(max=4)) * graph.possible, list[int]()
    real = write_table.as_one

    def counted(several: Any, ports: slice) -> Any:
        found = real(several, ports)
        fewer.append(len(several) - len(found))
        return found

    monkeypatch.setattr(write_table, "as_one", counted)
    at_once = run_edges(model, graph, ids, cut), edge_gradients(model, graph, ids, LOGIT_DIFF)
    assert max(fewer) == 3  # at the logits: m0 in layers 1 and 2, m1 in layer 2
    monkeypatch.setattr(write_table, "as_one", lambda several, ports: several)
    monkeypatch.setattr(edge_attribution, "_same_activations", lambda families, blocks: None)
    one_by_one = run_edges(model, graph, ids, cut), edge_gradients(model, graph, ids, LOGIT_DIFF)
    for one, other in zip(at_once, one_by_one, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)
        assert not torch.equal(one, other)


def test_a_run_asks_each_row_for_its_names_a_few_times_not_once_for_every_other_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With 12 layers of 42 features that was seven times the run itself."""
    model, ids, graph = tiny("gpt2"), some(), graph_for("gpt2")
    asked, names = list[str](), features.LaterWrites.writers.fget
    assert names is not None

    def counted(self: Any) -> Any:
        asked.append(self.part_of)
        return names(self)

    monkeypatch.setattr(features.LaterWrites, "writers", property(counted))
    run_edges(model, graph, ids, small_cut(graph, 0.5))
    n_rows, n_made = 3, 2  # later writes of layers 0 and 1; the graph of rows is made for the corrupt and the cut run
    assert n_rows * n_made <= len(asked) <= 6 * n_rows * n_made


def test_whole_nodes_are_replaced_as_their_edges_are_cut() -> None:
    """A mask that is nearly 1 is not seen as a node: so the two ways of the engine are compared."""
    model, ids, graph = tiny("gpt2"), some(), graph_for("gpt2", positions=True)
    by_node = graph_for("gpt2", positions=True, level="node")
    scores = mi.score_edges(model, by_node, ids, method="exact").values
    clean = run_edges(model, graph, ids, torch.zeros_like(graph.possible))
    for name in ("m0.f1@end", "m1.f4@rest", "m1@end", "m0.f4@a"):
        unit = by_node.unit_names().index(name)
        cut = by_node.unit == unit
        by_edges = run_edges(model, graph, ids, cut.double() * (1 - 1e-12))
        drop = float((clean - by_edges).mean())
        assert float(scores[tuple(by_node.first_of_unit[unit].tolist())]) == pytest.approx(drop, rel=1e-6, abs=1e-7)
    # What m0 reads matters without m0, for the rests of the later MLPs.
    without = graph.possible & (torch.arange(len(graph.writers)) == graph.writer_index["m0"])
    also = without | graph.mask_of([f"input->m0@{position}" for position in graph.positions])
    found = run_edges(model, graph, ids, torch.stack([without, also]))
    torch.testing.assert_close(found, run_edges(model, graph, ids, torch.stack([without, also]) * (1 - 1e-12)), **EXACT)
    assert float((found[0] - found[1]).abs().max()) > 1e-3


# -- what is refused -----------------------------------------------------------------------------------------------


def test_what_is_no_node_is_refused_with_what_to_use_instead() -> None:
    model, ids = tiny("gpt2"), pairs(3)
    weights = drawn(2, D_MODEL, 3), drawn(3, 2, D_MODEL)
    both = ["resid_pre.0", "resid_pre.1"]
    crosscoder = mi.crosscoder(both, *weights, label="m1")
    with pytest.raises(UnsupportedError, match=r"a crosscoder has read all of them only when .* attribution_patching"):
        build_graph(model, features=[crosscoder])
    assert mi.attribution_patching(model, ids, crosscoder, method="atp").values.shape[0] == 4  # as the error says
    with pytest.raises(UnsupportedError, match=r"mi\.feature_circuit, a graph of states in layers"):
        build_graph(model, features=[mi.sae("resid_pre.1", weights[0][0], weights[1][:, 0])])
    basis = a_transcoder()[0]
    for sites, message in (
        (("mlp_out.0", "mlp_out.2", "mlp_out.1"), "then of later ones"),
        (("mlp_out.1", "mlp_out.2", "mlp_out.3"), "reads 'mlp_in.0' and writes to 'mlp_out.1'"),
        (("mlp_out.0", "attn_out.1", "mlp_out.2"), "then of later ones"),
        (("mlp_out.0", "mlp_out.1", "mlp_out.7"), "Site 'mlp_out.7' does not exist"),
    ):
        with pytest.raises((UnsupportedError, mi.InputError), match=message):
            build_graph(model, features=[replace(basis, sites_out=tuple(map(Site.parse, sites)))])
    out = mi.sae("mlp_out.2", weights[0][0], weights[1][:, 0], label="out.2")
    with pytest.raises(mi.InputError, match=r"'m0' and 'out\.2' split m2"):
        build_graph(model, features=[basis, out])
    graph = build_graph(model, features={basis: [0]})
    too_late = replace(graph.features[0], later=(Site("mlp_out", 1), Site("mlp_out", 7)))
    with pytest.raises(mi.InputError, match="writes to layer 7; the model has layers 0 to 2"):
        graph_of(model.dims, parts=[too_late])
    with pytest.raises(mi.InputError, match="has other sites than the graph says"):
        graph_of(model.dims, parts=[replace(graph.features[0], later=())]).with_bases([basis])
    with pytest.raises(UnsupportedError, match="write in several layers"):
        edge_importances(model, graph, ids)
