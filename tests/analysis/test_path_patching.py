"""Path patching against the exact edges, and against frozen runs written out here."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mechinterp.analysis.path_patching import path_patching
from mechinterp.base.errors import InputError, UnsupportedError
from mechinterp.engines.edge_patching import run_edges
from mechinterp.engines.readout import clean_logits, metric_values
from mechinterp.graphs.graph import build_graph
from mechinterp.models.hook_manager import HookManager, Intervention
from mechinterp.models.sites import Site
from mechinterp.tasks.metrics import get_metric
from mechinterp.tasks.pairs import Pairs
from tests.support.models_tiny import ALL_FLOAT64, EVERY, SHAPES, as_installed, build, pairs, snapshot, tiny

FINAL = Site("resid_final")


def tolerance(name: str) -> float:
    # Norms and rotations of the other shapes run in float32 inside a float64 model.
    return 1e-9 if name in ALL_FLOAT64 else 2e-5


def measured(model: HookManager, examples: Pairs, ids: torch.Tensor, edits: list[Intervention]) -> torch.Tensor:
    run = model.run(ids, examples.mask, interventions=edits, record=[FINAL], stop=FINAL)
    return metric_values(model, examples, get_metric("logit_diff"), run.values[FINAL])


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_a_direct_path_is_the_exact_edge(name: str) -> None:
    model, examples = tiny(name), pairs(3, 5, padded=True)
    graph = build_graph(model)
    plain = measured(model, examples, examples.clean, [])
    readers = [graph.readers[i] for i in (0, 5, len(graph.readers) // 2, len(graph.readers) - 3, -2, -1)]
    for reader in readers:
        got = path_patching(model, examples, "nodes", reader, meaning="direct").values[:, 0]
        row = graph.reader_index[reader]
        there = graph.possible[row]
        torch.testing.assert_close(got[~there], torch.zeros_like(got[~there]), rtol=0, atol=tolerance(name))
        cuts = [graph.mask_of([f"{graph.writers[i]}->{reader}"]) for i in there.nonzero().flatten().tolist()]
        effects = plain - run_edges(model, graph, examples, torch.stack(cuts))
        torch.testing.assert_close(got[there], effects, rtol=0, atol=tolerance(name))


def frozen(
    model: HookManager, base: dict[Any, torch.Tensor], new: dict[Any, torch.Tensor], senders: dict[str, torch.Tensor]
) -> list[Intervention]:
    """Every head's z held at the base run, but the senders' (name: mask of positions), which are new; so are MLPs'."""
    edits: list[Intervention] = []
    for layer in range(model.dims.n_layers):
        z = base[Site("z", layer)].clone()
        for head in range(model.dims.n_heads):
            if f"a{layer}.h{head}" in senders:
                mask = senders[f"a{layer}.h{head}"][..., None]
                z[:, :, head] = torch.where(mask, new[Site("z", layer)][:, :, head], z[:, :, head])
        edits.append(Intervention(Site("z", layer), z))
        if f"m{layer}" in senders:
            mask, written = senders[f"m{layer}"][..., None], new[Site("mlp_out", layer)]
            edits.append(
                Intervention(
                    Site("mlp_out", layer), lambda value, mask=mask, written=written: torch.where(mask, written, value)
                )
            )
    if "input" in senders:
        mask, given = senders["input"][..., None], new[Site("resid_pre", 0)]
        edits.append(Intervention(Site("resid_pre", 0), lambda value: torch.where(mask, given, value)))
    return edits


def both_runs(model: HookManager, examples: Pairs, noise: bool) -> tuple[Any, Any, torch.Tensor]:
    sites = [s for s in model.sites() if s.kind in ("resid_pre", "z", "mlp_out", "mlp_in", "q", "k", "v")]
    ids = (examples.clean, examples.corrupt) if noise else (examples.corrupt, examples.clean)
    base, new = (dict(model.run(tokens, examples.mask, record=sites).values) for tokens in ids)
    return base, new, ids[0]


def put(site: Site, unit: int | None, given: torch.Tensor) -> Intervention:
    def edit(value: torch.Tensor) -> torch.Tensor:
        value = value.clone()
        if unit is None:
            value[:] = given
        else:
            value[:, :, unit] = given[:, :, unit]
        return value

    return Intervention(site, edit)


SETS: list[Any] = ["a0.h1", "m0", "input", ("a0.h0", "a1.h3", "m1"), "a1.h2@S"]


def masks_of(examples: Pairs, members: Any) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for member in [members] if isinstance(members, str) else members:
        node, _, at = member.partition("@")
        mask = examples.mask.clone()
        if at:
            mask[:] = False
            mask[torch.arange(len(examples)), examples.positions[at]] = True
        found[node] = mask
    return found


