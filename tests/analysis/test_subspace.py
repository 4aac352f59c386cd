"""Subspace interchange against activation patching and TransformerLens's own runs on the same bridge."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformer_lens.tools.analysis.interchange import SubspaceInterchange, collect_activations, intervened_logits

import mechinterp as mi
from mechinterp.analysis.subspace import learn_subspace, subspace_interchange
from mechinterp.base.errors import InputError, UnsupportedError
from tests.support.models_tiny import ALL_FLOAT64, EVERY, SHAPES, as_installed, pairs, snapshot, tiny

NAMED = {"S": [1, 2, 0]}


def tolerance(name: str) -> float:
    # Norms and rotations of the other shapes run in float32 inside a float64 model.
    return 1e-9 if name in ALL_FLOAT64 else 2e-5


def basis(d: int, rank: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d, rank, generator=generator, dtype=torch.float64)).Q


CASES = [(name, part) for name in EVERY for part in ("resid_pre.1", "a1.h2", "m1")]
CASES.remove(("attention-only", "m1"))  # it has no MLP


# Every shape and every part meets both directions.
@pytest.mark.parametrize(
    ("name", "part", "direction"), [(*case, ("noise", "denoise")[i % 2]) for i, case in enumerate(CASES)]
)
def test_the_whole_space_is_activation_patching(name: str, part: str, direction: Any) -> None:
    model, examples = tiny(name), pairs(3, 6, padded=True, positions=NAMED)
    d = model.dims.d_head if part == "a1.h2" else 16
    patched = mi.activation_patching(model, examples, [part], positions="S", direction=direction).values[0, 0]
    settings: dict[str, Any] = {"position": "S", "direction": direction, "placebos": 1}
    full = subspace_interchange(model, examples, part, basis(d, d), **settings)
    for name_of in ("basis", "whole", "placebo 0"):  # a random basis of the whole space is the whole space
        # TransformerLens draws its random bases in float32.
        torch.testing.assert_close(full.at(subspace=name_of).values, patched, rtol=2e-5, atol=2e-5)
    assert float(full.at(subspace="complement").values.abs().max()) < max(1e-6, tolerance(name))
    half = basis(d, 2)
    some = subspace_interchange(model, examples, part, half, **settings)
    turned = subspace_interchange(model, examples, part, half @ basis(2, 2, seed=3), **settings)
    torch.testing.assert_close(
        some.at(subspace="basis").values, turned.at(subspace="basis").values, rtol=0, atol=tolerance(name)
    )
    rest = torch.linalg.qr(torch.cat([half, torch.eye(d, dtype=torch.float64)], 1)).Q[:, 2:d]
    other = subspace_interchange(model, examples, part, rest, **settings)
    torch.testing.assert_close(
        some.at(subspace="complement").values, other.at(subspace="basis").values, rtol=0, atol=tolerance(name)
    )


@pytest.mark.parametrize(("name", "part"), [*((name, "resid_pre.2") for name in SHAPES), ("lfm2", "attn_out.0")])
def test_it_is_what_transformer_lens_runs(name: str, part: str) -> None:
    model, examples, directions = tiny(name), pairs(3, 6), basis(16, 3)
    hook = model.first_name(part)
    at = torch.tensor([2, 4, 5])

    def logits(ids: torch.Tensor) -> torch.Tensor:
        return model.bridge(ids, return_type="logits")[:, -1]

    source = collect_activations(model.bridge, hook, examples.corrupt, logits, positions=at)
    got = intervened_logits(
        model.bridge, hook, SubspaceInterchange(directions), examples.clean, source, logits, positions=at
    )
    plain = logits(examples.clean).detach()

    def difference(values: torch.Tensor) -> torch.Tensor:
        return (values.gather(-1, examples.right) - values.gather(-1, examples.wrong))[:, 0]  # type: ignore[arg-type]

    named = pairs(3, 6, positions={"at": at.tolist()})
    grid = subspace_interchange(model, named, part, directions, position="at", placebos=0)
    torch.testing.assert_close(
        grid.at(subspace="basis").values, difference(plain) - difference(got), rtol=0, atol=tolerance(name)
    )


def test_batches_change_nothing_and_the_model_is_left_alone() -> None:
    model, examples = tiny("gpt2"), pairs(5, 6, padded=True)
    before = snapshot(model.bridge)
    whole = subspace_interchange(model, examples, "resid_pre.1", basis(16, 2), placebos=2)
    tight = subspace_interchange(model, examples, "resid_pre.1", basis(16, 2), placebos=2, batch_size=2)
    torch.testing.assert_close(whole.values, tight.values, rtol=0, atol=1e-9)
    assert snapshot(model.bridge) == before
    other = subspace_interchange(model, examples, "resid_pre.1", basis(16, 2), placebos=1, seed=1)
    assert torch.equal(other.at(subspace="placebo 0").values, whole.at(subspace="placebo 1").values)


@pytest.mark.slow
def test_a_learned_subspace_beats_its_placebos_on_other_pairs() -> None:
    model = mi.load_model("bundled")
    train = mi.load_task("ioi").pairs(model, n=64, split="train")
    found = learn_subspace(model, train, "resid_pre.3", 2, position="end", epochs=6, batch_size=32)
    assert found.shape == (64, 2)
    torch.testing.assert_close(found.T @ found, torch.eye(2), rtol=0, atol=1e-4)
    test = mi.load_task("ioi").pairs(model, n=32, split="test")
    mean = subspace_interchange(model, test, "resid_pre.3", found, position="end", placebos=3).mean()
    placebos = [float(mean.at(subspace=f"placebo {i}")) for i in range(3)]
    assert float(mean.at(subspace="basis")) > max(placebos)


BAD: list[tuple[str, Any, dict[str, Any], str]] = [
    ("resid_pre.1", torch.ones(16, 2), {}, "not orthonormal"),
    ("resid_pre.1", basis(8, 2), {}, r"must be \[16, rank\]"),
    ("z.1", basis(4, 2), {}, "not one vector per token"),
    ("a1.h1<pattern>", basis(4, 2), {}, "not one vector per token"),
    ("m1.n3", basis(16, 2), {}, "is a single number"),
    ("resid_pre.1@S", basis(16, 2), {}, "position as `position`"),
    ("resid_pre.1", basis(16, 2), {"position": 9}, "outside the prompt"),
    ("resid_pre.1", basis(16, 2), {"placebos": -1}, "at least 0"),
    ("resid_pre.1", basis(16, 2), {"direction": "up"}, "Unknown direction"),
]


@pytest.mark.parametrize(("part", "directions", "keywords", "message"), BAD)
def test_bad_input_gets_one_clear_line(part: str, directions: Any, keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        as_installed(subspace_interchange)(tiny("gpt2"), pairs(3, 6), part, directions, **keywords)


@pytest.mark.parametrize(
    ("part", "rank", "message"), [("a1.h1", 1, "at a whole site"), ("resid_pre.1", 17, "from 1 to")]
)
def test_bad_learning_gets_one_clear_line(part: str, rank: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        learn_subspace(tiny("gpt2"), pairs(3, 6), part, rank)


@pytest.mark.parametrize("part", ["attn_out.0", "a2", "attn_out.1"])
def test_a_subspace_is_learned_where_a_convolution_takes_the_place_of_heads(part: str) -> None:
    found = learn_subspace(tiny("lfm2"), pairs(3, 6), part, 2, epochs=1)
    torch.testing.assert_close(found.T @ found, torch.eye(2).to(found), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("part", "instead"), [("resid_mid.1", "'resid_pre.2'"), ("resid_mid.2", "'resid_final'")])
def test_no_subspace_is_learned_where_the_hook_is_on_one_branch(part: str, instead: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"for the MLP only.*{instead}"):
        learn_subspace(tiny("gpt2"), pairs(3, 6), part, 2)
