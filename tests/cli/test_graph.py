"""`discover-circuit graph`: checked, pruned, written, and refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

import mechinterp as mi
from mechinterp.cli import app as cli

PROMPT = "Then Julie and Ryan went to the market . Julie gave a bone to"


@pytest.mark.slow
def test_the_graph_of_a_prompt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "x.graph.json"
    words = ["graph", PROMPT, "--target", "Ryan", "--target", "Julie", "--validate", "4", "--out", str(out)]
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    assert "add up to what it reads" in printed and "the largest edges into target: 'Ryan'" in printed
    assert printed.count("checked: ") == 5 and printed.count("readers each") == 1
    assert "Validation(" not in printed and "Scores(" not in printed  # sentences, not objects
    assert "the model's own gradient" in printed and "weakened by 0.1" in printed
    graph = mi.load_attribution_graph(out)
    assert [node.text for node in graph.targets] == ["Ryan", "Julie"] and graph.features


@pytest.mark.slow
def test_its_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, page, texts = tmp_path / "x.json", tmp_path / "new" / "x.html", tmp_path / "texts.txt"
    texts.write_text("Julie gave a bone to Ryan\n\nThen Ryan went to the market\n", "utf-8")
    words = ["graph", PROMPT, "--target", "Ryan", "--validate", "4", "--held", "nothing", "--out", str(out)]
    assert cli.main([*words, "--page", str(page), "--texts", str(texts)]) == 0
    printed, content = capsys.readouterr().out, page.read_text("utf-8")
    assert f"wrote {page}" in printed and "edges are derivatives with nothing held" in printed
    assert "--held nothing --validate 4 --texts texts.txt" in content and str(tmp_path) not in content
    assert "Influence from errors" in content and "Predicts real ablations" in content
    assert mi.load_attribution_graph(out).about["held"] == "nothing"


def test_the_graphs_of_a_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same numbers as in Python, and the correlation with real ablations beside them."""
    out, page = tmp_path / "x.graphs.json", tmp_path / "x.html"
    words = ["graph", "--task", "ioi", "--examples", "3", "--seed", "1", "--held", "nothing", "--validate", "4"]
    assert cli.main([*words, "--out", str(out), "--page", str(page)]) == 0
    printed, content = capsys.readouterr().out, page.read_text("utf-8")
    assert "prompt by prompt (3 of 3): median Pearson" in printed and "shuffled predictions below" in printed
    found = mi.load_aggregated_graph(out)
    assert (found.graphs, found.positions, found.held) == (3, "summed", "nothing")
    assert found.nodes["node"][found.nodes["kind"] == "target"].tolist() == ["target: 'right - wrong'"]
    model = mi.load_model("bundled")
    bases = mi.load_bases("bundled:transcoders", model=model, check=False)
    asked = mi.graph_prompts(mi.load_task("ioi").pairs(model, n=3, seed=1))
    graphs = (mi.attribution_graph(model, one, bases, targets=its, held="nothing").pruned() for one, its in asked)
    assert dict(zip(found.nodes["node"], found.nodes["influence"], strict=True)) == pytest.approx(
        dict(mi.aggregate_graphs(graphs).nodes[["node", "influence"]].itertuples(index=False))
    )
    assert "--task ioi --examples 3 --seed 1 --held nothing --validate 4" in content and str(tmp_path) not in content
    assert "Predicts real ablations" in content and content.count("<tr><td>") == 3


def test_the_graphs_of_prompts_and_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = PROMPT.replace("Julie", "Susan")
    file, a, b = tmp_path / "prompts.txt", tmp_path / "a.json", tmp_path / "b.json"
    file.write_text(f"{PROMPT}\n{other}\n", "utf-8")
    words = ["--target", "Ryan", "--validate", "0", "--aggregate", "kept", "--out"]
    assert cli.main(["graph", PROMPT, other, *words, str(a)]) == 0
    assert "were not tested" in capsys.readouterr().out
    assert cli.main(["graph", "--prompts", str(file), *words, str(b)]) == 0
    assert a.read_bytes() == b.read_bytes()
    assert mi.load_aggregated_graph(a).nodes["node"].str.contains("@").any()


def test_a_dry_run_says_what_it_takes_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["graph", "--task", "ioi", "--examples", "3", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    model = mi.load_model("bundled")
    asked = mi.graph_prompts(mi.load_task("ioi").pairs(model, n=3, seed=0))
    bases = mi.load_bases("bundled:transcoders", model=model, check=False)
    sizes = [mi.graph_size(model, prompt, bases, targets=targets) for prompt, targets in asked]
    active = [size.active for size in sizes]
    assert f"active features of a prompt: {min(active):,} to {max(active):,}" in printed and "prompts: 3 of" in printed
    assert f"{max(size.bytes for size in sizes) / 2**20:.3g} MiB, below the limit of 2 GiB" in printed
    monkeypatch.setattr("mechinterp.analysis.attribution_graph.build.MAX_BYTES", 1000)
    assert cli.main(["graph", PROMPT, "--dry-run"]) == 0
    assert "ABOVE the limit" in (printed := capsys.readouterr().out) and "--max-features" in printed
    assert cli.main(["graph", PROMPT, PROMPT]) == 2
    assert "max_features" in capsys.readouterr().err and not list(tmp_path.rglob("*.json"))


def test_mistakes_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for words in (
        [" "],
        ["Then Zorp"],
        [PROMPT, "--target", "Zorp"],
        [PROMPT, "--transcoders", str(tmp_path / "none")],
        [PROMPT, "--held", "everything"],
        [PROMPT, "--no-supernodes", "--texts", "texts.txt"],
        [PROMPT, "--page", "x.html", "--texts", str(tmp_path / "none")],
        [],
        [PROMPT, "--task", "ioi"],
        [PROMPT, " "],
        [PROMPT, "--aggregate", "kept"],
        [PROMPT, PROMPT, "--aggregate", "dropped"],
        [PROMPT, PROMPT, "--supernodes"],
        [PROMPT, "--examples", "4"],
        [PROMPT, PROMPT, "--seed", "4"],
        ["--task", "ioy"],
        ["--task", "ioi", "--target", "Zorp"],
        ["--prompts", str(tmp_path / "none")],
    ):
        assert cli.main(["graph", *words]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()[-1:]) == 1
    assert cli.main(["graph", "ioi"]) == 2
    assert "'ioi' is a task, and `graph` takes a prompt" in capsys.readouterr().err
