"""Files that are broken or made to harm: each is one clear error, and never anything else."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import mechinterp as mi
from mechinterp.base.canonical_json import MAX_DEPTH, parse_json
from mechinterp.base.errors import FormatError, MechInterpError
from mechinterp.circuit_file import store
from mechinterp.circuit_file.schema import circuit_sha256
from mechinterp.circuit_file.store import file_sha256, open_circuit_file
from tests.support import models_tiny as tiny

NAME, SIDECAR = "a.circuit.json", "a.scores.safetensors"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a valid pair of files."""
    folder = tmp_path_factory.mktemp("good")
    model = tiny.build("gpt2", dtype=torch.float32)
    graph = mi.build_graph(model)
    circuit = mi.select(graph, mi.score_edges(model, graph, tiny.pairs(), method="eap"), edges=30)
    mi.save_circuit(folder / NAME, circuit, model=model)
    return folder


@pytest.fixture
def place(tmp_path: Path, good: Path) -> Path:
    """The path of a copy of the valid pair, to be harmed."""
    for name in (NAME, SIDECAR):
        (tmp_path / name).write_bytes((good / name).read_bytes())
    return tmp_path / NAME


def refused(path: Path) -> str:
    """The message with which the file is refused: one line that names a file."""
    with pytest.raises(FormatError) as caught:
        mi.load_circuit(path)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600, message
    return message


def edited(path: Path, change: Callable[[dict[str, Any]], None], *, sealed: bool = True) -> Path:
    """The file with its content changed, and its hashes made right again: what somebody would do on purpose."""
    content = json.loads(path.read_text("utf-8"))
    change(content)
    path.write_text(json.dumps(content), "utf-8")
    if sealed:
        content["integrity"]["circuit_sha256"] = circuit_sha256(open_circuit_file(path).document)
        content["integrity"]["file_sha256"] = file_sha256(content)
        path.write_text(json.dumps(content), "utf-8")
    return path


