"""Readers of other tools' files: a small file of each layout, and the encoding that its tool defines.

In November 2026 the readers were compared with the tools' own `encode` and `decode` on random weights: sae_lens
6.54.12 (standard, top-k with and without rescaling, gated, JumpReLU, matching pursuit, both normalisations, four
transcoders), eai-sparsify 1.3.3 (top-k, groupmax, transcoders with and without skip), dictionary_learning 0.1.0 (all
seven classes) and circuit-tracer 0.5.0 (per layer, with and without skip, and across layers). All agree to 6e-6 in
float32. Where one tool's reader of another tool's files differs, the file's own tool is followed: sae_lens reads
sparsify's `W_dec` transposed (and subtracts the bias by another rule); circuit-tracer's `load_gemma_scope_2_clt` leaves
out the last layer.
"""

from __future__ import annotations

import json
import math
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

import mechinterp as mi
from mechinterp.base.errors import FormatError, InputError, MechInterpError, UnsupportedError
from mechinterp.models.sites import Site
from tests.support.models_tiny import D_MODEL, tiny

D, F = 6, 12
B_ENC = torch.linspace(-0.5, 0.5, F)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X, W_ENC, W_DEC, B_DEC = drawn(5, D), drawn(D, F, seed=1), drawn(F, D, seed=2), drawn(D, seed=3)
THETA, SKIP = drawn(F, seed=4).abs(), drawn(D, D, seed=5)


def write(folder: Path, tensors: dict | None = None, weights: str = "", **texts) -> Path:
    """A folder with tensors (by the suffix of their file) and JSON or YAML files (`cfg_json={...}`)."""
    folder.mkdir(parents=True, exist_ok=True)
    if tensors is not None:
        path = folder / weights
        path.parent.mkdir(exist_ok=True)
        if weights.endswith(".npz"):
            np.savez(path, **{name: value.numpy() for name, value in tensors.items()})
        elif weights.endswith(".pt"):
            torch.save(tensors, path)
        else:
            save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    for name, content in texts.items():
        stem, _, suffix = name.rpartition("_")
        dump = json.dumps if suffix == "json" else yaml.safe_dump
        (folder / f"{stem}.{suffix}").write_text(dump(content))
    return folder


def top(pre: torch.Tensor, k: int) -> torch.Tensor:
    pre = pre.relu()
    return pre * (pre >= pre.sort(-1, descending=True).values[:, k - 1 : k])


def jump(pre: torch.Tensor, theta: torch.Tensor = THETA) -> torch.Tensor:
    return pre.relu() * (pre > theta)


def check(basis, features: torch.Tensor, reconstruction: torch.Tensor, *sites: str, x: torch.Tensor = X) -> None:
    """The basis reads and writes these sites, and gives these features and this reconstruction."""
    assert [str(site) for site in (*basis.sites_in, *basis.sites_out)] == list(sites)
    code = basis.encode(x)
    torch.testing.assert_close(code.values, features, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(basis.decode(code)[basis.sites_out[0]], reconstruction, atol=1e-5, rtol=1e-5)
    assert 0 < int((features != 0).sum()) < features.numel()


# --- SAELens -------------------------------------------------------------------------------------------------------

PLAIN = {"W_enc": W_ENC, "W_dec": W_DEC, "b_enc": B_ENC, "b_dec": B_DEC}
META = {"model_name": "gpt2", "hook_name": "blocks.3.hook_resid_pre", "prepend_bos": True}


def saelens(folder, tensors, **cfg):
    return write(folder, tensors, "sae_weights.safetensors", cfg_json={"metadata": META, **cfg})


def test_saelens_standard(tmp_path):
    basis = mi.load_basis(saelens(tmp_path, PLAIN, architecture="standard", apply_b_dec_to_input=True))
    features = ((X - B_DEC) @ W_ENC + B_ENC).relu()
    check(basis, features, features @ W_DEC + B_DEC, "resid_pre.3", "resid_pre.3")
    assert basis.source.format == "saelens" and basis.source.about["model"] == "gpt2"
    assert set(basis.source.sha256) == {"cfg.json", "sae_weights.safetensors"}


def test_saelens_before_version_6(tmp_path):
    cfg = {"hook_point": "blocks.2.hook_resid_post", "activation_fn_str": "relu", "normalize_activations": False}
    folder = write(tmp_path, PLAIN, "sae_weights.safetensors", cfg_json={**cfg, "apply_b_dec_to_input": False})
    features = (X @ W_ENC + B_ENC).relu()
    check(mi.load_basis(folder), features, features @ W_DEC + B_DEC, "resid_post.2", "resid_post.2")
    cfg |= {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}}
    folder = write(tmp_path / "k", PLAIN, "sae_weights.safetensors", cfg_json=cfg)
    features = top((X - B_DEC) @ W_ENC + B_ENC, 3)  # b_dec is subtracted unless it says otherwise
    check(mi.load_basis(folder), features, features @ W_DEC + B_DEC, "resid_post.2", "resid_post.2")


