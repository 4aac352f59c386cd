"""Re-sealed forgeries: files whose claims all hold, or nearly, and that would mislead. Each is warned of or fails.

"Re-sealed" is what somebody does on purpose: the content is changed, then every hash is made right again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import mechinterp as mi
from mechinterp import pipeline
from mechinterp.circuit_file.circuit_file import edge_records, scores_bytes
from mechinterp.circuit_file.schema import CircuitFile, circuit_sha256
from mechinterp.circuit_file.store import file_sha256, open_circuit_file
from mechinterp.circuit_file.verify.claims import Verification
from mechinterp.circuit_file.verify.coverage import extent_of
from mechinterp.circuit_file.verify.warnings import stated_warnings
from mechinterp.cli import app as cli
from mechinterp.graphs.circuit import Circuit
from mechinterp.tasks import task as task_module
from tests.support.words_model import save_words_model

IOI = Path(task_module.__file__).parent / "ioi.yaml"
N = 24
Change = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Honest:
    """What an honest file is made of; `path` is that file, beside a folder with its model."""

    path: Path
    model: mi.HookManager
    circuit: Circuit
    train: mi.Pairs
    test: mi.Pairs


@pytest.fixture(scope="session")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Honest:
    folder = tmp_path_factory.mktemp("honest")
    model = mi.load_model(save_words_model(folder / "model"))
    task = mi.load_task("ioi")
    train, test = (task.pairs(model, n=N, split=split, seed=0) for split in ("train", "test"))
    graph = mi.build_graph(model)
    circuit = mi.select(graph, mi.score_edges(model, graph, train, method="eap"), edges=20)
    path, roles, checked = folder / "a.circuit.json", {}, supported(model, circuit, test)
    roles["early"] = {"label": "early heads", "nodes": ["a0.h0"]}
    result = mi.evaluate(model, circuit, test)
    mi.save_circuit(path, circuit, model=model, task=task, result=result, predictions=checked, roles=roles)
    return Honest(path, model, circuit, train, test)


def supported(model: mi.HookManager, circuit: Circuit, pairs: mi.Pairs) -> tuple[Any, ...]:
    """A prediction about a0.h0 that holds, with the control on the other side of its number."""
    assert "a0.h0" in circuit.nodes
    measures = [{"kind": "attention", "head": head, "query": "end", "key": "S1"} for head in ("a0.h0", "a0.h1")]
    sides = ">=", "<="
    for relation in sides:
        first = {"name": "attention of a0.h0", "measure": measures[0], "relation": relation, "value": 0.0}
        one = mi.Prediction.model_validate(first)
        other = mi.Prediction.model_validate({**first, "name": "other", "measure": measures[1]})
        got, against = (entry.value for entry in mi.check_predictions(model, [one, other], pairs))
        if (got > against) == (relation == ">="):
            middle = {"value": (got + against) / 2, "controls": [{"measure": measures[1]}]}
            return mi.check_predictions(model, [mi.Prediction.model_validate({**first, **middle})], pairs)
    raise AssertionError("both heads attend alike")


@pytest.fixture
def place(tmp_path: Path, honest: Honest) -> Path:
    """A copy of the honest file, to be forged."""
    for name in ("a.circuit.json", "a.scores.safetensors"):
        shutil.copy(honest.path.with_name(name), tmp_path)
    return tmp_path / "a.circuit.json"


def resealed(path: Path, *changes: Change) -> Path:
    content = json.loads(path.read_text("utf-8"))
    for change in changes:
        change(content)
    path.write_text(json.dumps(content), "utf-8")
    content["integrity"]["circuit_sha256"] = circuit_sha256(open_circuit_file(path).document)
    content["integrity"]["file_sha256"] = file_sha256(content)
    path.write_text(json.dumps(content), "utf-8")
    return path


def document(path: Path) -> CircuitFile:
    return open_circuit_file(path).document


def names(found: Verification) -> set[str]:
    """The warnings, without the one about the honest circuit itself, which is of a random model."""
    return {warning.name for warning in found.warnings} - {"overshoot"}


NOT_RESCORED = "scores not recomputed"


@pytest.fixture
def holds(
    honest: Honest, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., set[str]]:
    """The warnings of a file whose claims all hold: exit code 0, but 1 where it is looked at strictly."""

    def check(path: Path, **options: Any) -> set[str]:
        found = mi.verify(path, **{"model": honest.model, **options})  # loaded once
        assert found.ok, str(found)
        monkeypatch.setattr(pipeline, "verify", lambda *args, **keywords: found)  # it was run once, that will do
        assert cli.main(["verify", str(path)]) == 0
        assert cli.main(["verify", str(path), "--strict"]) == (1 if found.warnings else 0)
        printed = " ".join(capsys.readouterr().out.split())
        for words in ("recomputed", "only hash-checked", "free text, never checked", *names(found)):
            assert words in printed
        return names(found)

    return check


@pytest.fixture
def fails(honest: Honest) -> Callable[..., set[str]]:
    """The claims that fail."""

    def check(path: Path, **options: Any) -> set[str]:
        found = mi.verify(path, model=honest.model, **options)
        assert not found.ok
        return {claim.name for claim in found.failed}

    return check


# -- what is honest ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_honest_file_has_no_warning_when_all_is_recomputed(honest: Honest, holds: Callable[..., set[str]]) -> None:
    assert holds(honest.path, rescore=True) == set()


@pytest.mark.slow
def test_what_can_be_said_before_is_what_verify_finds(honest: Honest) -> None:
    found = mi.verify(honest.path)
    assert found.notes == (f"evaluation: none of the {N} prompts of 'evaluation' is among the {N} of 'discovery'.",)
    assert names(found) == {NOT_RESCORED}
    assert found.extent == extent_of(document(honest.path))
    assert found.warnings == stated_warnings(document(honest.path))
    words = [part.words for part in found.extent.recomputed]
    assert "predictions about 1 of 1 nodes with roles" in words and "scores and how they were made (eap)" not in words
    again = mi.verify(honest.path, rescore=True).extent
    assert {part.words for part in again.recomputed} - set(words) == {"scores and how they were made (eap)"}


def test_what_was_not_run_is_not_called_recomputed(place: Path, honest: Honest) -> None:
    """The claim that fails because nothing could be run shows nothing."""
    resealed(place, lambda c: c["model"].update(name=str(place.parent / "gone")))
    found = mi.verify(place)
    words = {part.words for part in found.extent.only_hashed}
    assert {"model and weights", "evaluation on 'evaluation'", "pairs 'evaluation'", "1 predictions"} <= words


def test_every_field_of_a_file_is_in_one_of_the_lists() -> None:
    """Of files that have them all: a field that is added to the schema must be put into a list as well."""
    stored = [document(path) for path in (Path(__file__).parents[2] / "circuits").glob("*.circuit.json")]
    more = {"license": "MIT", "created_utc": "2026-01-01T00:00:00Z", "extensions": {"x": 1}}
    stored += [entry.model_copy(update=more) for entry in stored[:1]]
    listed = {part.field for entry in stored for _, parts in extent_of(entry).lists() for part in parts}
    elsewhere = {"nodes": "with the edges", "readout": "test_readouts.py"}
    assert set(CircuitFile.model_fields) - listed == {"schema_version", "kind", *elsewhere}


# -- scores and how they were made -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_forged_scores(
    place: Path, honest: Honest, holds: Callable[..., set[str]], fails: Callable[..., set[str]]
) -> None:
    """Other scores, which give the same edges, in both files."""
    scores = honest.circuit.scores
    assert scores is not None
    table = scores.values * torch.where(honest.circuit.kept, 2.0, 0.5)
    sidecar = safetensors.torch.save({"scores": table.contiguous()})
    place.with_name("a.scores.safetensors").write_bytes(sidecar)
    forged = mi.Scores(honest.circuit.graph, table, 1, "eap", "logit_diff", "corrupt")
    again = mi.select(honest.circuit.graph, forged, edges=20)
    assert again.edges == honest.circuit.edges and scores_bytes(forged) != b""

    def change(content: dict[str, Any]) -> None:
        content["integrity"]["sidecar"]["sha256"] = hashlib.sha256(sidecar).hexdigest()
        content["edges"] = edge_records(again)

    resealed(place, change)
    assert holds(place) == {NOT_RESCORED}
    assert fails(place, rescore=True) == {"scores again"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("method", "causal-scrubbing-plus"),
        ("metric", {"name": "truth", "direction": "higher is better", "unit": "logits"}),
        ("metric", {"name": "logit_diff", "direction": "lower is better", "unit": "logits"}),
        ("metric", {"name": "logit_diff", "direction": "higher is better", "unit": "per cent"}),
        ("parameters", {"replacement": "corrupt", "care": "great"}),
        ("replacement", "zero"),
        ("n_examples", 100_000),
    ],
)
def test_a_discovery_that_cannot_have_been(place: Path, fails: Callable[..., set[str]], field: str, value: Any) -> None:
    resealed(place, lambda c: c["discovery"].update({field: value}))
    assert fails(place) == {f"discovery.{field}"}


@pytest.mark.slow
def test_an_unknown_method_is_named_with_the_known_ones(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    resealed(place, lambda c: c["discovery"].update(method="eap-gi"))
    assert cli.main(["verify", str(place)]) == 1
    assert "Did you mean 'eap-ig'?" in " ".join(capsys.readouterr().out.split())


# -- results -----------------------------------------------------------------------------------------------------------


def test_a_headline_without_an_evaluation(place: Path, holds: Callable[..., set[str]]) -> None:
    def change(content: dict[str, Any]) -> None:
        content.update(evaluation=[], status="ground-truth", title="Recovers 99.9 %")

    found = holds(resealed(place, change))
    assert found == {NOT_RESCORED, "no evaluation", "self-declared status", "numbers in words"}


def test_the_evaluation_on_the_pairs_of_the_discovery(
    tmp_path: Path, honest: Honest, holds: Callable[..., set[str]]
) -> None:
    result = mi.evaluate(honest.model, honest.circuit, honest.train)
    path = tmp_path / "b.circuit.json"
    mi.save_circuit(path, honest.circuit, model=honest.model, task=mi.load_task("ioi"), result=result)
    assert holds(path) == {NOT_RESCORED, "evaluation on discovery pairs"}


def test_pairs_of_the_discovery_under_another_name_and_with_another_corrupt_prompt(
    tmp_path: Path, honest: Honest
) -> None:
    """Told by the token ids: one half of the clean prompts was scored on."""
    half, train, test = N // 2, honest.train, honest.test
    rows = {name: getattr(train, name)[:half] for name in ("clean", "mask", "right", "wrong", "answer_pos")}
    corrupt = torch.where(train.mask[:half], train.clean[:half], 0)
    corrupt[:, 1] = corrupt[:, 1] % 20 + 5
    mixed = mi.Pairs(**rows, corrupt=corrupt)
    path = tmp_path / "b.circuit.json"
    results = [mi.evaluate(honest.model, honest.circuit, pairs) for pairs in (mixed, test)]
    mi.save_circuit(path, honest.circuit, model=honest.model, result=results)
    found = mi.verify(path, model=honest.model)
    assert found.ok and {"evaluation on discovery pairs", "own task"} <= names(found)
    assert any(f"{half} of the {half} prompts" in warning.text for warning in found.warnings)


@pytest.mark.slow
def test_two_examples_with_the_best_of_many_seeds(
    tmp_path: Path, honest: Honest, holds: Callable[..., set[str]]
) -> None:
    task = mi.load_task("ioi")
    tried = [task.pairs(honest.model, n=2, split="test", seed=seed) for seed in range(1, 9)]
    results = [mi.evaluate(honest.model, honest.circuit, pairs, n_random=1) for pairs in tried]
    best = max(results, key=lambda result: result.faithfulness)
    assert best.faithfulness > min(result.faithfulness for result in results) + 0.1  # there is something to choose
    path = tmp_path / "b.circuit.json"
    mi.save_circuit(path, honest.circuit, model=honest.model, task=task, result=best)
    assert holds(path) >= {"few examples", "chosen examples"}


def test_many_examples_that_are_the_same_two(tmp_path: Path, honest: Honest) -> None:
    pairs = honest.test[[0, 1] * 20]
    path = tmp_path / "b.circuit.json"
    result = mi.evaluate(honest.model, honest.circuit, pairs, n_random=0)
    mi.save_circuit(path, honest.circuit, model=honest.model, task=mi.load_task("ioi"), result=result)
    found = {warning.name: warning.text for warning in stated_warnings(document(path))}
    assert "evaluation on 2" in found["few examples"] and "no random circuits" in found


def test_a_random_circuit_that_does_as_well(honest: Honest) -> None:
    stated = document(honest.path)
    entry = stated.evaluation[0].model_copy(update={"random_faithfulness": (0.1, 1.5), "faithfulness": 0.9})
    found = stated_warnings(stated.model_copy(update={"evaluation": (entry,)}), rescored=True)
    assert [warning.name for warning in found] == ["no better than random"]


# -- tasks, pairs and models under a name that is not theirs -----------------------------------------------------------


def test_another_task_under_the_package_s_name(tmp_path: Path, honest: Honest, holds: Callable[..., set[str]]) -> None:
    (tmp_path / "ioi.yaml").write_text(IOI.read_text("utf-8").replace(" gave ", " handed ", 1), "utf-8")
    task = mi.load_task(str(tmp_path / "ioi.yaml"))
    assert task.name == "ioi"
    result = mi.evaluate(honest.model, honest.circuit, task.pairs(honest.model, n=N, split="test", seed=0))
    stored = mi.select(honest.circuit.graph, _without_pairs(honest.circuit), edges=20)
    path = tmp_path / "b.circuit.json"
    mi.save_circuit(path, stored, model=honest.model, task=task, result=result)
    found = holds(path)
    assert found == {NOT_RESCORED, "scores without pairs", "own task", "task under a known name"}


def _without_pairs(circuit: Circuit) -> mi.Scores:
    made = circuit.scores
    assert made is not None
    return mi.Scores(made.graph, made.total, made.count, made.method, made.metric, made.replacement, made.parameters)


def test_the_title_of_a_task_is_the_task_s(place: Path, fails: Callable[..., set[str]]) -> None:
    resealed(place, lambda c: c["task"].update(title="All of English grammar"))
    assert fails(place) == {"task.title"}


def test_a_tokenizer_that_contradicts_the_pairs(place: Path, fails: Callable[..., set[str]]) -> None:
    resealed(place, lambda c: c["tokenizer"].update(prepend_bos=not c["tokenizer"]["prepend_bos"]))
    assert fails(place) == {"tokenizer.prepend_bos"}


@pytest.mark.slow
def test_hand_picked_pairs_of_a_known_task(tmp_path: Path, honest: Honest, holds: Callable[..., set[str]]) -> None:
    """Given as token ids under the task's name; a part of what the task makes is no such thing."""
    test, path = honest.test, tmp_path / "b.circuit.json"
    results = [mi.evaluate(honest.model, honest.circuit, pairs, n_random=3) for pairs in (test, test[: N - 1])]
    mi.save_circuit(path, honest.circuit, model=honest.model, task=mi.load_task("ioi"), result=results)
    assert "pairs not of the task" not in names(mi.verify(path, model=honest.model))
    mi.save_circuit(path, honest.circuit, model=honest.model, task=mi.load_task("ioi"), result=results[1])
    assert "pairs not of the task" in holds(path)


