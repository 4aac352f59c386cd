"""How a circuit was found: performance, curve, size and stability hold, and every number of them fails once forged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import mechinterp as mi
from mechinterp.circuit_file.circuit_file import save_circuit
from mechinterp.circuit_file.schema import circuit_sha256
from mechinterp.circuit_file.store import file_sha256, open_circuit_file
from mechinterp.circuit_file.summary import steadiness
from mechinterp.circuit_file.verify.claims import Verification
from mechinterp.discovery.stable import (
    BLOCKS,
    RUNS,
    MeasuredStability,
    block_resamples,
    resampled_scores,
    stability_at,
)
from mechinterp.evaluation.sizes import Levels, SizeSearch
from mechinterp.evaluation.task_check import check_performance
from tests.support.words_model import save_words_model

HOW: dict[str, Any] = {"rule": "top", "by": "magnitude", "ratio": None}
SIZES = (8, 16, 28, 40)
TEMPLATE_NUMBERS = "performance.by_template, numbers"
Change = Callable[[dict[str, Any]], None]


def write(folder: Path, kind: str) -> None:
    """A file of a random model, with all that a run measures; what a size must reach lies between two of the sizes."""
    model, task = mi.load_model(str(folder / "model")), mi.load_task("ioi")
    train = task.pairs(model, n=12, split="train", seed=0)
    validation = task.pairs(model, n=12, split="train", seed=0, skip=12)
    test = task.pairs(model, n=10, split="test", seed=0)
    graph = mi.build_graph(model)
    if kind == BLOCKS:
        rows = block_resamples(len(train), 8, 3)
        scores, samples = resampled_scores(model, graph, train, rows, {"method": "eap"})
    else:
        settings = {"runs": 3, "learning_steps": 2, "drawings": 2, "seed": 3}
        scores = mi.score_edges(model, graph, train, method="mattr", **settings)
        assert scores.samples is not None
        samples = scores.samples
    levels = levels_between(model, scores, validation)
    search = SizeSearch(model, scores, [(scores, validation)], HOW, "logit_diff", "corrupt", 32, levels=levels, seed=2)
    search.measure(SIZES)
    curve = search.curve(validation, levels)
    size = search.chosen()
    assert size in SIZES[1:-1] and curve.spread is not None
    circuit = mi.select(graph, scores, edges=size)
    alike = stability_at(scores, samples, size, **HOW)
    performance = check_performance(model, train, templates=task.row_templates("train", 0, len(train)), seed=4)
    save_circuit(
        folder / "a.circuit.json",
        circuit,
        model=model,
        task=task,
        result=mi.evaluate(model, circuit, test, n_random=1),
        curve=curve,
        performance=(performance, train),
        stability=MeasuredStability(alike, train, kind, 3),
    )


def levels_between(model: mi.HookManager, scores: mi.Scores, pairs: mi.Pairs) -> Levels:
    """Levels that some sizes pass and others do not, each on some of the resamples."""
    plain = SizeSearch(model, scores, [(scores, pairs)], HOW, "logit_diff", "corrupt", 32)
    plain.measure(SIZES)
    shares = sorted(float(plain.point(size).kl or 0) / plain.kl_empty for size in SIZES)
    return Levels(low=-1000.0, high=1000.0, kl_share=(shares[1] + shares[2]) / 2, most=1.0)


@pytest.fixture(scope="module", params=[BLOCKS, RUNS])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    save_words_model(folder / "model")
    write(folder, request.param)
    return folder


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("blocks")
    save_words_model(folder / "model")
    write(folder, BLOCKS)
    return folder


@pytest.fixture
def place(blocks: Path, tmp_path: Path) -> Path:
    """A copy of the file, to be forged."""
    return copied(blocks, tmp_path)


def copied(folder: Path, to: Path) -> Path:
    for name in ("a.circuit.json", "a.scores.safetensors"):
        shutil.copy(folder / name, to)
    return to / "a.circuit.json"


def forged(path: Path, change: Change) -> Path:
    """The file with its content changed, and every hash made right again."""
    content = json.loads(path.read_text("utf-8"))
    before = json.dumps(content)
    change(content)
    assert json.dumps(content) != before
    path.write_text(json.dumps(content), "utf-8")
    content["integrity"]["circuit_sha256"] = circuit_sha256(open_circuit_file(path).document)
    content["integrity"]["file_sha256"] = file_sha256(content)
    path.write_text(json.dumps(content), "utf-8")
    return path


def names(found: Verification) -> set[str]:
    return {claim.name for claim in found.failed}


@pytest.mark.slow
def test_what_was_measured_holds(made: Path) -> None:
    found = mi.verify(made / "a.circuit.json", rescore=True)
    assert found.ok, str(found)
    claims = {claim.name for claim in found.claims}
    assert {"performance.difference_ci", "performance.by_template", "selection.size", "selection.size.spread"} < claims
    assert {"curve.passing", "curve.intervals", "curve.kl", "curve.kl_empty", "stability.n_core"} < claims
    assert {"scores again", "stability.jaccard again", "stability.frequency again, mean difference"} < claims
    parts = {part.words for part in found.extent.recomputed}
    assert {"choice of the size", "that the model does the task", "stability over resampled examples"} <= parts
    document = open_circuit_file(made / "a.circuit.json").document
    assert document.stability is not None and 0 < document.stability.n_core < len(document.edges)


@pytest.mark.slow
def test_without_rescoring_the_stability_is_only_hashed(blocks: Path) -> None:
    found = mi.verify(blocks / "a.circuit.json")
    assert found.ok and "stability over resampled examples" in {part.words for part in found.extent.only_hashed}


def more(*keys: str | int) -> Change:
    """Adds a hundredth (or one, to a whole number) to what is at these keys, or to the first of a list there."""

    def change(content: Any) -> None:
        *path, last = keys
        for key in path:
            content = content[key]
        value = content[last]
        if isinstance(value, list):
            content[last] = [value[0] - 0.01, *value[1:]]
        elif isinstance(value, float):
            content[last] = value + (0.01 if value < 0.9 else -0.01)
        else:
            content[last] = value + 1

    return change


def put(value: Any, *keys: str | int) -> Change:
    def change(content: Any) -> None:
        *path, last = keys
        for key in path:
            content = content[key]
        content[last] = value

    return change


def small_passes(content: Any) -> None:
    """The two smallest sizes, one of which must confirm the other."""
    for point in content["curve"]["points"][:2]:
        point["passing"] = 1.0


FORGED: dict[str, tuple[Change, Iterable[str]]] = {
    "clean": (more("performance", "clean"), {"performance.clean"}),
    "corrupt": (more("performance", "corrupt"), {"performance.corrupt"}),
    "difference": (more("performance", "difference"), {"performance.difference"}),
    "its interval": (more("performance", "difference_ci"), {"performance.difference_ci"}),
    "its seed": (more("performance", "seed"), {"performance.difference_ci"}),
    "accuracy": (more("performance", "accuracy"), {"performance.accuracy"}),
    "the interval of accuracy": (more("performance", "accuracy_ci"), {"performance.accuracy_ci"}),
    "n_examples": (more("performance", "n_examples"), {"performance.n_examples"}),
    "a template's difference": (
        more("performance", "by_template", 0, "difference"),
        {TEMPLATE_NUMBERS},
    ),
    "a template's accuracy": (
        put(0.123, "performance", "by_template", 0, "accuracy"),
        {TEMPLATE_NUMBERS},
    ),
    "a template's text": (put("[A]", "performance", "by_template", 0, "template"), {"performance.by_template"}),
    "a template's examples": (more("performance", "by_template", 1, "n_examples"), {"performance.by_template"}),
    "no templates": (put([], "performance", "by_template"), {"performance.by_template"}),
    "faithfulness": (more("curve", "points", 1, "faithfulness"), {"curve.faithfulness"}),
    "an interval": (more("curve", "points", 1, "faithfulness_ci"), {"curve.intervals"}),
    "a KL divergence": (more("curve", "points", 1, "kl"), {"curve.kl"}),
    "the empty circuit's": (more("curve", "kl_empty"), {"curve.kl_empty"}),
    "the curve's edges": (more("curve", "points", 1, "n_edges"), {"curve.n_edges"}),
    "the size": (put(20, "curve", "points", 1, "n_selected"), {"curve.faithfulness", "curve.kl"}),
    "a smaller size passes": (small_passes, {"curve.passing", "selection.size"}),
    "a larger one passes more often": (put(0.0, "curve", "points", 3, "passing"), {"curve.passing"}),
    "a looser level": (put(10.0, "selection", "size", "kl_share"), {"curve.passing"}),
    "a stricter interval": (put(0.999, "selection", "size", "low"), {"curve.passing"}),
    "a lower agreement": (put(0.0, "selection", "size", "agreement"), {"selection.size"}),
    "a smaller share of the graph": (put(0.01, "selection", "size", "most"), {"selection.size"}),
    "a narrow spread": (put([1, 1], "selection", "size", "spread"), {"selection.size.spread"}),
    "no spread": (lambda c: c["selection"]["size"].pop("spread"), {"selection.size.spread"}),
    "other pairs of the size": (put("evaluation", "selection", "size", "pairs"), {"selection.size.pairs"}),
    "the core": (more("stability", "n_core"), {"stability.n_core"}),
    "chance": (more("stability", "jaccard_by_chance"), {"stability.jaccard_by_chance"}),
    "a frequency": (put(0.123, "edges", 0, "frequency"), {"stability.frequency"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("part", FORGED)
def test_a_forged_number_fails(part: str, place: Path) -> None:
    change, claims = FORGED[part]
    assert set(claims) <= names(mi.verify(forged(place, change)))


def test_the_stability_of_nodes_is_counted_in_nodes(tmp_path: Path) -> None:
    """In the file, its sentences and doubts, in `verify` and in `diff`; a share of one edge alone is refused."""
    save_words_model(tmp_path / "model")
    model = mi.load_model(str(tmp_path / "model"))
    graph, train = mi.build_graph(model, level="node"), mi.load_task("ioi").pairs(model, n=12)
    rows = block_resamples(len(train), 8, 3)
    scores, samples = resampled_scores(model, graph, train, rows, {"method": "eap"})
    alike = stability_at(scores, samples, 6, **HOW)
    paths = [tmp_path / f"{name}.circuit.json" for name in "ab"]
    for path, size in zip(paths, (6, 5), strict=True):
        circuit = mi.select(graph, scores, nodes=size)
        found = replace(stability_at(scores, samples, size, **HOW), circuit=circuit)
        document = save_circuit(path, circuit, model=model, stability=MeasuredStability(found, train, BLOCKS, 3))
        assert document.stability is not None
        shares = {edge.name.partition("->")[0]: edge.frequency or 0.0 for edge in document.edges}
        nodes = set(document.nodes) - {"logits"}
        assert set(shares) == nodes
        assert document.stability.n_core == sum(share >= 0.9 for share in shares.values()) < len(document.edges)
        (said,) = steadiness(document)
        assert said.startswith(f"stability: {document.stability.n_core} of {len(nodes)} nodes (")
        assert f"share {alike.jaccard:.0%} of their nodes" in said or size == 5
    overlap = mi.diff_circuits(*paths).core
    assert overlap is not None and overlap.kind == "core nodes" and overlap.both + overlap.only_a <= 6
    assert mi.verify(paths[0], rescore=True).ok

    def one_edge(content: dict[str, Any]) -> None:
        content["edges"][0]["frequency"] = 0.5 if content["edges"][0]["frequency"] != 0.5 else 0.25

    assert "stability.frequency of a node, the same for its edges" in names(mi.verify(forged(paths[0], one_edge)))


def swap_frequencies(content: dict[str, Any]) -> None:
    """All edges alike, with as large a core as before: only a new run can tell."""
    core = content["stability"]["n_core"]
    for i, edge in enumerate(sorted(content["edges"], key=lambda edge: -edge["frequency"])):
        edge["frequency"] = 1.0 if i < core else 0.875
    assert any(edge["frequency"] < 0.9 for edge in content["edges"])


FORGED_AGAIN: dict[str, tuple[Change, Iterable[str]]] = {
    "jaccard": (put(0.999, "stability", "jaccard"), {"stability.jaccard again"}),
    "frequencies": (swap_frequencies, {"stability.frequency again, mean difference"}),
    "the seed": (put(99, "stability", "seed"), {"stability.frequency again, mean difference"}),
    "edges outside": (put(10_000, "stability", "n_often_outside"), {"stability.n_often_outside again, per edge"}),
    "the kind": (put(RUNS, "stability", "kind"), {"stability again"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("part", FORGED_AGAIN)
def test_a_forged_stability_fails_once_it_is_rescored(part: str, place: Path) -> None:
    change, claims = FORGED_AGAIN[part]
    assert mi.verify(forged(place, change)).ok
    assert set(claims) <= names(mi.verify(place, rescore=True))
