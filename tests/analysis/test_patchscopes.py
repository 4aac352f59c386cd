"""Patchscopes against runs with the state written in by hand; the logit lens and causal tracing are among them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mechinterp as mi
from mechinterp.analysis.patchscopes import patchscope
from mechinterp.base.errors import InputError
from mechinterp.models.hook_manager import Intervention
from tests.support.models_tiny import ALL_FLOAT64, EVERY, SHAPES, as_installed, build, pairs, tiny, tokens


def tolerance(name: str) -> float:
    # Norms and rotations of the other shapes run in float32 inside a float64 model.
    return 1e-9 if name in ALL_FLOAT64 else 2e-5


def written(site: str, state: torch.Tensor, at: int) -> Intervention:
    def edit(value: torch.Tensor) -> torch.Tensor:
        value = value.clone()
        value[:, at] = state
        return value

    return Intervention(site, edit)


@pytest.mark.parametrize("name", EVERY)
def test_a_state_is_written_where_it_is_said(name: str) -> None:
    model, source, target = tiny(name), pairs(3, 6, padded=True), tokens(1, 5, seed=9)
    got = patchscope(
        model,
        source.clean,
        target,
        ["resid_pre.0", "resid_pre.2"],
        source_mask=source.mask,
        target_site="resid_pre.1",
        target_position=2,
        max_new_tokens=3,
    )
    for i, site in enumerate(("resid_pre.0", "resid_pre.2")):
        value = model.run(source.clean, source.mask, record=[site]).values[site]
        state = value[torch.arange(3), source.lengths - 1]
        grown = target.expand(3, -1)
        for step in range(3):
            logits = model.run(grown, interventions=[written("resid_pre.1", state, 2)]).logits
            assert logits is not None
            if step == 0:
                torch.testing.assert_close(got.logits[i], logits[:, -1], rtol=0, atol=tolerance(name))
            grown = torch.cat([grown, logits[:, -1].argmax(-1, keepdim=True)], 1)
        assert got.generated[i].tolist() == grown[:, 5:].tolist()
        assert got.top_tokens[i, :, 0].tolist() == got.logits[i].argmax(-1).tolist()


@pytest.mark.parametrize("name", SHAPES)
def test_the_logit_lens_is_a_patchscope(name: str) -> None:
    model, source = tiny(name), pairs(3, 6, padded=True)
    sites = ["resid_pre.0", "resid_pre.1", "resid_pre.2"]
    target = tokens(1, 4, seed=9)  # any prompt: what is written last is all that is read
    got = patchscope(model, source.clean, target, sites, source_mask=source.mask, target_site="resid_final")
    lens = mi.logit_lens(model, source, sites=sites, top_k=5)
    assert torch.equal(got.top_tokens, lens.top_tokens[:, 0])
    torch.testing.assert_close(got.probabilities.values, lens.probabilities.values[:, 0], rtol=0, atol=tolerance(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_patching_and_causal_tracing_are_patchscopes(name: str) -> None:
    model, examples = tiny(name), pairs(3, 6)
    sites = ["resid_pre.1", "resid_pre.2"]
    got = patchscope(model, examples.corrupt, examples.clean, sites, source_position=3, target_position=3)
    effects = mi.activation_patching(model, examples, "resid_pre", positions=[3], layers=[1, 2])
    plain = model.run(examples.clean).logits
    assert plain is not None and examples.right is not None and examples.wrong is not None

    def difference(logits: torch.Tensor) -> torch.Tensor:
        return (logits.gather(-1, examples.right) - logits.gather(-1, examples.wrong))[:, 0]  # type: ignore[arg-type]

    for i in range(2):
        effect = difference(plain[:, -1]) - difference(got.logits[i])
        torch.testing.assert_close(effect, effects.values[i, 0], rtol=0, atol=tolerance(name))
    # Causal tracing: a clean state into the noised run of the same prompt, which is another model's run.
    noised, noise = build(name), torch.randn(3, 6, 16, generator=torch.Generator().manual_seed(0)).double()
    site, clean = "resid_pre.2", model.run(examples.clean, record=["resid_pre.2"]).values["resid_pre.2"]
    noisy = Intervention("embed", lambda value: value + noise.to(value))
    with noised.intervene(noisy):
        traced = patchscope(
            model, examples.clean, examples.clean, [site], source_position=2, target_position=2, target_model=noised
        )
    by_hand = model.run(examples.clean, interventions=[noisy, written(site, clean[:, 2], 2)]).logits
    assert by_hand is not None
    torch.testing.assert_close(traced.logits[0], by_hand[:, -1], rtol=0, atol=tolerance(name))


def test_the_same_state_changes_nothing_and_a_map_is_applied() -> None:
    model, ids = tiny("gpt2"), tokens(2, 6)
    plain = model.run(ids).logits
    assert plain is not None
    same = patchscope(model, ids, ids, ["resid_pre.1", "resid_mid.2", "resid_post.0"])
    torch.testing.assert_close(same.logits, plain[None, :, -1].expand(3, -1, -1), rtol=0, atol=1e-9)
    doubled = patchscope(model, ids, ids, ["resid_pre.1"], mapping=lambda state: 2 * state)
    state = 2 * model.run(ids, record=["resid_pre.1"]).values["resid_pre.1"][:, -1]
    expected = model.run(ids, interventions=[written("resid_pre.1", state, 5)]).logits
    torch.testing.assert_close(doubled.logits[0], expected[:, -1], rtol=0, atol=1e-9)  # type: ignore[index]
    assert same.to_frame().shape == (6, 5) and same.generated.shape == (3, 2, 0)


def test_another_model_needs_a_map_of_its_width() -> None:
    model, wide = tiny("gpt2"), build("gpt2", n_embd=32)
    with pytest.raises(InputError, match="give a `mapping`"):
        patchscope(model, tokens(2, 4), tokens(1, 4), ["resid_pre.1"], target_model=wide)
    lift = torch.randn(16, 32, generator=torch.Generator().manual_seed(0)).double()
    got = patchscope(model, tokens(2, 4), tokens(1, 4), ["resid_pre.1"], target_model=wide, mapping=lambda s: s @ lift)
    assert got.logits.isfinite().all()


BAD: list[tuple[dict[str, Any], str]] = [
    ({"source_sites": ["z.1"]}, "is not a residual stream"),
    ({"source_sites": []}, "at least one"),
    ({"source_sites": ["resid_pre.1", "resid_pre.1"]}, "given twice"),
    ({"source_sites": ["resid_pre.8"]}, "layers 0 to 2"),
    ({"target_site": "pattern.1"}, "is not a residual stream"),
    ({"source_position": 6}, "outside the prompt"),
    ({"target_position": -5}, "outside the target prompt of 4"),
    ({"target": tokens(2, 4)}, "one for each of the 3 sources"),
    ({"top_k": 0}, "must be from 1"),
]


@pytest.mark.parametrize(("keywords", "message"), BAD)
def test_bad_input_gets_one_clear_line(keywords: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"target": tokens(1, 4), "source_sites": ["resid_pre.1"], **keywords}
    with pytest.raises(InputError, match=message):
        as_installed(patchscope)(tiny("gpt2"), tokens(3, 6), **arguments)
