"""`discover`: one straight line from a specification to a circuit file that verifies."""

import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import mechinterp as mi
from mechinterp import pipeline, run_examples
from mechinterp.base import checkpoint
from mechinterp.base.errors import InputError, NoSmallCircuit, TaskNotDone
from mechinterp.circuit_file.summary import steadiness
from mechinterp.discovery import finished_parts
from mechinterp.evaluation.sizes import CurvePoint, Levels, chosen_size, size_curve, size_grid, smallest_faithful
from mechinterp.pipeline import Discovery, discover, output_path
from mechinterp.run_spec import EFFORTS, RESAMPLES, RunSpec, command_of, resolved
from tests.support.words_model import save_words_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    save_words_model(folder / "small")
    names = ("Mary", "John", "Tom", "James", "Anna", "Paul")
    with (folder / "mine.jsonl").open("w", encoding="utf-8") as file:
        for a in names:
            for b in names:
                if a != b:
                    clean, corrupt = (
                        f"{a} and {b} went to the store. {b} gave a drink to",
                        f"{b} and {a} went to the store. {b} gave a drink to",
                    )
                    file.write(
                        json.dumps({"clean": clean, "corrupt": corrupt, "right": f" {a}", "wrong": f" {b}"}) + "\n"
                    )
    return folder


@pytest.fixture
def spec(folder: Path, tmp_path: Path) -> RunSpec:
    return RunSpec("ioi", str(folder / "small"), **SMALL, out=tmp_path / "out")


SMALL: dict[str, Any] = {
    "method": "eap-ig",
    "examples": 12,
    "validation_examples": 12,
    "test_examples": 10,
    "resamples": 4,
    "anyway": True,
    "edges": 25,
}
"""A random model does no task, and no size is faithful."""
BUNDLED = RunSpec(
    "ioi",
    settings=("runs=2", "learning_steps=15", "drawings=8"),
    examples=40,
    validation_examples=60,
    test_examples=20,
    roles=False,
)
"""The default run, shortened: the size is chosen."""
STAGES: list[str] = []


@pytest.fixture(scope="module")
def made(folder: Path) -> Discovery:
    """The run of the spec above, made once; `STAGES` has what it reported."""
    spec = RunSpec("ioi", str(folder / "small"), **SMALL, out=folder / "made")
    return discover(spec, lambda stage, done, total: STAGES.append(stage))


@pytest.fixture(scope="module")
def sized(tmp_path_factory: pytest.TempPathFactory) -> Discovery:
    """The default run of the bundled model."""
    return discover(replace(BUNDLED, out=tmp_path_factory.mktemp("sized")))


@pytest.mark.slow
def test_a_run_writes_what_it_returns(made: Discovery, folder: Path) -> None:
    assert list(dict.fromkeys(STAGES)) == ["model", "task", "scores", "curve", "evaluation", "roles"]
    assert made.path == folder / "made" / "ioi-small-eap-ig.circuit.json"
    assert sorted(p.name for p in made.path.parent.iterdir()) == [
        made.path.name,
        "ioi-small-eap-ig.scores.safetensors",
    ]
    loaded = mi.load_circuit(made.path)
    assert loaded.digest() == made.circuit.digest() == made.evaluation.circuit_digest
    assert made.document.id == "ioi-small-eap-ig"
    assert made.document.evaluation[0].faithfulness == float(f"{made.evaluation.faithfulness:.6g}")
    assert made.train.digest() != made.test.digest()
    assert mi.verify(made.path).ok


