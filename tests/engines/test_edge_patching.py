"""The exact engine: identities at the ends, an independent oracle, and results that depend on no batching."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mechinterp.engines.edge_patching
import mechinterp.engines.write_table
from mechinterp.base.errors import InputError, UnsupportedError
from mechinterp.engines.edge_patching import run_edges
from mechinterp.engines.mask_gradients import mask_gradients
from mechinterp.engines.replacement import build_replacement, corrupt_replacement
from mechinterp.engines.whole_nodes import whole_nodes
from mechinterp.graphs.graph import Graph, build_graph, graph_of
from mechinterp.models.interventions import Intervention
from mechinterp.models.sites import Site
from mechinterp.tasks.metrics import get_metric
from mechinterp.tasks.pairs import Pairs
from tests.support.models_tiny import (
    ALL_FLOAT64,
    D_VOCAB,
    EVERY,
    NATIVE,
    SHAPES,
    as_installed,
    build,
    huggingface,
    native,
    pairs,
    small_cut,
    snapshot,
    tiny,
    tokens,
)
from tests.support.slow_edges import SLOW, slow_run

LOGIT_DIFF = get_metric("logit_diff")


def tolerance(name: str) -> float:
    """Float64 rounding; where Hugging Face computes norms and rotations in float32, that."""
    return 1e-11 if name in ALL_FLOAT64 else 5e-6


def bare_metric(name: str, ids: torch.Tensor, some: Pairs) -> torch.Tensor:
    """The logit difference of a model that we have never touched."""
    with torch.no_grad():
        if name in NATIVE:
            keywords = {} if bool(some.mask.all()) else {"attention_mask": some.mask.long()}
            logits = native(name)(ids, return_type="logits", **keywords)
        else:
            logits = huggingface(name)(ids, attention_mask=some.mask.long()).logits
    at = some.answer_pos[..., None].expand(-1, -1, D_VOCAB)
    return LOGIT_DIFF(logits.gather(1, at), some)


def parts_of(graph: Graph) -> dict[str, torch.Tensor]:
    """Masks by name: nothing, everything, everything into the logits."""
    logits = torch.zeros_like(graph.possible)
    logits[-1] = True
    return {"nothing": torch.zeros_like(graph.possible), "everything": graph.possible, "into logits": logits}


# -- the ends ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", EVERY)
def test_nothing_cut_is_the_clean_run_and_all_cut_the_corrupt_run(name: str, padded: bool) -> None:
    model, some = tiny(name), pairs(4, 7, padded=padded)
    graph = build_graph(model)
    values = run_edges(model, graph, some, torch.stack(list(parts_of(graph).values())))
    clean, corrupt = bare_metric(name, some.clean, some), bare_metric(name, some.corrupt, some)
    # GPT-NeoX's softmax is in float32 in Hugging Face, in float64 in the bridge.
    near = 5e-6 if name == "neox" else tolerance(name)
    torch.testing.assert_close(values[0], clean, rtol=0, atol=near)
    torch.testing.assert_close(values[1], corrupt, rtol=0, atol=near)
    # The logits see nothing but the writes: with those of the corrupt run they are the corrupt run's.
    torch.testing.assert_close(values[2], corrupt, rtol=0, atol=near)


@pytest.mark.parametrize("name", ["gpt2", "no-norm", "attention-only"])
def test_the_two_parts_of_a_split_input_together_are_the_input(name: str) -> None:
    model, some = tiny(name), pairs(4, 7, padded=True)
    one, two = build_graph(model), build_graph(model, split_input=True)
    cut = small_cut(one)
    both = torch.cat([cut[:, :1], cut], 1)
    torch.testing.assert_close(
        run_edges(model, one, some, cut), run_edges(model, two, some, both), rtol=0, atol=tolerance(name)
    )
    # Cutting the positions alone, under corrupt replacement, changes nothing: they are the same in both prompts.
    positions = two.possible.clone()
    positions[:, 0] = positions[:, 2:] = False
    clean = run_edges(model, two, some, torch.zeros_like(positions))
    torch.testing.assert_close(run_edges(model, two, some, positions), clean, rtol=0, atol=tolerance(name))


# -- one edge: a closed form -------------------------------------------------------------------------------------


def test_a_head_into_the_logits_is_z_times_its_weights() -> None:
    """Without a norm the last reader is linear: the edge's effect is (z - z') W_O W_U, nothing else."""
    model, some = tiny("no-norm"), pairs(5, 7)
    graph = build_graph(model)
    z, other = (model.run(ids, record=["z.1"]).values["z.1"][:, -1] for ids in (some.clean, some.corrupt))
    full = run_edges(model, graph, some, torch.zeros_like(graph.possible))
    attention = model.bridge.blocks[1].attn
    rows = torch.arange(5)
    for head in range(4):
        cut = run_edges(model, graph, some, graph.mask_of([f"a1.h{head}->logits"]))
        logits = (z - other)[:, head] @ attention.W_O[head] @ model.bridge.W_U
        expected = logits[rows, some.right[:, 0]] - logits[rows, some.wrong[:, 0]]
        torch.testing.assert_close(full - cut, expected.detach(), rtol=0, atol=1e-11)


def test_the_input_into_the_logits_of_a_norm_model() -> None:
    """With a norm: the final norm of the residual stream with one summand exchanged."""
    model, some = tiny("gpt2"), pairs(5, 7)
    graph = build_graph(model)
    final = model.run(some.clean, record=["resid_final"]).values["resid_final"]
    x, y = (model.run(ids, record=["resid_pre.0"]).values["resid_pre.0"] for ids in (some.clean, some.corrupt))
    module = huggingface("gpt2")
    with torch.no_grad():
        logits = module.lm_head(module.transformer.ln_f(final - x + y))[:, -1:]
    got = run_edges(model, graph, some, graph.mask_of(["input->logits"]))
    torch.testing.assert_close(got, LOGIT_DIFF(logits, some), rtol=0, atol=1e-11)


# -- the oracle --------------------------------------------------------------------------------------------------


def slow_metric(name: str, some: Pairs, graph: Graph, mask: torch.Tensor, kind: str) -> torch.Tensor:
    module = huggingface(name)
    model = SLOW[name](module)
    cut = {graph.edge_name(int(r), int(w)): float(mask[r, w]) for r, w in mask.nonzero()}
    _, writes = slow_run(model, some.corrupt, some.mask, {}, {})
    if kind == "zero":
        writes = {node: torch.zeros_like(value) for node, value in writes.items()}
    if kind == "mean":
        real = some.mask[..., None]
        writes = {n: (v * real).sum((0, 1)).expand_as(v) / some.mask.sum() for n, v in writes.items()}
    if kind == "mean-positional":
        writes = {n: v.mean(0, keepdim=True).expand_as(v) for n, v in writes.items()}
    logits, _ = slow_run(model, some.clean, some.mask, cut, writes)
    return LOGIT_DIFF(logits.gather(1, some.answer_pos[..., None].expand(-1, -1, D_VOCAB)), some)


@pytest.mark.parametrize("kind", ["corrupt", "zero", "mean", "mean-positional"])
@pytest.mark.parametrize("name", SLOW)
def test_random_cuts_agree_with_an_independent_implementation(name: str, kind: str) -> None:
    model, some = tiny(name), pairs(4, 6, padded=kind != "mean-positional")
    graph = build_graph(model)
    replacement = build_replacement(kind, model, graph, some)
    generator = torch.Generator().manual_seed(5)
    masks = [small_cut(graph, share, seed=i) for i, share in enumerate((0.02, 0.1, 0.5, 0.95))]
    partial = small_cut(graph, 0.3) * torch.rand(graph.possible.shape, generator=generator)
    masks = torch.stack([*(mask.float() for mask in masks), partial])
    got = run_edges(model, graph, some, masks, replacement=replacement)
    for row, mask in zip(got, masks, strict=True):
        # The oracle's softmax is in float64, Hugging Face's in float32 for the rotary shapes.
        expected = slow_metric(name, some, graph, mask, kind)
        torch.testing.assert_close(row, expected, rtol=0, atol=1e-10 if name == "gpt2" else 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama", "neox"])
def test_every_single_edge_agrees_with_an_independent_implementation(name: str) -> None:
    model, some = tiny(name), pairs(2, 5, padded=True)
    graph = build_graph(model)
    edges = graph.possible.nonzero()[::3]
    masks = torch.zeros(len(edges), *graph.possible.shape, dtype=torch.bool)
    masks[torch.arange(len(edges)), edges[:, 0], edges[:, 1]] = True
    for row, mask in zip(run_edges(model, graph, some, masks), masks, strict=True):
        expected = slow_metric(name, some, graph, mask, "corrupt")
        torch.testing.assert_close(row, expected, rtol=0, atol=1e-10 if name == "gpt2" else 2e-5)


# -- nothing depends on how it is batched ------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_batched_is_one_by_one_is_padded(name: str) -> None:
    model, some = tiny(name), pairs(4, 7, padded=True)
    graph = build_graph(model)
    cut = small_cut(graph)
    together = run_edges(model, graph, some, cut)
    for size in (1, 3):
        by_size = run_edges(model, graph, some, cut, batch_size=size)
        torch.testing.assert_close(by_size, together, rtol=0, atol=tolerance(name))
    for row in range(4):
        length = int(some.lengths[row])
        twice = {
            "clean": some.clean[row, :length].repeat(2, 1),
            "corrupt": some.corrupt[row, :length].repeat(2, 1),
            "right": some.right[row].repeat(2, 1),
            "wrong": some.wrong[row].repeat(2, 1),
        }
        alone = run_edges(model, graph, Pairs(**twice), cut)
        torch.testing.assert_close(alone, together[row].repeat(2), rtol=0, atol=tolerance(name))
        # The same with padding on the left, which Pairs moves to the right.
        ids = {part: torch.nn.functional.pad(twice[part], (3, 0), value=7) for part in ("clean", "corrupt")}
        mask = torch.nn.functional.pad(torch.ones(2, length, dtype=torch.bool), (3, 0))
        rolled = run_edges(model, graph, Pairs(**{**twice, **ids, "mask": mask}), cut)
        torch.testing.assert_close(rolled, alone, rtol=0, atol=tolerance(name))


@pytest.mark.parametrize("name", EVERY)
def test_candidates_side_by_side_are_one_by_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when they start in different layers, so that the shared prefix of the group is none of their own."""
    model, some = tiny(name), pairs(3, 6, padded=True)
    graph = build_graph(model)
    masks = [torch.zeros_like(graph.possible)]
    for layer in range(model.dims.n_layers):
        late = small_cut(graph, seed=layer)
        late[: graph.channel_readers(layer, "q").start] = False
        masks.append(late)
    masks.append(parts_of(graph)["into logits"])
    alone = torch.stack([run_edges(model, graph, some, mask) for mask in masks])
    together = run_edges(model, graph, some, torch.stack(masks))
    torch.testing.assert_close(together, alone, rtol=0, atol=tolerance(name))
    no_early = run_edges(model, graph, some, torch.stack(masks[2:]))  # a group that starts late
    torch.testing.assert_close(no_early, alone[2:], rtol=0, atol=tolerance(name))
    monkeypatch.setattr(mechinterp.engines.edge_patching, "WRITES_BUDGET_BYTES", 1)
    torch.testing.assert_close(run_edges(model, graph, some, torch.stack(masks)), alone, rtol=0, atol=tolerance(name))


