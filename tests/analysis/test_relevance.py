"""Relevance conserves the output; integrated gradients are complete."""

from __future__ import annotations

import pytest
import torch

from mechinterp.analysis.integrated_gradients import QUADRATURES, integrated_gradients, integration_points
from mechinterp.analysis.relevance import relevance
from mechinterp.base.errors import InputError, UnsupportedError
from mechinterp.engines.lrp import RULES, Rules, lrp_loss, rule_edits
from mechinterp.engines.readout import answer_logits, metric_readout, metric_values
from mechinterp.engines.site_gradients import site_gradients
from mechinterp.models.hook_manager import HookManager, Intervention, load_model
from mechinterp.models.norm import Norm
from mechinterp.models.sites import Site
from mechinterp.tasks.metrics import get_metric
from mechinterp.tasks.pairs import Pairs
from tests.support.models_tiny import ALL_FLOAT64, EVERY, as_installed, build, huggingface, pairs, tiny

LOGIT_DIFF = get_metric("logit_diff")
END, START = Site("resid_final"), Site("resid_pre", 0)


def near(name: str) -> float:
    """Rounding; the shapes with float32 parts inside (norms, cosines) are that much less exact."""
    return 1e-10 if name in ALL_FLOAT64 else 1e-5


# -- conservation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rules", ["relp", "attnlrp"])
@pytest.mark.parametrize("name", EVERY)
def test_relevance_is_conserved(name: str, rules: str) -> None:
    """Input and biases sum to the logit difference; so does every later residual stream with the biases behind it."""
    model, some = tiny(name), pairs(4, 6, padded=True)
    found = relevance(model, some, rules=rules)
    value = LOGIT_DIFF(answer_logits(model, some.clean, some), some)
    torch.testing.assert_close(found.output, value, rtol=near(name), atol=near(name))
    total = found.scores.values.nansum(0) + found.biases.values.sum(0)
    torch.testing.assert_close(total, value, rtol=near(name), atol=near(name))
    assert found.violation < near(name)
    assert found.scores.about["violation"] == found.violation
    streams = relevance(model, some, "resid_pre", rules=rules)
    parts = streams.biases
    for layer in range(model.dims.n_layers):
        behind = [p for p in parts.labels["part"] if p == "logits" or int(p.split()[0][1:]) >= layer]
        total = streams.scores.values[layer].nansum(0) + parts.at(part=behind).values.sum(0)
        torch.testing.assert_close(total, value, rtol=near(name), atol=near(name))


def test_a_smaller_last_batch_changes_nothing() -> None:
    model, some = tiny("gpt2"), pairs(5, 6, padded=True)
    whole, parts = relevance(model, some, "mlp_out"), relevance(model, some, "mlp_out", batch_size=2)
    torch.testing.assert_close(parts.scores.values, whole.scores.values, equal_nan=True)
    torch.testing.assert_close(parts.biases.values, whole.biases.values)
    assert parts.violation == pytest.approx(whole.violation, abs=1e-12)


@pytest.mark.parametrize("name", EVERY)
def test_plain_gradients_conserve_nothing_and_it_is_said(name: str) -> None:
    assert relevance(tiny(name), pairs(4, 6), rules="gradient").violation > 0.1


@pytest.mark.parametrize("name", ["gpt2", "neox", "qwen2"])
def test_without_biases_all_relevance_is_at_the_input(name: str) -> None:
    module = huggingface(name)
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            if key.endswith("bias"):
                parameter.zero_()
    found = relevance(load_model(module), pairs(3, 6))
    assert float(found.biases.values.abs().max()) == 0
    torch.testing.assert_close(found.scores.values.sum(0), found.output, rtol=near(name), atol=near(name))


