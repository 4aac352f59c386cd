"""The page in a real browser: what a reader does with it, and that it asks for nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import networkx as nx
import pytest

from mechinterp.circuit_file.circuit_file import load_circuit
from mechinterp.graphs.circuit import Circuit
from mechinterp.views.plots import circuit_figure, save_html
from mechinterp.views.report.page import write_report
from mechinterp.views.report.write_page import write_page
from tests.support.toy_circuits import scores_of, toy_circuit, toy_document

STORED = Path(__file__).parents[2] / "circuits"
NODE = ".node:not(.gone)"


@pytest.fixture(scope="module")
def circuit() -> Circuit:
    return load_circuit(STORED / "ioi-bundled-eap-ig.circuit.json")


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of the stored circuit of the bundled model, with its patterns."""
    made = write_page(STORED / "ioi-bundled-eap-ig.circuit.json", tmp_path_factory.mktemp("page") / "ioi.report.html")
    assert not made.notes
    return made.path


@pytest.fixture(scope="module")
def opened(browser: Any, bundled: Path) -> Any:
    """The page, loaded once, and what it asked for and complained about on the way."""
    return load(browser, bundled)


@pytest.fixture
def page(opened: Any) -> Any:
    """The page as it is after loading: everything shown, the circuit itself."""
    opened.keyboard.press("Escape")
    opened.mouse.move(2, 2)
    opened.evaluate("go(Math.max(0, ownStop()))")
    return opened


def load(browser: Any, path: Path, **context: Any) -> Any:
    page = browser.new_context(viewport={"width": 1400, "height": 1000}, **context).new_page()
    page.asked, page.complaints = [], []
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("console", lambda message: page.complaints.append(message.text))
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.goto(path.as_uri())
    return page


def data_of(page: Any) -> Any:
    return json.loads(page.locator("#data").text_content())


def lines(page: Any, which: str = "true") -> set[str]:
    """The names of the lines on the canvas, of those for which the expression in `e` holds."""
    return set(page.evaluate(f"state.drawn.filter(e => {which}).map(e => graph.edges[e][3])"))


def lit(page: Any) -> set[str]:
    """The names of the lines that the search leaves bright."""
    return lines(page, "!state.lit || state.lit.has(e)")


def names(page: Any, selector: str) -> set[str]:
    """The names of the nodes that the selector finds."""
    return set(page.eval_on_selector_all(selector, "found => found.map(one => graph.nodes[one.dataset.node].name)"))


def strongest(page: Any) -> tuple[float, float]:
    """A point of the strongest line between two rows, in pixels of the window."""
    page.evaluate("byId('figure-circuit').scrollIntoView()")
    return tuple(
        page.evaluate(
            """() => { const e = [...state.drawn].sort((a, b) => drawing.share(b) - drawing.share(a))[0];
                const points = sampled(drawing.curve(e), 6), k = 6;
                const box = drawing.svg.getBoundingClientRect();
                return [box.left + points[k], box.top + points[k + 1]]; }"""
        )
    )


def node(page: Any, name: str) -> Any:
    return page.locator(f'{NODE}[aria-label^="{name},"]')


def move(page: Any, stop: int) -> None:
    page.locator("#size").fill(str(stop))


@pytest.mark.slow
def test_it_loads_without_a_complaint_and_asks_for_nothing(page: Any, bundled: Path, circuit: Circuit) -> None:
    assert page.complaints == [] and page.asked == [bundled.as_uri()]
    assert bundled.stat().st_size < 6e6
    assert lines(page) == set(circuit.edges) and names(page, NODE) == set(circuit.nodes)


def test_the_policy_stops_what_is_not_the_pages_own(browser: Any, bundled: Path, tmp_path: Path) -> None:
    """Had a file's text become markup, it could still neither run nor call."""
    changed = tmp_path / "changed.html"
    evil = "<script>document.title = 'taken'</script><img src='http://127.0.0.1:9/x' onerror='document.title=1'>"
    changed.write_text(bundled.read_text("utf-8").replace("<main>", f"<main>{evil}", 1), "utf-8")
    page = load(browser, changed)
    assert "edges recover" in page.title()
    assert len(page.complaints) >= 2 and all("Content Security Policy" in words for words in page.complaints)


def test_every_stop_shows_its_edges_and_its_own_faithfulness(page: Any) -> None:
    points = json.loads((STORED / "ioi-bundled-eap-ig.circuit.json").read_text("utf-8"))["curve"]["points"]
    assert page.locator("#size").get_attribute("max") == str(len(points) - 1)
    for stop, point in enumerate(points):
        move(page, stop)
        assert len(lines(page)) == point["n_edges"]
        says = page.locator("#size-says").inner_text()
        assert says.startswith(f"{point['n_edges']} edge")
        assert page.locator("#size-says .value").first.inner_text() == f"{point['faithfulness']:.3f}"
        # The held-out number belongs to the circuit, and stands at no other size.
        assert ("evaluation" in says) == (point["n_selected"] == 157)