@pytest.mark.parametrize("positions", [(), ("end",)])
@pytest.mark.parametrize("name", EVERY)
def test_the_size_of_a_block_does_not_matter(
    name: str, positions: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every layer by itself, or all together: values and slopes; few cut edges, so that blocks begin in the middle."""
    model, some = tiny(name), pairs(2, 5, positions={"end": [4, 4]})
    graph = build_graph(model, positions=positions)
    values = corrupt_replacement(model, graph).on(some)
    generator = torch.Generator().manual_seed(0)
    chance = torch.rand((3, *graph.possible.shape), generator=generator, dtype=torch.float64)
    masks = chance * graph.possible * (chance < torch.tensor([0.02, 0.1, 1.0])[:, None, None])
    found: list[tuple[torch.Tensor, ...]] = []
    for size in (1, 1000):
        monkeypatch.setattr(mechinterp.engines.write_table, "PORTS_OF_A_BLOCK", size)
        slopes = mask_gradients(model, graph, some, masks, values, lambda logits: logits.square().sum((2, 3)))
        found.append((*(run_edges(model, graph, some, mask) for mask in masks), *slopes))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance(name), atol=tolerance(name) * float(one.abs().max()))


@pytest.mark.parametrize("kind", ["plain", "positions", "neurons"])
@pytest.mark.parametrize("name", EVERY)
def test_a_node_replaced_where_it_writes_is_all_its_edges_cut(
    name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole nodes, whole nodes and some edges, and all nodes but a few; padded prompts."""
    model, some = tiny(name), pairs(3, 6, padded=True, positions={"end": [5, 4, 3]})
    if kind == "neurons" and not model.dims.has_mlp:
        pytest.skip("no MLP")
    graph = build_graph(
        model,
        level="node",
        positions=("end",) if kind == "positions" else (),
        neurons={0: [1, 5], 2: [0]} if kind == "neurons" else None,
    )
    generator = torch.Generator().manual_seed(0)
    masks: list[torch.Tensor] = []
    for share in (0.05, 0.3, 0.8):
        chosen = torch.rand(graph.n_units, generator=generator) < share
        masks.append(chosen[graph.unit.clamp(min=0)] & graph.possible)
    cut = torch.stack([*masks, masks[0] | small_cut(graph, 0.05, seed=1)])
    replaced = whole_nodes(graph, cut.float()).nodes
    assert all(bool(own.any()) for own in replaced) and not bool(replaced.all())
    found = run_edges(model, graph, some, cut)
    monkeypatch.setattr(mechinterp.engines.edge_patching, "_nodes_replaceable", lambda model, graph: False)
    by_edges = run_edges(model, graph, some, cut)
    torch.testing.assert_close(found, by_edges, rtol=tolerance(name), atol=tolerance(name))


@pytest.mark.parametrize("name", SHAPES)
def test_a_cut_edge_does_not_act_before_its_reader(name: str) -> None:
    """Only the answer position's readers see an edge into the logits; other nodes' values stay the clean run's."""
    model, some = tiny(name), pairs(3, 6)
    graph = build_graph(model)
    a = run_edges(model, graph, some, graph.mask_of(["input->logits"]))
    b = run_edges(model, graph, some, graph.mask_of(["a0.h0->logits"]))
    both = run_edges(model, graph, some, graph.mask_of(["input->logits", "a0.h0->logits"]))
    none = run_edges(model, graph, some, torch.zeros_like(graph.possible))
    assert not torch.allclose(a, none)
    assert not torch.allclose(both, a)
    assert not torch.allclose(both, b)


@pytest.mark.slow
def test_float32_and_bfloat16_models_are_near_float64() -> None:
    some = pairs(4, 7, padded=True)
    exact = tiny("gpt2")
    graph = build_graph(exact)
    cut = small_cut(graph)
    expected = run_edges(exact, graph, some, cut)
    for dtype, near in ((torch.float32, 1e-5), (torch.bfloat16, 0.5)):  # logits are about 5; bfloat16 has 8 bits
        got = run_edges(build("gpt2", dtype=dtype), graph, some, cut)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=near)


