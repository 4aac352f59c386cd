"""The circuit file: its form, its round trip, its hashes, and that writing it is all or nothing."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mechinterp as mi
from mechinterp.base.canonical_json import render_json
from mechinterp.base.errors import FormatError, InputError
from mechinterp.circuit_file import store
from mechinterp.circuit_file.schema import DimsRecord, circuit_sha256, json_schema
from mechinterp.circuit_file.store import check_hashes, open_circuit_file, plain_content, write_file, write_pair
from mechinterp.graphs.circuit import Circuit
from mechinterp.graphs.scores import Scores
from mechinterp.models.layout import Dims
from tests.support import models_tiny as tiny

PUBLISHED = Path(mi.__file__).parent / "circuit_file" / "schemas" / "circuit-1.schema.json"


@pytest.fixture(scope="module")
def model() -> mi.HookManager:
    return tiny.build("gpt2", dtype=torch.float32)


@pytest.fixture(scope="module")
def pairs() -> mi.Pairs:
    generator = torch.Generator().manual_seed(0)
    clean, corrupt = torch.randint(3, 50, (2, 6, 7), generator=generator)
    return mi.Pairs(clean=clean, corrupt=corrupt, right=[1] * 6, wrong=[2] * 6)


@pytest.fixture(scope="module")
def graph(model: mi.HookManager) -> mi.Graph:
    return mi.build_graph(model)


@pytest.fixture(scope="module")
def circuit(model: mi.HookManager, graph: mi.Graph, pairs: mi.Pairs) -> Circuit:
    return mi.select(graph, mi.score_edges(model, graph, pairs), edges=60)


@pytest.fixture(scope="module")
def result(model: mi.HookManager, circuit: Circuit, pairs: mi.Pairs) -> mi.Evaluation:
    return mi.evaluate(model, circuit, pairs)


# -- form --------------------------------------------------------------------------------------------------------------


def test_the_published_schema_is_that_of_the_models() -> None:
    assert PUBLISHED.read_text("utf-8") == render_json(json_schema())


def test_dims_have_the_same_names() -> None:
    assert [field.name for field in fields(Dims)] == list(DimsRecord.model_fields)


@pytest.mark.slow
def test_the_file_is_sorted_with_one_edge_a_line(
    tmp_path: Path, model: mi.HookManager, circuit: Circuit, result: mi.Evaluation
) -> None:
    mi.save_circuit(tmp_path / "a.circuit.json", circuit, model=model, result=result)
    text = (tmp_path / "a.circuit.json").read_text("utf-8")
    content = json.loads(text)
    assert list(content) == sorted(content)
    lines = [line.strip().rstrip(",") for line in text.splitlines() if line.strip().startswith('{"name": "')]
    assert [json.loads(line) for line in lines] == content["edges"]
    assert [edge["name"] for edge in content["edges"]] == list(circuit.edges)
    assert all(edge["score"] == float(f"{edge['score']:.6g}") for edge in content["edges"])


def test_saving_twice_gives_the_same_bytes(
    tmp_path: Path, model: mi.HookManager, circuit: Circuit, result: mi.Evaluation
) -> None:
    for folder in ("one", "two"):
        mi.save_circuit(tmp_path / folder / "a.circuit.json", circuit, model=model, result=result)
    for name in ("a.circuit.json", "a.scores.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


# -- round trip --------------------------------------------------------------------------------------------------------


FLOATS = st.floats(-(2.0**99), 2.0**99, width=32)


@pytest.mark.slow
@given(data=st.data())
def test_any_circuit_comes_back(
    tmp_path_factory: pytest.TempPathFactory, model: mi.HookManager, graph: mi.Graph, data: st.DataObject
) -> None:
    places = graph.possible.nonzero().tolist()
    chosen = data.draw(st.sets(st.integers(0, len(places) - 1), min_size=1, max_size=40))
    numbers = data.draw(st.dictionaries(st.integers(0, len(places) - 1), FLOATS, max_size=20), label="scores")
    kept = torch.zeros_like(graph.possible)
    total = torch.randn(graph.possible.shape, generator=torch.Generator().manual_seed(len(numbers)))
    for number, (r, w) in enumerate(places):
        kept[r, w] = number in chosen
        total[r, w] = numbers.get(number, float(total[r, w]))
    total[~graph.possible] = 0
    scores = Scores(graph, total, 7, "eap", "logit_diff", "corrupt", {"replacement": "corrupt"}, {"forwards": 3})
    circuit = Circuit(graph, kept, len(chosen) + 2, {"rule": "top", "threshold": 0.25}, scores)
    path = tmp_path_factory.mktemp("round") / "a.circuit.json"
    mi.save_circuit(path, circuit, model=model, title="Grüße → “x”", extensions={"mine": [1, {"deep": None}]})
    again = mi.load_circuit(path)
    assert again.edges == circuit.edges and again.n_selected == circuit.n_selected
    assert dict(again.selection) == dict(circuit.selection)
    assert again.digest() == circuit.digest()
    assert again.scores is not None
    # The sidecar holds float32 and the mean is taken in float64: what comes back is the very number.
    assert torch.equal(again.scores.values.float(), scores.values)
    assert (again.scores.method, again.scores.metric, again.scores.cost) == ("eap", "logit_diff", {"forwards": 3})
    assert open_circuit_file(path).document.extensions == {"mine": [1, {"deep": None}]}


def test_a_circuit_without_scores_has_no_sidecar(tmp_path: Path, model: mi.HookManager, circuit: Circuit) -> None:
    path = tmp_path / "a.circuit.json"
    mi.save_circuit(path, circuit, model=model)
    mi.save_circuit(path, replace(circuit, scores=None), model=model)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.circuit.json"]
    assert mi.load_circuit(path).edges == circuit.edges


@pytest.mark.slow
@pytest.mark.parametrize("name", tiny.EVERY)
def test_every_shape_comes_back(tmp_path: Path, name: str, pairs: mi.Pairs) -> None:
    model = tiny.tiny(name)
    graph = mi.build_graph(model)
    circuit = mi.select(graph, mi.score_edges(model, graph, pairs, method="eap"), edges=graph.n_edges // 2)
    mi.save_circuit(tmp_path / "a.circuit.json", circuit, model=model)
    again = mi.load_circuit(tmp_path / "a.circuit.json")
    assert again.edges == circuit.edges
    assert again.graph.digest() == graph.digest()
    assert mi.verify(tmp_path / "a.circuit.json", model=model).ok


# -- hashes ------------------------------------------------------------------------------------------------------------


def test_the_hash_to_cite_is_over_the_circuit_and_nothing_else(
    tmp_path: Path, model: mi.HookManager, circuit: Circuit, result: mi.Evaluation
) -> None:
    path = tmp_path / "a.circuit.json"

    def saved(circuit: Circuit, model: mi.HookManager = model, **about: Any) -> str:
        return mi.save_circuit(path, circuit, model=model, **about).integrity.circuit_sha256

    first = saved(circuit, result=result)
    assert first == saved(circuit, title="another", license="MIT")
    assert first == saved(replace(circuit, scores=None))
    fewer = replace(circuit, kept=circuit.graph.mask_of(circuit.edges[1:]))
    assert first != saved(fewer)
    assert first != saved(circuit, tiny.build("gpt2", seed=1, dtype=torch.float32))
    assert first != saved(circuit, positions={"end": {"description": "the last token"}})


def test_white_space_is_no_change(tmp_path: Path, model: mi.HookManager, circuit: Circuit) -> None:
    path = tmp_path / "a.circuit.json"
    mi.save_circuit(path, circuit, model=model)
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))  # what a version control system may do
    assert mi.load_circuit(path).edges == circuit.edges


def test_a_changed_file_is_refused(tmp_path: Path, model: mi.HookManager, circuit: Circuit) -> None:
    path = tmp_path / "a.circuit.json"
    document = mi.save_circuit(path, circuit, model=model, title="A title")
    path.write_text(path.read_text("utf-8").replace("A title", "B title"), "utf-8")
    with pytest.raises(FormatError, match="was changed after it was written: its content"):
        mi.load_circuit(path)
    assert circuit_sha256(open_circuit_file(path).document) == document.integrity.circuit_sha256


# -- what is refused when saving ---------------------------------------------------------------------------------------


def test_a_result_of_another_circuit_is_refused(
    tmp_path: Path, model: mi.HookManager, circuit: Circuit, result: mi.Evaluation
) -> None:
    other = replace(circuit, kept=circuit.graph.mask_of(circuit.edges[1:]))
    with pytest.raises(InputError, match="result is of another circuit"):
        mi.save_circuit(tmp_path / "a.circuit.json", other, model=model, result=result)
    assert not list(tmp_path.iterdir())


def test_another_model_is_refused(tmp_path: Path, circuit: Circuit) -> None:
    other = tiny.tiny("llama")
    with pytest.raises(InputError, match="whose dimensions differ"):
        mi.save_circuit(tmp_path / "a.circuit.json", circuit, model=other)


@pytest.mark.parametrize("name", ["a.json", ".circuit.json", "a.circuit.yaml", ".a.circuit.json", "c:a.circuit.json"])
def test_a_file_of_another_name_is_refused(tmp_path: Path, name: str, model: mi.HookManager, circuit: Circuit) -> None:
    with pytest.raises(InputError, match=r"named NAME\.circuit\.json"):
        mi.save_circuit(tmp_path / name, circuit, model=model)


def test_an_unknown_field_is_refused_by_name(tmp_path: Path, model: mi.HookManager, circuit: Circuit) -> None:
    with pytest.raises(InputError, match=r"Unknown field 'titel'\. Did you mean 'title'\?"):
        mi.save_circuit(tmp_path / "a.circuit.json", circuit, model=model, titel="x")


def test_no_edges_are_refused(tmp_path: Path, model: mi.HookManager, graph: mi.Graph) -> None:
    empty = Circuit(graph, torch.zeros_like(graph.possible), 0)
    with pytest.raises(InputError, match="no edges"):
        mi.save_circuit(tmp_path / "a.circuit.json", empty, model=model)


# -- all or nothing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["replace", "fsync", "link", "unlink"])
@pytest.mark.parametrize("at", range(4))
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_error_while_writing_leaves_the_old_pair(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: mi.HookManager,
    circuit: Circuit,
    call: str,
    at: int,
    error: BaseException,
) -> None:
    path = tmp_path / "a.circuit.json"
    mi.save_circuit(path, circuit, model=model)
    assert circuit.scores is not None
    other = replace(circuit, scores=replace(circuit.scores, total=circuit.scores.total * 2))
    calls = 0
    real: Callable[..., Any] = getattr(os, call)

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at + 1:
            raise error
        return real(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(store.os, call, failing)
        try:
            mi.save_circuit(path, other, model=model)
        except InputError as shown:
            assert "No space left" in str(shown) and "Nothing was changed" in str(shown)
            kept = mi.load_circuit(path).scores
            assert kept is not None and torch.equal(kept.values, circuit.scores.values.float())
        except KeyboardInterrupt:
            pass
    again = mi.load_circuit(path)  # the old pair or the new one, whole
    assert again.scores is not None
    values = again.scores.values.float()
    assert any(torch.equal(values, one.scores.values) for one in (circuit, other) if one.scores is not None)
    mi.save_circuit(path, other, model=model)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.circuit.json", "a.scores.safetensors"]


_STOPPED_AT_EVERY_STEP = """
import os, shutil, signal, sys
from pathlib import Path
from mechinterp.circuit_file import store
folder, first, second, start = map(Path, sys.argv[1:5])
stop = sys.argv[5]
path = folder / "a.circuit.json"

