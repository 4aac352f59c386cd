"""Attribution graphs: sums that come out exactly, edges and predictions against the model, influence, pruning."""

from __future__ import annotations

import pytest
import torch

import mechinterp as mi
from mechinterp.analysis.attribution_graph import build as build_module
from mechinterp.analysis.attribution_graph.frozen_run import Seed, check_transcoders, freeze
from mechinterp.base.errors import InputError, UnsupportedError
from mechinterp.features.activations import Gated
from mechinterp.features.dictionary import cross_layer_transcoder, sae, transcoder
from tests.support.models_tiny import ALL_FLOAT64, D_MODEL, D_VOCAB, N_LAYERS, SHAPES, build, native, tiny, tokens

F = 12
PROMPT = tokens(1)[0]
LAYERS = range(N_LAYERS)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def a_set(read: str = "mlp_in", write: str = "mlp_out", layers=LAYERS, **more):
    return [
        transcoder(
            f"{read}.{i}", f"{write}.{i}", drawn(D_MODEL, F, seed=i), drawn(F, D_MODEL, seed=i + 9),
            b_enc=drawn(F, seed=20), b_dec=drawn(D_MODEL, seed=i + 30), **more,
        )
        for i in layers
    ]  # fmt: skip


def a_cross_layer_transcoder(spread: float = 1.0, **more):
    decoders = [
        torch.cat([drawn(F, 1, D_MODEL, seed=i + 9), spread * drawn(F, N_LAYERS - 1 - i, D_MODEL, seed=i + 60)], 1)
        for i in LAYERS
    ]
    reads, writes = [f"mlp_in.{i}" for i in LAYERS], [f"mlp_out.{i}" for i in LAYERS]
    W_enc, b = torch.stack([drawn(D_MODEL, F, seed=i) for i in LAYERS]), torch.stack([drawn(F, seed=20)] * N_LAYERS)
    b_dec = torch.stack([drawn(D_MODEL, seed=i + 30) for i in LAYERS])
    return cross_layer_transcoder(reads, writes, W_enc, decoders, b_enc=b, b_dec=b_dec, **more)


def kinds(model) -> dict[str, list]:
    found = {
        "per layer": a_set(),
        "skip": a_set(W_skip=0.1 * drawn(D_MODEL, D_MODEL, seed=50)),
        "cross-layer": list(a_cross_layer_transcoder(W_skip=0.1 * drawn(N_LAYERS, D_MODEL, D_MODEL, seed=51))),
        "some layers": a_set(layers=[1]),
    }
    if model.has("mlp_raw.0"):
        found["before the post-norm"] = a_set(write="mlp_raw", W_skip=0.1 * drawn(D_MODEL, D_MODEL, seed=52))
    if not model.dims.parallel:
        found["before the norm"] = a_set(read="resid_mid", W_skip=0.1 * drawn(D_MODEL, D_MODEL, seed=53))
    return found


def exact(shape: str) -> float:
    return 1e-12 if shape in ALL_FLOAT64 else 1e-5  # float32 inside Hugging Face's norms


@pytest.mark.parametrize("shape", (*SHAPES, "no-norm"))
def test_edges_add_up_and_are_what_the_held_model_does(shape):
    """Identities 6 and 7: every row sums to what is read, and the model itself, with all held, moves by the edges."""
    model = tiny(shape)
    for name, bases in kinds(model).items():
        graph = mi.attribution_graph(model, PROMPT, bases, targets=[3, 4])
        assert graph.about["gap"] < exact(shape), name
        sizes = graph.weights.abs().sum(1)
        assert float((graph.left_out().abs() / sizes).max()) < exact(shape), name
        assert len(graph.features) > 20 and float(graph.weights[:, PROMPT.shape[0]].abs().max()) > 1e-3  # the bias
        found = mi.validate_edges(model, graph, bases, n=4, factor=3.0)
        assert found.worst < exact(shape) and found.features == 4, name
    logits = model.run(PROMPT[None]).logits[0, -1].double()
    if model.layout.soft_cap is None:
        expected = (logits - logits.mean())[[3, 4]]
        torch.testing.assert_close(
            torch.tensor([t.pre for t in graph.targets]).double(), expected, rtol=1e-4, atol=1e-5
        )


