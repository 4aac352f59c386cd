"""The information bottleneck: its KL in closed form, no noise is the clean run, and bits only where they matter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributions import Normal, kl_divergence

import mechinterp as mi
from mechinterp.analysis.information_bottleneck import information, mix
from mechinterp.base.errors import InputError
from tests.support.models_tiny import pairs, tiny


def test_the_information_is_the_divergence_of_two_normals() -> None:
    generator = torch.Generator().manual_seed(0)
    x, mean = (torch.randn(4, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    spread, kept = (torch.rand(4, 6, generator=generator, dtype=torch.float64) + 0.01 for _ in range(2))
    kept = kept / 1.02
    expected = kl_divergence(Normal(kept * x + (1 - kept) * mean, (1 - kept) * spread), Normal(mean, spread))
    torch.testing.assert_close(information(x, mean[0] * 0 + mean[0], spread[0], kept)[0], expected[0])
    torch.testing.assert_close(information(x[1], mean[1], spread[1], kept[1]), expected[1])
    assert float(information(x[0], mean[0], spread[0], torch.zeros(6).double()).abs().max()) == 0
    real = torch.ones(4, 1, dtype=torch.bool)
    assert torch.equal(mix(x, mean, torch.ones_like(x), real), x)
    assert torch.equal(mix(x, mean, torch.zeros_like(x), real), mean)


def test_without_a_price_the_clean_metric_is_kept_and_padding_has_no_bits() -> None:
    model, p = tiny("gpt2"), pairs(3, 6, padded=True)
    free = mi.information_bottleneck(model, p, "resid_pre.1", beta=0.0, steps=3, samples=2)
    priced = mi.information_bottleneck(model, p, "resid_pre.1", beta=100.0, steps=10, samples=2)
    logits = model.run(p.clean, p.mask).logits
    assert logits is not None
    last = logits[torch.arange(3), p.lengths - 1].log_softmax(-1)
    assert free.about["clean"] == pytest.approx(float(last.gather(1, p.right).mean()), rel=1e-6)  # type: ignore[arg-type]
    assert abs(free.about["kept"] - free.about["clean"]) < abs(free.about["noise"] - free.about["clean"])
    bits = [grid.at(measure="bits").values for grid in (free, priced)]
    assert bool((bits[0][p.mask.T] > bits[1][p.mask.T]).all()) and bool((bits[1][p.mask.T] >= 0).all())
    assert bool(bits[0][~p.mask.T].isnan().all())


def test_only_the_token_that_is_read_needs_bits_at_the_last_stream() -> None:
    """After the last layer no token is read by any other, so the price takes all bits of the others."""
    model, p = tiny("llama"), pairs(3, 5)
    found = mi.information_bottleneck(model, p, "resid_post.2", beta=2.0, steps=25, samples=1, learning_rate=2.0)
    bits = found.at(measure="bits").values
    assert float(bits[:-1].max()) < 0.05 < float(bits[-1].min())


def test_the_gradient_of_the_masks_is_the_derivative() -> None:
    """One step of Adam goes by the gradient's sign; with beta 0 the loss of the same noise falls along it."""
    model, p = tiny("gpt2"), pairs(2, 5)
    values = [
        mi.information_bottleneck(model, p, "resid_pre.2", beta=0.0, steps=steps, samples=2).about["kept"]
        for steps in (1, 12)
    ]
    assert values[1] > values[0]


def test_batches_change_nothing() -> None:
    model, p = tiny("gpt2"), pairs(3, 6, padded=True)
    whole, parts = (
        mi.information_bottleneck(model, p, "resid_pre.1", steps=4, samples=2, batch_size=size) for size in (3, 2)
    )
    torch.testing.assert_close(whole.values, parts.values, equal_nan=True)
    assert whole.about["kept"] == pytest.approx(parts.about["kept"]), (whole.about, parts.about)


def test_more_padding_changes_nothing() -> None:
    """Some of the examples keep the width of all of them; made anew they are shorter."""
    model, wide = tiny("gpt2"), pairs(3, 6, padded=True)[1:]
    short = mi.Pairs(clean=wide.clean, corrupt=wide.corrupt, right=wide.right, wrong=wide.wrong, mask=wide.mask)
    assert wide.clean.shape[1] == 6 and short.clean.shape[1] == 5
    found, same = (mi.information_bottleneck(model, of, "resid_pre.1", steps=4, samples=2) for of in (wide, short))
    torch.testing.assert_close(found.values[:, :5], same.values, equal_nan=True)
    assert found.about["kept"] == pytest.approx(same.about["kept"]), (found.about, same.about)


def test_what_is_refused() -> None:
    model, p = tiny("gpt2"), pairs(2, 5)
    cases: list[tuple[Any, str]] = [
        (lambda: mi.information_bottleneck(model, p, "z.1"), "not one vector per token"),
        (lambda: mi.information_bottleneck(model, p, "resid_pre.1", beta=-1), "at least 0"),
        (lambda: mi.information_bottleneck(model, p, "resid_pre.1", metric="accuracy"), "gradient"),
    ]
    for call, message in cases:
        with pytest.raises(InputError, match=message):
            call()