def pair(place):
    document = store.open_circuit_file(place / "a.circuit.json").document
    return document, (place / "a.scores.safetensors").read_bytes()

def state():
    opened = store.open_circuit_file(path)
    store.check_hashes(opened)
    return opened.document, store.read_sidecar(path, opened.document.integrity.sidecar, 2**20)

def stop_at(step):
    seen = 0
    def trace(frame, event, argument):
        nonlocal seen
        if frame.f_code.co_filename != store.__file__:
            return None
        seen += event in ("line", "return")
        if seen == step and event in ("line", "return"):
            if stop == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise KeyboardInterrupt
        return trace
    sys.settrace(trace)

def copied(source, target):
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)

def every_step(start, old, new):
    for step in range(1, 10**4):
        copied(start, folder)
        child = os.fork()
        if child == 0:
            try:
                stop_at(step)
                store.write_pair(path, *new)
                sys.settrace(None)
                os._exit(0)
            except KeyboardInterrupt:
                os._exit(1)
        status = os.waitpid(child, 0)[1]
        assert state() in (old, new), (start, step)
        if any(name.endswith(".previous") for name in os.listdir(folder)) and state() == old:
            copied(folder, between)
        store.write_pair(path, *new)
        assert state() == new, step
        assert sorted(os.listdir(folder)) == ["a.circuit.json", "a.scores.safetensors"], (step, os.listdir(folder))
        if status == 0:
            return step - 1