def test_a_click_shows_exactly_the_paths_through_a_node(page: Any, circuit: Circuit) -> None:
    net = circuit.to_networkx()
    for name in ("a2.h1", "m1"):
        node(page, name).click()
        up, down = nx.ancestors(net, name) | {name}, nx.descendants(net, name) | {name}
        on_path = {d["name"] for a, b, d in net.edges(data=True) if {a, b} <= up or {a, b} <= down}
        assert 0 < len(on_path) < circuit.n_edges
        assert lines(page) == on_path
        assert names(page, f"{NODE}:not(.off)") == up | down
        page.keyboard.press("Escape")
        assert lines(page) == set(circuit.edges) and page.locator(f"{NODE}.off").count() == 0
    node(page, "a2.h1").click()
    page.locator("#figure-circuit").click(position={"x": 5, "y": 5})  # the background
    assert lines(page) == set(circuit.edges)


def test_search_finds_nodes_edges_and_nothing(page: Any, circuit: Circuit) -> None:
    box = page.locator("#search")
    box.fill("a2.h1")
    ends = {name for name in circuit.edges if re.search(r"\ba2\.h1\b", name)}
    assert lit(page) == ends and names(page, f"{NODE}:not(.off)") == {"a2.h1"}
    assert page.locator("#search-says").inner_text() == f"1 node, {len(ends)} edges"
    box.fill("a2.h1->logits")
    assert lit(page) == {"a2.h1->logits"}
    box.fill("a7.h7")
    assert page.locator("#search-says").inner_text() == "no match" and lit(page) == set()
    box.fill("a2.h1")
    box.press("Enter")
    assert page.locator(f"{NODE}.chosen").count() == 1
    box.press("Escape")
    assert box.input_value() == "" and lines(page) == set(circuit.edges)


def test_pointing_at_a_head_shows_what_it_does(page: Any, circuit: Circuit) -> None:
    node(page, "a2.h1").hover()
    panel = page.locator("#panel")
    panel.locator("canvas").wait_for()
    words = panel.inner_text()
    assert circuit.scores is not None
    own = [value for name, value in circuit.scores.to_dict().items() if name in circuit.edges and "a2.h1->" in name]
    assert f"{sum(own):.3g}" in words and f"{len(own)} out" in words
    details = data_of(page)["details"]
    prompt = details["prompts"][0]
    top, by = prompt["written"]["a2.h1"][0][0]
    assert f"mean of {details['n_direct']}" in words and "prompt 1 of 200 (evaluation)" in words
    assert top in words and f"+{by:.3g}" in words
    last = prompt["patterns"]["a2.h1"][prompt["answer_pos"]]
    most = max(range(len(last)), key=lambda k: last[k])
    assert f"attends to {prompt['tokens'][most]} ({most}) {last[most] / 1000:.2f}" in words
    panel.locator("select").select_option("1")
    assert details["prompts"][1]["written"]["a2.h1"][0][0][0] in panel.inner_text()


def test_a_click_opens_a_role_into_its_heads_and_their_edges(page: Any) -> None:
    """The arrows of the heads of an opened box add up to those of the closed box."""
    label, diagram = "heads that write toward the answer", "#figure-diagram"
    box = page.locator(f'{diagram} .box.role [aria-label^="{label},"]')
    (found,) = data_of(page)["graph"]["diagrams"]
    b = next(i for i, one in enumerate(found["boxes"]) if one["label"] == label)
    logits = next(i for i, one in enumerate(found["boxes"]) if one["kind"] == "logits")
    (whole,) = (arrow for arrow in found["arrows"] if (arrow["from"], arrow["to"]) == (b, logits))
    box.click(position={"x": 6, "y": 6})
    assert box.get_attribute("aria-expanded") == "true"
    assert label in page.locator("#diagram-panel h3").inner_text()
    parts = page.evaluate(
        f"diagrams[0].drawn.filter(arrow => arrow.from === {b} && arrow.to === {logits})"
        ".map(arrow => [arrow.source, arrow.weight])"
    )
    heads = {page.evaluate(f"graph.nodes[{source[1:]}].name") for source, _ in parts}
    assert heads <= set(found["boxes"][b]["nodes"]) and len(parts) == whole["n"] > 1
    assert sum(weight for _, weight in parts) == pytest.approx(whole["weight"], rel=1e-4)
    page.locator(f"{diagram} .box.open .pill").first.click()
    assert page.locator("#diagram-panel h3").inner_text() in found["boxes"][b]["nodes"]
    page.locator("#diagram-panel canvas").wait_for()  # its attention pattern
    box.click(position={"x": 6, "y": 6})
    assert page.locator(f"{diagram} .box.open").count() == 0
    page.locator("#plain").check()
    assert page.locator(f"{diagram} .box.plain").count() > 0
    page.locator("#plain").uncheck()
    assert page.locator(f"{diagram} .box.plain").count() == 0


