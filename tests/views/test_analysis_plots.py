"""Figures hold the numbers they were given, in the cells of their labels; strangers' tokens are only text."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch

import mechinterp as mi
from mechinterp.analysis.direct_logit_attribution import direct_logit_attribution
from mechinterp.base.errors import InputError
from mechinterp.engines.grid import Grid, numbered
from mechinterp.views.plots import (
    attention_figure,
    circuit_figure,
    heatmap,
    lens_figure,
    save_html,
    save_image,
    token_labels,
    waterfall,
)
from tests.support.models_tiny import pairs, tiny
from tests.support.toy_circuits import toy_circuit


def grid() -> Grid:
    values = torch.arange(24.0).reshape(2, 3, 4) - 5
    values[1, 2] = torch.nan
    return Grid(values, {"layer": ("0", "7"), "pos": ("0", "1", "2"), "example": numbered(4)}, "effect", "logits")


def test_a_heatmap_has_every_mean_in_its_cell() -> None:
    figure = heatmap(grid(), tokens=["a", "<b>", "c & d"])
    drawn, layout = figure.data[0], figure.layout
    assert [list(row) for row in drawn.z] == [[-3.5, 0.5, 4.5], [8.5, 12.5, None]]
    assert drawn.zmin == -drawn.zmax == -12.5 and drawn.zmid == 0
    assert list(layout.xaxis.ticktext) == ["a", "&lt;b&gt;", "c &amp; d"]
    assert list(layout.yaxis.ticktext) == ["0", "7"] and list(layout.yaxis.range) == [-0.5, 1.5]
    assert drawn.customdata[1][0] == "layer 7, pos a"
    turned = heatmap(grid(), x="layer", y="pos").data[0]
    assert [list(row) for row in turned.z] == [[-3.5, 8.5], [0.5, 12.5], [4.5, None]]
    blue, red = drawn.colorscale[-1][1], drawn.colorscale[0][1]
    assert (red, blue) == ("rgb(103,0,31)", "rgb(5,48,97)")  # positive is blue


def test_axes_of_one_entry_go_and_others_must_be_chosen() -> None:
    wide = Grid(
        torch.rand(2, 3, 1, 4),
        {"layer": numbered(2), "head": numbered(3), "pos": ("end",), "example": numbered(4)},
        "x",
    )
    assert len(heatmap(wide).data[0].z) == 2
    three = Grid(torch.rand(2, 3, 2), {"layer": numbered(2), "head": numbered(3), "pos": numbered(2)}, "x")
    with pytest.raises(InputError, match=r"layer \(2\), head \(3\), pos \(2\)"):
        heatmap(three)
    with pytest.raises(InputError, match="Did you mean 'head'"):
        heatmap(three.at(pos=0), x="heads")
    with pytest.raises(InputError, match="3 positions and 2 token labels"):
        heatmap(grid(), tokens=["a", "b"])


@pytest.mark.slow
def test_the_waterfall_adds_up() -> None:
    parts = Grid(
        torch.tensor([0.5, -2.0, 3.0, 0.25, torch.nan]), {"node": ("a", "b", "c", "d", "e")}, "attribution", "logits"
    )
    drawn = waterfall(parts, top=2).data[0]
    assert list(drawn.x) == ["c", "b", "2 others", "sum"]
    assert list(drawn.y) == [3.0, -2.0, 0.75, 1.75]
    assert list(drawn.measure) == ["relative", "relative", "relative", "total"]
    model = mi.load_model("bundled")
    examples = mi.load_task("ioi").pairs(model, n=8)
    found = direct_logit_attribution(model, examples)
    assert waterfall(found).data[0].y[-1] == pytest.approx(float(found.mean().values.sum()), rel=1e-5)
    with pytest.raises(InputError, match="along the one axis 'node'"):
        waterfall(grid())


def test_attention_patterns_side_by_side() -> None:
    patterns = torch.rand(3, 4, 4).tril()
    figure = attention_figure(list(patterns), ["a0.h0", "a1.h1", "a2.h2"], ["w", "x", "<y>", "z"], columns=2)
    for drawn, pattern in zip(figure.data, patterns, strict=True):
        assert torch.allclose(torch.tensor(drawn.z), pattern)
        assert (drawn.zmin, drawn.zmax) == (0, 1)
    assert figure.data[0].customdata[3][2] == "z attends to &lt;y&gt;"
    assert [note.text for note in figure.layout.annotations] == ["a0.h0", "a1.h1", "a2.h2"]
    with pytest.raises(InputError, match="one name per pattern"):
        attention_figure(list(patterns), ["a"], ["w", "x", "y", "z"])
    with pytest.raises(InputError, match=r"must be \[3, 3\]"):
        attention_figure(list(patterns), ["a", "b", "c"], ["w", "x", "y"])


@pytest.mark.slow
def test_the_lens_says_its_tokens() -> None:
    model = mi.load_model("bundled")
    examples = mi.load_task("ioi").pairs(model, n=4)
    lens = mi.logit_lens(model, examples, positions="each")
    labels = token_labels(model, examples, 1)
    figure = lens_figure(lens, model, example=1, tokens=labels)
    drawn, n = figure.data[0], int(examples.lengths[1])
    assert drawn.text[-1][n - 1] == model.tokenizer.decode([int(lens.top_tokens[-1, n - 1, 1, 0])]).strip()
    assert drawn.z[-1][n - 1] == pytest.approx(
        float(lens.probabilities.at(site="resid_final", pos=n - 1, example=1, rank=0))
    )
    assert labels[0] == "0 <bos>" and labels[n - 1].startswith(f"{n - 1} ") and len(set(labels)) == len(labels)
    assert lens_figure(lens, model, colour="kl").data[0].zmax is None
    with pytest.raises(InputError, match="Unknown colour"):
        lens_figure(lens, model, colour="red")


@pytest.mark.slow
def test_a_lens_shows_the_positions_that_the_example_has_with_whole_tokens_on_hover() -> None:
    model = mi.load_model("bundled")
    examples = mi.load_task("ioi").pairs(model, n=8)
    row = int(examples.lengths.argmin())
    n = int(examples.lengths[row])
    lens = mi.logit_lens(model, examples, positions="each")
    drawn = lens_figure(lens, model, example=row, tokens=token_labels(model, examples, row)).data[0]
    assert n < examples.clean.shape[1]
    assert {len(drawn.x), *map(len, drawn.z), *map(len, drawn.text), *map(len, drawn.customdata)} == {n}
    said = [model.tokenizer.decode([int(lens.top_tokens[-1, at, row, 0])]).strip() for at in range(n)]
    for cell, word, hover in zip(drawn.text[-1], said, drawn.customdata[-1], strict=True):
        assert hover.endswith(f"<br>{word}") or word.startswith("<")
        assert cell in (word, f"{word[: len(cell) - 1]}…") or word.startswith("<")


@pytest.mark.slow
def test_labels_need_a_tokenizer_and_a_row_that_is_there() -> None:
    with pytest.raises(InputError, match="no tokenizer"):
        token_labels(tiny("gpt2"), pairs(3, 6))
    model = mi.load_model("bundled")
    with pytest.raises(InputError, match="from 0 to 3"):
        token_labels(model, mi.load_task("ioi").pairs(model, n=4), 4)


def test_a_page_is_small_beside_one_file_of_plotly_and_has_a_title(tmp_path: Path) -> None:
    save_html(heatmap(grid()), tmp_path / "heads_by-layer.html")
    save_html(heatmap(grid(), title="Effect of <heads>"), tmp_path / "second.html")
    save_html(circuit_figure(toy_circuit(6, 8, 8, 380)), tmp_path / "circuit.html", title="A & B")
    (library,) = tmp_path.glob("plotly-*.min.js")
    assert library.stat().st_size > 1e6 and len(list(tmp_path.iterdir())) == 4
    titles = {"heads_by-layer": "heads by layer", "second": "Effect of &lt;heads&gt;", "circuit": "A &amp; B"}
    for name, title in titles.items():
        page = (tmp_path / f"{name}.html").read_text(encoding="utf-8")
        assert re.findall(r'<script[^>]* src="([^"]*)"', page) == [library.name]
        assert f"<title>{title}</title>" in page and "Plotly.newPlot" in page and len(page) < 300_000
        assert ("<h1>" in page) == (name != "second")
    written = library.stat().st_mtime_ns
    save_html(heatmap(grid()), tmp_path / "third.html")
    assert library.stat().st_mtime_ns == written
    with pytest.raises(InputError, match="Cannot write"):
        save_html(heatmap(grid()), tmp_path / "nowhere" / "figure.html")


@pytest.mark.parametrize("name", ["figure.png", "figure.svg"])
def test_a_picture_or_one_line_that_says_what_is_missing(tmp_path: Path, name: str) -> None:
    try:
        save_image(heatmap(grid()), tmp_path / name)
    except InputError as error:  # no kaleido, or no browser
        assert "pip install 'mechinterp-circuits[images]'" in str(error) and "\n" not in str(error)
        assert not (tmp_path / name).exists()
        if importlib.util.find_spec("kaleido") is not None:
            pytest.skip(f"kaleido is here, but cannot draw: {error}")
        return
    start = (tmp_path / name).read_bytes()[:8]
    assert start.startswith(b"\x89PNG" if name.endswith("png") else b"<svg")


def test_another_ending_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a picture"):
        save_image(heatmap(grid()), tmp_path / "figure.gif2")
