"""Long runs go on where they were: the same scores, and a state that is whole, their own, and gone at the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import mechinterp as mi
from mechinterp.discovery import checkpoint
from mechinterp.discovery.checkpoint import Checkpoint
from tests.models_tiny import pairs, tiny


class Killed(BaseException):
    """What happens at any moment."""


def killed_after(calls: int) -> Any:
    count = 0

    def progress(done: int, total: int) -> None:
        nonlocal count
        count += 1
        if count > calls:
            raise Killed

    return progress


@pytest.fixture(autouse=True)
def always_save(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "EVERY_SECONDS", 0.0)


@pytest.mark.parametrize(
    ("method", "settings"), [("eap-ig", {}), ("exact", {}), ("cd-edges", {}), ("eap-ig-activations", {"steps": 2})]
)
@pytest.mark.parametrize("calls", [0, 1, 3])
def test_a_killed_run_goes_on_to_the_same_scores(
    method: str, settings: dict[str, Any], calls: int, tmp_path: Path
) -> None:
    model, some = tiny("gpt2"), pairs(5, padded=True)
    graph = mi.build_graph(model)
    whole = mi.score_edges(model, graph, some, method=method, batch_size=2, **settings)
    state = tmp_path / "state.safetensors"
    keywords: dict[str, Any] = {"method": method, "batch_size": 2, "resume": state, **settings}
    with pytest.raises(Killed):
        mi.score_edges(model, graph, some, progress=killed_after(calls), **keywords)
    told: list[int] = []
    again = mi.score_edges(model, graph, some, progress=lambda done, total: told.append(done), **keywords)
    assert torch.equal(again.values, whole.values)
    assert (told[0] > 0) == (calls > 0)
    assert list(tmp_path.iterdir()) == []


def test_a_state_of_another_run_is_refused_and_kept(tmp_path: Path) -> None:
    model, some = tiny("gpt2"), pairs(4)
    graph = mi.build_graph(model)
    state = tmp_path / "state.safetensors"
    with pytest.raises(Killed):
        mi.score_edges(model, graph, some, method="eap", batch_size=2, resume=state, progress=killed_after(1))
    for change in ({"method": "eap-ig"}, {"metric": "prob_diff"}, {"replacement": "zero"}):
        with pytest.raises(mi.InputError, match="state of another run"):
            mi.score_edges(model, graph, some, **{"method": "eap", "batch_size": 2, "resume": state, **change})
    with pytest.raises(mi.InputError, match="state of another run"):
        mi.score_edges(tiny("neox"), mi.build_graph(tiny("neox")), some, method="eap", batch_size=2, resume=state)
    assert state.exists()
    state.write_bytes(b"no state at all")
    with pytest.raises(mi.InputError, match="is no state of a run"):
        mi.score_edges(model, graph, some, method="eap", resume=state)


def test_nothing_is_kept_unless_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    mi.score_edges(tiny("gpt2"), mi.build_graph(tiny("gpt2")), pairs(3), method="eap")
    Checkpoint().save({"total": torch.zeros(1)}, now=True)
    assert list(tmp_path.iterdir()) == []


def test_a_circuit_file_cannot_make_verify_touch_other_files(tmp_path: Path) -> None:
    """`resume` deletes its file at the end of a run; a stranger's file must not name one."""
    spec = mi.RunSpec("ioi", method="eap", edges=60, examples=8, test_examples=8, out=tmp_path)
    path = mi.discover(spec).path
    precious = tmp_path / "precious.txt"
    precious.write_text("mine")
    document = json.loads(path.read_text())
    document["discovery"]["parameters"]["resume"] = str(precious)
    path.write_text(json.dumps(document))
    found = mi.verify(path, rescore=True)
    assert not found.ok and precious.read_text() == "mine"