@pytest.mark.slow
def test_pointing_at_an_edge_shows_its_name_and_score(page: Any, circuit: Circuit) -> None:
    at = strongest(page)
    page.mouse.move(*at)
    page.wait_for_function("document.querySelector('#panel h3').textContent.includes('->')")
    words = page.locator("#panel").inner_text()
    assert circuit.scores is not None
    scores = {name: score for name, score in circuit.scores.to_dict().items() if name in circuit.edges}
    best = max(scores, key=lambda name: abs(scores[name]))
    assert best in words and f"{scores[best]:+.3g}" in words and "helps the task" in words


def test_signs_themes_and_keys(page: Any) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    colours = "state.drawn.map(e => tint()(graph.edges[e][2], graph.edges[e][4]))"
    before = page.evaluate(colours)
    page.get_by_label("sign of the score").check()
    assert set(page.evaluate(colours)) == {"#2166ac", "#b2182b"}
    page.get_by_label("where it enters").check()
    assert page.evaluate(colours) == before
    light = page.evaluate(ground)
    page.locator("#theme").click()
    assert page.evaluate(ground) == "rgb(20, 24, 28)" != light
    page.locator("#theme").click()
    assert page.evaluate(ground) == light
    page.locator("#theme").focus()
    for _ in range(30):  # past the legend's roles
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.closest('svg') !== null"):
            break
    first = page.evaluate("document.activeElement.getAttribute('aria-label')")
    page.keyboard.press("ArrowUp")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") != first
    page.keyboard.press("Enter")
    assert page.locator(f"{NODE}.chosen").count() == 1
    unlabelled = "all => all.filter(one => !one.labels?.length && !one.ariaLabel && !one.textContent.trim()).length"
    assert page.eval_on_selector_all("input, button, select", unlabelled) == 0