def set_in(*place: str, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        for key in place[:-1]:
            content = content[key]
        content[place[-1]] = to

    return change


def with_sidecar(path: Path, content: bytes) -> Path:
    """The pair with another sidecar, its hash made right."""
    (path.parent / SIDECAR).write_bytes(content)
    return edited(path, set_in("integrity", "sidecar", "sha256", to=hashlib.sha256(content).hexdigest()))


def table(path: Path) -> torch.Tensor:
    return safetensors.torch.load_file(path.parent / SIDECAR)["scores"]


# -- the JSON ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty; JSON is expected"),
        (b"{", "not valid JSON"),
        (b"[]", "must hold a JSON object"),
        (b"null", "must hold a JSON object"),
        (b"{}", "kind is nothing"),
        (b"\xff\xfe{}", "not UTF-8 text"),
        (b"\xef\xbb\xbf{}", "not valid JSON"),
        (b"[" * 200_000, "nested more than"),
        (b'{"a":' * 200_000, "nested more than"),
        (b"[" * 40 + b"]" * 40, "nested more than"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": -Infinity}', "-Infinity is not a JSON number"),
        (b'{"a": 1e999}', "too large"),
        (b'{"a": ' + b"9" * 100_000 + b"}", "more than 19 digits"),
        (b'{"a": 1, "a": 2}', "the key 'a' is given twice"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b'{"\\ud800": 1}', "surrogate"),
        (b'{"kind": "circuit", "schema_version": 3}', "schema_version is 3; this version of mechinterp reads 1 and 2"),
        (b'{"kind": "circuit", "schema_version": "1"}', "schema_version is '1'"),
        (b'{"kind": "circuit", "schema_version": true}', "schema_version is True"),
        (b'{"kind": "task", "schema_version": 1}', "kind is 'task'"),
        (b'{"kind": "circuit", "schema_version": 1}', "required"),
    ],
    ids=lambda value: None if isinstance(value, str) else repr(value[:24]),
)
def test_no_circuit_file_at_all(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / NAME
    path.write_bytes(content)
    assert words in refused(path)


def test_what_json_allows_to_a_depth_is_read() -> None:
    deep = b"[" * MAX_DEPTH + b"]" * MAX_DEPTH
    assert parse_json(deep, "x")
    assert parse_json(b'{"a": -0.5e-300, "b": 9223372036854775807}', "x") == {"a": -0.5e-300, "b": 2**63 - 1}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (set_in("titel", to="x"), "Unknown key 'titel'. Did you mean 'title'?"),
        (set_in("model", "weight_sha256", to="x"), "model: Unknown key 'weight_sha256'"),
        (set_in("title", to=3), "title:"),
        (set_in("title", to="x" * 20_000), "title:"),
        (set_in("status", to="secret"), "status:"),
        (set_in("edges", to=[]), "edges:"),
        (set_in("edges", to={}), "edges:"),
        (set_in("edges", to=[{"name": "a0.h0->m0", "score": True}]), "edges.0.score"),
        (set_in("edges", to=[{"name": "a0.h0->m0", "score": "1"}]), "edges.0.score"),
        (set_in("model", "dims", "n_layers", to=3.0), "model.dims.n_layers"),
        (set_in("model", "dims", "n_layers", to=-3), "model.dims.n_layers"),
        (set_in("model", "dims", "n_layers", to=10**18), "model.dims.n_layers"),
        (set_in("model", "dims", "n_layers", to=10**6), "larger than this version reads"),
        (set_in("model", "dims", "n_heads", to=2**31), "larger than this version reads"),
        (set_in("model", "dims", "n_kv_heads", to=3), "not a multiple"),
        (set_in("model", "dims", "has_mlp", to=1), "model.dims.has_mlp"),
        (set_in("model", "weights_sha256", to="0" * 63), "model.weights_sha256"),
        (set_in("integrity", "file_sha256", to="Z" * 64), "integrity.file_sha256"),
        (set_in("selection", "n_edges", to=7), "selection.n_edges is 7"),
        (set_in("selection", "parameters", "edges", to=[1]), "selection.parameters.edges"),
        (set_in("discovery", "pairs", to="nowhere"), "pairs 'nowhere' are used but not described"),
        (set_in("roles", to={"x": {"label": "mover", "nodes": ["a9.h9"]}}), "'a9.h9', which is not a node"),
        (set_in("pairs", "discovery", "made_from", "kind", to="pickle"), "pickle"),
        (set_in("pairs", "discovery", "made_from", "clean", to=[["1"]]), "clean"),
        (set_in("pairs", "discovery", "made_from", "clean", to=[[2**40]]), "clean"),
        (set_in("integrity", "sidecar", "file", to="../a.scores.safetensors"), "integrity.sidecar.file"),
        (set_in("integrity", "sidecar", "file", to="/etc/a.scores.safetensors"), "integrity.sidecar.file"),
        (set_in("integrity", "sidecar", "file", to="..\\a.scores.safetensors"), "integrity.sidecar.file"),
        (set_in("integrity", "sidecar", "file", to="c:a.scores.safetensors"), "integrity.sidecar.file"),
        (set_in("integrity", "sidecar", "file", to=".scores.safetensors"), "integrity.sidecar.file"),
        (set_in("integrity", "sidecar", "file", to="a\x00.scores.safetensors"), "integrity.sidecar.file"),
        (set_in("integrity", "sidecar", "file", to="passwd"), "integrity.sidecar.file"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_the_schema_refuses(place: Path, change: Callable[[dict[str, Any]], None], words: str) -> None:
    assert words in refused(edited(place, change, sealed=False))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (set_in("graph", "n_edges", to=5), "the file states"),
        (set_in("graph", "split_input", to=True), "the file states"),
        (lambda c: c["edges"][0].update(name="a0.h0->a0.h1<q>"), "There is no edge"),
        (lambda c: c["edges"][0].update(name="a0.h0->a9.h1<q>"), "Unknown reader"),
        (lambda c: c["edges"][0].update(name="a0.h0->a1.h1<q>\n"), "Unknown reader"),
        (lambda c: c["edges"].__setitem__(0, c["edges"][1]), "named twice"),
        (lambda c: c["nodes"].pop(), "the listed nodes are not the ones"),
        (lambda c: c["integrity"].pop("sidecar"), "go together"),
        (lambda c: c.pop("discovery"), "go together"),
        (set_in("discovery", "n_examples", to=0), "n_examples is 0"),
        (set_in("integrity", "sidecar", "file", to="b.scores.safetensors"), "cannot be read"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_a_file_that_contradicts_itself_is_refused(
    place: Path, change: Callable[[dict[str, Any]], None], words: str
) -> None:
    assert words in refused(edited(place, change))


def test_an_oversized_file_is_not_read(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "MAX_JSON_BYTES", 100)
    assert "larger than 100 bytes" in refused(place)


def test_what_is_no_plain_file_is_not_opened(tmp_path: Path) -> None:
    assert "cannot be read" in refused(tmp_path / NAME)
    assert "not a plain file" in refused(tmp_path)
    assert "cannot be read" in refused(tmp_path / "a\x00.circuit.json")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / NAME)
        assert "not a plain file" in refused(tmp_path / NAME)


# -- the sidecar -------------------------------------------------------------------------------------------------------


def test_a_link_out_of_the_folder_is_not_followed(place: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    away = tmp_path_factory.mktemp("away") / "b.scores.safetensors"
    sidecar = place.parent / SIDECAR
    away.write_bytes(sidecar.read_bytes())
    sidecar.unlink()
    sidecar.symlink_to(away)
    assert "is a link out of the folder" in refused(place)
    sidecar.unlink()
    sidecar.symlink_to(SIDECAR)  # to itself
    assert "cannot be read" in refused(place)


def test_a_missing_sidecar(place: Path) -> None:
    (place.parent / SIDECAR).unlink()
    assert "cannot be read" in refused(place)


def test_a_changed_score_is_refused(place: Path) -> None:
    scores = table(place)
    scores[0, 0] += 1e-6
    (place.parent / SIDECAR).write_bytes(safetensors.torch.save({"scores": scores}))
    assert "is not the file of scores that a.circuit.json states" in refused(place)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda t: b"", "is incomplete"),
        (lambda t: b"\x00" * 7, "is incomplete"),
        (lambda t: b"\xff" * 8 + b"{}", "is incomplete"),
        (lambda t: (2).to_bytes(8, "little") + b"{}", "one tensor named 'scores'"),
        (lambda t: (2).to_bytes(8, "little") + b"[]", "one tensor named 'scores'"),
        (lambda t: (10**4).to_bytes(8, "little") + b"[" * 10**4, "nested more than"),
        (lambda t: safetensors.torch.save({"scores": t})[:-1], "is incomplete or has extra"),
        (lambda t: safetensors.torch.save({"scores": t}) + b"\x00", "is incomplete or has extra"),
        (lambda t: safetensors.torch.save({"score": t}), "one tensor named 'scores'"),
        (lambda t: safetensors.torch.save({"scores": t, "more": t.clone()}), "one tensor named 'scores'"),
        (lambda t: safetensors.torch.save({"scores": t.half()}), "must be F32 or F64"),
        (lambda t: safetensors.torch.save({"scores": t.long()}), "must be F32 or F64"),
        (lambda t: safetensors.torch.save({"scores": t[:-1].contiguous()}), "of shape"),
        (lambda t: safetensors.torch.save({"scores": t[None]}), "of shape"),
        (lambda t: safetensors.torch.save({"scores": t * torch.nan}), "not finite"),
        (lambda t: safetensors.torch.save({"scores": t + torch.inf}), "not finite"),
        (lambda t: safetensors.torch.save({"scores": t + 1}), "where the graph has no edge"),
    ],
)
def test_another_sidecar_is_refused_even_with_its_own_hash(
    place: Path, made: Callable[[torch.Tensor], bytes], words: str
) -> None:
    assert words in refused(with_sidecar(place, made(table(place))))