@pytest.mark.parametrize("metric", ["prob_diff", "log_prob"])
@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_other_metrics_share_out_logits_times_gradient(name: str, metric: str) -> None:
    model, some = tiny(name), pairs(3, 7, answer_pos=[[3, 6], [2, -1], [1, 6]])
    found = relevance(model, some, metric=metric)
    logits = answer_logits(model, some.clean, some).requires_grad_()
    (gradient,) = torch.autograd.grad(get_metric(metric)(logits, some).sum(), logits)
    torch.testing.assert_close(found.output, (logits * gradient).sum((1, 2)).detach(), rtol=near(name), atol=near(name))
    assert found.violation < near(name)


# -- the rules ---------------------------------------------------------------------------------------------------


def frozen_metric(model: HookManager, some: Pairs, entering: torch.Tensor) -> torch.Tensor:
    """The metric of the model with its patterns, norm scales and activation coefficients held at the clean run's.

    An affine map of what enters, made of forward edits alone.
    """
    dims, layout = model.dims, model.layout
    kinds = ["resid_pre", "pattern", *(["mlp_pre", "mlp_post"] if dims.has_mlp else [])]
    kinds += ["resid_mid"] * (dims.has_mlp and not dims.parallel)
    sites = [Site(kind, layer) for kind in kinds for layer in range(dims.n_layers)] + [END]
    clean = model.run(some.clean, some.mask, record=sites, stop=END).values
    live: dict[Site, torch.Tensor] = {}

    def keep(site: Site) -> Intervention:
        def edit(value: torch.Tensor) -> torch.Tensor:
            live[site] = entering if site == START else value
            return live[site]

        return Intervention(site, edit)

    def normed(norm: Norm, entry: Site) -> torch.Tensor:
        out = norm.project(live[entry]) / norm.scale(clean[entry])
        return out if norm.bias is None else out + norm.bias

    edits: list[Intervention] = []
    for layer in range(dims.n_layers):
        pre = Site("resid_pre", layer)
        mid = pre if dims.parallel else Site("resid_mid", layer)
        edits += [keep(pre), Intervention(Site("pattern", layer), clean[Site("pattern", layer)])]
        norm = layout.attention[layer].norm
        edits.append(Intervention(Site("attn_in", layer), lambda _, n=norm, s=pre: normed(n, s)))
        if dims.has_mlp:
            edits += [] if dims.parallel else [keep(mid)]
            mlp_norm, hidden = layout.mlp_norm[layer], Site("mlp_pre", layer)
            assert mlp_norm is not None
            edits.append(Intervention(Site("mlp_in", layer), lambda _, n=mlp_norm, s=mid: normed(n, s)))
            edits.append(keep(hidden))
            ratio = clean[Site("mlp_post", layer)] / clean[hidden]
            edits.append(Intervention(Site("mlp_post", layer), lambda _, r=ratio, s=hidden: live[s] * r))
    last = model.run(some.clean, some.mask, interventions=edits, record=[END], stop=END).values[END]
    norm = layout.final_norm
    final = norm.project(last) / norm.scale(clean[END])
    logits = (final if norm.bias is None else final + norm.bias) @ layout.W_U
    logits = logits if layout.b_U is None else logits + layout.b_U
    at = torch.arange(len(some))[:, None], some.answer_pos
    return LOGIT_DIFF(logits[at], some)


