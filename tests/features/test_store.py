"""Our own folder of a basis: what is saved is what is loaded, to the bit, and anything else is refused."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

import mechinterp as mi
from mechinterp.base.errors import FormatError, InputError, UnsupportedError
from mechinterp.features.activations import Gated, GroupMax, JumpRelu, TopK
from mechinterp.features.matching_pursuit import MatchingPursuit
from mechinterp.models.feature_basis import BasisSource
from mechinterp.models.sites import Site

D, F = 6, 12
SITE = Site("resid_pre", 1)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def kinds() -> dict:
    W, V, b = drawn(D, F), drawn(F, D, seed=1), drawn(F, seed=2)
    source = BasisSource("somewhere", "saelens", "0" * 40, {"a.json": "1" * 64}, {"model": "gpt2"})
    layers = mi.cross_layer_transcoder(["mlp_in.0"], ["mlp_out.0"], W[None], [V[:, None]])
    cross = mi.crosscoder([SITE, "resid_pre.2"], drawn(2, D, F), drawn(F, 2, D))
    return {
        "relu": mi.sae(SITE, W, V, b_enc=b, source=source, label="mine", normalize="layer_norm"),
        "jumprelu": mi.sae(SITE, W, V, activation=JumpRelu(b.abs()), subtract_b_dec=True, prefixes=(3, 12)),
        "threshold": mi.sae(SITE, W.half(), V.half(), activation=JumpRelu(torch.tensor(0.3))),
        "topk": mi.sae(SITE, W, V, activation=TopK(3)),
        "groupmax": mi.sae(SITE, W, V, activation=GroupMax(3)),
        "gated": mi.sae(SITE, W, V, activation=Gated(b, -b, b / 2)),
        "skip": mi.transcoder("mlp_in.0", "mlp_out.0", W, V, W_skip=drawn(D, D)),
        "last layer": layers[0],
        "crosscoder": cross,
        "models": mi.crosscoder([SITE, SITE], drawn(2, D, F), drawn(F, 2, D), models=["base", "chat"]),
        "subspace": mi.svd_basis(SITE, drawn(9, D), 2),
        "pursuit": MatchingPursuit((SITE,), (SITE,), V, drawn(D), residual_threshold=0.5, steps=4, stop_at_old=False),
        "neurons": mi.neuron_basis("mlp_post.1", 7),
    }


@pytest.mark.parametrize("kind", kinds())
def test_a_basis_is_loaded_as_it_was_saved(tmp_path, kind):
    basis = kinds()[kind]
    mi.save_basis(tmp_path / "one", basis, card={"fvu": 0.25})
    again = mi.load_basis(tmp_path / "one")
    assert again == basis and repr(again) == repr(basis) and again.source == basis.source
    for name, tensor in basis.tensors().items():
        assert torch.equal(again.tensors()[name], tensor) and again.tensors()[name].dtype == tensor.dtype
    assert json.loads((tmp_path / "one" / "basis.json").read_text())["card"] == {"fvu": 0.25}


def test_saving_twice_leaves_two_files_and_no_old_one(tmp_path):
    for kind in ("relu", "topk"):
        mi.save_basis(tmp_path, kinds()[kind])
    assert len(list(tmp_path.iterdir())) == 2 and mi.load_basis(tmp_path) == kinds()["topk"]


def test_an_interrupted_write_leaves_the_old_basis(tmp_path, monkeypatch):
    from mechinterp.features import store

    mi.save_basis(tmp_path, kinds()["relu"])
    write = store.write_whole

    def fail_at_json(path, data):
        if os.fspath(path).endswith(".json"):
            raise KeyboardInterrupt
        write(path, data)

    monkeypatch.setattr(store, "write_whole", fail_at_json)
    with pytest.raises(KeyboardInterrupt):
        mi.save_basis(tmp_path, kinds()["topk"])
    assert mi.load_basis(tmp_path) == kinds()["relu"]


def test_a_changed_byte_is_refused(tmp_path):
    mi.save_basis(tmp_path, kinds()["relu"])
    (tensors,) = tmp_path.glob("*.safetensors")
    data = bytearray(tensors.read_bytes())
    data[-1] ^= 1
    tensors.write_bytes(data)
    with pytest.raises(FormatError, match=r"was changed after it was written: it has sha256"):
        mi.load_basis(tmp_path)


CHANGES = {
    "another site": ({"sites_in": ["resid_pre.2"], "sites_out": ["resid_pre.2"]}, "was changed after it was written"),
    "another rule": ({"settings": {"subtract_b_dec": True}}, "was changed after it was written"),
    "no site": ({"sites_in": ["nowhere.2"]}, "Unknown site"),
    "an unknown key": ({"more": 1}, "unknown key 'more'"),
    "a later version": ({"version": 2}, "not a feature basis of version 1"),
    "another kind": ({"kind": "pickle"}, "kind 'pickle'; known are"),
    "a path": ({"file": "../x.safetensors"}, "not the name of a file of tensors"),
    "another activation": ({"settings": {"activation": {"name": "exec"}}}, "activation 'exec' are not known"),
    "a number of a rule": ({"settings": {"activation": {"name": "relu", "k": 3}}}, "unexpected keyword argument"),
    "no list": ({"settings": {"models": "ab"}}, "'models' must be a list"),
    "no text": ({"label": 3}, "'label' must be a text"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_description_is_refused_in_one_line(tmp_path, name):
    change, message = CHANGES[name]
    mi.save_basis(tmp_path, kinds()["relu"])
    content = json.loads((tmp_path / "basis.json").read_text())
    for key, value in change.items():
        content[key] = {**content[key], **value} if isinstance(value, dict) else value
    (tmp_path / "basis.json").write_text(json.dumps(content))
    with pytest.raises(FormatError, match=message) as caught:
        mi.load_basis(tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


def test_tensors_that_do_not_belong_are_refused(tmp_path):
    mi.save_basis(tmp_path, kinds()["pursuit"])
    (tensors,) = tmp_path.glob("*.safetensors")
    save_file({**load_file(tensors), "more": torch.zeros(1)}, tensors)
    content = json.loads((tmp_path / "basis.json").read_text())
    import hashlib

    content["file_sha256"] = hashlib.sha256(tensors.read_bytes()).hexdigest()
    (tmp_path / "basis.json").write_text(json.dumps(content))
    with pytest.raises(FormatError, match="matching pursuit has W_dec and b_dec"):
        mi.load_basis(tmp_path)


def test_a_wrapped_object_is_used_and_not_saved(tmp_path):
    plain = kinds()["relu"]

    class Mine(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.W = torch.nn.Parameter(plain.W_enc[0])

        def encode(self, x):
            return (x @ self.W).relu()

        def decode(self, f):
            return f @ plain.writes() + 1

    basis = mi.wrap_basis(Mine(), SITE, width=D)
    x = drawn(4, D, seed=5)
    torch.testing.assert_close(basis.encode(x).values, (x @ plain.W_enc[0]).relu())
    torch.testing.assert_close(basis.writes([1, 2]), plain.writes([1, 2]))
    torch.testing.assert_close(basis.decode(basis.encode(x))[SITE] + basis.error(x), x)
    assert basis.n_features == F and basis == mi.wrap_basis(Mine(), SITE, width=D)
    assert basis != mi.wrap_basis(Mine(), "resid_pre.2", width=D)  # or a run would take one for the other
    with pytest.raises(UnsupportedError, match="cannot be saved"):
        mi.save_basis(tmp_path, basis)
    Mine.decode = lambda self, f: f.square() @ plain.writes()
    with pytest.raises(UnsupportedError, match="not affine"):
        mi.wrap_basis(Mine(), SITE, width=D)
    with pytest.raises(InputError, match="no encode and no decode"):
        mi.wrap_basis(object(), SITE, width=D)


def test_places_that_do_not_exist(tmp_path):
    with pytest.raises(InputError, match="no folder"):
        mi.load_basis(tmp_path / "none")
    with pytest.raises(FormatError, match="holds no known feature basis"):
        mi.load_basis(tmp_path)
    with pytest.raises(InputError, match="not cached and the hub cannot be reached"):
        mi.load_basis("org/name/folder@main")
    with pytest.raises(InputError, match="Two revisions"):
        mi.load_basis("org/name/folder@main", revision="other")
    with pytest.raises(InputError, match="not the path of a folder"):
        mi.load_basis("org/name/../folder")
    with pytest.raises(InputError, match="Unknown format"):
        mi.load_basis(tmp_path, format="pickle")


def test_a_folder_of_a_repository_is_loaded_at_its_commit(tmp_path, monkeypatch):
    import huggingface_hub

    commit, asked = "a" * 40, []
    place = tmp_path / commit
    mi.save_basis(place / "layer_3", kinds()["relu"])
    torch.save(
        {"W_enc": drawn(F, D), "W_dec": drawn(D, F), "b_enc": drawn(F), "b_dec": drawn(D)}, place / "layer2.sae.pt"
    )

    def stand_in(repo, *, revision, allow_patterns):
        asked.append((repo, revision, allow_patterns))
        return str(place)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", stand_in)
    assert mi.load_basis("org/name/layer_3@v1") == kinds()["relu"]
    repo, revision, patterns = asked[-1]
    assert (repo, revision) == ("org/name", "v1") and "layer_3/*.safetensors" in patterns
    assert not any(pattern.endswith((".py", "*")) for pattern in patterns)
    basis = mi.load_basis("org/name/layer2.sae.pt", revision="v2", k=2)
    assert asked[-1][1] == "v2" and basis.source.where == "org/name/layer2.sae.pt" and basis.source.revision == commit
    assert basis.sites_in == (Site("resid_post", 2),)
    with pytest.raises(InputError, match="has no folder 'layer_9' at 'main'"):
        mi.load_basis("org/name/layer_9")

    def unreachable(*_, **__):
        raise huggingface_hub.errors.OfflineModeIsEnabled("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(InputError, match="the hub cannot be reached; give a folder on disk"):
        mi.load_basis("org/name/layer_3")