def test_saelens_jumprelu_gated_and_topk(tmp_path):
    folder = saelens(tmp_path / "a", {**PLAIN, "threshold": THETA}, architecture="jumprelu", apply_b_dec_to_input=False)
    features = jump(X @ W_ENC + B_ENC)
    check(mi.load_basis(folder), features, features @ W_DEC + B_DEC, "resid_pre.3", "resid_pre.3")
    gate, mag, r = drawn(F, seed=6), drawn(F, seed=7), drawn(F, seed=8) / 2
    tensors = {"W_enc": W_ENC, "W_dec": W_DEC, "b_dec": B_DEC, "b_gate": gate, "b_mag": mag, "r_mag": r}
    features = ((X - B_DEC) @ W_ENC + gate > 0) * ((X - B_DEC) @ (W_ENC * r.exp()) + mag).relu()
    basis = mi.load_basis(saelens(tmp_path / "b", tensors, architecture="gated"))
    check(basis, features, features @ W_DEC + B_DEC, "resid_pre.3", "resid_pre.3")
    settings = {"architecture": "topk", "k": 4, "apply_b_dec_to_input": False, "rescale_acts_by_decoder_norm": True}
    basis = mi.load_basis(saelens(tmp_path / "c", PLAIN, **settings))
    features = top((X @ W_ENC + B_ENC) * W_DEC.norm(dim=1), 4)
    check(basis, features, features / W_DEC.norm(dim=1) @ W_DEC + B_DEC, "resid_pre.3", "resid_pre.3")


def test_saelens_heads_and_normalisations(tmp_path):
    meta = {"hook_name": "blocks.3.attn.hook_z"}
    folder = saelens(tmp_path / "a", PLAIN, architecture="standard", reshape_activations="hook_z", metadata=meta)
    basis, heads = mi.load_basis(folder), X.unflatten(-1, (2, 3))
    features = ((X - B_DEC) @ W_ENC + B_ENC).relu()
    check(basis, features, (features @ W_DEC + B_DEC).unflatten(-1, (2, 3)), "z.3", "z.3", x=heads)
    folder = saelens(tmp_path / "b", PLAIN, architecture="standard", normalize_activations="layer_norm")
    mean, std = X.mean(-1, keepdim=True), X.std(-1, keepdim=True)
    features = (((X - mean) / (std + 1e-5) - B_DEC) @ W_ENC + B_ENC).relu()
    check(mi.load_basis(folder), features, (features @ W_DEC + B_DEC) * std + mean, "resid_pre.3", "resid_pre.3")
    folder = saelens(tmp_path / "c", PLAIN, architecture="standard", normalize_activations="expected_average_only_in")
    with pytest.raises(FormatError, match="give it as input_scale="):
        mi.load_basis(folder)
    basis = mi.load_basis(folder, input_scale=2.0)
    features = ((2 * X - B_DEC) @ W_ENC + B_ENC).relu()
    check(basis, features, (features @ W_DEC + B_DEC) / 2, "resid_pre.3", "resid_pre.3")