def test_dark_is_followed_and_a_narrow_window_does_not_overflow(browser: Any, bundled: Path) -> None:
    page = load(browser, bundled, color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 24, 28)"
    page.set_viewport_size({"width": 400, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 400


@pytest.mark.slow
def test_an_opened_role_of_a_publication_keeps_to_what_its_source_states(browser: Any, tmp_path: Path) -> None:
    """S-inhibition in Wang et al. 2022: reads duplicate token and induction heads, and `end` as its query."""
    page = load(browser, write_page(STORED / "ioi-wang2022-heads.circuit.json", tmp_path / "page.html").path)
    box = page.locator('#figure-diagram .box.role [aria-label^="S-inhibition,"]')
    box.click(position={"x": 6, "y": 6})
    script = """diagrams[0].drawn.filter(arrow => diagrams[0].data.boxes[arrow.to].label === "S-inhibition")
        .map(arrow => [diagrams[0].data.boxes[arrow.from].label, arrow.inputs.join(), arrow.at, arrow.target])"""
    found = [tuple(arrow) for arrow in page.evaluate(script)]
    assert {arrow[:3] for arrow in found} == {
        ("duplicate token", "k,v", ""),
        ("induction", "k,v", ""),
        ("input", "q", "end"),
    }
    assert len(found) == len(set(found)) == 3 * 4 and page.complaints == []


def test_pointing_does_not_move_the_page(page: Any) -> None:
    height = "document.documentElement.scrollHeight"
    before = page.evaluate(height)
    for name in ("a2.h1", "m1", "input"):
        node(page, name).hover()
        assert name in page.locator("#panel h3").inner_text() and page.evaluate(height) == before
    page.locator("#figure-diagram .arrow .touch").first.hover(force=True)
    assert page.evaluate(height) == before


def test_a_finger_opens_roles_nodes_and_edges(browser: Any, bundled: Path) -> None:
    page = load(browser, bundled, has_touch=True, is_mobile=True, device_scale_factor=1)
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.locator("#figure-diagram .box.role rect[role=button]").first.tap(position={"x": 6, "y": 6})
    assert page.locator("#figure-diagram .box.open").count() == 1
    node(page, "a2.h1").tap()
    assert page.locator("#panel h3").inner_text() == "a2.h1"
    page.evaluate("everything()")
    at = strongest(page)
    page.touchscreen.tap(*at)
    assert "->" in page.locator("#panel h3").inner_text()


@pytest.mark.slow
def test_the_lines_are_on_the_canvas_and_nodes_keep_their_places(page: Any) -> None:
    pixel = """([x, y]) => { const c = drawing.base, box = c.getBoundingClientRect(), r = c.ratio;
        return [...c.getContext('2d').getImageData((x - box.left) * r, (y - box.top) * r, 1, 1).data][3]; }"""
    assert page.evaluate(pixel, strongest(page)) > 100
    places = "[...drawing.nodes].map(([i, box]) => [i, box.getAttribute('transform')])"
    before = page.evaluate(places)
    for stop in (0, 1, 3):
        move(page, stop)
        assert page.evaluate(places) == before


@pytest.mark.slow
def test_seventy_thousand_edges_open_in_two_seconds_and_stay_fluid(browser: Any, tmp_path: Path) -> None:
    """A graph of the size of SmolLM2-135M. The times are those of the page's own scripts."""
    circuit = toy_circuit(30, 9, 3, 70_000)
    assert circuit.n_edges >= 69_000
    path = tmp_path / "large.html"
    write_report(path, circuit, toy_document(circuit), "large.circuit.json")
    assert path.stat().st_size < 5e6
    page = load(browser, path)
    assert page.complaints == [] and page.evaluate("graph.diagrams[0].by") == "layers"
    took = "performance.getEntriesByName('drawn')[0].startTime"  # milliseconds; other work on the machine can only add
    assert min(page.evaluate(took), load(browser, path).evaluate(took)) < 2000
    assert set(page.evaluate("state.edges.map(e => graph.edges[e][3])")) == set(circuit.edges)
    strong = {name for name in lines(page) if not re.search(r"kv\d", name)}  # one of these is a line to each head
    scores = scores_of(circuit).to_dict()
    weakest = min(abs(scores[name]) for name in strong)
    assert strong == {n for n in circuit.edges if abs(scores[n]) >= weakest and not re.search(r"kv\d", n)}
    assert page.locator("#lines-says").inner_text().startswith("the strongest 500 of ")
    node_by_node = "for (const i of [...drawing.nodes.keys()].slice(0, 20)) pointAt('node', i)"
    took = page.evaluate(
        f"(() => {{ const start = performance.now(); {node_by_node}; return performance.now() - start; }})()"
    )
    assert took < 2000  # milliseconds to point at 20 nodes
    head = circuit.nodes[40]
    node(page, head).dispatch_event("click")
    own = {name for name in circuit.edges if name.startswith(f"{head}->")}
    assert own <= lines(page) and len(own) > 20
    page.keyboard.press("Escape")
    page.locator("#lines").fill("100")
    assert page.locator("#lines-says").inner_text().startswith("all ")


@pytest.mark.slow
def test_a_saved_figure_is_drawn_from_the_file_beside_it(browser: Any, tmp_path: Path) -> None:
    save_html(circuit_figure(toy_circuit(edges=30)), tmp_path / "figure.html", title="A circuit")
    page = load(browser, tmp_path / "figure.html")
    page.locator(".main-svg").first.wait_for()
    assert page.complaints == [] and page.title() == "A circuit" == page.locator("h1").inner_text()
    assert len(page.asked) == 2 and all(url.startswith(tmp_path.as_uri()) for url in page.asked)
    next(tmp_path.glob("plotly-*.js")).unlink()
    assert "needs the file plotly-" in load(browser, tmp_path / "figure.html").locator("body").inner_text()


@pytest.mark.slow
def test_hostile_names_stay_texts(browser: Any, tmp_path: Path) -> None:
    evil = "</script><img src=x onerror=\"document.title='taken'\"><b>"
    circuit = toy_circuit()
    head = next(name for name in circuit.nodes if name.startswith("a"))
    document = toy_document(circuit, title=evil, roles={"r": {"label": evil, "description": evil, "nodes": [head]}})
    write_report(tmp_path / "evil.html", circuit, document, "evil.circuit.json")
    page = load(browser, tmp_path / "evil.html")
    node(page, head).hover()
    page.get_by_text("role", exact=True).first.wait_for()
    assert evil in page.locator("#panel").inner_text() and page.title() != "taken"
    own = page.locator("#size-says b, .warnings b").count()  # the page's own markup
    assert page.locator("img").count() == page.locator("main b").count() - own == 0
    assert page.complaints == [] and len(page.asked) == 1
