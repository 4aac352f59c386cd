"""The methods: against brute force, under batches and shards, and what they refuse."""

from __future__ import annotations

import itertools

import pytest
import torch

import mechinterp as mi
from mechinterp.discovery.eap import integration_points
from mechinterp.graphs.graph import Graph, build_graph
from mechinterp.graphs.scores import Scores
from tests.support.models_tiny import SHAPES, huggingface, pairs, tiny


def near(name: str, n: int = 4, length: int = 6) -> tuple[mi.HookManager, mi.Pairs]:
    """A model in which token 2k + 1 is nearly token 2k, and pairs that differ by that: first order has a chance."""
    module = huggingface(name)
    embedding = module.get_input_embeddings().weight
    noise = torch.randn(embedding[0::2].shape, generator=torch.Generator().manual_seed(0), dtype=embedding.dtype)
    with torch.no_grad():
        embedding[1::2] = embedding[0::2] + 0.01 * noise
    some = pairs(n, length)
    clean = some.clean - some.clean % 2
    corrupt = clean.clone()
    corrupt[:, 1] += 1
    return mi.load_model(module), mi.Pairs(clean=clean, corrupt=corrupt, right=some.right, wrong=some.wrong)


def spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    """The correlation of the ranks (there are no ties among real numbers)."""
    ranks = torch.stack([a.argsort().argsort(), b.argsort().argsort()]).double()
    return float(torch.corrcoef(ranks)[0, 1])


def values(scores: Scores) -> torch.Tensor:
    return scores.values[scores.graph.possible].double()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "neox", "llama", "gemma2"])
def test_eap_ranks_as_brute_force_does(name: str) -> None:
    """MLPs included: peers multiply an MLP's output by the gradient at its input. The sign is checked too."""
    model, some = near(name)
    graph = build_graph(model)
    exact = values(mi.score_edges(model, graph, some, method="exact"))
    # Gemma-2 computes norms in float32: effects of a millionth of the largest are rounding there, and have no rank.
    moving = exact.abs() > 1e-5 * exact.abs().max()
    assert int(moving.sum()) > 50
    mlp = torch.tensor([edge.startswith("m") or "->m" in edge for edge in graph.edge_names()])
    for method, extra in (("eap", {}), ("eap-ig", {"steps": 5})):
        estimate = values(mi.score_edges(model, graph, some, method=method, **extra))
        assert spearman(estimate[moving], exact[moving]) > 0.99, method
        assert spearman(estimate[moving & mlp], exact[moving & mlp]) > 0.99, method


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "method"),
    [*itertools.product(SHAPES, ["eap", "eap-ig", "eap-ig-activations"]), ("llama", "exact"), ("gpt2", "exact")],
)
def test_scores_do_not_depend_on_the_batches(name: str, method: str) -> None:
    """Silent error 1: EAP-IG divides a batch mean by the number of items, so 8 + 2 is not 10. Here 5 is 2 + 2 + 1."""
    model, some = tiny(name), pairs(5, padded=True)
    graph = build_graph(model)
    steps = {"steps": 3} if "ig" in method else {}
    whole = mi.score_edges(model, graph, some, method=method, batch_size=5, **steps)
    parts = mi.score_edges(model, graph, some, method=method, batch_size=2, **steps)
    # Gemma-2 and the RMSNorm shapes compute norms and softmax in float32 inside.
    assert torch.allclose(values(parts), values(whole), rtol=1e-4, atol=1e-5)
    assert whole.count == 5


@pytest.mark.slow
def test_shards_add_up_to_the_whole() -> None:
    model, some = tiny("gpt2"), pairs(5)
    graph = build_graph(model)
    whole = mi.score_edges(model, graph, some, method="eap-ig")
    shards = [mi.score_edges(model, graph, some[rows], method="eap-ig") for rows in (slice(0, 4), slice(4, 5))]
    added = shards[0] + shards[1]
    assert added.count == whole.count and torch.allclose(added.values, whole.values, atol=1e-9)
    assert dict(added.cost) == dict(whole.cost)
    with pytest.raises(mi.InputError, match="added"):
        _ = whole + mi.score_edges(model, graph, some, method="eap")