@pytest.mark.slow
def test_a_folder_gpt2_that_is_not_gpt2(place: Path, honest: Honest, holds: Callable[..., set[str]]) -> None:
    folder = place.parent / "gpt2"
    shutil.copytree(honest.path.parent / "model", folder)
    found = holds(resealed(place, lambda c: c["model"].update(name=str(folder))), model=None)
    assert found == {NOT_RESCORED, "model under a known name"}


@pytest.mark.parametrize(
    ("name", "origin", "size", "words"),
    [
        ("gpt2", "directory", (12, 12, 768), "is not compared with"),
        ("models/GPT2/", "directory", (2, 2, 16), "2 layers, 2 heads and width 16"),
        ("openai-community/gpt2-xl", "memory", (12, 12, 768), "12 layers"),
        ("somebody/pythia-70m-deduped", "hub", (2, 2, 16), "'pythia-70m' has 6 layers"),
        ("bundled", "directory", (4, 4, 64), "is not compared with"),
        ("org/anything", "memory", (2, 2, 16), "is not compared with"),
        ("gpt2", "hub", (12, 12, 768), None),
        ("my-model", "directory", (2, 2, 16), None),
        ("org/anything", "hub", (2, 2, 16), None),
    ],
)
def test_names_of_known_models(
    honest: Honest, name: str, origin: str, size: tuple[int, int, int], words: str | None
) -> None:
    stated = document(honest.path)
    sizes = dict(zip(("n_layers", "n_heads", "d_model"), size, strict=True))
    dims = stated.model.dims.model_copy(update=sizes)
    model = stated.model.model_copy(update={"name": name, "origin": origin, "dims": dims})
    found = stated_warnings(stated.model_copy(update={"model": model}), rescored=True)
    found = tuple(warning for warning in found if warning.name != "overshoot")
    assert [words in warning.text for warning in found if words] == ([True] if words else [])
    assert {warning.name for warning in found} == ({"model under a known name"} if words else set())