@pytest.mark.parametrize("name", ["gpt2", "neox", "attention-only", "no-norm"])
def test_relp_is_exact_in_the_frozen_model(name: str) -> None:
    """Where nothing is gated, its rules make the model affine: a token's relevance is what it adds there."""
    model, some = tiny(name), pairs(3, 5, padded=True)
    scores = relevance(model, some).scores.values
    clean = model.run(some.clean, some.mask, record=[START], stop=START).values[START]
    whole = frozen_metric(model, some, clean)
    torch.testing.assert_close(whole, LOGIT_DIFF(answer_logits(model, some.clean, some), some))
    for pos in range(clean.shape[1]):
        without = clean.clone()
        without[:, pos] = 0
        added = whole - frozen_metric(model, some, without)
        torch.testing.assert_close(scores[pos].nan_to_num(), added * some.mask[:, pos], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen2"])
@pytest.mark.parametrize("rules", ["relp", "attnlrp"])
def test_a_gate_gets_half_and_what_it_gates_the_other(name: str, rules: str) -> None:
    model, some = tiny(name), pairs(3, 6)
    gate, up, both = (relevance(model, some, k, rules=rules).scores.values for k in ("mlp_pre", "mlp_up", "mlp_post"))
    torch.testing.assert_close(gate, both / 2)
    torch.testing.assert_close(up, both / 2)


@pytest.mark.parametrize("name", ["gpt2", "neox", "attention-only"])
def test_in_attention_products_are_halved_or_go_to_the_values(name: str) -> None:
    model, some = tiny(name), pairs(3, 6)

    def total(kind: str, rules: str) -> torch.Tensor:
        return relevance(model, some, kind, rules=rules).scores.values.sum(-2)

    torch.testing.assert_close(total("v", "relp"), total("z", "relp"))
    for kind in ("v", "pattern"):
        torch.testing.assert_close(total(kind, "attnlrp"), total("z", "attnlrp") / 2)
    # Rotations keep the product of a query and a key, which each of them holds a half of.
    torch.testing.assert_close(total("q", "attnlrp"), total("k", "attnlrp"))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_an_activation_at_zero_takes_the_derivative(name: str) -> None:
    """f(x) / x tends to f'(x): a half for GELU and SiLU; and nothing is NaN."""
    model, some = tiny(name), pairs(3, 5)
    sites = [Site("mlp_pre", 1), Site("mlp_post", 1)]
    edits = [Intervention(sites[0], torch.zeros_like), *rule_edits(model, RULES["relp"])]
    loss = lrp_loss(model, metric_readout(model, some, LOGIT_DIFF), RULES["relp"])
    found = site_gradients(model, some, some.clean, sites, loss, edits=edits)
    up = model.run(some.clean, record=["mlp_up.1"]).values["mlp_up.1"] / 2 if name == "llama" else 1.0
    torch.testing.assert_close(found.gradients[sites[0]], found.gradients[sites[1]] * 0.5 * up)


def test_rules_of_ones_own() -> None:
    model, some = tiny("gpt2"), pairs(3, 5)
    assert RULES["relp"] == Rules()
    same = relevance(model, some, rules=Rules()).scores
    torch.testing.assert_close(same.values, relevance(model, some).scores.values)
    assert relevance(model, some, rules=Rules(activation=False)).violation > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_batches_and_padding_change_nothing(name: str) -> None:
    model, some = tiny(name), pairs(4, 6, padded=True)
    row, length = 2, int(some.lengths[2])
    assert some.right is not None and some.wrong is not None
    tables = {"clean": some.clean[:, :length], "corrupt": some.corrupt[:, :length]}
    tables |= {"right": some.right, "wrong": some.wrong}
    alone = Pairs(**{key: table[[row, row]] for key, table in tables.items()})
    close = {"rtol": near(name), "atol": near(name)}
    for rules in ("relp", "attnlrp"):
        whole = relevance(model, some, "v", rules=rules)
        single = relevance(model, some, "v", rules=rules, batch_size=1)
        torch.testing.assert_close(whole.scores.values, single.scores.values, equal_nan=True, **close)
        torch.testing.assert_close(whole.biases.values, single.biases.values, **close)
        short = relevance(model, alone, "v", rules=rules).scores.values
        torch.testing.assert_close(whole.scores.values[:, :, :length, row], short[..., 0], **close)
        assert bool(whole.scores.values[:, :, length:, row].isnan().all())
    whole = integrated_gradients(model, some, steps=3).values
    torch.testing.assert_close(
        whole, integrated_gradients(model, some, steps=3, batch_size=1).values, equal_nan=True, **close
    )
    short = integrated_gradients(model, alone, steps=3).values
    torch.testing.assert_close(whole[:length, row], short[:, 0], **close)


def test_bad_requests_get_one_clear_error() -> None:
    model, some = tiny("gpt2"), pairs(3, 6)
    for match, arguments in (
        ("Unknown set of rules 'lrp'", {"rules": "lrp"}),
        ("has no gradient; use", {"metric": "accuracy"}),
        ("has no gradient at the clean run itself", {"metric": "kl_to_clean"}),
        ("Unknown site of a layer 'zed'", {"what": "zed"}),
    ):
        with pytest.raises(InputError, match=match):
            as_installed(relevance)(model, some, **arguments)
    with pytest.raises(UnsupportedError, match="hold attention patterns constant, so 'pattern'"):
        relevance(model, some, "pattern")
    with pytest.raises(UnsupportedError, match="no site 'mlp_up"):
        relevance(model, some, "mlp_up")


# -- integrated gradients ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("name", "site"), [(name, ("embed", "resid_pre")[i % 2]) for i, name in enumerate(EVERY)])
def test_integrated_gradients_are_complete(name: str, site: str) -> None:
    """They sum to the metric of the clean less that of the baseline's embeddings, as `about` says."""
    model, some = build(name, scale=0.1), pairs(2, 5, padded=True)
    found = integrated_gradients(model, some, site=site, steps=32)
    where = Site("embed") if site == "embed" else START
    ends: list[torch.Tensor] = []
    for tokens in (some.clean, some.corrupt):
        value = model.run(tokens, some.mask, record=[where], stop=where).values[where]
        run = model.run(some.clean, some.mask, interventions=[Intervention(where, value)], record=[END], stop=END)
        ends.append(metric_values(model, some, LOGIT_DIFF, run.values[END]))
    effect = ends[0] - ends[1]
    error = (found.values.nansum(0) - effect).abs().max()
    # What 32 midpoints leave.
    assert float(error) < 5e-3 * float(effect.abs().max())
    assert found.about["completeness_error"] == pytest.approx(float(error), rel=1e-3, abs=near(name))


@pytest.mark.slow
def test_baselines() -> None:
    model, some = build("no-norm", scale=0.1), pairs(2, 5, padded=True)
    zero = integrated_gradients(model, some, baseline="zero", steps=8)
    given = integrated_gradients(model, some, baseline=torch.zeros(model.dims.d_model), steps=8)
    torch.testing.assert_close(zero.values, given.values, equal_nan=True)
    token = integrated_gradients(model, some, baseline=7, steps=8)
    value = model.run(torch.full_like(some.clean, 7), record=["embed"]).values["embed"]
    given = integrated_gradients(model, some, baseline=value, steps=8, batch_size=1)
    torch.testing.assert_close(token.values, given.values, equal_nan=True)
    for found in (zero, token):
        assert found.about["completeness_error_share"] < 1e-3
    same = Pairs(clean=some.clean, corrupt=some.clean, mask=some.mask, right=some.right, wrong=some.wrong)
    assert float(integrated_gradients(model, same, steps=2).values.nansum()) == 0


@pytest.mark.parametrize("quadrature", QUADRATURES)
def test_weights_sum_to_one_and_integrate(quadrature: str) -> None:
    points = integration_points(50, quadrature)
    assert sum(weight for _, weight in points) == pytest.approx(1)
    error = abs(sum(weight * point**3 for point, weight in points) - 0.25)
    assert error < {"gauss-legendre": 1e-12, "midpoint": 1e-4, "right": 1.1e-2}[quadrature]


def test_bad_baselines_get_one_clear_error() -> None:
    model, some = tiny("gpt2"), pairs(3, 6)
    for match, arguments in (
        ("Unknown baseline 'blank'", {"baseline": "blank"}),
        ("Unknown input site", {"site": "pos"}),
        ("baseline token 99 is not in the vocabulary", {"baseline": 99}),
        ("A baseline tensor is", {"baseline": torch.zeros(3)}),
        ("Unknown quadrature", {"quadrature": "simpson"}),
        ("`steps` must be a whole number", {"steps": 0}),
        ("has no gradient", {"metric": "accuracy"}),
    ):
        with pytest.raises(InputError, match=match):
            as_installed(integrated_gradients)(model, some, **arguments)
    with pytest.raises(UnsupportedError, match="no tokenizer with a padding or end token"):
        integrated_gradients(model, some, baseline="pad")
