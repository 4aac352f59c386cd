"""Compensation: the changes add up to the change of the logit difference, and are those of runs edited by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import mechinterp as mi
from mechinterp.base.errors import InputError
from mechinterp.models.hook_manager import Intervention
from mechinterp.models.sites import Site
from tests.support.models_tiny import pairs, tiny

REPLACED = ("a0.h1", "a1.h2")


@pytest.mark.parametrize("shape", ["gpt2", "neox", "llama", "qwen2"])  # without a soft cap, in which the sum would end
@pytest.mark.parametrize("replacement", ["zero", "pair", "mean"])
def test_the_changes_add_up(shape: str, replacement: str) -> None:
    model, some = tiny(shape), pairs(5, padded=replacement != "mean")
    found = mi.compensation(model, some, list(REPLACED), replacement=replacement)
    effect = mi.activation_patching(model, some, [REPLACED], replacement=replacement).values[0, 0]
    torch.testing.assert_close(found.values.sum(0), -effect, atol=1e-6, rtol=1e-6)
    batched = mi.compensation(model, some, list(REPLACED), replacement=replacement, batch_size=2)
    torch.testing.assert_close(batched.values, found.values)


def test_a_node_of_an_edited_run() -> None:
    """With heads set to zero by an intervention, the direct effects change by what is reported."""
    model, some = tiny("llama"), pairs(3)
    found = mi.compensation(model, some, ["a0.h1"], replacement="zero")

    def without(z: Tensor) -> Tensor:
        new = z.clone()
        new[:, :, 1] = 0
        return new

    before = mi.direct_logit_attribution(model, some)
    with model.intervene(Intervention(Site("z", 0), without)):
        after = mi.direct_logit_attribution(model, some)
    torch.testing.assert_close(found.values, after.values - before.values)
    assert float(found.mean().at(node="a2.h0")) != 0


def test_a_part_can_be_replaced_at_one_position() -> None:
    model, some = tiny("gpt2"), pairs(3, positions={"here": torch.full((3,), 2)})
    found = mi.compensation(model, some, ["a0.h1@here"])
    effect = mi.activation_patching(model, some, ["a0.h1@here"]).values[0, 0]
    torch.testing.assert_close(found.values.sum(0), -effect, atol=1e-6, rtol=1e-6)
    assert not torch.equal(found.values, mi.compensation(model, some, ["a0.h1"]).values)


@pytest.mark.parametrize(
    ("replaced", "match"),
    [([], "at least one"), (["a0.h1<q>"], "neither a head"), (["a9.h9"], "9"), ("a0.h1", "is a list")],
)
def test_mistakes(replaced: list[str], match: str) -> None:
    with pytest.raises(InputError, match=match):
        mi.compensation(tiny("gpt2"), pairs(2), replaced)
    with pytest.raises(InputError, match="replacement"):
        mi.compensation(tiny("gpt2"), pairs(2), ["a0.h1"], replacement="nothing")