# -- roles and predictions ---------------------------------------------------------------------------------------------


def test_roles_that_are_free_text(place: Path, honest: Honest, holds: Callable[..., set[str]]) -> None:
    nodes = [name for name in honest.circuit.nodes if name.startswith("a")]

    def change(content: dict[str, Any]) -> None:
        content["roles"] = {"all": {"label": "heads that understand", "nodes": nodes}}

    found = holds(resealed(place, change))
    assert found == {NOT_RESCORED, "roles without predictions"}
    (text,) = (entry.text for entry in stated_warnings(document(place)) if entry.name == "roles without predictions")
    assert "heads that understand" in text and "a0.h0 (" not in text  # which has its prediction still


@pytest.mark.parametrize(
    ("measure", "relation", "value"),
    [
        ({"kind": "parts replaced", "parts": ["a0.h0"]}, ">=", -1e9),
        ({"kind": "direct effect", "node": "a0.h0"}, ">=", -1e9),
        ({"kind": "attention", "head": "a0.h0", "query": "end", "key": "S1"}, ">=", 0.0),
        ({"kind": "attention", "head": "a0.h0", "query": "end", "key": "S1"}, "<=", 1.0),
        ({"kind": "detector", "head": "a0.h0", "pattern": "induction", "length": 8}, ">=", -0.5),
        ({"kind": "copying", "head": "a0.h0"}, ">=", -1.0),
    ],
)
def test_predictions_that_any_value_satisfies(
    place: Path, holds: Callable[..., set[str]], measure: dict[str, Any], relation: str, value: float
) -> None:
    entry = {"name": "moves names", "measure": measure, "relation": relation, "value": value}
    if measure["kind"] not in ("detector", "copying"):
        entry["pairs"] = "evaluation"
    found = holds(resealed(place, lambda c: c.update(predictions=[entry])))
    vacuous = {"vacuous predictions", "predictions without controls", "roles without predictions"}
    assert found == {NOT_RESCORED, *vacuous}


