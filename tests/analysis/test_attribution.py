"""Attribution patching: derivatives of exact patching, completeness, and the repairs of AtP*."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mechinterp.analysis.activation_patching import activation_patching
from mechinterp.analysis.attribution import METHODS, attribution_patching, node_attribution
from mechinterp.analysis.relevance import relevance
from mechinterp.base.errors import InputError, UnsupportedError
from mechinterp.engines.edge_attribution import edge_gradients
from mechinterp.engines.readout import metric_values
from mechinterp.graphs.graph import build_graph
from mechinterp.models.hook_manager import HookManager, Intervention, load_model
from mechinterp.models.sites import Site
from mechinterp.tasks.metrics import get_metric
from mechinterp.tasks.pairs import Pairs
from tests.support.models_tiny import ALL_FLOAT64, EVERY, SHAPES, as_installed, build, native, pairs, tiny

LOGIT_DIFF = get_metric("logit_diff")
END = Site("resid_final")
GAUSS = "gauss-legendre"


def near(name: str) -> float:
    """Rounding; the shapes with float32 parts inside (norms, cosines) are that much less exact."""
    return 1e-9 if name in ALL_FLOAT64 else 1e-4


def patched_metric(model: HookManager, some: Pairs, edits: list[Intervention]) -> torch.Tensor:
    """The metric of every example of the clean prompts with edits, without any of the code under test."""
    run = model.run(some.clean, some.mask, interventions=edits, record=[END], stop=END)
    return metric_values(model, some, LOGIT_DIFF, run.values[END])


def recorded(model: HookManager, some: Pairs, tokens: torch.Tensor, sites: list[Site]) -> dict[Site, torch.Tensor]:
    return dict(model.run(tokens, some.mask, record=sites, stop=END).values)  # type: ignore[arg-type]


def kinds(model: HookManager) -> list[str]:
    every = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "q", "k", "v", "z", "pattern", "mlp_post")
    return [kind for kind in every if model.has(Site(kind, 0))]


# -- first order -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_the_score_is_the_derivative_of_patching(name: str) -> None:
    """Of moving all units of all layers a little way towards their corrupt values, each by its own share."""
    model, some = tiny(name), pairs(3, 6, padded=True)
    # Central differences: error step^2, and rounding / step, which is large where parts run in float32.
    step, tolerance = (1e-4, 1e-6) if name in ALL_FLOAT64 else (3e-3, 5e-3)
    generator = torch.Generator().manual_seed(0)
    for kind in kinds(model):
        scores = attribution_patching(model, some, kind)
        values = scores.values if scores.values.ndim == 4 else scores.values[:, None]  # [layer, unit, pos, example]
        sites = [Site(kind, layer) for layer in range(model.dims.n_layers)]
        clean, corrupt = (recorded(model, some, tokens, sites) for tokens in (some.clean, some.corrupt))
        shares = torch.rand(values.shape[:2], generator=generator, dtype=torch.float64)

        def moved(
            size: float,
            sites: list[Site] = sites,
            shares: torch.Tensor = shares,
            clean: dict[Site, torch.Tensor] = clean,
            corrupt: dict[Site, torch.Tensor] = corrupt,
            kind: str = kind,
        ) -> list[Intervention]:
            edits: list[Intervention] = []
            for site, share in zip(sites, shares, strict=True):
                difference = (clean[site] - corrupt[site]).nan_to_num()
                axis = {"pattern": 1, "mlp_post": 2}.get(kind, 2 if difference.ndim == 4 else None)
                shape = [-1 if i == axis else 1 for i in range(difference.ndim)]
                by = share if axis is None else share.reshape(shape)
                edits.append(Intervention(site, lambda x, d=difference, by=by: x - (size * by * d).to(x.dtype)))
            return edits

        ends = [patched_metric(model, some, moved(size)) for size in (step, -step)]
        slope = (ends[1] - ends[0]) / (2 * step)
        expected = (values[:, :, 0] * shares[..., None]).sum((0, 1))
        size = 1 + float((values.abs()).sum(1).max())
        torch.testing.assert_close(slope, expected, rtol=0, atol=tolerance * size, msg=f"{name} {kind}")


@pytest.mark.slow
@pytest.mark.parametrize("replacement", ["pair", "mean", "zero"])
def test_where_the_rest_is_linear_the_score_is_exact(replacement: Any) -> None:
    """Behind the last attention layer of a model without norms and MLPs there is only the unembedding."""
    model, some = load_model(native("attention-only", normalization_type=None)), pairs(4, 6, padded=True)
    last = model.dims.n_layers - 1
    for kind in ("z", "v", "attn_out") if replacement == "mean" else ("z", "v", "pattern", "attn_out"):
        where = {"layers": [last], "positions": "each", "replacement": replacement, "reference": pairs(5, 4, seed=3)}
        exact = activation_patching(model, some, kind, **where)
        scores = attribution_patching(model, some, kind, batch_size=3, **where)
        assert exact.axes == scores.axes
        torch.testing.assert_close(scores.values, exact.values, rtol=0, atol=1e-10, equal_nan=True)


@pytest.mark.parametrize("name", EVERY)
def test_a_node_is_the_sum_of_its_edges(name: str) -> None:
    """To first order. Under a post-norm a head's edges hold its share of the norm, so there the layer's sum agrees."""
    model, some = tiny(name), pairs(4, 6, padded=True)
    graph = build_graph(model)
    edges = edge_gradients(model, graph, some, LOGIT_DIFF).sum(0)
    nodes = node_attribution(model, some)
    assert nodes.labels["node"] == graph.writers
    got = nodes.values[:, 0].sum(-1)
    if name == "gemma2":
        heads = [graph.head_writers(layer) for layer in range(model.dims.n_layers)]
        layers = attribution_patching(model, some, "attn_out").values[:, 0].sum(-1)
        torch.testing.assert_close(
            layers, torch.stack([edges[at].sum() for at in heads]), rtol=near(name), atol=near(name)
        )
        rest = [i for i, node in enumerate(graph.writers) if not node.startswith("a")]
        got, edges = got[rest], edges[rest]
    torch.testing.assert_close(got, edges, rtol=near(name), atol=near(name))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("method", ["atp", "relp", "eap-ig-inputs"])
def test_heads_add_up_to_their_layer(name: str, method: str) -> None:
    model, some = tiny(name), pairs(3, 6)
    raw = "attn_raw" if name == "gemma2" else "attn_out"
    heads = attribution_patching(model, some, "z", method=method, positions="each")
    layer = attribution_patching(model, some, raw, method=method, positions="each")
    torch.testing.assert_close(heads.values.sum(1), layer.values, rtol=near(name), atol=near(name))


@pytest.mark.slow
def test_denoising_is_noising_with_the_prompts_swapped() -> None:
    model, some = tiny("gpt2"), pairs(4, 6)
    swapped = Pairs(clean=some.corrupt, corrupt=some.clean, right=some.right, wrong=some.wrong)
    for method in ("atp", "atp-qk-fix", "eap-ig-inputs", "eap-ig-activations", "relp"):
        for kind in ("v", "q") if method != "relp" else ("v",):
            forth = attribution_patching(model, some, kind, method=method, direction="denoise")
            torch.testing.assert_close(forth.values, -attribution_patching(model, swapped, kind, method=method).values)


@pytest.mark.slow
def test_replacing_by_zero_is_activation_times_gradient() -> None:
    model, some = tiny("llama"), pairs(3, 6, padded=True)
    for method, rules in (("atp", "gradient"), ("relp", "relp")):
        for kind in ("z", "mlp_out", "mlp_post", "v"):
            scores = attribution_patching(model, some, kind, method=method, replacement="zero", positions="each")
            torch.testing.assert_close(
                scores.values, relevance(model, some, kind, rules=rules).scores.values, equal_nan=True
            )


# -- integrated gradients ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_a_layer_integrated_at_its_activations_sums_to_its_exact_effect(name: str) -> None:
    """Completeness: all units of one site, replaced together at all positions."""
    # Small weights, so that few steps integrate well; the rest is what 24 points leave (Gemma-2 has the most norms).
    model, some = build(name, scale=0.1), pairs(2, 5, padded=True)
    for kind in ("k", "z") if name in SHAPES else ("resid_pre", "z"):
        exact = activation_patching(model, some, [f"{kind}.1"]).values[0, 0]
        scores = attribution_patching(
            model, some, kind, method="eap-ig-activations", steps=24, quadrature=GAUSS, layers=[1]
        ).values
        total = scores[0, 0] if scores.ndim == 3 else scores.sum(1)[0, 0]
        torch.testing.assert_close(total, exact, rtol=0, atol=1e-3 * float(exact.abs().max()), msg=f"{name} {kind}")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "neox", "gemma2"])
def test_integration_over_the_inputs_is_complete_at_the_input(name: str) -> None:
    model, some = build(name, scale=0.1), pairs(2, 5, padded=True)
    ends = [patched_metric(model, some, [])]
    corrupt = recorded(model, some, some.corrupt, [Site("resid_pre", 0)])[Site("resid_pre", 0)]
    ends.append(patched_metric(model, some, [Intervention(Site("resid_pre", 0), corrupt)]))
    effect, errors = ends[0] - ends[1], dict[str, float]()
    for quadrature, steps in ((GAUSS, 32), ("midpoint", 4), ("midpoint", 16)):
        nodes = node_attribution(model, some, method="eap-ig-inputs", steps=steps, quadrature=quadrature)
        errors[f"{quadrature} {steps}"] = float((nodes.at(node="input").values[0] - effect).abs().max())
    size = float(effect.abs().max())
    assert errors[f"{GAUSS} 32"] < 2e-3 * size
    assert errors["midpoint 16"] < errors["midpoint 4"] / 4 + 1e-4 * size  # a sixteenth in the limit


def test_one_step_on_the_right_is_plain_attribution() -> None:
    model, some = tiny("gpt2"), pairs(3, 6)
    plain = node_attribution(model, some)
    for method in ("eap-ig-inputs", "eap-ig-activations"):
        one = node_attribution(model, some, method=method, steps=1, quadrature="right")
        torch.testing.assert_close(one.values, plain.values)


# -- AtP* --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_behind_the_softmax_all_is_linear_so_the_fix_is_exact() -> None:
    """Last layer, no norms, no MLPs: only the softmax stands between a query or key and the logits."""
    model, some = load_model(native("attention-only", normalization_type=None, scale=0.6)), pairs(4, 6, padded=True)
    last = model.dims.n_layers - 1
    for kind in ("q", "k"):
        for positions in (None, "each", [1, (0, 2)]):
            exact = activation_patching(model, some, kind, layers=[last], positions=positions)
            fixed = attribution_patching(model, some, kind, method="atp-qk-fix", layers=[last], positions=positions)
            torch.testing.assert_close(fixed.values, exact.values, rtol=0, atol=1e-10, equal_nan=True)
            plain = attribution_patching(model, some, kind, layers=[last], positions=positions)
            assert float((plain.values - exact.values).nan_to_num().abs().max()) > 0.01


@pytest.mark.parametrize("name", EVERY)
def test_the_fix_takes_the_pattern_of_a_run_with_one_query_or_key_replaced(name: str) -> None:
    """A patched run of its own for one head and position, on every shape."""
    model, some = tiny(name), pairs(2, 6)
    layer, unit, pos = 1, 1, 3
    pattern = Site("pattern", layer)
    clean = recorded(model, some, some.clean, [pattern])[pattern]
    gradient = model.run(
        some.clean,
        some.mask,
        grads=[pattern],
        loss=lambda resid: metric_values(model, some, LOGIT_DIFF, resid),
        stop=END,
    ).grads[pattern]
    for kind in ("q", "k"):
        site = Site(kind, layer)
        corrupt = recorded(model, some, some.corrupt, [site])[site]

        def one(value: torch.Tensor, corrupt: torch.Tensor = corrupt) -> torch.Tensor:
            new = value.clone()
            new[:, pos, unit] = corrupt[:, pos, unit]
            return new

        run = model.run(some.clean, some.mask, interventions=[Intervention(site, one)], record=[pattern], stop=END)
        expected = ((clean - run.values[pattern]) * gradient).sum((1, 2, 3))
        scores = attribution_patching(model, some, kind, method="atp-qk-fix", positions=[pos])
        got = scores.at(layer=layer, pos=pos).values[unit]
        torch.testing.assert_close(got, expected, rtol=near(name), atol=near(name))


@pytest.mark.parametrize("name", EVERY)
def test_dropped_gradients_are_those_of_a_model_with_detached_layers(name: str) -> None:
    """GradDrop against forwards in which what a layer adds is a constant; mean over the layers but the own."""
    model, some = tiny(name), pairs(3, 6, padded=True)
    n_layers = model.dims.n_layers
    sites = [Site("z", layer) for layer in range(n_layers)]
    clean, corrupt = (recorded(model, some, tokens, sites) for tokens in (some.clean, some.corrupt))
    total = torch.zeros(n_layers, model.dims.n_heads, len(some), dtype=torch.float64)
    for dropped in range(n_layers):
        out = ("attn_out", "mlp_out") if model.dims.has_mlp else ("attn_out",)
        edits = [Intervention(Site(kind, dropped), lambda value: value.detach() + 0 * value) for kind in out]
        run = model.run(
            some.clean,
            some.mask,
            interventions=edits,
            grads=sites,
            loss=lambda resid: metric_values(model, some, LOGIT_DIFF, resid),
            stop=END,
        )
        for layer, site in enumerate(sites):
            if layer != dropped:  # 0 there
                product = ((clean[site] - corrupt[site]) * run.grads[site]).sum(-1)
                total[layer] += (product * some.mask[..., None]).sum(1).T.abs()
    scores = attribution_patching(model, some, "z", method="atp-star")
    torch.testing.assert_close(
        scores.values[:, :, 0].double(), total / (n_layers - 1), rtol=near(name), atol=near(name)
    )
    assert bool((attribution_patching(model, some, "q", method="atp-star").values >= 0).all())


def test_the_fix_changes_queries_and_keys_only() -> None:
    model, some = tiny("qwen2"), pairs(3, 6)
    for kind in ("z", "v", "mlp_out", "pattern"):
        plain, fixed = (attribution_patching(model, some, kind, method=m) for m in ("atp", "atp-qk-fix"))
        torch.testing.assert_close(fixed.values, plain.values)


# -- positions, batches, padding, errors -------------------------------------------------------------------------


# Every method on two shapes, every shape with two methods or more.
@pytest.mark.parametrize(
    ("name", "method"), [(SHAPES[(i + step) % len(SHAPES)], m) for i, m in enumerate(METHODS) for step in (0, 2)]
)
def test_batches_and_padding_change_nothing(name: str, method: str) -> None:
    model, some = tiny(name), pairs(3, 5, padded=True)
    whole = node_attribution(model, some, method=method, positions="each", steps=2)
    single = node_attribution(model, some, method=method, positions="each", steps=2, batch_size=1)
    torch.testing.assert_close(whole.values, single.values, rtol=1e-5, atol=10 * near(name), equal_nan=True)
    row, length = 1, int(some.lengths[1])
    assert some.right is not None and some.wrong is not None
    tables = {"clean": some.clean[:, :length], "corrupt": some.corrupt[:, :length]}
    tables |= {"right": some.right, "wrong": some.wrong}
    alone = Pairs(**{key: table[[row, row]] for key, table in tables.items()})
    short = node_attribution(model, alone, method=method, positions="each", steps=2)
    torch.testing.assert_close(whole.values[:, :length, row], short.values[:, :, 0], rtol=1e-5, atol=10 * near(name))
    assert bool(whole.values[:, length:, row].isnan().all())
    if method not in ("atp-qk-fix", "atp-star"):
        return
    kind = "k"  # which go another way in these
    whole = attribution_patching(model, some, kind, method=method, positions=[1, -1], steps=2)
    single = attribution_patching(model, some, kind, method=method, positions=[1, -1], steps=2, batch_size=2)
    torch.testing.assert_close(whole.values, single.values, rtol=1e-5, atol=10 * near(name))


@pytest.mark.parametrize("kind", ["z", "pattern", "mlp_post", "resid_mid"])
def test_positions_add_up(kind: str) -> None:
    model, some = tiny("gpt2"), pairs(3, 6, padded=True)
    each = attribution_patching(model, some, kind, positions="each").values.nansum(-2)
    torch.testing.assert_close(each, attribution_patching(model, some, kind).values[..., 0, :])


def test_the_sign_turns_where_lower_is_better() -> None:
    model, some = tiny("gpt2"), pairs(3, 6)
    method = "eap-ig-activations"
    scores = attribution_patching(model, some, "resid_pre", method=method, metric="kl_to_clean", steps=12)
    exact = activation_patching(model, some, "resid_pre", metric="kl_to_clean")
    torch.testing.assert_close(scores.values, exact.values, rtol=0.05, atol=0.01)
    assert float(exact.values.min()) > 0.01  # patching makes the KL grow, so every node helps


def test_cost_is_counted() -> None:
    model, some = tiny("gpt2"), pairs(4, 6)
    assert node_attribution(model, some, batch_size=3).cost == {"forwards": 2.0, "backwards": 1.0}
    assert attribution_patching(model, some, "k", method="atp-star", positions="each").cost["forwards"] == 1 + 3 + 6


def test_a_pattern_has_no_mean() -> None:
    with pytest.raises(UnsupportedError, match="no mean over positions"):
        attribution_patching(tiny("gpt2"), pairs(4, 6), "pattern", replacement="mean")


def test_bad_requests_get_one_clear_error() -> None:
    model, some = tiny("gpt2"), pairs(3, 6)
    for match, arguments in (
        ("Unknown attribution method 'apt'", {"method": "apt"}),
        ("Unknown direction", {"direction": "both"}),
        ("Unknown replacement", {"replacement": "mean-ish"}),
        ("Unknown metric", {"metric": "logits"}),
        ("has no gradient", {"metric": "accuracy"}),
        ("The gradient of kl_to_clean at the clean run is 0", {"metric": "kl_to_clean"}),
        ("`steps` must be a whole number from 1", {"steps": 0}),
        ("Unknown quadrature", {"quadrature": "simpson"}),
        ("outside the prompt", {"positions": [9]}),
        ("`layers` must be distinct", {"layers": [7]}),
        ("batch_size must be", {"batch_size": -1}),
    ):
        with pytest.raises(InputError, match=match):
            as_installed(attribution_patching)(model, some, "z", **arguments)
    with pytest.raises(InputError, match="Unknown site of a layer"):
        attribution_patching(model, some, "zed")
    with pytest.raises(UnsupportedError, match="no site 'mlp_up"):
        attribution_patching(model, some, "mlp_up")
    with pytest.raises(UnsupportedError, match="hold attention patterns constant, so 'q'"):
        attribution_patching(model, some, "q", method="relp")
    with pytest.raises(InputError, match="the vocabulary has"):
        attribution_patching(model, Pairs(clean=[[70, 2]] * 2, corrupt=[[1, 2]] * 2, right=[3] * 2, wrong=[4] * 2))
    with pytest.raises(UnsupportedError, match="this model has one"):
        attribution_patching(build("gpt2", n_layer=1), some, method="atp-star")