@pytest.mark.parametrize("metric", ["kl_to_clean", "l2_to_clean", "prob_diff", "accuracy"])
def test_other_metrics_read_the_same_logits(metric: str) -> None:
    model, some = tiny("gpt2"), pairs(4, 7, answer_pos=[[3, 6], [2, 6], [1, 6], [0, 6]])
    graph = build_graph(model)
    at = some.answer_pos[..., None].expand(-1, -1, D_VOCAB)
    clean, corrupt = (model.run(ids).logits.gather(1, at) for ids in (some.clean, some.corrupt))
    expected = get_metric(metric)(corrupt, some, clean)
    torch.testing.assert_close(run_edges(model, graph, some, graph.possible, metric=metric), expected)


# -- what it leaves and refuses ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_the_model_and_the_arguments_are_as_before(name: str) -> None:
    model, some = build(name), pairs(3, 6)
    graph = build_graph(model)
    cut = small_cut(graph)
    kept, digest, possible = cut.clone(), some.digest(), graph.possible.clone()
    before = snapshot(model.bridge)
    run_edges(model, graph, some, cut)
    assert snapshot(model.bridge) == before
    assert torch.equal(cut, kept)
    assert torch.equal(graph.possible, possible)
    assert some.digest() == digest


def test_an_interrupt_inside_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, some = build("gpt2"), pairs(3, 6)
    graph = build_graph(model)
    before = snapshot(model.bridge)
    expected = run_edges(model, graph, some, small_cut(graph))

    def interrupt(*arguments: Any) -> torch.Tensor:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(type(model.layout), "read_mlp", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_edges(model, graph, some, small_cut(graph))
    assert snapshot(model.bridge) == before
    assert torch.equal(run_edges(model, graph, some, small_cut(graph)), expected)


def test_bad_masks_are_refused() -> None:
    model, some = tiny("gpt2"), pairs(3, 6)
    graph = build_graph(model)
    run = as_installed(run_edges)
    good = graph.possible.double()
    wrong: list[tuple[torch.Tensor, str]] = [
        (good[:-1], r"\[reader, writer\]"),
        (good[None, None], r"\[reader, writer\]"),
        (torch.zeros(0, *good.shape), r"\[reader, writer\]"),
        (good * torch.nan, "NaN"),
        (good * 1.5, "from 0"),
        (-good, "from 0"),
        (torch.ones_like(good), "not an edge"),
    ]
    for mask, message in wrong:
        with pytest.raises(InputError, match=message):
            run(model, graph, some, mask)


def test_a_graph_and_pairs_of_another_model_are_refused() -> None:
    model, some = tiny("gpt2"), pairs(3, 6)
    other = build_graph(build("gpt2", n_layer=2))
    with pytest.raises(InputError, match="other dimensions"):
        run_edges(model, other, some, other.possible)
    graph = build_graph(model)
    ids = tokens(2, 5)
    beyond = Pairs(clean=ids, corrupt=ids.flip(0), right=[D_VOCAB + 3, 1], wrong=[2, 3])
    with pytest.raises(InputError, match="vocabulary"):
        run_edges(model, graph, beyond, graph.possible)
    outside = Pairs(clean=ids + D_VOCAB, corrupt=ids, right=[1, 2], wrong=[3, 4])
    with pytest.raises(InputError, match="vocabulary"):
        run_edges(model, graph, outside, graph.possible)
    bare = Pairs(clean=ids, corrupt=ids.flip(0))
    with pytest.raises(InputError, match="right"):
        run_edges(model, graph, bare, graph.possible)


def test_a_split_graph_on_a_model_without_position_embedding_is_refused() -> None:
    graph = graph_of(tiny("llama").dims, split_input=True)
    with pytest.raises(UnsupportedError, match="pos_embed"):
        run_edges(tiny("llama"), graph, pairs(3, 6), graph.possible)


def test_hooks_of_an_outer_intervention_act_in_the_engine() -> None:
    """`intervene` holds for every run inside it, those of the engine included: both runs see the edit."""
    model, some = tiny("gpt2"), pairs(3, 6)
    graph = build_graph(model)
    with model.intervene(Intervention(Site("z", 0), torch.zeros_like)):
        ends = run_edges(model, graph, some, torch.stack([torch.zeros_like(graph.possible), graph.possible]))
        at = some.answer_pos[..., None].expand(-1, -1, D_VOCAB)
        plain = [LOGIT_DIFF(model.run(ids).logits.gather(1, at), some) for ids in (some.clean, some.corrupt)]
    torch.testing.assert_close(ends, torch.stack(plain), rtol=0, atol=1e-11)


def test_outer_edits_of_single_rows_meet_every_mask() -> None:
    model, examples = tiny("gpt2"), pairs(3, 6)
    graph = build_graph(model)
    masks = torch.stack([small_cut(graph, seed=seed) for seed in range(3)])

    def edit(value: torch.Tensor) -> torch.Tensor:
        value = value.clone()
        value[1, 2] *= -2.0
        return value

    with model.intervene(Intervention("mlp_out.1", edit)):
        together = run_edges(model, graph, examples, masks)
        alone = torch.stack([run_edges(model, graph, examples, mask) for mask in masks])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-9)
    assert not torch.allclose(together, run_edges(model, graph, examples, masks))
