"""Comparing methods: MIB's sizes and areas, overlap, the page, the command."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import mechinterp as mi
from mechinterp.cli import app as cli
from mechinterp.compare import compare_methods
from mechinterp.evaluation.comparison import MIB_SHARES, MethodResult, area, top_edges
from mechinterp.graphs.scores import Scores
from tests.support.models_tiny import pairs, tiny


def test_the_areas_are_those_of_mib() -> None:
    """Its numbers for a circuit that does nothing until every edge is in, and for one that is always the model."""
    scores = mi.score_edges(tiny("gpt2"), mi.build_graph(tiny("gpt2")), pairs(3), method="random")
    useless = MethodResult(scores, (0.0,) * 9 + (1.0,), (0.0,) * 9 + (1.0,), 0.0)
    assert useless.cpr(MIB_SHARES) == pytest.approx(0.25, abs=1e-9)
    assert useless.cmd(MIB_SHARES) == pytest.approx(0.749, abs=1e-9)  # the range is 0.999
    perfect = MethodResult(scores, (1.0,) * 10, (1.0,) * 10, 0.0)
    assert perfect.cpr(MIB_SHARES) == pytest.approx(0.999) and perfect.cmd(MIB_SHARES) == 0
    assert perfect.log_area(MIB_SHARES) == pytest.approx(1.0)
    x = torch.rand(7, generator=torch.Generator().manual_seed(0)).sort().values
    y = torch.randn(7, generator=torch.Generator().manual_seed(1))
    assert area(x.tolist(), y.tolist()) == pytest.approx(float(torch.trapezoid(y, x)), abs=1e-6)
    assert useless.reaches(range(10), 0.8) == 9 and perfect.reaches(range(10), 0.9) == 0


def test_an_edge_without_a_score_is_never_selected_but_in_the_whole_graph() -> None:
    graph = mi.build_graph(tiny("gpt2"))
    total = torch.zeros(graph.possible.shape)
    r, w = graph.edge_index("m0->logits")
    total[r, w] = -2.0
    scores = Scores(graph, total, 1, "by hand", "logit_diff", "corrupt")
    assert int(top_edges(scores, 5, "magnitude").sum()) == 1
    assert int(top_edges(scores, graph.n_edges - 1, "value")[r, w]) == 0  # the one edge that hurts comes last
    assert bool((top_edges(scores, graph.n_edges, "value") == graph.possible).all())


@pytest.mark.slow
def test_methods_are_judged_alike() -> None:
    model = mi.load_model("bundled")
    task = mi.load_task("ioi")
    train, test = (task.pairs(model, n=20, split=split, seed=0) for split in ("train", "test"))
    graph = mi.build_graph(model)
    told: set[str] = set()
    found = compare_methods(
        model,
        graph,
        train,
        test,
        ["cd-edges", "random"],
        shares=(0.05, 0.2, 1.0),
        settings={"random": {"seed": 3}},
        progress=lambda stage, done, total: told.add(stage),
    )
    assert told == {"cd-edges", "cd-edges: faithfulness", "random: faithfulness"}  # random has nothing to wait for
    assert found.sizes == (23, 95, 479)
    again = mi.score_edges(model, graph, train, method="cd-edges")
    circuit = mi.select(graph, again, edges=95)
    expected = mi.evaluate(model, circuit, test).faithfulness
    assert found.results["cd-edges"].by_magnitude[1] == pytest.approx(expected, abs=1e-5)
    assert found.results["random"].scores.parameters["seed"] == 3
    assert all(result.by_value[-1] == pytest.approx(1, abs=1e-5) for result in found.results.values())
    frame = found.to_frame()
    assert frame.method.tolist() == ["cd-edges", "random"] and frame.CMD.is_monotonic_increasing
    assert len(found.curves()) == 2 * 2 * 3
    overlap = found.overlap(95)
    assert overlap.loc["random", "random"] == 1 and 0 <= float(overlap.loc["random", "cd-edges"]) < 0.3
    figure = mi.comparison_curves(found)
    assert [trace.name for trace in figure.data] == ["cd-edges", "random"]  # type: ignore[attr-defined]
    assert mi.overlap_matrix(found, 95).data[0].z.shape == (2, 2)  # type: ignore[attr-defined]


@pytest.mark.slow
def test_the_command_writes_a_table_and_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["compare", "ioi", "--methods", "eap,random", "--sizes", "0.1,0.5,1", "--examples", "8"]
    assert cli.main([*command, "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "CPR" in said and "random" in said
    page = (tmp_path / "ioi-comparison.html").read_text()
    assert "discover-circuit compare ioi --methods eap,random --sizes 0.1,0.5,1 --examples 8" in page
    assert "<td>eap</td>" in page and page.count("<polyline") == 2 and len(page) < 60_000
    assert "<script" not in page and "unsafe" not in page and "style=" not in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "eap,eaap"], "eaap"),
        (["--methods", ","], "separated by commas, each only once"),
        (["--sizes", "many"], "Sizes are"),
        (["--sizes", "0.5,0.1,1"], "Shares must increase"),
        (["--sizes", "0.1,0.5"], "Shares must increase"),
        (["--replacement", "noise"], "noise"),
    ],
)
def test_bad_requests_get_one_line_and_exit_code_2(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["compare", "ioi", *arguments, "--examples", "4", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