def test_a_wrong_edge_is_noticed():
    model, bases = tiny("gpt2"), a_set()
    graph = mi.attribution_graph(model, PROMPT, bases, targets=[3])
    graph.weights[:, graph.n_leaves + int(graph.influence()[graph.n_leaves :].argmax())] *= 1.01
    assert mi.validate_edges(model, graph, bases, n=4).worst > 5e-3


def test_skip_connections_carry_effects():
    model = tiny("gpt2")
    plain = mi.attribution_graph(model, PROMPT, a_set(), targets=[3])
    skip = mi.attribution_graph(model, PROMPT, a_set(W_skip=drawn(D_MODEL, D_MODEL)), targets=[3])
    none = mi.attribution_graph(model, PROMPT, a_set(W_skip=torch.zeros(D_MODEL, D_MODEL).double()), targets=[3])
    torch.testing.assert_close(none.weights, plain.weights)
    assert not torch.allclose(skip.weights, plain.weights, atol=1e-2)


def test_the_transpose_is_the_jacobian():
    """Identity 9, against autograd through the frozen map written forwards."""
    model, bases = tiny("gpt2"), check_transcoders(tiny("gpt2"), a_set(W_skip=drawn(D_MODEL, D_MODEL)))
    run = freeze(model, PROMPT, bases)
    writes = {key: torch.zeros_like(run.start(), requires_grad=True) for key in run.constants()}
    resid = run.start() + writes["input", -1]
    for layer in LAYERS:
        maps = model.layout.attention[layer]
        x = maps.norm.project(resid) / maps.norm.scale(run.at("resid_pre", layer))
        v = torch.einsum("pd,hde->phe", x, maps.W["v"])
        z = torch.einsum("hqk,khe->qhe", run.at("pattern", layer), v)
        resid = resid + torch.einsum("phe,hed->pd", z, maps.W_O) + writes["attn", layer]
        x = run.mlp_norm(layer).project(resid) / run.mlp_scale(layer)
        if layer == 2:
            read = x[4] @ bases[2].W_enc[0, :, 5]
        resid = resid + x @ bases[layer].W_skip + writes["mlp", layer]
    seed = Seed(0, 2, "mlp_in", 4, bases[2].W_enc[0, :, 5])
    earlier = [key for key in writes if key[1] < 2 or key == ("attn", 2)]
    expected = dict(zip(earlier, torch.autograd.grad(read, [writes[key] for key in earlier]), strict=True))
    found = {key: g[0].clone() for key, g in run.backward([seed], 1)}
    for key in earlier:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-10, atol=1e-12)
        assert not found[key][5:].any()  # nothing from later positions
    assert not found["mlp", 2].any()


def test_batches_and_order_do_not_matter():
    model, bases = tiny("gpt2"), a_set()
    graph = mi.attribution_graph(model, PROMPT, bases, targets=[3, 4])
    for size in (1, 7):
        other = mi.attribution_graph(model, PROMPT, bases, targets=[3, 4], batch_size=size)
        torch.testing.assert_close(other.weights, graph.weights, rtol=1e-11, atol=1e-13)


def test_neurons_of_a_relu_model_have_no_error():
    """Identity 10: a transcoder that is the MLP misses nothing, and its edges to logits are those of the neurons."""
    model = build("no-norm", act_fn="relu")
    bases = [
        transcoder(f"mlp_in.{i}", f"mlp_out.{i}", m.W_in, m.W_out, b_enc=m.b_in, b_dec=m.b_out)
        for i, m in enumerate(model.layout.mlp_maps)
    ]
    graph = mi.attribution_graph(model, PROMPT, bases, targets=[3])
    errors = [i for i, node in enumerate(graph.nodes) if node.kind == "error"]
    assert float(graph.weights[:, errors].abs().max()) < 1e-12 and graph.scores.replacement > 1 - 1e-9
    W_U = model.layout.W_U
    post = model.run(PROMPT[None], record=["mlp_post.2"]).values["mlp_post.2"][0, -1]
    expected = post * (model.layout.mlp_maps[2].W_out @ (W_U[:, 3] - W_U.mean(1)))
    last = [node for node in graph.features if node.layer == 2 and node.position == len(PROMPT) - 1]
    found = torch.stack([graph.weights[-1, graph.index[node.name]] for node in last])
    torch.testing.assert_close(found, expected[[node.feature for node in last]])