# -- what was dropped --------------------------------------------------------------------------------------------------


def drop_scores(content: dict[str, Any]) -> None:
    del content["discovery"], content["integrity"]["sidecar"]


def drop_all_of_scores(content: dict[str, Any]) -> None:
    drop_scores(content)
    content["edges"] = [{"name": edge["name"]} for edge in content["edges"]]


DROPPED: dict[str, tuple[Change, set[str]]] = {
    "the sidecar": (drop_scores, {"no scores", "scores without a source"}),
    "all scores": (drop_all_of_scores, {"no scores"}),
    "the rule": (lambda c: c["selection"].update(parameters={}), {NOT_RESCORED, "selection not applied"}),
    "the pairs of the scores": (lambda c: c["discovery"].pop("pairs"), {NOT_RESCORED, "scores without pairs"}),
    "versions": (lambda c: c["provenance"].update(versions={}), {NOT_RESCORED, "no versions"}),
    "the tokenizer": (lambda c: c.pop("tokenizer"), {NOT_RESCORED, "tokenizer not stated"}),
    "predictions": (lambda c: c.pop("predictions"), {NOT_RESCORED, "roles without predictions"}),
    "the curve": (
        lambda c: c["selection"].update(
            size={
                "rule": "smallest size whose faithfulness reaches the target",
                "target": 0.9,
                "pairs": "discovery",
            }
        ),
        {NOT_RESCORED, "size without a curve"},
    ),
    "random circuits": (
        lambda c: c["evaluation"][0].update(random_faithfulness=[]),
        {NOT_RESCORED, "no random circuits"},
    ),
}


@pytest.mark.parametrize("part", DROPPED)
def test_a_part_that_was_dropped(place: Path, part: str, holds: Callable[..., set[str]]) -> None:
    change, expected = DROPPED[part]
    assert holds(resealed(place, change)) == expected


def test_words_of_the_author_are_not_claims(place: Path, holds: Callable[..., set[str]]) -> None:
    cited = {"title": "A paper", "authors": ["A. Uthor"]}
    found = holds(resealed(place, lambda c: c.update(status="ground-truth", citation=cited)))
    assert found == {NOT_RESCORED, "self-declared status", "self-declared citation"}