def test_saelens_transcoders(tmp_path):
    meta = {"hook_name": "blocks.1.ln2.hook_normalized", "hook_name_out": "blocks.1.hook_mlp_out"}
    tensors = {**PLAIN, "W_skip": SKIP, "threshold": THETA}
    cfg = {"metadata": meta, "architecture": "jumprelu_skip_transcoder", "apply_b_dec_to_input": False}
    basis = mi.load_basis(saelens(tmp_path, tensors, **cfg))
    features = jump(X @ W_ENC + B_ENC)
    check(basis, features, features @ W_DEC + B_DEC + X @ SKIP.T, "mlp_in.1", "mlp_out.1")
    assert basis.kind == "skip transcoder" and basis.name == "m1"
    cfg["architecture"] = "transcoder"
    with pytest.raises(FormatError, match="does not fit its tensors"):
        mi.load_basis(saelens(tmp_path, tensors, **cfg))


def test_saelens_matching_pursuit(tmp_path):
    directions = torch.nn.functional.normalize(W_DEC, dim=1)
    tensors = {"W_dec": directions, "b_dec": B_DEC}
    cfg = {"architecture": "matching_pursuit", "residual_threshold": 0.05, "max_iterations": 3}
    basis = mi.load_basis(saelens(tmp_path / "a", tensors, apply_b_dec_to_input=True, **cfg))
    first = ((X - B_DEC) @ directions.T).argmax(-1)
    assert bool((basis.encode(X).values.gather(1, first[:, None]) > 0).all())
    torch.testing.assert_close(
        basis.decode(basis.encode(X).with_values(torch.zeros(5, F)))[Site("resid_pre", 3)][0], B_DEC
    )
    basis = mi.load_basis(saelens(tmp_path / "b", tensors, apply_b_dec_to_input=False, **cfg))
    assert not basis.b_dec.any()  # a tied dictionary adds the bias only where it subtracts it


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "temporal"}, "architecture 'temporal', which is not supported"),
        ({"normalize_activations": "covariance_whitening"}, "which is not supported"),
        ({"metadata": {"hook_name": "blocks.3.hook_nowhere"}}, "unknown hook point 'blocks.3.hook_nowhere'"),
        ({"metadata": {}}, "does not say which site it reads"),
        ({"metadata": {**META, "hook_head_index": 3}}, "one head of a site"),
        ({"architecture": "topk", "k": 99}, "from 1 to 12; got 99"),
        ({"architecture": "jumprelu"}, "no tensor 'threshold'"),
        ({"activation_fn": "tanh-relu"}, "activation function 'tanh-relu'"),
    ],
)
def test_what_saelens_folders_cannot_say(tmp_path, change, message):
    folder = saelens(tmp_path, PLAIN, **{"architecture": "standard", **change})
    with pytest.raises(MechInterpError, match=message) as caught:
        mi.load_basis(folder)
    assert "\n" not in str(caught.value)


def test_a_site_that_is_given_comes_before_that_of_the_files(tmp_path):
    folder = saelens(tmp_path, PLAIN, architecture="standard", metadata={"hook_name": "blocks.3.hook_nowhere"})
    assert mi.load_basis(folder, site="resid_pre.7").sites_out == (Site("resid_pre", 7),)


# --- Gemma Scope ---------------------------------------------------------------------------------------------------


def test_gemma_scope(tmp_path):
    folder = tmp_path / "gemma-scope-2b-pt-res" / "layer_20" / "width_16k" / "average_l0_71"
    write(folder, {**PLAIN, "threshold": THETA}, "params.npz")
    features = jump(X @ W_ENC + B_ENC)
    check(mi.load_basis(folder), features, features @ W_DEC + B_DEC, "resid_post.20", "resid_post.20")
    for repository, sites in (("transcoders", ("mlp_in", "mlp_out")), ("mlp", ("mlp_out",) * 2), ("att", ("z",) * 2)):
        other = tmp_path / f"gemma-scope-2b-pt-{repository}" / "layer_3"
        basis = mi.load_basis(write(other, {**PLAIN, "threshold": THETA}, "params.npz"))
        assert (basis.sites_in[0], basis.sites_out[0]) == (Site(sites[0], 3), Site(sites[1], 3))