def usable(model: HookManager) -> list[Any]:
    return SETS if model.dims.has_mlp else ["a0.h1", "input", ("a0.h0", "a1.h3"), "a1.h2@S"]


@pytest.mark.parametrize(("name", "direction"), [(name, ("noise", "denoise")[i % 2]) for i, name in enumerate(EVERY)])
def test_recomputed_mlps_equal_a_frozen_run_to_the_logits(name: str, direction: Any) -> None:
    model, examples = tiny(name), pairs(3, 6, padded=True, positions={"S": [5, 2, 3]})
    base, new, ids = both_runs(model, examples, direction == "noise")
    plain = measured(model, examples, ids, [])
    got = path_patching(model, examples, usable(model), direction=direction)
    for row, members in zip(got.values[:, 0], usable(model), strict=True):
        patched = measured(model, examples, ids, frozen(model, base, new, masks_of(examples, members)))
        effect = plain - patched if direction == "noise" else patched - plain
        torch.testing.assert_close(row, effect, rtol=0, atol=tolerance(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_recomputed_mlps_equal_a_frozen_run_to_inner_receivers(name: str) -> None:
    model, examples = tiny(name), pairs(3, 6, padded=True, positions={"S": [5, 2, 3]})
    base, new, ids = both_runs(model, examples, True)
    plain = measured(model, examples, ids, [])
    shared = "kv" if model.dims.n_kv_heads < model.dims.n_heads else "h"
    cases = [(["a2.h1<q>"], [("q", 2, 1)]), ([f"a1.{shared}0<k>", "a2.h3<q>"], [("k", 1, 0), ("q", 2, 3)])]
    cases += [([f"a2.{shared}1<v>"], [("v", 2, 1)]), (["resid_pre.2"], [("resid_pre", 2, None)])]
    if model.dims.has_mlp:
        cases.append((["m2", "a2.h0<q>"], [("mlp_in", 2, None), ("q", 2, 0)]))
    for receivers, parts in cases:
        got = path_patching(model, examples, usable(model), receivers)
        for row, members in zip(got.values[:, 0], usable(model), strict=True):
            sites = [Site(kind, layer) for kind, layer, _ in parts]
            edits = frozen(model, base, new, masks_of(examples, members))
            seen = model.run(ids, examples.mask, interventions=edits, record=sites).values
            patched = measured(
                model,
                examples,
                ids,
                [put(Site(kind, layer), unit, seen[Site(kind, layer)]) for kind, layer, unit in parts],
            )
            torch.testing.assert_close(row, plain - patched, rtol=0, atol=tolerance(name))


# Under a post-norm (Gemma-2) the direct write is a share of the normed sum, not a replaced z.
@pytest.mark.parametrize("name", [name for name in EVERY if name != "gemma2"])
def test_positions_of_senders_and_receivers_equal_runs_with_all_writes_frozen(name: str) -> None:
    model, examples = tiny(name), pairs(3, 6, padded=True, positions={"S": [5, 2, 3], "T": [3, 4, 3]})
    assert all(maps.post.kind == "none" for maps in model.layout.attention.maps)
    base, new, ids = both_runs(model, examples, True)
    plain = measured(model, examples, ids, [])
    grouped = model.dims.n_kv_heads < model.dims.n_heads
    rows = torch.arange(len(examples))
    for receiver, at in (("a2.h1<q>", "T"), ("a2.kv1<v>" if grouped else "a2.h1<v>", "S")):
        site, where = Site(receiver[-2], 2), examples.positions[at]
        senders = ["a0.h1@S", "a1.h2@T", "input@S"]
        got = path_patching(model, examples, senders, f"{receiver}@{at}", meaning="direct").values[:, 0]
        for row, sender in zip(got, senders, strict=True):
            edits = frozen(model, base, new, masks_of(examples, sender))
            if model.dims.has_mlp:
                edits += [Intervention(Site("mlp_out", i), base[Site("mlp_out", i)]) for i in range(2)]
            seen = model.run(ids, examples.mask, interventions=edits, record=[site]).values[site]
            given = base[site].clone()
            given[rows, where, 1] = seen[rows, where, 1]
            patched = measured(model, examples, ids, [put(site, 1, given)])
            torch.testing.assert_close(row, plain - patched, rtol=0, atol=tolerance(name))
        assert float(got.abs().max()) > 1e-4


TWO_HOPS = [  # every shape to both receivers with both meanings; under a post-norm no frozen run shows a direct write
    ("gpt2", "logits", "direct"),
    ("gpt2", "a2.h1<q>", "mlps-recomputed"),
    ("neox", "logits", "mlps-recomputed"),
    ("neox", "a2.h1<q>", "direct"),
    ("llama", "logits", "direct"),
    ("llama", "a2.h1<q>", "mlps-recomputed"),
    ("gemma2", "logits", "mlps-recomputed"),
    ("gemma2", "a2.h1<q>", "mlps-recomputed"),
    ("qwen2", "logits", "mlps-recomputed"),
    ("qwen2", "a2.h1<q>", "direct"),
]


@pytest.mark.parametrize(("name", "receivers", "meaning"), TWO_HOPS)
def test_two_hops_equal_frozen_runs_one_after_the_other(name: str, receivers: str, meaning: Any) -> None:
    model, examples = tiny(name), pairs(3, 6, padded=True)
    base, new, ids = both_runs(model, examples, True)
    plain = measured(model, examples, ids, [])
    grouped = model.dims.n_kv_heads < model.dims.n_heads
    key = "a1.kv1<k>" if grouped else "a1.h1<k>"
    heads = [2, 3] if grouped else [1]
    got = path_patching(model, examples, ["a0.h0", "m0"], receivers, via=[[key, "m1"]], meaning=meaning)

    def held(senders: dict[str, torch.Tensor]) -> list[Intervention]:
        """For direct paths the MLPs are frozen too, but those that send."""
        if meaning != "direct":
            return []
        every = [Site("mlp_out", layer) for layer in range(3) if f"m{layer}" not in senders]
        return [Intervention(site, base[site]) for site in every]

    for row, sender in zip(got.values[:, 0], ["a0.h0", "m0"], strict=True):
        edits = frozen(model, base, new, {sender: examples.mask}) + held({sender: examples.mask})
        seen = model.run(ids, examples.mask, interventions=edits, record=["k.1", "mlp_in.1"]).values
        z = model.run(ids, examples.mask, interventions=[put(Site("k", 1), 1, seen["k.1"])], record=["z.1"])
        out = model.run(
            ids, examples.mask, interventions=[put(Site("mlp_in", 1), None, seen["mlp_in.1"])], record=["mlp_out.1"]
        )
        written = {Site("z", 1): z.values["z.1"], Site("mlp_out", 1): out.values["mlp_out.1"]}
        senders = {f"a1.h{head}": examples.mask for head in heads} | {"m1": examples.mask}
        edits = frozen(model, base, base | written, senders) + held(senders)
        if receivers == "logits":
            patched = measured(model, examples, ids, edits)
        else:
            q = model.run(ids, examples.mask, interventions=edits, record=["q.2"]).values["q.2"]
            patched = measured(model, examples, ids, [put(Site("q", 2), 1, q)])
        torch.testing.assert_close(row, plain - patched, rtol=0, atol=tolerance(name))


@pytest.mark.parametrize("meaning", ["direct", "mlps-recomputed"])
@pytest.mark.parametrize("name", EVERY)
def test_sending_everything_is_the_corrupt_run(name: str, meaning: Any) -> None:
    model, examples = tiny(name), pairs(3, 6, padded=True)
    graph = build_graph(model)
    plain = measured(model, examples, examples.clean, [])
    corrupt = measured(model, examples, examples.corrupt, [])
    for direction in ("noise", "denoise"):
        got = path_patching(model, examples, [graph.writers], meaning=meaning, direction=direction)
        torch.testing.assert_close(got.values[0, 0], plain - corrupt, rtol=0, atol=tolerance(name))
        assert got.about["clean_value"] == pytest.approx(float(plain.mean()), abs=1e-6)
    swapped = Pairs(
        clean=examples.corrupt, corrupt=examples.clean, mask=examples.mask, right=examples.right, wrong=examples.wrong
    )
    one = path_patching(model, examples, "heads", meaning=meaning)
    other = path_patching(model, swapped, "heads", meaning=meaning, direction="denoise")
    # The same patched runs; only the base value is on the other side of the minus sign.
    torch.testing.assert_close(one.values, -other.values, rtol=0, atol=tolerance(name))


def test_effects_add_up_where_the_model_is_linear() -> None:
    model, examples = tiny("no-norm"), pairs(4, 6)
    writers = build_graph(model).writers
    single = path_patching(model, examples, "nodes", meaning="direct").values[:, 0]
    together = path_patching(model, examples, [writers], meaning="direct").values[0, 0]
    torch.testing.assert_close(single.sum(0), together, rtol=0, atol=1e-9)
    assert float(single.abs().max()) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("receivers", ["logits", ["a2.h1<q>", "m1"]])
@pytest.mark.parametrize("name", SHAPES)
def test_batches_memory_and_padding_change_nothing(name: str, receivers: Any) -> None:
    model, examples = tiny(name), pairs(5, 7, padded=True)
    senders = ["input", "a0.h1", "a1.h2", "m1"]
    whole = path_patching(model, examples, senders, receivers, positions=[1, -1])
    tight = path_patching(model, examples, senders, receivers, positions=[1, -1], batch_size=2, memory=1)
    torch.testing.assert_close(whole.values, tight.values, rtol=0, atol=tolerance(name))
    rows, n = [4, 4], int(examples.lengths[4])
    alone = Pairs(
        clean=examples.clean[rows, :n],
        corrupt=examples.corrupt[rows, :n],
        right=examples.right[rows],  # type: ignore[index]
        wrong=examples.wrong[rows],  # type: ignore[index]
    )
    got = path_patching(model, alone, senders, receivers, positions=[1, -1])
    torch.testing.assert_close(whole.values[..., 4], got.values[..., 0], rtol=0, atol=tolerance(name))


def test_positions_that_a_prompt_does_not_have_are_nan() -> None:
    model, examples = tiny("gpt2"), pairs(3, 6, padded=True)
    got = path_patching(model, examples, "heads", "a2.h0<k>", positions="each")
    present = torch.stack([examples.mask[:, pos] for pos in range(6)])
    assert torch.equal(got.values.isnan(), ~present.expand_as(got.values))


@pytest.mark.parametrize("metric", ["kl_to_clean", "prob_diff"])
def test_other_metrics_and_several_answer_positions(metric: str) -> None:
    model = tiny("gpt2")
    examples = pairs(3, 6, answer_pos=torch.tensor([[1, 5], [3, -1], [5, 0]]))
    base, new, ids = both_runs(model, examples, True)
    measure = get_metric(metric)
    reference = clean_logits(model, examples) if measure.needs_reference else None

    def value(edits: list[Intervention]) -> torch.Tensor:
        run = model.run(ids, interventions=edits, record=[FINAL], stop=FINAL)
        return metric_values(model, examples, measure, run.values[FINAL], reference)

    got = path_patching(model, examples, ["a1.h1", "m0"], metric=metric)
    for row, sender in zip(got.values[:, 0], ["a1.h1", "m0"], strict=True):
        effect = (value([]) - value(frozen(model, base, new, {sender: examples.mask}))) * measure.direction
        torch.testing.assert_close(row, effect, rtol=0, atol=1e-9)


@pytest.mark.slow
def test_the_model_is_left_as_it_was() -> None:
    model = build("gemma2")
    before = snapshot(model.bridge)
    path_patching(model, pairs(3, 6), "nodes", ["a2.h1<q>"], via=[["m1"]])
    assert snapshot(model.bridge) == before


BAD: list[tuple[Any, Any, dict[str, Any], str]] = [
    ([], "logits", {}, "No sender is given"),
    (["a9.h0"], "logits", {}, "layers 0 to 2"),
    (["a0.h0<q>"], "logits", {}, "is not a sender"),
    (["resid_pre.1"], "logits", {}, "is not a sender"),
    ([()], "logits", {}, "empty"),
    (["m0", "m0"], "logits", {}, "given twice"),
    ("heads", [], {}, "at least one"),
    ("heads", "a1.h1", {}, "is not a receiver"),
    ("heads", "a1.kv1<k>", {}, "own keys and values"),
    ("heads", ["logits", "m1"], {}, "cannot be combined with other receivers"),
    ("heads", "a1.h1<x>", {}, "is not a part of a model"),
    ("heads", "logits", {"via": [["logits"]]}, "cannot be a mediator"),
    ("heads", "logits", {"via": [["resid_pre.1"]]}, "does not write by itself"),
    ("heads", "logits", {"meaning": "wang"}, "Unknown meaning"),
    ("heads", "logits", {"direction": "up"}, "Unknown direction"),
    ("heads", "logits", {"positions": [9]}, "outside the prompt"),
    (["m0@1"], "logits", {"positions": [2]}, "given twice"),
]


@pytest.mark.parametrize(("senders", "receivers", "keywords", "message"), BAD)
def test_bad_input_gets_one_clear_line(senders: Any, receivers: Any, keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        as_installed(path_patching)(tiny("gpt2"), pairs(3, 6), senders, receivers, **keywords)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_exact_is_refused() -> None:
    model = build("gpt2")
    with model.intervene(Intervention("mlp_out.0", lambda out: out)), pytest.raises(InputError, match="inside"):
        path_patching(model, pairs(3, 6))
    model.bound_mlps = {2: "it adds the residual stream"}
    with pytest.raises(UnsupportedError, match="layer 2 cannot be run by itself"):
        path_patching(model, pairs(3, 6))
    assert path_patching(model, pairs(3, 6), meaning="direct").values.isfinite().all()