old, new = pair(first), pair(second)
between = start.with_name("between")
steps = every_step(first, old, new)
if stop == "kill":  # once more, from where the first run was killed between its two renames
    assert between.exists()
    copied(between, start)
    steps += every_step(start, old, new)
print(steps)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
@pytest.mark.parametrize("stop", ["kill", "interrupt"])
def test_a_run_that_is_stopped_at_any_step_leaves_a_whole_pair(
    tmp_path: Path, model: mi.HookManager, circuit: Circuit, stop: str
) -> None:
    """SIGKILL (or Ctrl-C) at every line of store.py that writing executes, one process per line.

    For SIGKILL, again in the run after it, which finds what the killed one left.
    """
    assert circuit.scores is not None
    other = replace(circuit, scores=replace(circuit.scores, total=circuit.scores.total * 2))
    mi.save_circuit(tmp_path / "first" / "a.circuit.json", circuit, model=model)
    mi.save_circuit(tmp_path / "second" / "a.circuit.json", other, model=model)
    places = [str(tmp_path / name) for name in ("out", "first", "second", "start")]
    command = [sys.executable, "-c", _STOPPED_AT_EVERY_STEP, *places, stop]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 50


def test_leftovers_of_other_files_stay(tmp_path: Path, model: mi.HookManager, circuit: Circuit) -> None:
    mine, theirs = ".a.circuit.json.001122334455.partial", ".b.circuit.json.001122334455.partial"
    for name in (mine, theirs):
        (tmp_path / name).write_text("half")
        os.utime(tmp_path / name, (0, 0))  # from long ago
    mi.save_circuit(tmp_path / "a.circuit.json", circuit, model=model)
    names = {entry.name for entry in tmp_path.iterdir()}
    assert mine not in names and theirs in names


