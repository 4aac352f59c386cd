"""The tuned lens beats the plain one on prompts it has not seen; its file is checked before it is believed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import mechinterp as mi
from mechinterp.analysis.logit_lens import logit_lens
from mechinterp.analysis.tuned_lens import TunedLens, load_lens, save_lens, train_tuned_lens
from mechinterp.base.errors import FormatError, InputError
from mechinterp.models.sites import Site
from tests.support.models_tiny import SHAPES, as_installed, snapshot, tiny, tokens


@pytest.mark.slow
def test_it_beats_the_plain_lens_at_every_layer_on_held_out_prompts() -> None:
    model, names = mi.load_model("bundled"), ("ioi", "induction")
    train = [mi.load_task(name).pairs(model, n=60, split="train") for name in names]
    width = max(pairs.clean.shape[1] for pairs in train)
    ids = torch.cat([torch.nn.functional.pad(pairs.clean, (0, width - pairs.clean.shape[1])) for pairs in train])
    mask = torch.cat([torch.nn.functional.pad(pairs.mask, (0, width - pairs.clean.shape[1])) for pairs in train])
    lens = train_tuned_lens(model, ids, mask, steps=80)
    for name in names:
        test = mi.load_task(name).pairs(model, n=30, split="test")
        sites = [f"resid_pre.{layer}" for layer in range(4)]
        plain = logit_lens(model, test, sites=sites, positions="each").kl.values.nanmean((1, 2))
        tuned = logit_lens(model, test, sites=sites, positions="each", lens=lens).kl.values.nanmean((1, 2))
        assert bool((tuned < 0.8 * plain).all()), (plain, tuned)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_training_lowers_the_loss_is_repeatable_and_leaves_the_model(name: str) -> None:
    model, ids = tiny(name), tokens(16, 8)
    before = snapshot(model.bridge)
    settings: dict[str, Any] = {"steps": 40, "batch_size": 64}
    lens, again = (train_tuned_lens(model, ids, **settings) for _ in range(2))
    assert snapshot(model.bridge) == before
    assert torch.equal(lens.weight, again.weight) and torch.equal(lens.bias, again.bias)
    plain, tuned = (logit_lens(model, ids, sites=["resid_pre.1"], positions="each", lens=used) for used in (None, lens))
    assert float(tuned.kl.mean().values.mean()) < float(plain.kl.mean().values.mean())
    other = train_tuned_lens(model, ids, **settings, seed=1)
    assert not torch.equal(other.weight, lens.weight)


def identity(model: Any) -> TunedLens:
    n, d = model.dims.n_layers, model.dims.d_model
    about = {"format": "mechinterp.tuned_lens.1", "model": "tiny", "weights_sha256": model.info.weights_sha256()}
    return TunedLens(torch.zeros(n, d, d), torch.zeros(n, d), about)


def test_the_untrained_lens_is_the_plain_one() -> None:
    model, ids = tiny("gpt2"), tokens(3, 6)
    sites = ["resid_pre.0", "resid_post.1", "resid_post.2", "resid_final"]
    plain, same = (logit_lens(model, ids, sites=sites, lens=lens) for lens in (None, identity(model)))
    assert torch.equal(plain.kl.values, same.kl.values)
    shifted = TunedLens(torch.zeros(3, 16, 16), torch.arange(3.0)[:, None].expand(-1, 16), identity(model).provenance)
    resid = torch.zeros(2, 16)
    assert [
        float(shifted(Site.parse(site), resid)[0, 0]) for site in ("resid_pre.1", "resid_post.1", "resid_post.2")
    ] == [1, 2, 0]


def test_a_file_gives_back_the_lens(tmp_path: Path) -> None:
    model = tiny("gpt2")
    lens = train_tuned_lens(model, tokens(8, 6), steps=3)
    save_lens(tmp_path / "lens.safetensors", lens)
    assert [path.name for path in tmp_path.iterdir()] == ["lens.safetensors"]
    back = load_lens(tmp_path / "lens.safetensors")
    assert torch.equal(back.weight, lens.weight) and torch.equal(back.bias, lens.bias)
    assert back.provenance == lens.provenance
    assert back.provenance["tokens"] == "48" and back.provenance["steps"] == "3"
    with pytest.raises(InputError, match="was trained on"):
        logit_lens(tiny("neox"), tokens(2, 4), lens=back)
    with pytest.raises(InputError, match=r"not for 'resid_mid\.0'"):
        logit_lens(model, tokens(2, 4), sites=["resid_mid.0"], lens=back)
    with pytest.raises(InputError, match="Cannot write"):
        save_lens(tmp_path / "nowhere" / "lens.safetensors", lens)


def written(path: Path, change: dict[str, Any]) -> None:
    parts: dict[str, Any] = {"weight": torch.zeros(2, 4, 4), "bias": torch.zeros(2, 4)} | change.get("parts", {})
    about = {"format": "mechinterp.tuned_lens.1", "model": "m", "weights_sha256": "0"} | change.get("about", {})
    save_file(
        {k: v for k, v in parts.items() if v is not None}, path, {k: v for k, v in about.items() if v is not None}
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parts": {"bias": None}}, "not a tuned lens"),
        ({"parts": {"more": torch.zeros(1)}}, "not a tuned lens"),
        ({"about": {"format": "other"}}, "not a tuned lens"),
        ({"about": {"weights_sha256": None}}, "weights_sha256 missing"),
        ({"parts": {"bias": torch.zeros(3, 4)}}, "do not match"),
        ({"parts": {"weight": torch.zeros(2, 4, 5)}}, "do not match"),
        ({"parts": {"bias": torch.full((2, 4), torch.nan)}}, "NaN"),
        ({"parts": {"bias": torch.zeros(2, 4, dtype=torch.long)}}, "integer maps"),
    ],
)
def test_an_untrusted_file_is_checked(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "lens.safetensors"
    written(path, change)
    with pytest.raises(FormatError, match=message) as caught:
        load_lens(path)
    assert "\n" not in str(caught.value)


def test_what_is_no_file_at_all(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"\x80\x04pickle")
    with pytest.raises(FormatError, match="not a safetensors file"):
        load_lens(tmp_path / "x")
    with pytest.raises(FormatError, match="Cannot read"):
        load_lens(tmp_path / "none")


def test_bad_settings_are_refused() -> None:
    with pytest.raises(InputError, match="at least 1"):
        as_installed(train_tuned_lens)(tiny("gpt2"), tokens(2, 4), steps=0)