def test_a_cross_layer_transcoder_without_spread_is_one_per_layer():
    model = tiny("gpt2")
    a = mi.attribution_graph(model, PROMPT, a_cross_layer_transcoder(0.0), targets=[3])
    b = mi.attribution_graph(model, PROMPT, a_set(), targets=[3])
    assert [node.name for node in a.nodes] == [node.name for node in b.nodes]
    torch.testing.assert_close(a.weights, b.weights)


def square(graph) -> tuple[torch.Tensor, torch.Tensor]:
    """(the matrix of all nodes by all nodes without constants, the weights of targets), as circuit-tracer has them."""
    n = len(graph.nodes)
    full = torch.zeros(n, n, dtype=torch.float64)
    full[graph.n_leaves :, : n - graph.n_targets] = graph.weights.abs()
    full[:, [i for i, node in enumerate(graph.nodes) if node.kind == "bias"]] = 0
    return full, torch.tensor([node.weight for node in graph.nodes], dtype=torch.float64)


def normalised(matrix: torch.Tensor) -> torch.Tensor:
    return matrix / matrix.sum(1, keepdim=True).clamp(min=1e-10)


def series(matrix: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    total, term = torch.zeros_like(weight), weight @ matrix
    while bool(term.any()):
        total, term = total + term, term @ matrix
    return total


def threshold(scores: torch.Tensor, share: float) -> torch.Tensor:
    ordered = scores.sort(descending=True).values
    return ordered[int((ordered.cumsum(0) / ordered.sum() < share).sum()).__index__()]


def test_influence_scores_and_pruning_are_those_of_circuit_tracer():
    """Identity 8, and the published rules written out on the square matrix with its power series."""
    model, bases = tiny("gpt2"), a_set()
    graph = mi.attribution_graph(model, PROMPT, bases, targets=[3, 4, 5])
    matrix, weight = square(graph)
    kind = {
        k: torch.tensor([node.kind == k for node in graph.nodes])
        for k in ("token", "error", "feature", "target", "bias")
    }
    influence = series(normalised(matrix), weight)
    torch.testing.assert_close(influence[: len(graph.writers)], graph.influence())
    leaves = [
        graph.influence(constants=True)[i]
        for i, node in enumerate(graph.nodes)
        if node.kind in ("token", "bias", "error")
    ]
    torch.testing.assert_close(sum(leaves), weight.sum())
    tokens_, errors = float(influence[kind["token"]].sum()), float(influence[kind["error"]].sum())
    assert graph.scores.replacement == pytest.approx(tokens_ / (tokens_ + errors))
    clean, counts = 1 - normalised(matrix)[:, kind["error"]].sum(1), influence + weight
    assert graph.scores.completeness == pytest.approx(float((clean * counts).sum() / counts.sum()))
    assert graph.scores.of_tokens + graph.scores.of_constants + graph.scores.of_errors == pytest.approx(1)

    always = kind["token"] | kind["target"]
    kept = (influence >= threshold(influence, 0.8)) | always
    part = matrix * kept[:, None] * kept[None]
    flow = normalised(part) * (series(normalised(part), weight) + weight)[:, None]
    edge = (flow >= threshold(flow.flatten(), 0.9)) & (flow > 0)
    for _ in range(50):
        kept &= edge.any(0) | always
        kept &= edge.any(1) | ~kind["feature"]
        edge &= kept[:, None] & kept[None]
    pruned = graph.pruned(0.8, 0.9)
    kept |= kind["bias"]
    assert [node.name for node in pruned.nodes] == [
        n.name for n, k in zip(graph.nodes, kept.tolist(), strict=True) if k
    ]
    without_bias = torch.tensor([node.kind != "bias" for node in pruned.writers])
    assert int((pruned.weights[:, without_bias] != 0).sum()) == int(edge.sum())
    assert 5 < len(pruned.features) < len(graph.features)
    rest = graph.weights.sum(1)[[graph.index[n.name] - graph.n_leaves for n in pruned.readers]] - pruned.weights.sum(1)
    torch.testing.assert_close(pruned.left_out(), rest, rtol=1e-9, atol=1e-9)
    assert len(graph.pruned(1.0, 1.0).features) == len(
        [n for n in graph.features if influence[graph.index[n.name]] > 0]
    )


def test_features_beyond_the_limit_are_one_node():
    model, bases = tiny("gpt2"), a_set()
    whole = mi.attribution_graph(model, PROMPT, bases, targets=[3])
    part = mi.attribution_graph(model, PROMPT, bases, targets=[3], max_features=40, batch_size=5)
    assert len(part.features) == 40 and part.nodes[part.n_leaves - 1].kind == "rest"
    torch.testing.assert_close(part.left_out(), torch.zeros(41).double(), rtol=0, atol=1e-10)
    same = [whole.index[node.name] for node in part.writers if node.kind != "rest"]
    rows = [whole.index[node.name] - whole.n_leaves for node in part.readers]
    columns = [i for i, node in enumerate(part.writers) if node.kind != "rest"]
    torch.testing.assert_close(part.weights[:, columns], whole.weights[rows][:, same])
    held = whole.influence()[whole.n_leaves :].sort(descending=True).values
    assert sum(float(whole.influence()[whole.index[node.name]]) for node in part.features) > 0.9 * float(
        held[:40].sum()
    )


def test_first_positions_can_count_as_constants():
    model, bases = tiny("gpt2"), a_set()
    graph = mi.attribution_graph(model, PROMPT, bases, targets=[3], constant_positions=2)
    assert graph.about["gap"] < 1e-12
    assert all(node.position >= 2 for node in graph.nodes if node.kind in ("feature", "error"))


def test_predictions_are_exact_where_the_model_is_linear():
    """No norms, frozen patterns, MLPs that are their transcoders, and no ReLU that switches."""
    bridge = native("no-norm", act_fn="relu", scale=0.05)
    with torch.no_grad():
        for block in bridge.blocks:
            block.mlp.b_in.fill_(3.0)
    model = mi.load_model(bridge)
    bases = [
        transcoder(f"mlp_in.{i}", f"mlp_out.{i}", m.W_in, m.W_out, b_enc=m.b_in, b_dec=m.b_out)
        for i, m in enumerate(model.layout.mlp_maps)
    ]
    graph = mi.attribution_graph(model, PROMPT, bases, targets=[3, 4])
    assert len(graph.features) == 3 * 7 * 32  # all neurons are on
    found = mi.validate_graph(model, graph, bases, n=20, held="patterns")
    predicted, measured = (torch.tensor(found.frame[name].to_numpy()) for name in ("predicted", "measured"))
    torch.testing.assert_close(predicted, measured, rtol=1e-8, atol=1e-12)
    assert found.pearson > 1 - 1e-9 and found.spearman > 1 - 1e-9 and found.direct < 1 - 1e-9 and found.shuffled < 0.6


def test_targets():
    model, bases = tiny("gpt2"), a_set()
    graph = mi.attribution_graph(model, PROMPT, bases, targets={"3 - 4": {3: 1.0, 4: -1.0}, "5": {5: 1.0}})
    one = mi.attribution_graph(model, PROMPT, bases, targets=[3, 4, 5])
    torch.testing.assert_close(graph.weights[-2], one.weights[-3] - one.weights[-2])
    assert [node.weight for node in graph.targets] == [0.5, 0.5]
    by_default = mi.attribution_graph(model, PROMPT, bases)
    shares = model.run(PROMPT[None]).logits[0, -1].softmax(-1).sort(descending=True)
    n = min(10, int((shares.values.cumsum(0) < 0.95).sum()) + 1)
    assert [node.feature for node in by_default.targets] == shares.indices[:n].tolist()
    mi.validate_graph(model, graph, bases, n=2)


def test_the_bundled_model():
    model = mi.load_model("bundled")
    bases = mi.load_bases("bundled:transcoders", model=model, check=False)
    pairs = mi.load_task("ioi").pairs(model, n=2, seed=0)
    graph = mi.attribution_graph(model, pairs.clean[0, : int(pairs.lengths[0])], bases)
    assert graph.about["gap"] < 1e-5 and graph.scores.of_errors < 0.1
    assert mi.validate_edges(model, graph, bases, n=3).worst < 1e-4
    small = graph.pruned()
    assert "m1" in {node.basis for node in graph.features} and len(small.features) < 50
    top = small.edges(into=small.targets[0].name)
    assert top["weight"].abs().is_monotonic_decreasing and top["source"][0].startswith("token")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: [sae("resid_pre.1", drawn(D_MODEL, F), drawn(F, D_MODEL))], "needs transcoders"),
        (lambda: a_set(activation=Gated(drawn(F), drawn(F), drawn(F))), "not an affine reading"),
        (lambda: [*a_set(), *a_set(layers=[1])], "Two transcoders read layer 1"),
        (lambda: [], "at least one transcoder"),
        (lambda: [transcoder("mlp_in.2", "mlp_out.1", drawn(D_MODEL, F), drawn(F, D_MODEL))], "before the layer"),
        (lambda: [transcoder("mlp_in.9", "mlp_out.9", drawn(D_MODEL, F), drawn(F, D_MODEL))], "layers 0 to 2"),
    ],
)
def test_other_bases_are_refused(make, said):
    with pytest.raises((InputError, UnsupportedError), match=said):
        mi.attribution_graph(tiny("gpt2"), PROMPT, make())


