"""The page of an attribution graph: the sizes of the library, sums of supernodes, and what a reader does with it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import mechinterp as mi
from mechinterp.base.errors import InputError
from mechinterp.circuit_file.formats.attribution_graphs import from_neuronpedia
from mechinterp.views.report import attribution_page
from mechinterp.views.report.attribution_page import page_sizes, render_graph_page
from tests.circuit_file.test_attribution_graph_files import of_circuit_tracer
from tests.views.test_page_browser import load

PROMPT = "Then Julie and Ryan went to the market . Julie gave a bone to"


@pytest.fixture(scope="module")
def graph() -> mi.AttributionGraph:
    model = mi.load_model("bundled")
    bases = mi.load_bases("bundled:transcoders", model=model, check=False)
    made = mi.attribution_graph(model, PROMPT, bases, targets=["Ryan", "Julie"], held="nothing")
    made = made.with_texts({made.pruned().features[0].name: "<b>a name</b>"})
    names = [node.name for node in made.pruned(0.95).features]
    groups = [mi.Supernode("early & <i>", tuple(names[:6])), mi.Supernode("more", tuple(names[8:12]))]
    return made.with_supernodes(groups)


@pytest.fixture(scope="module")
def page_path(graph: mi.AttributionGraph, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = mi.load_model("bundled")
    bases = mi.load_bases("bundled:transcoders", model=model, check=False)
    texts = mi.load_task("ioi").pairs(model, n=8, seed=0)
    shown = [(node.basis, node.feature) for node in graph.pruned(0.95).features]
    checks = [mi.validate_edges(model, graph, bases, n=2), mi.validate_graph(model, graph, bases, n=6)]
    path = tmp_path_factory.mktemp("page") / "graph.html"
    mi.write_graph_page(path, graph, notes=mi.feature_notes(model, bases, shown, texts=texts), checks=checks)
    return path


@pytest.fixture(scope="module")
def page(browser: Any, page_path: Path) -> Iterator[Any]:
    yield load(browser, page_path)


def data_of(content: str) -> Any:
    return json.loads(re.findall(r'<script type="application/json" id="data">(.*?)</script>', content)[0])


def test_the_prompt_is_read_as_text(graph: mi.AttributionGraph) -> None:
    """Tokens that hold their spaces are joined as they are, others by a space."""
    assert graph.prompt == f"<bos> {PROMPT}"
    spaced = replace(graph, words=tuple(word if word == "." else f" {word}" for word in graph.words))
    assert spaced.prompt == f" <bos> {PROMPT}".replace(" .", ".")
    assert repr(graph).startswith("AttributionGraph('<bos> Then Julie and ")


def test_every_size_is_what_pruned_keeps(graph: mi.AttributionGraph, page_path: Path) -> None:
    content = page_path.read_text("utf-8")
    data = data_of(content)
    assert page_path.stat().st_size < 6e6 and data["words"] == list(graph.words)
    for bit, size in enumerate(data["sizes"]):
        pruned = graph.pruned(size["share"], 0.98)
        kept = [i for i, node in enumerate(data["nodes"]) if node["sizes"] >> bit & 1]
        assert [data["nodes"][i]["name"] for i in kept] == [node.name for node in pruned.nodes]
        edges = {
            (data["nodes"][a]["name"], data["nodes"][b]["name"]): weight
            for a, b, weight, of in zip(*(data["edges"][key] for key in ("from", "to", "weight", "sizes")), strict=True)
            if of >> bit & 1
        }
        expected = {(row.source, row.target): row.weight for row in pruned.edges().itertuples()}
        assert edges == pytest.approx(expected, rel=1e-3)
        assert (size["features"], size["edges"]) == (len(pruned.features), pruned.n_edges)
    assert data["sizes"][data["first"]]["share"] == 0.8


def test_what_is_claimed_stands_beside_its_check(graph: mi.AttributionGraph, page_path: Path) -> None:
    content = page_path.read_text("utf-8")
    assert f"{graph.scores.of_errors:.1%}" in content and f"{graph.scores.replacement:.3f}" in content
    assert re.search(r"r = -?\d\.\d\d<small>model&#x27;s own gradient", content) and 'id="checks"' in content
    assert "<b>a name" not in content and "early & <i>" not in content
    bare = render_graph_page(graph)
    assert "not tested" in bare and "were not measured" in bare and 'id="checks"' not in bare
    pruned = data_of(render_graph_page(graph.pruned(0.6)))
    assert len(pruned["sizes"]) == 1 and pruned["sizes"][0]["share"] == 0.6


def test_the_graphs_of_files_have_a_page(graph: mi.AttributionGraph, tmp_path: Path) -> None:
    """Ours, with what the file says of itself, and one of circuit-tracer, which does not know pre-activations."""
    mi.save_attribution_graph(tmp_path / "x.json", graph.pruned())
    again = mi.load_attribution_graph(tmp_path / "x.json")
    data, own = (data_of(render_graph_page(one)) for one in (again, graph.pruned()))
    assert data["groups"] == own["groups"] and data["words"] == own["words"] and data["sizes"] == own["sizes"]
    assert [node["name"] for node in data["nodes"]] == [node["name"] for node in own["nodes"]]
    content = render_graph_page(from_neuronpedia(of_circuit_tracer(), "x"))
    assert "patterns and norm scales are held" in content.lower() and "m3.f40@1" in content
    strange = replace(again, about={"held": "<b>all</b>", "gap": "none", "pruned": 3, "active_features": []})
    assert "<b>all" not in render_graph_page(strange)


def test_what_is_too_large_is_left_out_and_said(graph: mi.AttributionGraph, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attribution_page, "MAX_FEATURES", len(graph.pruned().features))
    sizes, left_out = page_sizes(graph, 0.98, 0.8)
    assert [size.share for size in sizes][-1] == 0.8 and left_out == [0.9, 0.95]
    assert "hold 90%, 95% of the influence are too large" in render_graph_page(graph)
    monkeypatch.setattr(attribution_page, "MAX_FEATURES", 0)
    for one in (graph, graph.pruned()):
        with pytest.raises(InputError, match="too many for a page"):
            render_graph_page(one)


def keys(page: Any, expression: str = "true") -> set[str]:
    return set(page.evaluate(f"[...items.values()].filter(item => {expression}).map(nameOf)"))


@pytest.mark.slow
def test_it_asks_for_nothing_and_shows_the_graph(page: Any, page_path: Path, graph: mi.AttributionGraph) -> None:
    assert page.complaints == [] and page.asked == [page_path.as_uri()]
    page.evaluate("everything(); state.open = new Set([0, 1]); go(sizes.length - 1)")
    small = graph.pruned(0.95)
    assert keys(page) == {node.name for node in small.nodes}
    # The edges of a chosen node, sorted, with their weights.
    name = small.features[-1].name
    page.evaluate(f"choose('n' + nodes.findIndex(n => n.name === {json.dumps(name)}))")
    into = small.edges(into=name)
    said = page.locator("#panel").inner_text()
    assert f"In ({len(into)})" in said.replace("\xa0", " ")
    first = page.locator("#panel table.edges").first.locator("tr").first.locator("td").all_inner_texts()
    assert first[0].startswith(into["source"][0])
    assert float(first[1].replace("\u2212", "-")) == pytest.approx(into["weight"][0], rel=6e-3)
    assert page.locator(".attribution .edge").count() >= len(into)
    # Errors are hidden and shown, sizes by the slider.
    page.keyboard.press("Escape")
    page.locator("#errors").uncheck()
    assert keys(page) == {node.name for node in small.nodes if node.kind != "error"}
    page.locator("#errors").check()
    page.locator("#size").fill("2")
    assert keys(page) == {node.name for node in graph.pruned(0.6).nodes}
    assert "60% of the influence" in page.locator("#size-says").inner_text()
    page.locator("#search").fill("bone")
    assert "bone" in " ".join(page.eval_on_selector_all(".item:not(.off)", "a => a.map(x => x.textContent)"))
    page.locator("#search").fill("zzz")
    assert page.locator("#search-says").inner_text() == "no match"
    page.keyboard.press("Escape")


@pytest.mark.slow
def test_supernodes_open_and_close_with_exact_sums(page: Any, graph: mi.AttributionGraph) -> None:
    page.evaluate("everything(); state.open = new Set(); go(sizes.length - 1)")
    small = graph.pruned(0.95)
    assert {"early & <i>", "more"} <= keys(page)
    expected = {(row.source, row.target): row.weight for row in small.collapsed_edges().itertuples()}
    found = page.evaluate("links.map(l => [nameOf(items.get(l.from)), nameOf(items.get(l.to)), l.weight])")
    assert {(a, b): weight for a, b, weight in found} == pytest.approx(
        {key: weight for key, weight in expected.items() if key[0] != key[1]}, rel=2e-3, abs=2e-3
    )
    page.locator('.item[aria-label="more"]').click()
    page.locator("#open-group").click()
    members = set(graph.supernodes[1].members)
    assert members <= keys(page) and "more" not in keys(page)
    member = page.locator(f'.item[aria-label="{graph.supernodes[1].members[0]}"]')
    member.focus()
    page.keyboard.press("Enter")
    page.locator("#open-group").click()
    assert "more" in keys(page) and not members & keys(page)
    page.locator("#groups").uncheck()
    assert members <= keys(page)
    page.locator("#groups").check()
    # Pointing shows what a feature does, without a click.
    page.evaluate("everything(); state.open = new Set([0, 1]); render()")
    page.locator(f'.item[aria-label="{small.features[0].name}"]').hover()
    panel = page.locator("#panel").inner_text()
    assert "raises" in panel and "activation" in panel and "strongest:" in panel


@pytest.mark.slow
def test_dark_and_narrow(browser: Any, page_path: Path) -> None:
    narrow = load(browser, page_path, color_scheme="dark", has_touch=True)
    assert narrow.locator("#theme").inner_text() == "Light"
    narrow.locator("#theme").click()
    assert narrow.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    narrow.set_viewport_size({"width": 390, "height": 844})
    assert narrow.evaluate("document.documentElement.scrollWidth") <= 390
    narrow.locator(".item").last.scroll_into_view_if_needed()
    narrow.locator(".item").last.tap()
    assert narrow.evaluate("state.chosen") is not None and narrow.complaints == []
