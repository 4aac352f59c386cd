"""Long runs go on where they were: the same scores, and a state that is whole, their own, and gone at the end."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import mechinterp as mi
from mechinterp.base import checkpoint
from mechinterp.base.checkpoint import Checkpoint
from mechinterp.pipeline import _state_path, output_path
from tests.support.models_tiny import pairs, tiny


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


@pytest.mark.slow
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
    with pytest.raises(mi.InputError, match="is not the state of a run"):
        mi.score_edges(model, graph, some, method="eap", resume=state)


@pytest.mark.parametrize("method", ["eap", "exact"])
def test_a_state_that_counts_batches_says_which_batch_size_goes_on(method: str, tmp_path: Path) -> None:
    model, some, state = tiny("gpt2"), pairs(6), tmp_path / "state"
    graph = mi.build_graph(model)
    with pytest.raises(Killed):
        mi.score_edges(model, graph, some, method=method, batch_size=2, resume=state, progress=killed_after(1))
    with pytest.raises(mi.InputError, match=r"counts batches of 2 pairs.* Go on with batch_size=2 \(--batch-size 2\)"):
        mi.score_edges(model, graph, some, method=method, batch_size=3, resume=state)
    assert state.exists()


@pytest.mark.parametrize(("method", "settings"), [("acdc", {}), ("edge-pruning", {"learning_steps": 2})])
def test_a_state_that_counts_no_batches_goes_on_with_another_batch_size(
    method: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    model, some, state = tiny("gpt2"), pairs(4), tmp_path / "state"
    graph = mi.build_graph(model, level="node")
    asked: dict[str, Any] = {"method": method, "metric": "kl_to_clean", **settings}
    whole = mi.score_edges(model, graph, some, batch_size=4, **asked)
    with pytest.raises(Killed):
        mi.score_edges(model, graph, some, batch_size=4, resume=state, progress=killed_after(1), **asked)
    told: list[int] = []
    again = mi.score_edges(
        model, graph, some, batch_size=2, resume=state, progress=lambda done, total: told.append(done), **asked
    )
    assert told[0] > 0
    torch.testing.assert_close(again.values, whole.values, rtol=1e-4, atol=1e-6)  # sums in another order


def test_nothing_is_kept_unless_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    mi.score_edges(tiny("gpt2"), mi.build_graph(tiny("gpt2")), pairs(3), method="eap")
    Checkpoint().save({"total": torch.zeros(1)}, now=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_circuit_file_cannot_make_verify_touch_other_files(tmp_path: Path) -> None:
    """`resume` deletes its file at the end of a run; a stranger's file must not name one."""
    spec = mi.RunSpec(
        "ioi", method="eap", edges=60, examples=8, test_examples=8, roles=False, curve=False, out=tmp_path
    )
    path = mi.discover(spec).path
    precious = tmp_path / "precious.txt"
    precious.write_text("mine")
    document = json.loads(path.read_text())
    document["discovery"]["parameters"]["resume"] = str(precious)
    path.write_text(json.dumps(document))
    found = mi.verify(path, rescore=True)
    assert not found.ok and precious.read_text() == "mine"


def unfinished(path: Path, method: str = "eap", **settings: Any) -> dict[str, Any]:
    """A killed run's state at the path; what to call `score_edges` with to go on."""
    model, some = tiny("gpt2"), pairs(4)
    asked = {"pairs": some, "method": method, "batch_size": 2, "resume": path, **settings}
    with pytest.raises(Killed):
        mi.score_edges(model, mi.build_graph(model), progress=killed_after(1), **asked)
    return asked


