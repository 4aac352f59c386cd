"""The page of an aggregated graph in a browser: it asks for nothing, and every size shows what so many prompts have."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import mechinterp as mi
from tests.analysis.test_supernodes import graphs
from tests.views.test_attribution_page import keys
from tests.views.test_page_browser import load


@pytest.mark.slow
@pytest.mark.parametrize("positions", ["summed", "kept"])
def test_the_slider_asks_for_so_many_prompts(browser: Any, positions: str, tmp_path: Path) -> None:
    found = mi.aggregate_graphs(graphs(3), positions=positions)
    path = tmp_path / "page.html"
    mi.write_aggregate_page(path, found)
    page = load(browser, path)
    assert page.complaints == [] and page.asked == [path.as_uri()]
    for size, least in enumerate((3, 2, 1)):
        page.locator("#size").fill(str(size))
        part = found.frequent(least / 3)
        assert keys(page) == set(part.nodes["node"])
        assert "prompt" in page.locator("#size-says").inner_text()
    name = part.nodes["node"][part.nodes["kind"] == "feature"].iloc[0]
    page.evaluate(f"choose('n' + nodes.findIndex(n => n.name === {json.dumps(name)}))")
    said = page.locator("#panel").inner_text()
    row = part.nodes.set_index("node").loc[name]
    assert f"{row['frequency']:.0%} of the prompts" in said.replace("\xa0", " ") and "mean activation" in said
    # No label hides another one, however long the words of the targets are.
    long = "n.text = 'a long answer'; n.value = 0.5;"
    page.evaluate(f"nodes.filter(n => n.kind === 'target').forEach(n => {{ {long} }}); go(state.size)")
    boxes = page.eval_on_selector_all(
        ".item rect", "all => all.map(one => { const b = one.getBoundingClientRect(); return [b.x, b.y, b.width]; })"
    )
    places = sorted((round(y), x, width) for x, y, width in boxes)
    for (y, x, width), (below, later, _) in pairwise(places):
        assert y != below or later >= x + width - 1
    page.close()
