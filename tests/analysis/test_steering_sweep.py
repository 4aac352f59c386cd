"""Scrubbing leaves nothing linear at any layer; a sweep's numbers are those of runs with the edit."""

from __future__ import annotations

import pytest
import torch

import mechinterp as mi
from mechinterp.base.errors import InputError
from tests.support.models_tiny import pairs, tiny, tokens

NAMED = {"S": [1, 2, 0, 1] * 10}


@pytest.mark.parametrize("positions", [None, "S"])
def test_scrubbing_leaves_nothing_linear_at_any_layer(positions: str | None) -> None:
    model, p = tiny("gpt2"), pairs(40, 6, positions=NAMED)
    found = mi.scrub_concept(model, p, positions=positions)
    sites = list(found.fits)
    assert [str(site) for site in sites] == ["resid_pre.0", "resid_pre.1", "resid_pre.2"]
    rows = torch.arange(40)

    def means(edits: list[mi.Intervention]) -> list[torch.Tensor]:
        values = [model.run(ids, p.mask, record=sites, interventions=edits).values for ids in (p.clean, p.corrupt)]
        if positions is None:
            return [values[0][site].mean((0, 1)) - values[1][site].mean((0, 1)) for site in sites]
        return [(values[0][site] - values[1][site])[rows, p.positions["S"]].mean(0) for site in sites]

    edits = found.interventions(p)
    assert max(float(delta.abs().max()) for delta in means(edits)) < 1e-9
    # One erasure alone leaves a difference at the layers after it.
    assert float(means(edits[:1])[2].abs().max()) > 1e-4
    same = pairs(4, 6)
    with pytest.raises(InputError, match="nothing to erase"):
        mi.scrub_concept(model, mi.Pairs(clean=same.clean, corrupt=same.clean), "resid_pre")


def test_a_sweep_measures_the_runs_under_the_edit() -> None:
    model, p, text = tiny("gpt2"), pairs(4, 6, padded=True, positions={"S": [1, 2, 0, 1]}), tokens(5, 6, seed=9)
    direction = mi.find_direction(model, p, "resid_pre.1", "S")
    sweep = mi.steering_sweep(
        model, direction, [0.0, 2.0], p, text, positions="S", side=pairs(3, 6, seed=4), controls=2, batch_size=3
    )
    assert sweep.labels["edit"] == ("direction", "random 0", "random 1")
    zero = sweep.at(strength="0").values
    assert torch.equal(zero[:, [1, 2, 4]], torch.zeros(3, 3).double())
    edit = mi.add_features(direction.basis, {0: 2.0}, pairs=p, positions="S")
    at = p.lengths - 1
    runs = [model.run(p.corrupt, p.mask, interventions=edits).logits for edits in ((), (edit,))]
    last = [logits[torch.arange(4), at] for logits in runs]  # type: ignore[index]
    difference = [(own.gather(1, p.right) - own.gather(1, p.wrong)).mean() for own in last]  # type: ignore[arg-type]
    own = sweep.at(edit="direction", strength="2")
    assert float(own.at(measure="change")) == pytest.approx(float(difference[1] - difference[0]), abs=1e-6)
    everywhere = mi.add_features(direction.basis, {0: 2.0})
    before, after = (model.run(text, interventions=edits).logits.log_softmax(-1) for edits in ((), (everywhere,)))  # type: ignore[union-attr]
    kl = torch.nn.functional.kl_div(after, before, log_target=True, reduction="none").sum(-1).mean()
    loss = torch.nn.functional.cross_entropy(after[:, :-1].flatten(0, 1), text[:, 1:].flatten())
    assert float(own.at(measure="kl")) == pytest.approx(float(kl), abs=1e-6)
    assert float(own.at(measure="perplexity")) == pytest.approx(float(loss.exp()), rel=1e-6)
    random = mi.steering_sweep(model, direction, [2.0], p, text, how="set", controls=0)
    assert random.labels["edit"] == ("direction",)
    figure = mi.steering_curve(sweep)
    assert [trace["name"] for trace in figure.to_dict()["data"]] == list(sweep.labels["edit"])
    with pytest.raises(InputError, match="at least two tokens"):
        mi.steering_sweep(model, direction, [1.0], p, text[:, :1])
