"""Observables: the readings of all paths add up on a model without norms; what an MLP reads is its derivative."""

from __future__ import annotations

from itertools import combinations, product
from typing import Any

import pytest
import torch

import mechinterp as mi
from mechinterp.analysis.weights import writing
from mechinterp.base.errors import InputError
from tests.support.models_tiny import native, pairs, tiny, tokens

WEIGHTS = {3: 1.0, 7: -2.0}


@pytest.fixture(scope="module")
def plain() -> mi.HookManager:
    """Attention only, no norm, no biases: linear once the patterns are given."""
    bridge = native("plain", attn_only=True, normalization_type=None)
    with torch.no_grad():
        for name, parameter in bridge.named_parameters():
            if "bias" in name or ".b_" in name:
                parameter.zero_()
    return mi.load_model(bridge)


def test_the_readings_of_all_paths_add_up_to_the_observable(plain: mi.HookManager) -> None:
    """Every path of heads, each with its attention: sum over sources of A ... A (x . y), exactly n . logits."""
    ids, dims = tokens(3, 6), plain.dims
    run = plain.run(ids, record=["resid_pre.0", *(f"pattern.{layer}" for layer in range(dims.n_layers))])
    x, total, seen = run.values["resid_pre.0"], 0.0, 0
    for length in range(dims.n_layers + 1):
        for layers in combinations(range(dims.n_layers), length):
            for heads in product(range(dims.n_heads), repeat=length):
                path = [f"a{layer}.h{head}" for layer, head in zip(layers, heads, strict=True)]
                reading = x @ mi.observable(plain, WEIGHTS, path).read
                for layer, head in zip(layers, heads, strict=True):
                    reading = torch.einsum("bqk,bk->bq", run.values[f"pattern.{layer}"][:, head], reading)
                total, seen = total + reading, seen + 1
    assert seen == (1 + dims.n_heads) ** dims.n_layers and run.logits is not None
    expected = run.logits[..., 3] - 2 * run.logits[..., 7]
    torch.testing.assert_close(total, expected, rtol=1e-9, atol=1e-9)


def test_what_an_mlp_reads_is_the_derivative_at_its_mean_input() -> None:
    model, p = tiny("no-norm"), pairs(4, 6, padded=True)
    found = mi.observable(model, WEIGHTS, ["m1"], pairs=p)
    assert str(found.site) == "resid_mid.1"
    inputs = [model.run(ids, p.mask, record=["mlp_in.1"]).values["mlp_in.1"][p.mask] for ids in (p.clean, p.corrupt)]
    mean, maps = torch.cat(inputs).mean(0), model.layout.mlp_maps[1]
    assert maps is not None
    step = 1e-5 * torch.randn(16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    change = maps(mean + step) - maps(mean - step)
    own = mi.observable(model, WEIGHTS).read
    assert float(change @ own) == pytest.approx(2 * float(step @ found.read), rel=1e-6)


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "llama", "neox"])
def test_a_head_s_observable_is_its_attribution_at_the_run_s_scales(name: str) -> None:
    """Of one token the head adds (reading / scale of its norm + its biases) / scales of the norms after it."""
    model, ids = tiny(name), tokens(1, 1)
    layout, read = model.layout, mi.observable(model, WEIGHTS, ["a1.h3"]).read.double()
    post = layout.attention[1].post
    raw = ["attn_raw.1"] if post.kind != "none" else []
    run = model.run(ids, record=["resid_pre.1", "resid_final", *raw])
    resid, final = (run.values[site][0, 0].double() for site in ("resid_pre.1", "resid_final"))
    after = layout.final_norm.scale(final)
    if raw:
        after = after * post.scale(run.values["attn_raw.1"][0, 0].double())
    _, constant = layout.folded(1, "v", torch.float64)
    kv = 3 // (model.dims.n_heads // model.dims.n_kv_heads)
    biases = constant[kv] @ writing(model, 1)[3].double() @ mi.observable(model, WEIGHTS).read.double()
    weights = torch.zeros(layout.W_U.shape[1], dtype=torch.float64)
    weights[3], weights[7] = 1.0, -2.0
    part = mi.direct_logit_attribution(model, ids, weights).at(node="a1.h3").values[0]
    expected = (resid @ read / layout.attention[1].norm.scale(resid) + biases) / after
    assert float(part) == pytest.approx(float(expected), rel=1e-4, abs=1e-6)


def test_coupling_is_the_slope_of_a_regression() -> None:
    """Over inputs alike in all directions; exactly so for inputs whose covariance is the identity."""
    model = tiny("gpt2")
    a, b = (mi.observable(model, WEIGHTS, [path]) for path in ("a2.h0", "a2.h1"))
    x = torch.linalg.qr(torch.randn(40, 16, dtype=torch.float64)).Q
    first, second = a.reading(x), b.reading(x)
    assert mi.coupling(a, b) == pytest.approx(float(first @ second / (first @ first)), rel=1e-9)
    assert mi.coupling(a, a) == pytest.approx(1) and mi.coupling(a, b) != pytest.approx(mi.coupling(b, a))
    with pytest.raises(InputError, match="at one site"):
        mi.coupling(a, mi.observable(model, WEIGHTS))


def test_a_typed_observable_of_the_bundled_model_is_a_metric() -> None:
    model = mi.load_model("bundled")
    direction = mi.observable(model, {" he": 1.0, " she": -1.0}, ["a2.h1"])
    assert str(direction.site) == "resid_pre.2" and direction.about["path"] == ["a2.h1"]
    own = direction.pairs(mi.load_task("gendered_pronoun").pairs(model, n=4))
    parts = mi.direct_logit_attribution(mi.read_direction(model, direction), own, 0)
    assert parts.values.abs().sum() > 0


def test_what_is_refused() -> None:
    model, p = tiny("gpt2"), pairs(3, 5)
    cases: list[tuple[Any, str]] = [
        (lambda: mi.observable(model, WEIGHTS, ["a1.h0", "a0.h0"]), "does not read what 'a1.h0' writes"),
        (lambda: mi.observable(model, WEIGHTS, ["m1", "a1.h0"], pairs=p), "does not read what 'm1' writes"),
        (lambda: mi.observable(model, WEIGHTS, ["m1"]), "give `pairs`"),
        (lambda: mi.observable(model, WEIGHTS, ["a1.h0"], pairs=p), "leave them out"),
        (lambda: mi.observable(model, WEIGHTS, ["logits"]), "heads .* and MLPs"),
        (lambda: mi.observable(model, WEIGHTS, ["a9.h0"]), "not a head of the model"),
        (lambda: mi.observable(model, {}), "weights of tokens"),
        (lambda: mi.observable(model, {999: 1.0}), "tokens 0 to 49"),
        (lambda: mi.observable(model, {3: 0.0}), "the weights cancel"),
        (lambda: mi.observable(mi.load_model("bundled"), {" he she": 1.0}), "2 tokens"),
    ]
    for call, message in cases:
        with pytest.raises(InputError, match=message):
            call()
    assert str(mi.observable(tiny("neox"), WEIGHTS, ["m1"], pairs=p).site) == "resid_pre.1"