def test_what_cannot_be_deleted_afterwards_is_told_and_the_new_file_is_there(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    model: mi.HookManager,
    circuit: Circuit,
) -> None:
    """It was said then that nothing had been changed."""
    path, bare = tmp_path / "a.circuit.json", replace(circuit, scores=None)
    real = Path.unlink

    def failing(self: Path, missing_ok: bool = False) -> None:
        if self.name.endswith((".safetensors", ".previous")) and self.exists():
            raise PermissionError(13, "Permission denied")
        real(self, missing_ok=missing_ok)

    for new in (circuit, bare):
        mi.save_circuit(path, circuit, model=model)
        with monkeypatch.context() as patched:
            patched.setattr(Path, "unlink", failing)
            mi.save_circuit(path, new, model=model)
        assert (mi.load_circuit(path).scores is None) == (new is bare)
        assert "cannot be deleted: Permission denied" in caplog.records[-1].getMessage()
        caplog.clear()


def test_a_pair_that_cannot_be_placed_leaves_the_one_that_a_killed_writer_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: mi.HookManager, circuit: Circuit
) -> None:
    """Killed between its two renames, with the old sidecar kept aside: that one must not be lost."""
    path, sidecar = tmp_path / "a.circuit.json", tmp_path / "a.scores.safetensors"
    mi.save_circuit(path, circuit, model=model)
    old, content = sidecar.read_bytes(), path.read_bytes()
    (tmp_path / ".a.scores.safetensors.previous").write_bytes(old)
    sidecar.write_bytes(b"the new one")

    def fails(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "_replace", fails)
    with pytest.raises(InputError, match="Nothing was changed"):
        store.place_pair(path, content + b" ", (sidecar.name, b"another"))
    assert mi.load_circuit(path).scores is not None and sidecar.read_bytes() == old


def test_a_folder_that_cannot_be_written_is_one_clear_error(
    tmp_path: Path, model: mi.HookManager, circuit: Circuit
) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot be written"):
        mi.save_circuit(tmp_path / "file" / "a.circuit.json", circuit, model=model)
    with pytest.raises(InputError, match="cannot be written"):
        write_file(tmp_path / "file" / "report.html", b"")


def test_one_file_is_written_whole(tmp_path: Path) -> None:
    write_file(tmp_path / "new" / "report.html", b"one")
    write_file(tmp_path / "new" / "report.html", b"two")
    assert [(p.name, p.read_bytes()) for p in (tmp_path / "new").iterdir()] == [("report.html", b"two")]


def test_the_written_text_is_the_document(tmp_path: Path, model: mi.HookManager, circuit: Circuit) -> None:
    document = mi.save_circuit(tmp_path / "a.circuit.json", circuit, model=model)
    opened = open_circuit_file(tmp_path / "a.circuit.json")
    check_hashes(opened)
    assert opened.document == document
    assert opened.content == plain_content(document)
    write_pair(tmp_path / "b.circuit.json", document, None)
    assert (tmp_path / "b.circuit.json").read_bytes() == (tmp_path / "a.circuit.json").read_bytes()
