"""The same direction in several places: equal models give equal rows, and the matrix is that of its definitions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mechinterp as mi
from mechinterp.base.errors import InputError
from tests.support.models_tiny import huggingface, pairs, tiny


def test_the_same_model_twice_gives_the_same_rows_and_columns() -> None:
    """Diagonal = off-diagonal, exactly; and the diagonal is what steering and probing say by themselves."""
    model, train, test = tiny("gpt2"), pairs(12, 6), pairs(6, 6, seed=50)
    places: dict[str, Any] = {name: (model, "resid_pre.2") for name in ("base", "tuned")}
    found = mi.compare_directions(places, train, test, controls=2)
    table = found.grid.values
    assert torch.equal(table[0, 0], table[0, 1]) and torch.equal(table[0, 0], table[1, 0])
    assert float(found.grid.at(of="base", **{"used in": "tuned"}, measure="cosine")) == pytest.approx(1)
    direction = mi.find_direction(model, train, "resid_pre.2")
    edit = mi.add_features(direction.basis, {0: 1.0}, pairs=test, positions=-1)
    change = 0.0
    for interventions, sign in (([edit], 1), ([], -1)):
        logits = model.run(test.corrupt, test.mask, interventions=interventions).logits[:, -1]  # type: ignore[index]
        change += sign * float((logits.gather(1, test.right) - logits.gather(1, test.wrong)).mean())  # type: ignore[arg-type]
    assert float(table[0, 1, 2]) == pytest.approx(change, rel=1e-6)
    assert found.random.values.shape == (2, 2) and bool((found.random.values == found.random.values[0, 0]).all())
    values = model.run(test.clean, record=["resid_pre.2"]).values["resid_pre.2"][:, -1]
    other = model.run(test.corrupt, record=["resid_pre.2"]).values["resid_pre.2"][:, -1]
    right = (direction.reading(values) > 0).sum() + (direction.reading(other) < 0).sum()
    assert float(table[1, 0, 1]) == pytest.approx(float(right) / 12)


def test_another_model_and_another_precision_differ_as_they_should() -> None:
    model, train, test = tiny("gpt2"), pairs(12, 6), pairs(6, 6, seed=50)
    places: dict[str, Any] = {
        "float64": (model, "resid_pre.2"),
        "float32": (mi.load_model(huggingface("gpt2", dtype=torch.float32)), "resid_pre.2"),
        "other seed": (mi.load_model(huggingface("gpt2", seed=9)), "resid_pre.2"),
        "next layer": (model, "resid_pre.3"),
    }
    places["next layer"] = (model, "resid_post.2")
    cosine = mi.compare_directions(places, train, test, controls=0).grid.at(measure="cosine").values
    assert float(cosine[0, 1]) == pytest.approx(1, abs=1e-5) and abs(float(cosine[0, 2])) < 0.9
    torch.testing.assert_close(cosine, cosine.T)
    assert float(cosine[0, 3]) < 1 - 1e-3


def test_what_is_refused() -> None:
    model, p, other = tiny("gpt2"), pairs(4, 6), pairs(4, 6, seed=50)
    both: dict[str, Any] = {"a": (model, "resid_pre.1"), "b": (model, "mlp_post.1")}
    cases: list[tuple[Any, str]] = [
        (lambda: mi.compare_directions({"a": (model, "resid_pre.1")}, p, other), "at least two places"),
        (lambda: mi.compare_directions(both, p, p), "also in `train`"),
        (lambda: mi.compare_directions(both, p, other), "of one width"),
    ]
    for call, message in cases:
        with pytest.raises(InputError, match=message):
            call()


def test_random_directions_are_as_long_as_the_direction_that_they_stand_beside() -> None:
    """The direction of one layer in another: its control has its own length, not that of the direction there."""
    model, train, test = tiny("gpt2"), pairs(12, 6), pairs(6, 6, seed=50)
    places: dict[str, Any] = {f"layer {n}": (model, f"resid_pre.{n}") for n in (0, 2)}
    found = mi.compare_directions(places, train, test, controls=2, seed=3)
    lengths = [float(found.directions[name].write.norm()) for name in places]
    assert abs(lengths[0] / lengths[1] - 1) > 0.2
    generator = torch.Generator().manual_seed(3)
    changes: list[float] = []
    plain = model.run(test.corrupt, test.mask).logits
    for _ in range(2):
        vector = torch.randn(model.dims.d_model, generator=generator).to(model.dtype)
        edit = mi.Intervention(mi.Site("resid_pre", 2), lambda x, v=vector: last_plus(x, v / v.norm() * lengths[0]))
        logits = model.run(test.corrupt, test.mask, interventions=[edit]).logits
        assert logits is not None and plain is not None and test.right is not None and test.wrong is not None
        moved = (logits - plain)[:, -1]
        changes.append(abs(float((moved.gather(1, test.right) - moved.gather(1, test.wrong)).mean())))
    assert float(found.random.at(of="layer 0", **{"used in": "layer 2"})) == pytest.approx(max(changes), rel=1e-6)


def last_plus(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.cat([x[:, :-1], x[:, -1:] + v], 1)
