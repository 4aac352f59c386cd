"""The load contract: a basis is measured on its model, and one that does not fit is refused with what would."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

import mechinterp as mi
from mechinterp.base.errors import FormatError, InputError, UnsupportedError
from mechinterp.features.activations import JumpRelu
from mechinterp.features.load import BUNDLED, bundled_names
from mechinterp.features.measure import check_basis
from tests.support.models_tiny import D_MODEL, tiny, tokens

TOKENS = tokens(6, 9)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def model():
    return mi.load_model("bundled")


@pytest.mark.slow
@pytest.mark.parametrize("name", bundled_names())
def test_a_bundled_dictionary_fits_as_its_card_says(model, name):
    import json

    basis = mi.load_basis(f"bundled:{name}", model=model)
    card = json.loads((BUNDLED / name / "basis.json").read_text())
    measured = mi.measure_basis(model, basis)
    assert basis.name == name and measured.fvu < 0.1 and 1 < measured.l0 < 30
    assert card["card"]["variance_explained"] > 0.95 and card["card"]["loss_recovered"] > 0.95
    assert card["model"]["weights_sha256"] == model.info.weights_sha256()
    assert basis.to_frame().at[0, "sha256"] == card["sha256"]


def test_the_bundled_dictionaries_are_small():
    assert len(bundled_names()) == 12
    assert sum(path.stat().st_size for path in BUNDLED.rglob("*") if path.is_file()) < 3e6
    assert [basis.name for basis in mi.load_bases("bundled:transcoders")] == ["m0", "m1", "m2", "m3"]
    with pytest.raises(InputError, match=r"Unknown bundled dictionary 'm9'"):
        mi.load_basis("bundled:m9")


def test_measuring_is_the_formula():
    model = tiny("gpt2")
    basis = mi.sae("resid_pre.1", drawn(D_MODEL, 20), drawn(20, D_MODEL, seed=1) / 20, b_enc=drawn(20))
    found = mi.measure_basis(model, basis, TOKENS)
    x = model.run(TOKENS, record=["resid_pre.1"]).values["resid_pre.1"]
    error = basis.error(x)
    for value, rows in ((found.fvu, slice(1, None)), (found.fvu_with_first, slice(None))):
        y, e = x[:, rows].flatten(0, 1), error[:, rows].flatten(0, 1)
        assert value == pytest.approx(float(e.square().sum() / (y - y.mean(0)).square().sum()))
    active = basis.encode(x).values[:, 1:].flatten(0, 1) > 0
    assert found.l0 == pytest.approx(float(active.sum(1).double().mean()))
    assert (found.active, found.features, found.tokens) == (int(active.any(0).sum()), 20, 6 * 8)
    assert "of the variance unexplained" in repr(found) and found.to_frame().at[0, "l0"] == found.l0


def refusal(model, basis, prompts=None) -> str:
    with pytest.raises(InputError) as caught:
        check_basis(model, basis, prompts)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("name", "wrong"), [("resid_pre.3", "attn_out.0"), ("a2", "mlp_out.3"), ("a0", "resid_pre.2")])
def test_a_wrong_hook_point_is_named(model, name, wrong):
    basis = mi.load_basis(f"bundled:{name}")
    site = mi.Site.parse(wrong)
    message = refusal(model, replace(basis, sites_in=(site,), sites_out=(site,)))
    assert f"It would fit at site='{basis.sites_in[0]}'" in message


def test_a_transcoder_of_another_layer_is_named(model):
    basis = mi.load_basis("bundled:m2")
    moved = replace(basis, sites_in=(mi.Site("mlp_in", 0),), sites_out=(mi.Site("mlp_out", 0),))
    assert "It would fit at site='mlp_in.2', site_out='mlp_out.2'" in refusal(model, moved)


def shifted(seed: int = 0):
    """A square dictionary without an error: the biases keep every ReLU on."""
    W = drawn(D_MODEL, D_MODEL, seed=seed)
    b = torch.full((D_MODEL,), 1000.0, dtype=torch.float64)
    inverse = torch.linalg.inv(W)
    return mi.sae("resid_pre.1", W, inverse, b_enc=b, b_dec=-b @ inverse)


def test_transposed_matrices_are_named():
    model, basis = tiny("gpt2"), shifted()
    found = mi.measure_basis(model, basis, TOKENS)
    assert found.fvu < 1e-9 and found.l0 == D_MODEL
    for which in ("encoder", "decoder"):
        W_enc = basis.W_enc.transpose(1, 2) if which == "encoder" else basis.W_enc
        W_dec = basis.W_dec.transpose(0, 2) if which == "decoder" else basis.W_dec
        message = refusal(model, replace(basis, W_enc=W_enc, W_dec=W_dec), TOKENS)
        assert f"It would fit with its {which} transposed, where 0.00 is unexplained" in message


@pytest.mark.slow
def test_a_scale_that_is_not_folded_in_is_named(model):
    basis = mi.load_basis("bundled:a0")
    for factor in (8.0, 1 / 8.0):
        message = refusal(model, basis.with_input_scale(factor))
        assert "It would fit with input_scale=" in message and ("0.125" in message) == (factor > 1), message


def test_a_bias_that_is_wrongly_subtracted_is_named():
    model, plain = tiny("gpt2"), shifted(3)
    b = 10 * drawn(D_MODEL, seed=5)  # (x - b) W + c, decoded by W^-1 with the bias b - c W^-1
    right = replace(plain, b_enc=plain.b_enc - b @ plain.W_enc[0], b_dec=plain.b_dec + b[None])
    assert mi.measure_basis(model, right, TOKENS).fvu < 1e-9
    wrong = replace(right, subtract_b_dec=True)
    assert "It would fit with b_dec not subtracted from the input" in refusal(model, wrong, TOKENS)


def test_silence_is_refused():
    model = tiny("gpt2")
    basis = mi.sae("resid_pre.1", drawn(D_MODEL, 20), drawn(20, D_MODEL), activation=JumpRelu(torch.tensor(1e9)))
    message = refusal(model, basis, TOKENS)
    assert "no feature is active" in message and "Usual reasons: another model or hook point" in message


def test_sites_and_widths_are_compared_without_prompts():
    model = tiny("gpt2")
    with pytest.raises(InputError, match="layers 0 to 2"):
        check_basis(model, mi.sae("resid_pre.7", drawn(D_MODEL, 4), drawn(4, D_MODEL)), TOKENS)
    with pytest.raises(InputError, match=r"reads vectors of 8 numbers at 'resid_pre.1'; got 16"):
        check_basis(model, mi.sae("resid_pre.1", drawn(8, 4), drawn(4, 8)), TOKENS)
    wide = mi.transcoder("mlp_in.1", "mlp_out.1", drawn(D_MODEL, 4), drawn(4, 8))
    with pytest.raises(InputError, match=r"writes vectors of 8 numbers to 'mlp_out.1', which has 16"):
        check_basis(model, wide, TOKENS)
    assert check_basis(model, mi.subspace_basis("resid_pre.1", torch.eye(D_MODEL)[:, :2].double()), TOKENS) is None
    assert check_basis(model, mi.neuron_basis("mlp_post.1", 64), TOKENS) is None
    with pytest.raises(UnsupportedError, match=r"has no site 'mlp_raw.1'"):
        check_basis(model, mi.sae("mlp_raw.1", drawn(D_MODEL, 4), drawn(4, D_MODEL)), TOKENS)


def test_the_prompts_can_be_given_and_are_needed_without_a_tokenizer(tmp_path):
    model = tiny("gpt2")
    mi.save_basis(tmp_path, shifted())
    with pytest.raises(InputError, match=r"no tokenizer .*check=tokens\), or check=False"):
        mi.load_basis(tmp_path, model=model)
    assert mi.load_basis(tmp_path, model=model, check=TOKENS) == mi.load_basis(tmp_path, model=model, check=False)
    with pytest.raises(InputError, match="give the model as well"):
        mi.load_basis(tmp_path, check=TOKENS)
    nowhere = (mi.Site("resid_pre", 9),)
    mi.save_basis(tmp_path, replace(shifted(), sites_in=nowhere, sites_out=nowhere))
    with pytest.raises(InputError, match="layers 0 to 2"):
        mi.load_basis(tmp_path, model=model, check=False)
    with pytest.raises(InputError, match="says everything about its basis"):
        mi.load_basis(tmp_path, site="resid_pre.1")


def test_a_neighbouring_site_that_fits_much_better_is_a_warning(model, caplog):
    basis = mi.load_basis("bundled:resid_pre.2")
    near = replace(basis, sites_in=(mi.Site("resid_mid", 2),), sites_out=(mi.Site("resid_mid", 2),))
    with caplog.at_level(logging.WARNING):
        found = check_basis(model, near)
    assert found is not None and 0.1 < found.fvu < 1
    assert "Is its site right?" in caplog.text and "resid_pre.2" in caplog.text


def test_two_formats_in_one_folder_are_an_error(tmp_path):
    mi.save_basis(tmp_path, shifted())
    (tmp_path / "ae.pt").write_bytes(b"")
    with pytest.raises(FormatError, match="could be mechinterp or dictionary-learning; say which"):
        mi.load_basis(tmp_path)
    assert mi.load_basis(tmp_path, format="mechinterp") == shifted()


@pytest.mark.slow
def test_the_layers_of_a_cross_layer_transcoder_are_measured_together(tmp_path):
    """Planted: the MLP outputs are affine in what is read, up to a part that an earlier layer writes."""
    from safetensors.torch import save_file

    model = tiny("no-norm")
    values = model.run(
        TOKENS, record=["mlp_in.0", "mlp_in.1", "mlp_in.2", "mlp_out.0", "mlp_out.1", "mlp_out.2"]
    ).values
    n, d = 3, D_MODEL
    big = 1e4  # keeps every ReLU on
    encoders = [torch.linalg.qr(drawn(d, d, seed=i)).Q for i in range(n)]
    decoders = [torch.zeros(d, n - i, d).double() for i in range(n)]
    biases = []
    for i in range(n):
        rows = torch.cat([values[f"mlp_in.{j}"].flatten(0, 1) @ encoders[j] + big for j in range(i + 1)], 1)
        target = values[f"mlp_out.{i}"].flatten(0, 1)
        mean = rows.mean(0), target.mean(0)
        found = torch.linalg.lstsq(rows - mean[0], target - mean[1], driver="gelsd").solution
        biases.append(mean[1] - mean[0] @ found)
        for j, part in enumerate(found.split(d)):
            decoders[j][:, i - j] = part
    for i in range(n):
        own = {f"W_enc_{i}": encoders[i].T.contiguous(), f"b_enc_{i}": torch.full((d,), big).double()}
        save_file(own | {f"b_dec_{i}": biases[i]}, tmp_path / f"W_enc_{i}.safetensors")
        save_file({f"W_dec_{i}": decoders[i]}, tmp_path / f"W_dec_{i}.safetensors")
    (tmp_path / "config.yaml").write_text("feature_input_hook: mlp.hook_in\n")
    assert len(mi.load_bases(tmp_path, model=model, check=TOKENS)) == 3
    (tmp_path / "config.yaml").write_text("feature_input_hook: hook_resid_pre\n")
    with pytest.raises(InputError, match="unexplained by all its layers together"):
        mi.load_bases(tmp_path, model=model, check=TOKENS)
    assert len(mi.load_bases(tmp_path, model=model, check=False)) == 3