@pytest.mark.slow
@pytest.mark.parametrize(("method", "settings"), [("eap", {}), ("acdc", {}), ("edge-pruning", {"learning_steps": 3})])
def test_a_flipped_bit_anywhere_in_a_state_is_one_line(method: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """Without a hash it gave another circuit."""
    model, state = tiny("gpt2"), tmp_path / "state"
    asked = unfinished(state, method, **settings)
    whole, graph = state.read_bytes(), mi.build_graph(model)
    for place in [*range(0, 150, 13), *range(150, len(whole), len(whole) // 10), len(whole) - 1]:
        state.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(mi.InputError, match="delete it to start over") as raised:
            mi.score_edges(model, graph, **asked)
        assert "\n" not in str(raised.value)
    state.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(mi.InputError, match="damaged"):
        mi.score_edges(model, graph, **asked)


@pytest.mark.parametrize(
    ("method", "change"),
    [
        ("eap", {"total": torch.zeros(3, 3)}),
        ("eap", {"total": torch.zeros(3, 3, dtype=torch.int64)}),
        ("eap", {"done": torch.tensor(99)}),
        ("eap", {"done": torch.tensor([1, 2])}),
        ("eap", {"more": torch.zeros(1)}),
        ("exact", {"done": torch.tensor(-1)}),
        ("acdc", {"cut": torch.zeros(2, 2, dtype=torch.bool)}),
        ("acdc", {"at_once": torch.tensor(10**9)}),
        ("acdc", {"loss": torch.tensor(torch.nan, dtype=torch.float64)}),
        ("edge-pruning", {"log_alpha.exp_avg": torch.zeros(1)}),
    ],
)
def test_a_state_of_wrong_shapes_or_numbers_is_one_line(method: str, change: dict[str, Any], tmp_path: Path) -> None:
    """Also where its hash was made to fit."""
    model, state = tiny("gpt2"), tmp_path / "state"
    asked = unfinished(state, method, **({"learning_steps": 3} if method == "edge-pruning" else {}))
    content = state.read_bytes()
    saved = checkpoint.load(content.partition(b"\n")[2])
    Checkpoint(state, content.split(b" ")[2].decode()).save({**saved, **change}, now=True)
    with pytest.raises(mi.InputError, match="is not a state of this"):
        mi.score_edges(model, mi.build_graph(model), **asked)


def test_a_state_is_a_plain_file_and_its_folder_is_there(tmp_path: Path) -> None:
    """A pipe would be waited for."""
    model, some = tiny("gpt2"), pairs(2)
    graph = mi.build_graph(model)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(mi.InputError, match="not a plain file"):
            mi.score_edges(model, graph, some, method="eap", resume=tmp_path / name)
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    with pytest.raises(mi.InputError, match="cannot be read"):
        mi.score_edges(model, graph, some, method="eap", resume=tmp_path / "link")
    with pytest.raises(mi.InputError, match="does not exist"):
        mi.score_edges(model, graph, some, method="eap", resume=tmp_path / "nowhere" / "state")


def test_a_run_goes_on_when_its_state_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, some = tiny("gpt2"), pairs(6)
    graph = mi.build_graph(model)
    expected = mi.score_edges(model, graph, some, method="eap", batch_size=2)

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with caplog.at_level(logging.WARNING):
        found = mi.score_edges(model, graph, some, method="eap", batch_size=2, resume=tmp_path / "state")
    assert torch.equal(found.values, expected.values)
    assert [record.getMessage().count("No space left") for record in caplog.records] == [1]  # said once
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_restart_deletes_the_states_of_a_run_and_no_other_file(tmp_path: Path) -> None:
    spec = mi.RunSpec(
        "ioi", method="eap", edges=60, examples=4, test_examples=4, resamples=0, roles=False, out=tmp_path
    )
    run = _state_path(output_path(spec), spec)
    state = run.with_name(f"{run.name}.scores")
    state.write_bytes(b"damaged")
    others = [tmp_path / state.name.replace("-eap.", "-exact."), tmp_path / "mine.unfinished"]
    for other in others:
        other.write_bytes(b"")
    stale = run.with_name(f"{run.name.rsplit('.', 2)[0]}.0123abcd.unfinished")
    stale.write_bytes(b"")
    with pytest.raises(mi.InputError, match="is not the state of a run"):
        mi.discover(spec)
    found = mi.discover(mi.RunSpec(**{**vars(spec), "restart": True}))
    assert "restart" not in (found.document.provenance.command or "")
    assert not state.exists() and not stale.exists() and all(other.exists() for other in others)