def test_shards_under_a_mean_do_not_add_up_and_are_refused() -> None:
    """Each shard has a mean of its own, so their sum is not the whole."""
    model, some = tiny("gpt2"), pairs(5)
    graph = build_graph(model)
    first, rest = (
        mi.score_edges(model, graph, some[rows], method="eap", replacement="mean")
        for rows in (slice(0, 3), slice(3, 5))
    )
    with pytest.raises(mi.InputError, match="mean of its own examples"):
        _ = first + rest


@pytest.mark.slow
@pytest.mark.parametrize("method", ["eap", "eap-ig", "exact"])
def test_positive_means_that_the_edge_helps(method: str) -> None:
    """Cutting the best edge lowers the metric, cutting the worst raises it; a metric to be lowered turns the sign."""
    model, some = near("gpt2")
    graph = build_graph(model)
    scores = mi.score_edges(model, graph, some, method=method)
    table = scores.to_frame().sort_values("score")
    clean = mi.run_edges(model, graph, some, torch.zeros_like(graph.possible)).mean()
    for edge, sign in ((table.edge.iloc[-1], -1), (table.edge.iloc[0], 1)):
        cut = mi.run_edges(model, graph, some, graph.mask_of([edge])).mean()
        assert float(cut - clean) * sign > 0
    kl = mi.score_edges(model, graph, some, method="exact", metric="kl_to_clean")
    assert float(values(kl).min()) >= -1e-12  # replacing any edge can only lead away from the clean run


def test_the_integration_points() -> None:
    assert integration_points(2, "right") == (0.5, 1.0)
    assert integration_points(2, "left") == (0.0, 0.5)
    assert integration_points(2, "midpoint") == (0.25, 0.75)
    model, some = tiny("gpt2"), pairs(3)
    graph = build_graph(model)
    by_schedule = [
        values(mi.score_edges(model, graph, some, method="eap-ig", steps=2, schedule=name))
        for name in ("right", "left", "midpoint")
    ]
    assert not torch.allclose(by_schedule[0], by_schedule[1]) and not torch.allclose(by_schedule[0], by_schedule[2])
    one = mi.score_edges(model, graph, some, method="eap-ig", steps=1)
    assert torch.equal(one.total, mi.score_edges(model, graph, some, method="eap").total)


def test_the_same_call_gives_the_same_scores_and_leaves_the_graph() -> None:
    model, some = tiny("qwen2"), pairs(3)
    graph = build_graph(model)
    digest = graph.digest()
    first, again = (mi.score_edges(model, graph, some, method="eap-ig") for _ in range(2))
    assert torch.equal(first.total, again.total) and graph.digest() == digest
    assert first.to_dict().keys() == set(graph.edge_names())
    assert list(first.to_frame().columns) == ["edge", "writer", "reader", "score"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"method": "epa"}, "Did you mean 'eap'"),
        ({"method": "eap", "steps": 3}, "no parameter 'steps'"),
        ({"method": "eap-ig", "steps": 0}, "steps must be"),
        ({"method": "eap-ig", "steps": True}, "steps must be"),
        ({"method": "eap-ig", "schedule": "middle"}, "schedule 'middle'"),
        ({"method": "eap", "metric": "kl_to_clean"}, "is 0"),
        ({"method": "eap", "metric": "accuracy"}, "no gradient"),
        ({"method": "eap", "metric": "logit_dif"}, "Did you mean 'logit_diff'"),
        ({"method": "eap", "replacement": "noise"}, "replacement 'noise'"),
        ({"method": "eap", "batch_size": 0}, "batch_size"),
    ],
)
def test_nonsense_is_refused(arguments: dict[str, object], words: str) -> None:
    model = tiny("gpt2")
    with pytest.raises(mi.InputError, match=words):
        mi.score_edges(model, build_graph(model), pairs(3), **arguments)  # type: ignore[arg-type]