def test_bad_input_is_one_line():
    model, bases = tiny("gpt2"), a_set()
    for more, said in (
        ({"targets": []}, "list of tokens"),
        ({"targets": [3, 3]}, "named twice"),
        ({"targets": [D_VOCAB]}, "not one of the model's"),
        ({"max_features": 0}, "at least 1"),
        ({"max_bytes": 1000}, "smaller max_features"),
    ):
        with pytest.raises(InputError, match=said):
            mi.attribution_graph(model, PROMPT, bases, **more)
    graph = mi.attribution_graph(model, PROMPT, bases, targets=[3])
    for call, said in (
        (lambda: graph.pruned(nodes=0.0), "share of the influence"),
        (lambda: graph.edges(into="m9.f1@0"), "Unknown node"),
        (lambda: mi.validate_edges(model, graph.pruned(), bases), "pruned"),
        (lambda: mi.validate_edges(model, graph, a_set(W_skip=drawn(D_MODEL, D_MODEL))), "same ones"),
        (lambda: mi.validate_edges(build("gpt2", seed=5), graph, bases), "other logits"),
        (lambda: mi.validate_graph(model, graph, bases, held="all"), "Unknown part to hold"),
        (lambda: graph.with_supernodes([mi.Supernode("a", ("nothing",))]), "Unknown node"),
        (lambda: graph.with_texts({"m0.f999": "x"}), "Unknown feature"),
    ):
        with pytest.raises(InputError, match=said):
            call()
    for wrong in ("llama", "neox"):
        with pytest.raises(InputError):
            mi.validate_edges(tiny(wrong), graph, bases)