def test_gemma_scope_of_embeddings_is_scaled_bias_included(tmp_path):
    folder = tmp_path / "gemma-scope-2b-pt-res" / "embedding" / "width_4k"
    basis = mi.load_basis(write(folder, {**PLAIN, "threshold": THETA}, "params.npz"))
    features = jump(X / D**0.5 @ W_ENC + B_ENC)
    check(basis, features, (features @ W_DEC + B_DEC) * D**0.5, "embed", "embed")


def test_an_npz_with_objects_is_refused(tmp_path):
    np.savez(tmp_path / "params.npz", W_enc=np.array([{"run": print}], dtype=object))
    with pytest.raises(FormatError, match="is not an npz file of floats"):
        mi.load_basis(tmp_path, site="resid_pre.1")


def test_an_npz_that_promises_more_than_it_holds_is_refused(tmp_path):
    import io

    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (10**12,)})
    with zipfile.ZipFile(tmp_path / "params.npz", "w") as archive:
        archive.writestr("W_enc.npy", header.getvalue() + b"\x00" * 16)
    with pytest.raises(FormatError, match="does not have the size that it states"):
        mi.load_basis(tmp_path, site="resid_pre.1")
    with zipfile.ZipFile(tmp_path / "params.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("W_enc.npy", b"\x00" * 10**8)
    with pytest.raises(FormatError, match="is too large, or holds too many arrays"):
        mi.load_basis(tmp_path, site="resid_pre.1")


def test_floats_of_eight_bits_are_refused(tmp_path):
    tensors = {name: value.to(torch.float8_e4m3fn) for name, value in PLAIN.items()}
    with pytest.raises(FormatError, match="is of type float8_e4m3fn, not supported"):
        mi.load_basis(saelens(tmp_path, tensors, architecture="standard"))


def test_gemma_scope_2(tmp_path):
    tensors = {"w_enc": W_ENC, "w_dec": W_DEC, "b_enc": B_ENC, "b_dec": B_DEC, "threshold": THETA}
    cfg = {"architecture": "jump_relu", "model_name": "gemma-v3-1b-pt", "hf_hook_point_in": "model.layers.5.output"}
    folder = write(tmp_path / "a", tensors, "params.safetensors", config_json=cfg)
    features = jump(X @ W_ENC + B_ENC)
    check(mi.load_basis(folder), features, features @ W_DEC + B_DEC, "resid_post.5", "resid_post.5")
    cfg |= {
        "hf_hook_point_in": "model.layers.5.pre_feedforward_layernorm.output",
        "hf_hook_point_out": "model.layers.5.post_feedforward_layernorm.output",
        "affine_connection": True,
    }
    tensors["affine_skip_connection"] = SKIP
    folder = write(tmp_path / "b", tensors, "params.safetensors", config_json=cfg)
    check(mi.load_basis(folder), features, features @ W_DEC + B_DEC + X @ SKIP, "mlp_in.5", "mlp_out.5")


def test_gemma_scope_2_cross_layer_has_every_layer(tmp_path):
    n, decoders = 3, drawn(3, F, 3, D, seed=9)
    for i in range(n):
        tensors = {"w_enc": W_ENC + i, "w_dec": decoders[i], "b_enc": B_ENC, "b_dec": B_DEC + i, "threshold": THETA}
        write(tmp_path, tensors, f"layer_{i}_width_16k_l0_big.safetensors")
    bases = mi.load_bases(tmp_path)
    assert [basis.name for basis in bases] == ["m0", "m1", "m2"]
    last = Site("mlp_out", 2)
    total = sum(basis.decode(basis.encode(X))[last] for basis in bases)
    expected = B_DEC + 2 + sum(jump(X @ (W_ENC + i) + B_ENC) @ decoders[i, :, 2] for i in range(n))
    torch.testing.assert_close(total, expected)
    assert mi.load_basis(tmp_path, layer=1) == bases[1]
    with pytest.raises(InputError, match=r"holds 3 bases \(m0, m1, m2\); give layer="):
        mi.load_basis(tmp_path)


# --- dictionary_learning -------------------------------------------------------------------------------------------

LINEAR = {"encoder.weight": W_ENC.T, "decoder.weight": W_DEC.T, "encoder.bias": B_ENC}


def state(**tensors) -> OrderedDict:
    """A state_dict as torch makes it, with the attribute that its pickle sets."""
    found = OrderedDict({name.replace("__", "."): value for name, value in tensors.items()})
    found._metadata = OrderedDict({"": {"version": 1}})  # pyright: ignore[reportAttributeAccessIssue]
    return found


def learned(folder, kind: str, tensors, **more):
    trainer = {"dict_class": kind, "submodule_name": "resid_post_layer_4", "lm_name": "gpt2", **more}
    return write(folder, state(**tensors), "ae.pt", config_json={"trainer": trainer, "buffer": {}})


@pytest.mark.parametrize("kind", ["AutoEncoder", "AutoEncoderNew", "AutoEncoderTopK", "BatchTopKSAE"])
def test_dictionary_learning_with_linear_layers(tmp_path, kind):
    k, theta = torch.tensor(3, dtype=torch.int32), torch.tensor(0.4)
    own = {
        "AutoEncoder": {"bias": B_DEC},
        "AutoEncoderNew": {"decoder.bias": B_DEC},
        "AutoEncoderTopK": {"b_dec": B_DEC, "k": k, "threshold": theta},
        "BatchTopKSAE": {"b_dec": B_DEC, "k": k, "threshold": theta},
    }[kind]
    basis = mi.load_basis(learned(tmp_path, kind, {**LINEAR, **own}))
    pre = (X - B_DEC * (kind != "AutoEncoderNew")) @ W_ENC + B_ENC
    features = {"AutoEncoderTopK": top(pre, 3), "BatchTopKSAE": jump(pre, theta)}.get(kind, pre.relu())
    check(basis, features, features @ W_DEC + B_DEC, "resid_post.4", "resid_post.4")


def test_dictionary_learning_without_linear_layers(tmp_path):
    direct = {"W_enc": W_ENC, "W_dec": W_DEC, "b_enc": B_ENC, "b_dec": B_DEC}
    basis = mi.load_basis(learned(tmp_path / "a", "JumpReluAutoEncoder", {**direct, "threshold": THETA}))
    features = jump(X @ W_ENC + B_ENC)  # b_dec is not subtracted
    check(basis, features, features @ W_DEC + B_DEC, "resid_post.4", "resid_post.4")
    tensors = {**direct, "threshold": torch.tensor(0.4), "k": torch.tensor(3), "group_sizes": torch.tensor([4, 8])}
    basis = mi.load_basis(learned(tmp_path / "b", "MatryoshkaBatchTopKSAE", tensors))
    features = jump((X - B_DEC) @ W_ENC + B_ENC, torch.tensor(0.4))
    check(basis, features, features @ W_DEC + B_DEC, "resid_post.4", "resid_post.4")
    assert basis.prefixes == (4, 12)
    gate, mag, r = drawn(F, seed=6), drawn(F, seed=7), drawn(F, seed=8) / 2
    tensors = {"encoder.weight": W_ENC.T, "decoder.weight": W_DEC.T, "decoder_bias": B_DEC}
    tensors |= {"gate_bias": gate, "mag_bias": mag, "r_mag": r}
    basis = mi.load_basis(learned(tmp_path / "c", "GatedAutoEncoder", tensors))
    pre = (X - B_DEC) @ W_ENC
    features = (pre + gate > 0) * (r.exp() * pre + mag).relu()
    check(basis, features, features @ W_DEC + B_DEC, "resid_post.4", "resid_post.4")


def test_dictionary_learning_without_a_config(tmp_path):
    write(tmp_path, state(**LINEAR, b_dec=B_DEC, k=torch.tensor(3), threshold=torch.tensor(0.4)), "ae.pt")
    with pytest.raises(FormatError, match="top-k or batch-top-k"):
        mi.load_basis(tmp_path, site="resid_pre.1")
    features = top((X - B_DEC) @ W_ENC + B_ENC, 2)
    check(mi.load_basis(tmp_path, site="resid_pre.1", k=2), features, features @ W_DEC + B_DEC, *["resid_pre.1"] * 2)
    with pytest.raises(FormatError, match="does not say which site"):
        mi.load_basis(tmp_path, k=2)
    tensors = {**LINEAR, "b_dec": B_DEC, "k": torch.tensor(3), "threshold": torch.tensor(-1.0)}
    with pytest.raises(FormatError, match="has no threshold"):
        mi.load_basis(learned(tmp_path, "BatchTopKSAE", tensors))


class Runs:
    def __reduce__(self):
        return (exec, ("raise SystemExit('this was run')",))


def test_a_pickle_in_a_torch_file_is_never_run(tmp_path):
    torch.save({"W_enc": Runs()}, tmp_path / "ae.pt")
    with pytest.raises(FormatError, match="holds more than plain values"):
        mi.load_basis(tmp_path, site="resid_pre.1")
    (tmp_path / "ae.pt").write_bytes(pickle.dumps(Runs()))
    with pytest.raises(FormatError, match="Pickles are never read"):
        mi.load_basis(tmp_path, site="resid_pre.1")


def test_attributes_are_set_on_a_state_dict_only(tmp_path):
    hidden = state(**LINEAR, bias=B_DEC)
    hidden.itemz = 3  # pyright: ignore[reportAttributeAccessIssue]
    write(tmp_path, hidden, "ae.pt")
    with zipfile.ZipFile(tmp_path / "ae.pt") as archive:
        entries = {name: archive.read(name).replace(b"itemz", b"items") for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "ae.pt", "w") as archive:  # what is loaded has an attribute over its method
        for name, data in entries.items():
            archive.writestr(name, data)
    assert mi.load_basis(tmp_path, site="resid_pre.1").n_features == F
    parameter = torch.nn.Parameter(W_ENC)
    parameter.extra = 3  # pyright: ignore[reportAttributeAccessIssue]
    write(tmp_path, {"W_enc": parameter}, "ae.pt")
    with pytest.raises(FormatError):
        mi.load_basis(tmp_path, site="resid_pre.1")


# --- eai-sparsify --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["topk", "groupmax"])
@pytest.mark.parametrize("normalize", [True, False])
def test_sparsify(tmp_path, activation, normalize):
    tensors = {"encoder.weight": W_ENC.T, "encoder.bias": B_ENC, "W_dec": W_DEC, "b_dec": B_DEC}
    cfg = {"d_in": D, "k": 3, "activation": activation, "normalize_decoder": normalize, "transcode": False}
    folder = write(tmp_path / "layers.4", tensors, "sae.safetensors", cfg_json=cfg)
    pre = (X - B_DEC) @ W_ENC + B_ENC
    groups = pre.relu().unflatten(-1, (3, -1))
    largest = (groups * (groups == groups.max(-1, keepdim=True).values)).flatten(-2)
    features = top(pre, 3) if activation == "topk" else largest
    check(mi.load_basis(folder), features, features @ W_DEC + B_DEC, "resid_post.4", "resid_post.4")


def test_sparsify_transcoders_do_not_subtract_and_may_skip(tmp_path):
    tensors = {"encoder.weight": W_ENC.T, "encoder.bias": B_ENC, "W_dec": W_DEC, "b_dec": B_DEC, "W_skip": SKIP}
    cfg = {"d_in": D, "k": 3, "transcode": True, "skip_connection": True}
    folder = write(tmp_path / "layers.4.mlp", tensors, "sae.safetensors", cfg_json=cfg)
    features = top(X @ W_ENC + B_ENC, 3)
    check(mi.load_basis(folder), features, features @ W_DEC + B_DEC + X @ SKIP.T, "mlp_in.4", "mlp_out.4")
    folder = write(tmp_path / "layers.4.attention", tensors, "sae.safetensors", cfg_json=cfg)
    with pytest.raises(FormatError, match="give its sites"):
        mi.load_basis(folder)
    cfg["signed"] = True
    with pytest.raises(UnsupportedError, match="signed"):
        mi.load_basis(write(folder, tensors, "sae.safetensors", cfg_json=cfg))


# --- circuit-tracer ------------------------------------------------------------------------------------------------


def test_circuit_tracer_transcoders(tmp_path):
    for i in range(2):
        tensors = {"W_enc": (W_ENC + i).T, "W_dec": W_DEC, "b_enc": B_ENC, "b_dec": B_DEC, "W_skip": SKIP}
        if i:
            tensors["activation_function.threshold"] = THETA
        write(tmp_path, tensors, f"layer_{i}.safetensors")
    cfg = {"model_name": "x", "model_kind": "transcoder_set", "feature_input_hook": "hook_resid_mid"}
    cfg |= {
        "feature_output_hook": "mlp.hook_out",
        "transcoders": ["hf://org/name/layer_0.safetensors", "layer_1.safetensors"],
    }
    write(tmp_path, config_yaml=cfg)
    first, second = mi.load_bases(tmp_path)
    features = (X @ W_ENC + B_ENC).relu()
    check(first, features, features @ W_DEC + B_DEC + X @ SKIP.T, "resid_mid.0", "mlp_out.0")
    features = jump(X @ (W_ENC + 1) + B_ENC)
    check(second, features, features @ W_DEC + B_DEC + X @ SKIP.T, "resid_mid.1", "mlp_out.1")
    write(tmp_path, config_yaml={**cfg, "k": 3})
    features = top(X @ W_ENC + B_ENC, 3)
    check(mi.load_basis(tmp_path, layer=0), features, features @ W_DEC + B_DEC + X @ SKIP.T, "resid_mid.0", "mlp_out.0")
    write(tmp_path, config_yaml={**cfg, "transcoders": ["../../etc/passwd"]})
    with pytest.raises(FormatError, match="leads out of the folder"):
        mi.load_bases(tmp_path)
    # The place in the list is the layer; a file named after another layer would be read at the wrong one in silence.
    write(tmp_path, config_yaml={**cfg, "transcoders": ["layer_1.safetensors"]})
    with pytest.raises(FormatError, match="place 0 of 'transcoders', which is its layer, has 'layer_1"):
        mi.load_bases(tmp_path)


def test_circuit_tracer_sites_are_those_of_the_model(tmp_path):
    """`mlp.hook_out` is before a post-norm: for one basis as for all, and for one read again without a model."""
    model = tiny("gemma2")
    for i in range(2):
        tensors = {"W_enc": drawn(F, D_MODEL), "W_dec": drawn(F, D_MODEL), "b_enc": B_ENC, "b_dec": drawn(D_MODEL)}
        write(tmp_path, tensors, f"layer_{i}.safetensors")
    cfg = {"model_kind": "transcoder_set", "feature_output_hook": "mlp.hook_out"}
    write(tmp_path, config_yaml={**cfg, "transcoders": ["layer_0.safetensors", "layer_1.safetensors"]})
    found = mi.load_bases(tmp_path, model=model, check=False)
    assert [basis.sites_out for basis in found] == [(Site("mlp_raw", 0),), (Site("mlp_raw", 1),)]
    one = mi.load_basis(tmp_path, model=model, check=False, layer=1)
    again = mi.load_basis(tmp_path, **one.source.options)
    assert one.sites_out == again.sites_out == (Site("mlp_raw", 1),) and again.sha256 == one.sha256 == found[1].sha256


def test_circuit_tracer_cross_layer(tmp_path):
    n, decoders = 3, [drawn(F, 3 - i, D, seed=20 + i) for i in range(3)]
    for i in range(n):
        own = {f"W_enc_{i}": (W_ENC + i).T, f"b_enc_{i}": B_ENC, f"b_dec_{i}": B_DEC + i, f"threshold_{i}": THETA}
        write(tmp_path, own, f"W_enc_{i}.safetensors")
        write(tmp_path, {f"W_dec_{i}": decoders[i]}, f"W_dec_{i}.safetensors")
    write(
        tmp_path,
        config_yaml={"model_name": "x", "model_kind": "cross_layer_transcoder", "feature_input_hook": "mlp.hook_in"},
    )
    bases = mi.load_bases(tmp_path)
    assert [len(basis.sites_out) for basis in bases] == [3, 2, 1] and bases[0].sites_in == (Site("mlp_in", 0),)
    total = sum(basis.decode(basis.encode(X))[Site("mlp_out", 2)] for basis in bases)
    expected = B_DEC + 2 + sum(jump(X @ (W_ENC + i) + B_ENC) @ decoders[i][:, 2 - i] for i in range(n))
    torch.testing.assert_close(total, expected)


def test_yaml_cannot_be_a_bomb(tmp_path):
    (tmp_path / "config.yaml").write_text("a: &a [x, x]\nb: &b [*a, *a]\nmodel_kind: transcoder_set\n")
    with pytest.raises(FormatError, match="anchors or aliases"):
        mi.load_bases(tmp_path)
    (tmp_path / "config.yaml").write_text("!!python/object/apply:os.system ['true']")
    with pytest.raises(FormatError, match="is not YAML"):
        mi.load_bases(tmp_path)


# --- Llama Scope and Qwen-Scope ------------------------------------------------------------------------------------


def test_llama_scope(tmp_path):
    tensors = {"encoder.weight": W_ENC.T, "encoder.bias": B_ENC, "decoder.weight": W_DEC.T, "decoder.bias": B_DEC}
    cfg = {"d_model": D, "d_sae": F, "jump_relu_threshold": 0.3, "dataset_average_activation_norm": {"in": 5.0}}
    cfg |= {"hook_point_in": "blocks.8.hook_resid_post", "act_fn": "jumprelu"}
    folder = write(tmp_path, tensors, "checkpoints/final.safetensors", hyperparams_json=cfg)
    scale = math.sqrt(D) / 5
    features = jump(scale * X @ W_ENC + B_ENC, torch.tensor(0.3 * scale))
    check(mi.load_basis(folder), features, (features @ W_DEC + B_DEC) / scale, "resid_post.8", "resid_post.8")


def test_qwen_scope(tmp_path):
    folder = tmp_path / "SAE-Res-Qwen3-1.7B-Base-W32K-L0_3"
    for i in (2, 10):
        write(folder, {"W_enc": W_ENC.T, "W_dec": W_DEC.T, "b_enc": B_ENC + i, "b_dec": B_DEC}, f"layer{i}.sae.pt")
    bases = mi.load_bases(folder)
    features = top(X @ W_ENC + B_ENC + 10, 3)
    check(bases[1], features, features @ W_DEC + B_DEC, "resid_post.10", "resid_post.10")
    assert mi.load_basis(folder / "layer2.sae.pt") == bases[0]


@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("blocks.3.hook_resid_pre", "resid_pre.3"),
        ("blocks.3.attn.hook_z", "z.3"),
        ("blocks.3.hook_mlp_in", "resid_mid.3"),
        ("hook_embed", "embed"),
        ("model.layers.3.self_attn.o_proj.input", "z.3"),
        ("transformer.h.3", "resid_post.3"),
        ("layers.3.mlp", "mlp_out.3"),
        ("gpt_neox.embed_in", "embed"),
        ("mlp_in.3", "mlp_in.3"),
    ],
)
def test_hook_points_of_other_tools(name, site):
    from mechinterp.features.hook_points import site_of_hook

    assert str(site_of_hook(name, "a file")) == site