def test_ids_outside_the_vocabulary_and_nan_weights_are_refused() -> None:
    """Silent error 9."""
    model = tiny("gpt2")
    graph: Graph = build_graph(model)
    with pytest.raises(mi.InputError, match="vocabulary"):
        mi.score_edges(model, graph, mi.Pairs(clean=[[1, 999]] * 2, corrupt=[[1, 2]] * 2, right=[3, 3], wrong=[4, 4]))
    with pytest.raises(mi.InputError, match="two examples"):
        mi.Pairs(clean=[[1, 2]], corrupt=[[1, 3]], right=[3], wrong=[4])


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_activation_paths_share_out_what_patching_a_group_does(name: str) -> None:
    """Completeness: the edges out of all heads of a layer, or of an MLP, sum to the effect of patching them."""
    model, some = tiny(name), pairs(3, padded=True)
    graph = build_graph(model)
    scores = mi.score_edges(model, graph, some, method="eap-ig-activations", steps=60 if name == "llama" else 30)
    clean = mi.run_edges(model, graph, some, torch.zeros_like(graph.possible))
    groups = [slice(0, 1), graph.head_writers(1), slice(graph.mlp_writer(1), graph.mlp_writer(1) + 1)]
    if name == "gemma2":  # a head's write is a share of a normed sum, which is no straight path
        del groups[1]
    for rows in groups:
        cut = torch.zeros_like(graph.possible)
        cut[:, rows] = graph.possible[:, rows]
        effect = float((clean - mi.run_edges(model, graph, some, cut)).mean())
        assert float(scores.values[:, rows].sum()) == pytest.approx(effect, rel=2e-2, abs=2e-3)


def test_clean_corrupted_is_the_mean_of_both_ends() -> None:
    from mechinterp.tasks.metrics import get_metric

    model, some = tiny("gpt2"), pairs(4)
    graph = build_graph(model)
    both = mi.score_edges(model, graph, some, method="clean-corrupted")
    ends = [
        mi.edge_gradients(model, graph, some, get_metric("logit_diff"), alphas=(alpha,)) / 4 for alpha in (0.0, 1.0)
    ]
    assert torch.allclose(both.values, sum(ends) / 2, atol=1e-12)  # type: ignore[operator]


@pytest.mark.parametrize("name", ["gpt2", "neox", "llama", "qwen2"])
def test_relp_at_edges_sums_to_relp_at_nodes(name: str) -> None:
    from dataclasses import replace

    from mechinterp.engines.lrp import RULES

    model, some = tiny(name), pairs(4, padded=True)
    graph = build_graph(model)
    scores = mi.score_edges(model, graph, some, method="relp", replacement="zero")
    heads = mi.relevance(model, some, "z", rules=replace(RULES["relp"], pattern=1.0)).scores.values.nansum(-2).mean(-1)
    for layer in range(graph.dims.n_layers):
        assert torch.allclose(scores.values[:, graph.head_writers(layer)].sum(0), heads[layer], atol=1e-5)


def test_the_baselines_know_nothing_of_the_task() -> None:
    model, some = tiny("llama"), pairs(3)
    graph = build_graph(model)
    first, again, other = (mi.score_edges(model, graph, some, method="random", seed=seed).values for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    sizes = mi.score_edges(model, graph, some, method="weight-magnitude").values
    maps = model.layout.attention[1]
    virtual = maps.norm.project(model.layout.attention[0].W_O[2]) @ maps.W["k"][1]
    row, column = graph.edge_index("a0.h2->a1.kv1<k>")
    assert float(sizes[row, column]) == pytest.approx(float(virtual.norm()), rel=1e-6)
    logits = model.layout.final_norm.project(model.layout.neurons(2).W_out) @ model.layout.W_U
    assert float(sizes[graph.edge_index("m2->logits")]) == pytest.approx(float(logits.norm()), rel=1e-6)
