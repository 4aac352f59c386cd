"""What a run will take, said before it is done."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import mechinterp as mi
from mechinterp.base.errors import InputError
from mechinterp.cli.app import main
from mechinterp.pipeline import prepare
from mechinterp.run_costs import dry_run
from mechinterp.run_spec import RunSpec, command_of

WRITES = "patched runs keep: all writes of 6 examples at once"


def spec(tmp_path: Path, **options: object) -> RunSpec:
    few = {"examples": 6, "validation_examples": 4, "test_examples": 4}
    return RunSpec("ioi", out=tmp_path, **{**few, **options})  # pyright: ignore[reportArgumentType]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("eap-ig", ()),
        ("ensemble", ()),
        ("mattr", ("runs=2", "learning_steps=2", "examples=2", "drawings=1")),
    ],
)
def test_the_runs_of_scoring_are_those_of_the_method(tmp_path: Path, method: str, settings: tuple[str, ...]) -> None:
    model = mi.load_model("bundled")
    asked = spec(tmp_path, method=method, settings=settings)
    found = dry_run(asked, model=model)
    ready = prepare(asked, given=model)
    scores = mi.score_edges(model, ready.graph, ready.examples.train, method=method, **ready.settings)
    scoring = found.stages[0]
    assert (scoring.forwards, scoring.backwards) == (scores.cost["forwards"], scores.cost["backwards"])
    assert (found.n_edges, found.n_train) == (ready.graph.n_edges, 6)
    assert ("learned masks" in found.bytes) == (method == "mattr")
    assert found.seconds > scoring.seconds > 0
    for part in (
        "graph: 479 edges (21 writers",
        f"scores: {scoring.forwards} forwards",
        "memory, total: ",
        "time: ",
        WRITES,
    ):
        assert any(line.startswith(part) for line in found.lines())
    assert [*tmp_path.iterdir()] == []


def test_where_the_runs_are_not_known_a_note_says_so(tmp_path: Path) -> None:
    unknown = dry_run(spec(tmp_path, method="cd"), model=mi.load_model("bundled"))
    assert [stage.name for stage in unknown.stages] == ["size", "evaluation"]
    assert "not known" in unknown.notes[0]
    assert any(line.startswith("time: ") and "without what the notes name" in line for line in unknown.lines())


@pytest.mark.slow
def test_that_refining_is_not_in_the_time_is_said(tmp_path: Path) -> None:
    model = mi.load_model("bundled")
    assert dry_run(spec(tmp_path, method="eap", edges=20), model=model).notes == ()
    found = dry_run(spec(tmp_path, method="eap", edges=20, refine=0.01), model=model)
    assert len(found.notes) == 1 and "6 train pairs for every edge" in found.notes[0]


def test_the_command_line_says_it_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["run", "ioi", "--method", "eap", "--examples", "4", "--out", str(tmp_path), "--dry-run"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["n_edges"], found["stages"][0]["backwards"]) == ("dry_run", 479, 4)
    assert main([*words, "--shard", "1/2"]) == 2
    assert "--dry-run is of a whole run; leave --shard out" in capsys.readouterr().err
    assert [*tmp_path.iterdir()] == []


def test_auto_becomes_a_number_that_the_command_records(tmp_path: Path) -> None:
    asked = spec(tmp_path, method="eap", batch_size="auto")
    ready = prepare(asked, given=mi.load_model("bundled"))
    assert isinstance(ready.spec.batch_size, int)
    assert ready.spec.batch_size in (4, 8)  # no more than twice the pairs; a machine with little memory may take less
    assert f"--batch-size {ready.spec.batch_size}" in command_of(ready.spec)
    with pytest.raises(InputError, match="Shards must have one batch size"):
        prepare(replace(asked, shard="1/2"))