@pytest.mark.slow
@pytest.mark.parametrize("error", [InputError("no"), ValueError("no"), RuntimeError("no"), ZeroDivisionError("no")])
def test_a_run_is_kept_when_its_roles_cannot_be_measured(
    spec: RunSpec, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(pipeline, "measured_roles", fails)
    made = discover(replace(spec, method="eap", examples=4, test_examples=4))
    assert made.path.exists() and made.roles is None and made.notes == ("Roles were not measured: no",)


@pytest.mark.slow
def test_the_size_is_the_smallest_that_passes(sized: Discovery) -> None:
    size = sized.circuit.selection["edges"]
    points = [point for point in sized.curve.points if point.n_selected <= size]
    assert size == points[-1].n_selected
    assert [point.passing is not None and point.passing >= 0.9 for point in points[-2:]] == [False, True]
    assert points[-1].n_selected / points[-2].n_selected < 2 ** (2 / 8)  # the gap below was bisected
    assert sized.path.name == "ioi-bundled-mattr.circuit.json"
    stated = sized.document.selection.size
    assert stated is not None and stated.low == 0.92 and stated.pairs == "validation" and stated.target is None
    assert sized.stability is not None and sized.document.stability is not None
    assert sized.document.stability.n_core == int(sized.stability.found.core().sum()) > 0
    found = mi.verify(sized.path, rescore=True)
    assert found.ok, str(found)
    names = {claim.name for claim in found.claims}
    assert {"selection.size", "curve.passing", "performance.difference", "stability.jaccard again"} <= names
    assert not [warning for warning in found.warnings if warning.name == "pairs not of the task"]


def test_a_model_that_does_not_do_the_task_gets_no_circuit(spec: RunSpec) -> None:
    with pytest.raises(TaskNotDone, match=r"does not do ioi on 12 pairs: .*--anyway"):
        discover(replace(spec, anyway=False))
    assert not list(spec.out.iterdir())


@pytest.mark.slow
def test_no_small_circuit_is_an_answer(spec: RunSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its scores are kept for the run with a given size, which leaves nothing behind."""
    monkeypatch.setattr(finished_parts, "WORTH_SECONDS", 0.0)
    scored: list[int] = []
    own = pipeline.resampled_scores
    monkeypatch.setattr(pipeline, "resampled_scores", lambda *a, **k: (scored.append(1), own(*a, **k))[1])
    random = replace(spec, method="random", edges=None, resamples=10)
    with pytest.raises(NoSmallCircuit, match=r"No small circuit at this level by random: .* Try more --examples"):
        discover(random)
    assert all(".unfinished." in path.name for path in spec.out.iterdir())
    given = discover(replace(random, edges=40, curve=False))
    assert scored == [1] and not [path for path in spec.out.iterdir() if path.name.startswith(".")]
    alone = discover(replace(random, edges=40, curve=False, out=spec.out / "alone"))
    assert alone.path.read_bytes() == given.path.read_bytes()


TINY_TASK = """
name: few
version: 1
title: Few examples
source: ours
metric: logit_diff
answer: " {IO}"
wrong: " {S}"
positions: [end]
words: {IO: people, S: people, PLACE: towns}
lists: {people: [Mary, John, Tom, James], towns: [store, garden]}
corruption: {scheme: replace, slots: {S2: IO}}
pair_split: {slots: [IO, S], test_fraction: 0.3}
splits:
  train: {templates: [{text: "When {IO} and {S} went to the {PLACE}, {S} gave a drink to", order: ABBA}]}
  test: {templates: [{text: "After {IO} and {S} went to the {PLACE}, {S} gave a drink to", order: ABBA}]}
"""


def test_a_task_with_too_few_examples_for_both_is_cross_fitted(spec: RunSpec, tmp_path: Path) -> None:
    (tmp_path / "few.yaml").write_text(TINY_TASK, "utf-8")
    model, task = mi.load_model(spec.model), mi.load_task(str(tmp_path / "few.yaml"))
    most = 2  # examples that the task makes of a split
    with pytest.raises(InputError):
        while most < 50:
            task.pairs(model, n=most + 1, split="train")
            most += 1
    assert 4 < most < 24
    asked = replace(spec, task=str(tmp_path / "few.yaml"), examples=most - 3, test_examples=4)
    sets = pipeline.examples_of(replace(asked, validation_examples=3), model)
    assert sets.validation is not None and len(sets.validation) == 3 and sets.notes == ()
    assert not set(sets.train.clean_text or ()) & set(sets.validation.clean_text or ())
    sets = pipeline.examples_of(replace(asked, validation_examples=4), model)
    assert sets.validation is None and len(sets.train) == most - 3
    assert sets.notes == (f"{run_examples.CROSS_FITTED} the task makes no {most + 1} different train pairs.",)


@pytest.mark.parametrize(("n", "sizes"), [(59, (29, 0, 30)), (60, (20, 20, 20)), (90, (30, 30, 30))])
def test_a_file_of_pairs_is_cut_in_thirds_if_these_are_large_enough(
    spec: RunSpec, tmp_path: Path, n: int, sizes: tuple[int, int, int]
) -> None:
    path = tmp_path / "ids.jsonl"
    rows = torch.randint(2, 100, (n, 2, 6), generator=torch.Generator().manual_seed(0)).tolist()
    path.write_text("\n".join(json.dumps({"clean": c, "corrupt": x}) for c, x in rows), "utf-8")
    asked = RunSpec(str(path), spec.model)
    sets = pipeline.examples_of(asked, mi.load_model(spec.model))
    found = [sets.train, *([] if sets.validation is None else [sets.validation]), sets.test]
    assert (len(sets.train), len(sets.validation or ()), len(sets.test)) == sizes
    assert torch.equal(torch.cat([part.clean for part in found]), mi.load_pairs(path).clean)  # every pair once
    assert any(note.startswith(run_examples.CROSS_FITTED) for note in sets.notes) == (sizes[1] == 0)
    assert "200 train, 200 validation and 200 test were asked for" in sets.notes[-1]


@pytest.mark.slow
def test_with_few_pairs_the_size_is_chosen_by_cross_fitting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = mi.load_model("bundled")
    made = mi.load_task("gendered_pronoun").pairs(model, n=40, seed=0)
    assert made.clean_text and made.corrupt_text and made.right is not None and made.wrong is not None
    answers = [model.tokenizer.batch_decode(ids[:, :1]) for ids in (made.right, made.wrong)]
    columns = zip(made.clean_text, made.corrupt_text, *answers, strict=True)
    rows = [dict(zip(("clean", "corrupt", "right", "wrong"), row, strict=True)) for row in columns]
    path = tmp_path / "pronouns.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    own, scored = pipeline.score_edges, list[mi.Pairs]()
    monkeypatch.setattr(pipeline, "score_edges", lambda m, g, p, **k: (scored.append(p), own(m, g, p, **k))[1])
    found = discover(RunSpec(str(path), method="gim", roles=False, out=tmp_path))
    train = found.train
    assert len(train) == len(found.test) == 20 and found.examples.validation is None
    assert found.notes[0].startswith(run_examples.CROSS_FITTED)
    for fold, part in enumerate(scored):  # each fold is measured with the scores of the others
        assert torch.equal(part.clean, train[[i for i in range(20) if i % 3 != fold]].clean)
    assert len(scored) == found.curve.folds == 3 and found.curve.pairs is train
    size, curve = found.document.selection.size, found.document.curve
    assert size is not None and curve is not None and size.pairs == curve.pairs == "discovery" and curve.folds == 3
    assert found.circuit.selection["edges"] < 100 and found.evaluation.faithfulness > 0.8
    verified = mi.verify(found.path, rescore=True)
    assert verified.ok and any("cross-fitted in 3 folds" in note for note in verified.notes)
    assert "choice of the size" in {part.words for part in verified.extent.only_hashed}
    forged = json.loads(found.path.read_text("utf-8"))
    forged["selection"]["size"]["agreement"] = 0.0
    found.path.write_text(json.dumps(forged), "utf-8")
    assert "selection.size" in {claim.name for claim in mi.verify(found.path).failed}


@pytest.mark.parametrize(
    ("changes", "kind", "resamples"),
    [
        ({"resamples": None, "examples": 6}, "bootstrap over blocks of examples", RESAMPLES),
        ({"resamples": 5}, "bootstrap over blocks of examples", 5),
        ({"resamples": 0}, None, 0),
        ({"resamples": None, "method": "path-patching", "examples": 2}, None, 0),  # would cost that many runs
        ({"resamples": None, "replacement": "mean"}, None, 0),
    ],
)
def test_resamples_are_drawn_where_they_cost_little(
    spec: RunSpec, changes: dict[str, Any], kind: str | None, resamples: int
) -> None:
    found = discover(replace(spec, roles=False, curve=False, **{"method": "eap", **changes}))
    assert (found.stability is None) == (kind is None) == (found.document.stability is None)
    if found.stability is not None and found.document.stability is not None:
        assert found.stability.kind == found.document.stability.kind == kind
        assert found.stability.found.resamples == found.document.stability.resamples == resamples
        assert all(edge.frequency is not None for edge in found.document.edges)
    assert [point.n_selected for point in found.curve.points] == [25]  # no curve: the size itself


def test_resamples_of_a_method_that_draws_them_itself_are_its_runs(spec: RunSpec) -> None:
    with pytest.raises(InputError, match="give --set runs=4"):
        discover(replace(spec, method="mattr"))


@pytest.mark.slow
def test_a_run_refines_its_circuit_and_a_killed_pass_goes_on(spec: RunSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finished_parts, "WORTH_SECONDS", 0.0)
    monkeypatch.setattr(checkpoint, "EVERY_SECONDS", 0.0)
    spec = replace(spec, method="eap", refine=0.01, refine_add=3, roles=False)
    told: list[int] = []

    def report(stage: str, done: int, total: int) -> None:
        if stage == "refine":
            told.append(done)
            if len(told) == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        discover(spec, report)
    killed_at = told[-1]
    made = discover(spec, report)
    assert told[3] == killed_at > 0  # it did not begin again
    assert made.circuit.scores is not None
    plain = mi.select(made.circuit.graph, made.circuit.scores, edges=25)
    expected = mi.refine_circuit(made.model, plain, made.train, tau=0.01, add=3)
    stated = made.document.selection
    assert made.circuit.edges == expected.edges and stated.parameters["edges"] == 25
    assert stated.parameters["dropped"] == expected.selection["dropped"] > 0
    assert "--refine 0.01 --refine-add 3" in str(made.document.provenance.command)
    assert [path.name for path in spec.out.iterdir() if "unfinished" in path.name] == []

    lines = steadiness(made.document)
    assert lines[0].startswith("size: given (25 edges)")
    assert lines[1].startswith("refined by exact runs on 12 pairs: ")
    assert lines[2].startswith("stability, before it was refined: ")
    found = mi.verify(made.path, model=made.model, rescore=True)
    assert found.ok and any(warning.name == "selection not applied" for warning in found.warnings)
    names = [claim.name for claim in found.claims]
    assert {"selection.added", "stability.jaccard_by_chance", "stability.jaccard again"} <= set(names)


def test_refining_needs_a_threshold() -> None:
    with pytest.raises(InputError, match="`refine_add` goes with `refine`"):
        discover(RunSpec("ioi", method="eap", refine_add=3))
    with pytest.raises(InputError, match="refine must be a number, above 0"):
        discover(RunSpec("ioi", method="eap", refine=0.0))


def test_an_effort_names_the_method_and_settings_given_come_last() -> None:
    assert {effort: method for effort, (method, _) in EFFORTS.items()} == {
        "quick": "ensemble",
        "standard": "mattr",
        "thorough": "mattr",
    }
    assert resolved(RunSpec("ioi")) == RunSpec("ioi", method="mattr")
    thorough = resolved(RunSpec("ioi", effort="thorough", settings=("runs=2",)))
    assert thorough.settings[0] == "runs=8" and thorough.settings[-1] == "runs=2"
    assert pipeline._settings(thorough)["runs"] == 2 and pipeline._settings(thorough)["learning_steps"] == 300
    own = RunSpec("ioi", method="eap", effort="thorough")
    assert resolved(own) == own
    for effort in EFFORTS:  # its settings exist
        pipeline._settings(resolved(RunSpec("ioi", effort=effort)))


@pytest.mark.slow
def test_a_killed_run_does_not_score_again(spec: RunSpec, monkeypatch: pytest.MonkeyPatch, made: Discovery) -> None:
    monkeypatch.setattr(finished_parts, "WORTH_SECONDS", 0.0)
    scored: list[int] = []
    own = pipeline.resampled_scores
    monkeypatch.setattr(pipeline, "resampled_scores", lambda *a, **k: (scored.append(1), own(*a, **k))[1])
    with monkeypatch.context() as broken:
        broken.setattr(pipeline, "evaluate_in", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            discover(spec)
    assert [path for path in spec.out.iterdir() if ".unfinished." in path.name]
    state = {path: path.read_bytes() for path in spec.out.iterdir()}
    again = discover(spec)
    assert scored == [1] and again.path.read_bytes() == made.path.read_bytes()
    for path, content in state.items():
        path.write_bytes(content)
    smaller = discover(replace(spec, batch_size=5, roles=False))  # as after too little memory
    assert scored == [1] and smaller.circuit.edges == made.circuit.edges
    assert not [path for path in spec.out.iterdir() if path.name.startswith(".")]


def test_what_was_measured_with_another_metric_of_a_task_file_is_not_taken_up(tmp_path: Path) -> None:
    model, file = mi.load_model("bundled"), tmp_path / "own.yaml"
    text = (Path(mi.__file__).parent / "tasks" / "subject_verb_agreement.yaml").read_text("utf-8")
    keys: dict[str, str] = {}
    for metric in ("logit_diff", "prob_diff"):
        file.write_text(text.replace("metric: logit_diff", f"metric: {metric}"), "utf-8")
        asked = RunSpec(str(file), method="eap", examples=4, validation_examples=4, test_examples=4, out=tmp_path)
        keys[metric] = pipeline.prepare(asked, given=model).key
    assert len(set(keys.values())) == 2


@pytest.mark.slow
def test_the_same_run_gives_the_same_bytes(made: Discovery, spec: RunSpec) -> None:
    assert made.path.read_bytes() == discover(spec).path.read_bytes()


@pytest.mark.slow
def test_the_batch_size_changes_nothing_that_counts(made: Discovery, spec: RunSpec) -> None:
    parts = discover(replace(spec, batch_size=5))
    assert made.circuit.edges == parts.circuit.edges
    assert mi.verify(made.path, batch_size=3).ok


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"threshold": 1e-5, "edges": None},
        {"edges": 15, "rule": "greedy", "dtype": "float64"},
        {"edges": 15, "by": "value", "seed": 3},
        {"edges": 15, "method": "eap", "metric": "prob_diff"},
        {"edges": 15, "settings": ("runs=3", "learning_steps=4"), "method": "mattr", "resamples": None},
        {"edges": 15, "steps": 2, "replacement": "zero"},
        {"edges": 15, "replacement": "mean", "metric": "kl_to_clean", "resamples": 2},
        {"edges": 15, "method": "exact", "examples": 4},
    ],
    ids=str,
)
def test_every_choice_verifies(spec: RunSpec, changes: dict[str, Any]) -> None:
    made = discover(replace(spec, roles=False, **changes))  # roles and their claims: the runs above
    found = mi.verify(made.path, rescore=True)
    assert found.ok, str(found)
    assert made.document.selection.size is None


@pytest.mark.slow
def test_a_file_of_pairs(spec: RunSpec, folder: Path) -> None:
    path = folder / "mine.jsonl"
    made = discover(
        replace(spec, task=str(path), edges=20, examples=8, test_examples=8, out=folder)
    )  # beside the pairs
    assert made.path.name == "mine-small-eap-ig.circuit.json"
    assert (len(made.train), len(made.test)) == (8, 8)
    assert made.train.digest() != made.test.digest()
    assert mi.verify(made.path).ok
    text = path.read_text("utf-8")
    try:
        path.write_text(text.replace("drink", "drank", 1), "utf-8")
        assert [claim.name for claim in mi.verify(made.path).failed] == ["task file"]
    finally:
        path.write_text(text, "utf-8")


@pytest.mark.slow
def test_bos_is_chosen_by_the_spec_and_kept_in_the_file(spec: RunSpec) -> None:
    model = mi.load_model(spec.model)
    default = model.tokenizer("a")["input_ids"][0] == model.tokenizer.bos_token_id
    for bos in (None, True, False):
        sets = pipeline.examples_of(replace(spec, bos=bos), model)
        for pairs in (sets.train, sets.validation, sets.test):
            assert pairs is not None
            first = pairs.clean[:, 0] == model.tokenizer.bos_token_id
            assert bool(first.all() if (default if bos is None else bos) else not first.any())
    found = discover(replace(spec, bos=not default, roles=False, edges=20))
    stated = found.document.tokenizer
    assert stated is not None and stated.prepend_bos is not default
    assert mi.verify(found.path).ok
    again = mi.reevaluate(found.path, examples=10)  # on the file's own task: the same pairs
    assert again.evaluation.faithfulness == pytest.approx(found.evaluation.faithfulness, rel=1e-5)


@pytest.mark.slow
def test_pairs_without_answers_are_measured_by_kl(spec: RunSpec, tmp_path: Path) -> None:
    path = tmp_path / "ids.jsonl"
    rows = torch.randint(2, 100, (8, 2, 6), generator=torch.Generator().manual_seed(0)).tolist()
    path.write_text("\n".join(json.dumps({"clean": c, "corrupt": x}) for c, x in rows), "utf-8")
    made = discover(replace(spec, task=str(path), edges=20))
    assert made.document.discovery is not None
    assert made.document.discovery.metric.name == "kl_to_clean"
    assert made.evaluation.accuracy is None
    assert mi.verify(made.path).ok


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"task": "ioy"}, "Unknown task 'ioy'. Did you mean 'ioi'"),
        ({"task": "none.jsonl"}, "cannot be read"),
        ({"task": "none.yaml"}, "cannot be read"),
        ({"model": "./none"}, "no model directory"),
        ({"method": "eap_ig"}, "Unknown method 'eap_ig'. Did you mean 'eap-ig'"),
        ({"metric": "logitdiff"}, "Unknown metric 'logitdiff'. Did you mean 'logit_diff'"),
        ({"method": "eap", "steps": 5}, "has no parameter 'steps'"),
        ({"edges": 5, "threshold": 0.1}, "only one of them"),
        ({"edges": 10**6}, "edges must be"),
        ({"rule": "best"}, "Unknown rule"),
        ({"by": "size"}, "Unknown order"),
        ({"replacement": "noise"}, "Unknown replacement"),
        ({"examples": 0}, "0"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_said_and_nothing_is_written(spec: RunSpec, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        discover(replace(spec, **changes))
    assert words in str(caught.value)
    assert not spec.out.exists() or not list(spec.out.iterdir())


def test_a_folder_that_cannot_be_made_is_said_first(spec: RunSpec, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="Cannot write to"):
        discover(replace(spec, model="./none", out=tmp_path / "file" / "out"))


def test_names_and_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert output_path(RunSpec("ioi")) == Path("out/ioi-bundled-mattr.circuit.json")
    assert output_path(RunSpec("my/own.yaml", "org/name@main", method="eap")).name == "own-name-main-eap.circuit.json"
    assert command_of(RunSpec("ioi")) == "discover-circuit run ioi"
    spec = RunSpec("my task.jsonl", method="eap", edges=5, test_examples=7, out=Path("x"), device="cuda")
    assert command_of(spec) == "discover-circuit run 'my task.jsonl' --method eap --edges 5 --test-examples 7"


def test_sizes() -> None:
    assert size_grid(3) == (3,)
    assert size_grid(1) == (1,)
    grid = size_grid(32_491)
    assert grid[0] == 4 and grid[-1] == 32_491 and len(grid) < 110
    assert len(size_grid(32_491, fine=1)) == 14
    assert all(a < b for a, b in itertools.pairwise(grid))
    points = [CurvePoint(4, 0, 0.0), CurvePoint(8, 8, 0.95), CurvePoint(16, 16, 0.85), CurvePoint(32, 32, 1.0)]
    assert smallest_faithful(points) == 8
    assert smallest_faithful(points, 0.99) == 32
    with pytest.raises(InputError, match="No size reaches"):
        smallest_faithful(points, 1.5)


def test_one_lucky_crossing_is_no_answer() -> None:
    def points(**passing: float) -> list[CurvePoint]:
        return [CurvePoint(int(n[1:]), int(n[1:]), 1.0, passing=share) for n, share in passing.items()]

    assert chosen_size(points(n4=1.0, n8=0.0, n16=0.89, n32=0.95, n64=1.0), 100, Levels(most=1.0)) == 32
    assert chosen_size(points(n4=1.0, n8=1.0), 100, Levels()) == 4
    assert chosen_size(points(n4=0.0, n64=1.0, n99=1.0), 100, Levels()) is None  # more than half
    assert chosen_size([CurvePoint(4, 4, 1.0)], 100, Levels()) is None  # nothing was measured


def test_a_size_that_connects_nothing_is_the_empty_circuit(made: Discovery) -> None:
    assert made.circuit.scores is not None
    (point,) = size_curve(made.model, made.circuit.scores, made.train, [1])
    assert point.n_edges in (0, 1)
    assert point.n_edges == 1 or point.faithfulness == pytest.approx(0, abs=1e-6)


def test_the_package_is_imported_without_torch() -> None:
    code = "import sys, mechinterp, mechinterp.circuit_file.store as _; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0


def test_every_public_name_is_there() -> None:
    for name in mi.__all__:
        assert getattr(mi, name) is not None
    assert callable(mi.verify) and callable(mi.select) and callable(mi.discover)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = mi.nothing


@pytest.mark.slow
def test_a_run_by_name_is_the_run_of_the_spec(made: Discovery, folder: Path, tmp_path: Path) -> None:
    """Options as keywords, as on the command line; the command that it states names the model."""
    loaded = mi.load_model(str(folder / "small"))
    found = mi.discover("ioi", model=loaded, out=tmp_path, **SMALL)
    assert found.circuit.digest() == made.circuit.digest() and found.model is loaded
    assert found.document.provenance.command == made.document.provenance.command
    assert repr(found).startswith(f"Discovery({len(made.circuit)} of")


@pytest.mark.slow
def test_a_run_with_a_model_in_memory_states_no_command(folder: Path, tmp_path: Path) -> None:
    loaded = mi.load_model(str(folder / "small"))
    model = mi.load_model(loaded.bridge.original_model, tokenizer=loaded.tokenizer)
    quick = {"method": "eap", "examples": 10, "edges": 20, "roles": False, "curve": False, "anyway": True}
    found = mi.discover("ioi", model=model, out=tmp_path, settings={}, positions=["S2", "end"], **quick)
    assert found.document.provenance.command is None and found.document.model.origin == "memory"
    assert len(found.train) == len(found.test) == 10 and found.circuit.graph.positions == ("S2", "end", "rest")


@pytest.mark.parametrize(
    ("task", "options", "said"),
    [
        ("ioi", {"edgse": 3}, "Unknown option of a run 'edgse'. Did you mean 'edges'"),
        ("ioi", {"task": "ioi"}, "Unknown option of a run 'task'"),
        ("ioy", {"model": "./none"}, "no model directory"),
    ],
)
def test_a_wrong_option_of_a_run_by_name_is_named(task: str, options: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises((InputError, TypeError), match=said):
        mi.discover(task, out=tmp_path, **options)
