"""Causal tracing against whole runs with noise and restored states, drawn and written by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mechinterp.analysis.activation_patching import fraction
from mechinterp.analysis.causal_tracing import causal_tracing
from mechinterp.base.errors import InputError
from mechinterp.engines.readout import metric_values
from mechinterp.models.hook_manager import Intervention
from mechinterp.models.sites import Site
from mechinterp.tasks.metrics import get_metric
from mechinterp.tasks.pairs import Pairs
from tests.support.models_tiny import ALL_FLOAT64, EVERY, SHAPES, as_installed, pairs, tiny

FINAL = Site("resid_final")
NAMED = {"S": [1, 2, 0], "end": [5, 4, 3]}


CASES = [
    (name, what, window) for name in EVERY for what, window in (("resid_post", 1), ("mlp_out", 2), ("attn_out", 3))
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "what", "window"), [case for case in CASES if case[:2] != ("attention-only", "mlp_out")]
)
def test_it_equals_plain_runs(name: str, what: str, window: int) -> None:
    model, examples = tiny(name), pairs(3, 6, padded=True, positions=NAMED)
    noise, samples = 2.0, 2
    grid = causal_tracing(model, examples, [("S", 2)], what, window=window, noise=noise, samples=samples, seed=5)
    embedded = model.run(examples.clean, examples.mask, record=["embed"]).values["embed"]
    spread = float(embedded[examples.mask].double().std(unbiased=False))
    generator = torch.Generator().manual_seed(5)
    sites = [Site(what, layer) for layer in range(model.dims.n_layers)]
    clean = model.run(examples.clean, examples.mask, record=sites).values
    measure = get_metric("prob")

    def value(edits: list[Intervention]) -> torch.Tensor:
        run = model.run(examples.clean, examples.mask, interventions=edits, record=[FINAL], stop=FINAL)
        return metric_values(model, examples, measure, run.values[FINAL])

    checked = (0, 2, 5)
    expected = torch.zeros(3, 6, 3, dtype=torch.float64)
    for _ in range(samples):
        extra = torch.zeros_like(embedded)
        for row, length in enumerate(examples.lengths.tolist()):
            drawn = torch.randn(length, model.dims.d_model, generator=generator).to(embedded)
            for pos in {int(examples.positions["S"][row]), 2}:
                extra[row, pos] = noise * spread * drawn[pos]
        noisy = Intervention("embed", lambda value, extra=extra: value + extra)
        broken = value([noisy])
        for layer in range(3):
            for pos in checked:
                edits: list[Intervention] = [noisy]
                # Layers as in the paper's code: from layer - window // 2, `window` of them, cut at both ends.
                for near in range(max(0, layer - window // 2), min(3, layer - window // 2 + window)):

                    def put_back(value: torch.Tensor, near: int = near, pos: int = pos) -> torch.Tensor:
                        value = value.clone()
                        value[:, pos] = clean[Site(what, near)][:, pos]
                        return value

                    edits.append(Intervention(Site(what, near), put_back))
                expected[layer, pos] += (value(edits) - broken) / samples
    tolerance = 1e-9 if name in ALL_FLOAT64 else 2e-5  # float32 parts inside the other shapes
    got = grid.values
    present = torch.stack([examples.mask[:, pos] for pos in range(6)])
    assert torch.equal(got.isnan(), ~present.expand_as(got))
    for pos in checked:
        there = present[pos]
        torch.testing.assert_close(got[:, pos, there], expected[:, pos, there].to(got), rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", SHAPES)
def test_restoring_the_last_state_restores_all(name: str) -> None:
    model, examples = tiny(name), pairs(3, 6, positions=NAMED)
    grid = causal_tracing(model, examples, "S", layers=[2], positions=[5], samples=3)
    assert float(fraction(grid)) == pytest.approx(1.0, abs=1e-5)
    assert grid.about["clean_value"] != pytest.approx(grid.about["corrupt_value"])


@pytest.mark.slow
def test_batches_and_padding_change_nothing() -> None:
    model, examples = tiny("gpt2"), pairs(4, 6, positions={"S": [1, 2, 0, 1]})
    wide = Pairs(
        clean=torch.nn.functional.pad(examples.clean, (0, 2)),
        corrupt=torch.nn.functional.pad(examples.corrupt, (0, 2)),
        mask=torch.nn.functional.pad(examples.mask, (0, 2)),
        right=examples.right,
        wrong=examples.wrong,
        positions=examples.positions,
    )
    whole = causal_tracing(model, examples, "S", samples=2)
    for other in (
        causal_tracing(model, examples, "S", samples=2, batch_size=1),
        causal_tracing(model, wide, "S", samples=2),
    ):
        torch.testing.assert_close(other.values[:, :6], whole.values, rtol=0, atol=1e-9)
    again = causal_tracing(model, examples, "S", samples=2, seed=1)
    assert not torch.allclose(again.values, whole.values)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"subject": "T"}, "Unknown position 'T'"),
        ({"subject": ["S", "end"]}, "one set of positions"),
        ({"what": "z"}, "Unknown site to restore"),
        ({"window": 0}, "at least 1"),
        ({"noise": -1.0}, "positive"),
        ({"positions": [9]}, "outside the prompt"),
    ],
)
def test_bad_input_gets_one_clear_line(keywords: dict[str, Any], message: str) -> None:
    arguments = {"subject": "S", "what": "resid_post", **keywords}
    with pytest.raises(InputError, match=message):
        as_installed(causal_tracing)(tiny("gpt2"), pairs(3, 6, positions=NAMED), **arguments)