def test_targets_of_no_probability_count_alike(monkeypatch: pytest.MonkeyPatch):
    """Where the softmax gives both 0, their probabilities are no weights, and every influence would be 0."""
    model = tiny("gpt2")
    logits = model.run(PROMPT[None]).logits
    assert logits is not None
    least = logits[0, -1].argsort()[:2].tolist()
    layout = type(model.layout)
    plain = layout.unembed
    monkeypatch.setattr(layout, "unembed", lambda self, resid: 1e6 * plain(self, resid))
    graph = mi.attribution_graph(model, PROMPT, a_set(), targets=least)
    assert [node.value for node in graph.targets] == [0, 0]
    assert [node.weight for node in graph.targets] == [0.5, 0.5]
    assert float(graph.influence()[: graph.n_leaves].sum()) == pytest.approx(1)


def test_a_graph_of_numbers_that_are_not_finite_is_refused(monkeypatch: pytest.MonkeyPatch):
    """With patterns free nothing checks the sums; NaN edges would leave a pruned graph empty, without a word."""
    rows = build_module._Edges.rows

    def broken(self, seeds, own):
        found = rows(self, seeds, own)
        found[0, 0] = torch.nan
        return found

    monkeypatch.setattr(build_module._Edges, "rows", broken)
    with pytest.raises(UnsupportedError, match="finite"):
        mi.attribution_graph(tiny("gpt2"), PROMPT, a_set(), targets=[3], held="nothing")
