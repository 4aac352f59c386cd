"""`discover-circuit view`, and what the page says of nodes: against the model itself."""

from __future__ import annotations

import json
import webbrowser
from pathlib import Path

import pytest
import torch

from mechinterp.base.errors import FormatError
from mechinterp.circuit_file.circuit_file import load_circuit
from mechinterp.cli import app as cli
from mechinterp.graphs.circuit import Circuit
from mechinterp.models.hook_manager import HookManager, load_model
from mechinterp.models.sites import Node, Site
from mechinterp.tasks.pairs import Pairs
from mechinterp.tasks.task import load_task
from mechinterp.views.report.node_details import TOP_TOKENS, NodeDetails, node_details
from mechinterp.views.report.write_page import write_page
from tests.support.toy_circuits import toy_circuit, toy_document

STORED = Path(__file__).parents[2] / "circuits"


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A circuit file whose model was in memory, so that nothing can load it."""
    path = tmp_path / "toy.circuit.json"
    document = toy_document(toy_circuit())
    path.write_text(json.dumps(document.model_dump(mode="json", exclude_none=True)), "utf-8")
    return path


def test_view_writes_the_page_beside_the_file_and_says_what_is_missing(
    toy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    page = toy.with_name("toy.report.html")
    page.write_text("old", "utf-8")
    assert cli.main(["view", str(toy), "--no-open"]) == 0
    out = capsys.readouterr().out.splitlines()
    words = "Attention patterns and written tokens are left out: the model toy is not available."
    assert out == [f"note: {words}", f"wrote {page}"] and not opened
    assert words in page.read_text("utf-8")
    assert cli.main(["view", str(toy), "--out", str(toy.with_name("other.html"))]) == 0
    assert opened == [toy.with_name("other.html").as_uri()]


def test_a_device_that_is_none_is_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    assert cli.main(["view", "induction-bundled-eap-ig", "--device", "nonsense", "--out", str(page), "--no-open"]) == 2
    assert "nonsense" in capsys.readouterr().err and not page.exists()


@pytest.mark.slow
def test_a_stored_circuit_has_its_page_here_and_is_called_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = "ioi-wang2022-naive"
    assert cli.main(["view", name, "--no-open"]) == 0
    assert f"discover-circuit verify {name}<" in (tmp_path / f"{name}.report.html").read_text("utf-8")
    assert not list(STORED.glob("*.html"))


def test_a_desktop_without_a_browser_is_no_failure(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: str) -> bool:
        raise webbrowser.Error("no browser")

    monkeypatch.setattr(webbrowser, "open", fails)
    assert cli.main(["view", str(toy)]) == 0


def test_bad_input_is_one_line_and_writes_nothing(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads(toy.read_text("utf-8"))
    toy.write_text(json.dumps({**record, "title": "changed"}), "utf-8")
    with pytest.raises(FormatError, match="was changed"):
        write_page(toy)
    for arguments in ([str(toy)], ["no-such-file"], [str(toy), "--model", "./nowhere"], [str(toy), "--size", "3"]):
        assert cli.main(["view", *arguments, "--no-open"]) == 2
        out, err = capsys.readouterr()
        assert out == "" and len(err.splitlines()) == 1
    assert [path.name for path in toy.parent.iterdir()] == [toy.name]


def test_a_file_without_prompts_says_so(tmp_path: Path) -> None:
    page = write_page(STORED / "tracr-reverse-zero.circuit.json", tmp_path / "page.html")
    (note,) = page.notes
    assert note.endswith("the file has no prompts to measure them on.") and note in page.path.read_text("utf-8")


# --- details of nodes ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> HookManager:
    return load_model("bundled")


@pytest.fixture(scope="module")
def circuit() -> Circuit:
    return load_circuit(STORED / "ioi-bundled-eap-ig.circuit.json")


@pytest.fixture(scope="module")
def pairs(model: HookManager) -> Pairs:
    return load_task("ioi").pairs(model, n=12, split="test", seed=0)


@pytest.fixture(scope="module")
def details(model: HookManager, circuit: Circuit, pairs: Pairs) -> NodeDetails:
    return node_details(model, circuit, pairs, "evaluation")


@pytest.mark.slow
def test_patterns_are_those_of_the_whole_batch(model: HookManager, pairs: Pairs, details: NodeDetails) -> None:
    sites = [Site("pattern", layer) for layer in range(model.dims.n_layers)]
    run = model.run(pairs.clean, pairs.mask, record=sites)
    assert len(details.prompts) == 3
    for prompt in details.prompts:
        n = int(pairs.lengths[prompt.row])
        assert len(prompt.tokens) == n and prompt.answer_pos == int(pairs.answer_pos[prompt.row, 0])
        for name, pattern in prompt.patterns.items():
            node = Node.parse(name)
            expected = run.values[Site("pattern", node.layer)][prompt.row, node.head, :n, :n]
            torch.testing.assert_close(pattern, expected, atol=1e-6, rtol=0)  # another batch, another rounding


def test_written_tokens_are_the_extremes_of_the_whole_vocabulary(
    model: HookManager, circuit: Circuit, pairs: Pairs, details: NodeDetails
) -> None:
    """The write through the frozen norm and all of W_U, sorted; the mean of its answers is the direct effect."""
    prompt = details.prompts[1]
    assert set(prompt.written) == {name for name in circuit.nodes if name not in ("input", "logits")}
    sites = [Site("z", layer) for layer in range(model.dims.n_layers)] + [Site("resid_final")]
    values = model.run(pairs.clean, pairs.mask, record=sites).values
    at = (torch.arange(len(pairs)), pairs.answer_pos[:, 0])
    norm = model.layout.final_norm
    assert pairs.right is not None and pairs.wrong is not None
    for name in ("a2.h1", "a3.h0"):
        node = Node.parse(name)
        write = model.layout.head_writes(node.layer, values[Site("z", node.layer)][at])[node.head]
        logits = norm.project(write) / norm.scale(values[Site("resid_final")][at]) @ model.layout.W_U
        order = logits[prompt.row].sort(descending=True)
        for found, ids in (
            (prompt.written[name].raised, order.indices[:TOP_TOKENS]),
            (prompt.written[name].lowered, order.indices.flip(0)[:TOP_TOKENS]),
        ):
            assert [by for _, by in found] == pytest.approx(logits[prompt.row][ids].tolist(), rel=1e-4)
            assert [token for token, _ in found] == [model.tokenizer.decode([int(i)]) for i in ids]
        rows = torch.arange(len(pairs))
        difference = logits[rows, pairs.right[:, 0]] - logits[rows, pairs.wrong[:, 0]]
        assert details.direct[name] == pytest.approx(float(difference.mean()), rel=1e-4)
    assert details.n_direct == details.n_examples == len(pairs)


def test_what_is_left_out_is_counted(model: HookManager, circuit: Circuit, pairs: Pairs) -> None:
    told: list[tuple[int, int]] = []
    few = node_details(model, circuit, pairs[:2], "evaluation", max_nodes=3, progress=lambda *done: told.append(done))
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]
    total = len([name for name in circuit.nodes if name not in ("input", "logits")])
    assert len(few.prompts[0].written) == 3 and f"{total - 3} others were left out" in few.notes[0]
    scores = circuit.scores
    assert scores is not None
    strength = dict(zip(scores.graph.writers, (scores.values * circuit.kept).sum(0).abs().tolist(), strict=True))
    assert set(few.prompts[0].written) == set(
        sorted(set(circuit.nodes) - {"input", "logits"}, key=lambda n: -strength[n])[:3]
    )


def test_long_prompts_and_missing_answers_are_told(model: HookManager, circuit: Circuit) -> None:
    long = node_details(model, circuit, Pairs(clean=[[5] * 60] * 2, corrupt=[[6] * 60] * 2), "mine")
    assert not long.prompts and not long.direct and "more than 48 tokens" in long.notes[0]