def test_a_huge_sidecar_is_not_read(place: Path) -> None:
    with (place.parent / SIDECAR).open("wb") as file:
        file.truncate(2**32)  # sparse: takes no room on the disk
    assert "larger than" in refused(place)


# -- random harm -------------------------------------------------------------------------------------------------------

Harm = Callable[[bytes], bytes]


def _flip(at: float, mask: int) -> Harm:
    def harm(content: bytes) -> bytes:
        place = int(at * len(content))
        return content[:place] + bytes([content[place] ^ mask]) + content[place + 1 :]

    return harm


def _cut(at: float, length: int) -> Harm:
    return lambda content: content[: int(at * len(content))] + content[int(at * len(content)) + length :]


def _insert(at: float, text: bytes) -> Harm:
    return lambda content: content[: int(at * len(content))] + text + content[int(at * len(content)) :]


PLACES = st.floats(0, 1, exclude_max=True)
HARM = st.one_of(
    st.builds(_flip, PLACES, st.integers(1, 255)),
    st.builds(_cut, PLACES, st.integers(1, 400)),
    st.builds(_cut, PLACES, st.just(10**9)),
    st.builds(
        _insert, PLACES, st.sampled_from([b"0", b" ", b'"', b"[", b"1e999", b"NaN", b"\x00", b"\xff", b"9" * 50])
    ),
)


@pytest.mark.slow
@given(harm=st.lists(HARM, min_size=1, max_size=3), name=st.sampled_from([NAME, SIDECAR]))
@example(harm=[_insert(0, b" ")], name=NAME)
def test_random_harm_is_an_error_or_no_change(
    tmp_path_factory: pytest.TempPathFactory, good: Path, harm: list[Harm], name: str
) -> None:
    """Whatever happens to the bytes: one error of ours, or the very same circuit (white space, say)."""
    folder = tmp_path_factory.mktemp("harmed")
    for each in (NAME, SIDECAR):
        content = (good / each).read_bytes()
        if each == name:
            for one in harm:
                content = one(content) if content else content
        (folder / each).write_bytes(content)
    try:
        circuit = mi.load_circuit(folder / NAME)
    except MechInterpError as error:
        assert "\n" not in str(error)
        return
    unharmed = mi.load_circuit(good / NAME)
    assert open_circuit_file(folder / NAME).content == open_circuit_file(good / NAME).content
    assert circuit.digest() == unharmed.digest()


@pytest.mark.slow
@given(
    content=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    ),
    key=st.sampled_from(["model", "edges", "graph", "pairs", "integrity", "evaluation", "curve", "selection", "task"]),
)
def test_any_json_in_any_field_is_an_error(good: Path, tmp_path_factory: Any, content: Any, key: str) -> None:
    folder = tmp_path_factory.mktemp("typed")
    whole = json.loads((good / NAME).read_text("utf-8"))
    if whole.get(key) == content or content in (None, [], {}):
        return
    (folder / NAME).write_text(json.dumps({**whole, key: content}), "utf-8")
    (folder / SIDECAR).write_bytes((good / SIDECAR).read_bytes())
    refused(folder / NAME)
