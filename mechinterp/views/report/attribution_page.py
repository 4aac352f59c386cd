"""`write_graph_page`: an attribution graph as one HTML page that needs only a browser and no network.

Positions are columns and layers are rows. The page holds several sizes of the pruned graph, each exactly what
`AttributionGraph.pruned` keeps, so that its slider cuts as the library does.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mechinterp.analysis.attribution_graph.graph import AttributionGraph, GraphNode
from mechinterp.analysis.attribution_graph.validate import EdgeValidation, GraphValidation
from mechinterp.analysis.feature_notes import FeatureNote
from mechinterp.base.atomic_write import write_whole
from mechinterp.base.errors import InputError, clip
from mechinterp.views.report.html_page import html_page, resource
from mechinterp.views.report.shown_paths import shown_command, shown_path
from mechinterp.views.report.tables import text

SHARES = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
MAX_EDGES, MAX_FEATURES = 60_000, 1500
"""The largest size on a page; larger ones are left out, and the page says so."""
SCRIPTS = ("draw.js", "panel.js", "attribution.js")
Checks = Sequence[EdgeValidation | GraphValidation]
WORDS = {"norms": "patterns and norms", "patterns": "patterns", "nothing": "nothing"}


@dataclass(frozen=True)
class Size:
    """A pruned graph that the page can show: the share of influence its nodes hold, and the graph."""

    share: float
    graph: AttributionGraph


def write_graph_page(
    path: str | os.PathLike[str],
    graph: AttributionGraph,
    *,
    notes: Mapping[str, FeatureNote] | None = None,
    checks: Checks = (),
    edges: float = 0.98,
    shown: float = 0.8,
    command: str = "",
) -> None:
    """Return None after writing the page of an attribution graph, completely or not at all.

    Args:
        path: Where, NAME.html.
        graph: The whole graph, of which the page shows several pruned sizes; or a pruned one, which is shown as it is.
        notes: By the names of features (`m1.f17`), what they write and where they fire: `feature_notes`.
        checks: What `validate_edges` and `validate_graph` found; printed beside the graph.
        edges: The share of the influence of edges that every size keeps.
        shown: The size that is shown at first.
        command: The command that makes the page again.

    The page is at most some 5 MB: sizes of more than 60,000 edges or 1,500 features are left out, which it says.

    Raises InputError if even the smallest size is larger, and if the file cannot be written.
    """
    write_whole(path, render_graph_page(graph, notes, checks, edges, shown, command).encode("utf-8"))


def render_graph_page(
    graph: AttributionGraph,
    notes: Mapping[str, FeatureNote] | None = None,
    checks: Checks = (),
    edges: float = 0.98,
    shown: float = 0.8,
    command: str = "",
) -> str:
    """The page as text; `write_graph_page` describes the arguments."""
    sizes, left_out = page_sizes(graph, edges, shown)
    data = _data(graph, sizes, notes or {}, shown)
    title = f"Attribution graph of “{clip(graph.prompt.strip(), 90)}”"
    parts = [
        f"<h1>{text(title)}</h1>",
        _lead(graph),
        _cards(graph, checks),
        _graph_section(graph, left_out, notes),
        _validation(graph, checks),
        _about(graph, command),
    ]
    script = "\n".join(resource(name) for name in SCRIPTS)
    return html_page(
        title, "\n".join(parts), script=script, data=script_json(data), styles=(resource("attribution.css"),)
    )


def page_sizes(graph: AttributionGraph, edges: float, shown: float) -> tuple[list[Size], list[float]]:
    """The sizes on the page, and the shares of those that are too large; `write_graph_page` describes the arguments."""
    if "pruned" in graph.about or not graph.features:
        of = graph.about.get("pruned")
        share = of.get("nodes") if isinstance(of, Mapping) else None
        found = [Size(share if isinstance(share, float) else 1.0, graph)]
        if graph.n_edges > MAX_EDGES or len(graph.features) > MAX_FEATURES:
            raise InputError(f"{_of(graph)} are too many for a page; prune the graph further.")
        return found, []
    found, left_out = list[Size](), list[float]()
    for share in sorted({*SHARES, shown}):
        pruned = graph.pruned(share, edges)
        if pruned.n_edges > MAX_EDGES or len(pruned.features) > MAX_FEATURES:
            left_out.append(share)
        else:
            found.append(Size(share, pruned))
    if not found:
        raise InputError(f"{_of(graph.pruned(min(SHARES), edges))} are too many for a page, and it is the smallest.")
    return found, left_out


def _of(graph: AttributionGraph) -> str:
    return f"{len(graph.features):,} features and {graph.n_edges:,} edges"


def _data(graph: AttributionGraph, sizes: Sequence[Size], notes: Mapping[str, FeatureNote], shown: float) -> Any:
    """What the script draws: nodes and edges of all sizes, each with the sizes (bits) that have it."""
    influence = dict(zip((n.name for n in graph.writers), graph.influence().tolist(), strict=True))
    nodes: dict[str, GraphNode] = {}
    node_bits, edge_bits = dict[str, int](), dict[tuple[str, str], int]()
    weights: dict[tuple[str, str], float] = {}
    for bit, size in enumerate(sizes):
        own = size.graph
        for node in own.nodes:
            nodes[node.name] = node
            node_bits[node.name] = node_bits.get(node.name, 0) | 1 << bit
        readers, writers = [n.name for n in own.readers], [n.name for n in own.writers]
        rows, columns = own.weights.nonzero(as_tuple=True)
        values = own.weights[rows, columns].tolist()
        for row, column, value in zip(rows.tolist(), columns.tolist(), values, strict=True):
            key = writers[column], readers[row]
            weights[key] = value
            edge_bits[key] = edge_bits.get(key, 0) | 1 << bit
    order = {name: i for i, name in enumerate(sorted(nodes, key=lambda name: graph.index[name]))}
    groups = {name: i for i, group in enumerate(graph.supernodes) for name in group.members}
    every = [nodes[name] for name in order]
    layers = [node.layer for node in every if node.layer >= 0]
    return {
        "words": [visible(word) for word in graph.words],
        "layers": 1 + max(layers, default=-1),
        "nodes": [
            {
                "name": node.name,
                "kind": node.kind,
                "layer": node.layer,
                "position": node.position,
                "text": node.text,
                "value": digits(node.value),
                "pre": None if node.pre != node.pre else digits(node.pre),
                "influence": digits(node.weight if node.kind == "target" else influence[node.name]),
                "sizes": node_bits[node.name],
                "group": groups.get(node.name, -1),
                "note": f"{node.basis}.f{node.feature}" if node.kind == "feature" else "",
            }
            for node in every
        ],
        "edges": {
            "from": [order[source] for source, _ in weights],
            "to": [order[target] for _, target in weights],
            "weight": [digits(value) for value in weights.values()],
            "sizes": [edge_bits[key] for key in weights],
        },
        "sizes": [_size(size) for size in sizes],
        "first": min(range(len(sizes)), key=lambda i: abs(sizes[i].share - shown)),
        "groups": [group.label for group in graph.supernodes],
        "notes": {
            name: note_content(notes[name])
            for name in dict.fromkeys(f"{n.basis}.f{n.feature}" for n in every if n.kind == "feature")
            if name in notes
        },
    }


def _size(size: Size) -> dict[str, Any]:
    scores = size.graph.scores
    return {
        "share": size.share,
        "says": f"{size.share:.0%} of the influence",
        "features": len(size.graph.features),
        "edges": size.graph.n_edges,
        "facts": [
            ["replacement", f"{digits(scores.replacement):g} (of this size)"],
            ["completeness", f"{digits(scores.completeness):g} (of this size)"],
        ],
    }


def note_content(note: FeatureNote) -> dict[str, Any]:
    """What a feature writes and where it fires, as the script reads it."""
    examples = [
        [digits(one.value), *(clip(part, 120) for part in _around(one.words, one.position))] for one in note.examples
    ]
    return {
        "raises": [visible(word) for word in note.raises],
        "lowers": [visible(word) for word in note.lowers],
        "examples": examples,
        "fired": note.fired,
        "tokens": note.tokens,
    }


def _around(words: Sequence[str], position: int) -> tuple[str, str, str]:
    """The text before a token, the token, the text after it."""
    first = max(0, position - 10)
    before = ("… " if first else "") + "".join(words[first:position]).lstrip()
    return before, words[position], "".join(words[position + 1 : position + 5])


def _lead(graph: AttributionGraph) -> str:
    held = _held(graph)
    words = (
        "Attention patterns and norm scales are held at those of the prompt, so edges into a node add up to what it "
        "reads."
        if held == WORDS["norms"]
        else f"Edges are derivatives times activations, with {text(held)} held: what moves when a "
        "feature is weakened a little. They do not add up to what a node reads."
    )
    model = f" in the model {text(shown_path(graph.model))}" if graph.model else ""
    return (
        f'<p class="lead">What tokens, features of transcoders and what these miss (errors) add to each other and to '
        f"the next token{model}. {words}</p>"
    )


def _held(graph: AttributionGraph) -> str:
    """What the edges hold, in words; a file of another tool does not say it, and theirs hold patterns and norms."""
    held = str(graph.about.get("held", "norms"))
    return WORDS.get(held, held)


def _cards(graph: AttributionGraph, checks: Checks) -> str:
    scores = graph.scores
    pruned = "pruned" in graph.about
    of = "of this pruned graph" if pruned else "of the whole graph"
    cards = [
        ("Influence from errors", f"{scores.of_errors:.1%}", f"what the transcoders miss, {of}"),
        ("Replacement", f"{scores.replacement:.3f}", f"tokens among tokens and errors, {of}"),
        ("Completeness", f"{scores.completeness:.3f}", f"edges not from errors, {of}"),
    ]
    if scores.of_rest:
        cards.append(("From features without a node", f"{scores.of_rest:.1%}", "share of influence"))
    real = [check for check in checks if isinstance(check, GraphValidation) and check.held == "nothing"]
    for check in real[:1]:
        control = f"model's own gradient {check.gradient:.2f}; shuffled below {check.shuffled:.2f}"
        if not check.pearson > check.shuffled:
            control += ": no better than chance"
        cards.append((f"Predicts real {_done(check)}", f"r = {check.pearson:.2f}", control))
    if not real:
        cards.append(("Predicts real ablations", "not tested", "give checks=[validate_graph(...)]"))
    rows = "".join(
        f"<div><dt>{text(name)}</dt><dd>{text(value)}<small>{text(more)}</small></dd></div>"
        for name, value, more in cards
    )
    return f'<dl class="cards">{rows}</dl>'


def _done(check: GraphValidation) -> str:
    return "ablations" if check.strength == 1 else f"weakening by {check.strength:g}"


def _graph_section(graph: AttributionGraph, left_out: Sequence[float], notes: Mapping[str, FeatureNote] | None) -> str:
    said: list[str] = []
    if left_out:
        shares = ", ".join(f"{share:.0%}" for share in left_out)
        said.append(f"Sizes that hold {shares} of the influence are too large for a page.")
    if notes is None:
        said.append("Tokens and examples of features were not measured: give notes=feature_notes(...).")
    elif graph.features and not any(note.tokens for note in notes.values()):
        said.append("Examples of features were not looked for: no corpus was given.")
    columns = "Columns are the positions of the prompt, rows the layers; information flows upward and to the right."
    return GRAPH.format(columns=columns, notes="".join(f'<p class="note">{text(one)}</p>' for one in said))


def _validation(graph: AttributionGraph, checks: Checks) -> str:
    if not checks:
        return (
            "<h2>Is it true?</h2><p>Not tested: <code>validate_edges</code> and <code>validate_graph</code> "
            "compare the graph with runs of the model.</p>"
        )
    parts = ["<h2>Is it true?</h2>"]
    for check in checks:
        if isinstance(check, EdgeValidation):
            parts.append(
                f"<p>Edges: {check.features} features were multiplied by {check.factor:g} in the model, with "
                f"MLP outputs and what the edges hold held; of {check.readers:,} readers none moved by more than "
                f"{check.worst:.1e} of the largest edge beside what its edge says.</p>"
            )
    graphs = [check for check in checks if isinstance(check, GraphValidation)]
    if graphs:
        held = text(_held(graph))
        parts.append(
            f"<p>Predictions: features were ablated or weakened in the model, and the logits of the targets compared "
            f"with what the graph (whose edges hold {held}) predicts along all its paths. Correlation of the two, and "
            "its controls: the direct edges alone, and the 95&nbsp;% quantile for shuffled predictions. The gradient "
            "column is the same for what the model's own gradient predicts: an exact account of the first order.</p>"
        )
        head = ("held in the model", "taken away", "Pearson", "Spearman", "gradient", "direct edges", "shuffled")
        rows = "".join(
            f'<tr><th scope="row">{text(WORDS[one.held])}</th><td class="number">{one.strength:.0%}</td>'
            + "".join(
                f'<td class="number">{value:.2f}</td>'
                for value in (one.pearson, one.spearman, one.gradient, one.direct, one.shuffled)
            )
            + "</tr>"
            for one in graphs
        )
        heads = "".join(f'<th class="{"name" if i == 0 else "number"}">{name}</th>' for i, name in enumerate(head))
        parts.append(
            f'<div class="scroll"><table class="data" id="checks"><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody>'
            "</table></div>"
        )
        real = next((one for one in graphs if one.held == "nothing"), graphs[-1])
        parts.append(_scatter(real))
    return "".join(parts)


def _scatter(check: GraphValidation) -> str:
    """Measured against predicted changes of logits, one point per feature and target."""
    side, pad = 260, 42
    predicted, measured = check.frame["predicted"].to_numpy(), check.frame["measured"].to_numpy()
    most = max(float(abs(predicted).max()), float(abs(measured).max()), 1e-9) * 1.06
    scale = side / (2 * most)

    def at(x: float, y: float) -> tuple[float, float]:
        return pad + (x + most) * scale, 8 + (most - y) * scale

    points: list[str] = []
    for name, target, x, y in zip(check.frame["feature"], check.frame["target"], predicted, measured, strict=True):
        cx, cy = at(float(x), float(y))
        said = text(f"{name}, {target}: predicted {x:+.3f}, measured {y:+.3f}")
        points.append(
            f'<circle class="point" cx="{cx:.1f}" cy="{cy:.1f}" r="3" fill-opacity=".6"><title>{said}</title></circle>'
        )
    (x0, y0), (x1, y1), (mx, my) = at(-most, -most), at(most, most), at(0, 0)
    lines = (
        f'<line class="grid" x1="{x0}" x2="{x1}" y1="{my:.1f}" y2="{my:.1f}"/>'
        f'<line class="grid" x1="{mx:.1f}" x2="{mx:.1f}" y1="{y1}" y2="{y0}"/>'
        f'<line class="grid guide" x1="{x0}" y1="{y0}" x2="{x1}" y2="{y1}"/>'
    )
    words = (
        f'<text x="{mx:.0f}" y="{y0 + 18:.0f}" text-anchor="middle">predicted change of the logit (±{most:.2g})'
        f'</text><text transform="translate(14 {my:.0f}) rotate(-90)" text-anchor="middle">measured</text>'
    )
    label = f"Measured against predicted, {WORDS[check.held]} held in the model"
    return (
        f'<figure><svg class="chart still" width="{side + pad + 12}" height="{side + 34}" '
        f'viewBox="0 0 {side + pad + 12} {side + 34}" role="img" aria-label="{text(label)}">{lines}{"".join(points)}'
        f"{words}</svg><figcaption>{text(label)}. A point on the diagonal is predicted exactly.</figcaption></figure>"
    )


def _about(graph: AttributionGraph, command: str) -> str:
    gap, active, facts = graph.about.get("gap"), graph.about.get("active_features"), list[tuple[str, str]]()
    facts += [("largest gap of a sum of edges", f"{gap:.1e} of their sizes")] if isinstance(gap, float) else []
    facts += [("active features", f"{active:,}")] if isinstance(active, int) else []
    return made_of(graph.model, graph.bases, facts, command)


def made_of(model: str, bases: Mapping[str, str], facts: Sequence[tuple[str, str]], command: str) -> str:
    """The section on the model, the transcoders and their hashes, further facts, and the command that was used."""
    every = [("model", shown_path(model))] if model else []
    every += [(f"transcoder {name}", f"sha256 {digest}") for name, digest in bases.items()]
    rows = "".join(
        f'<tr><th scope="row">{text(name)}</th><td><code>{text(value)}</code></td></tr>'
        for name, value in (*every, *facts)
    )
    again = f"<h2>Make it again</h2><pre><code>{text(shown_command(command))}</code></pre>" if command else ""
    return f'<h2>What it was made of</h2><table class="facts-of"><tbody>{rows}</tbody></table>{again}'


def visible(word: str) -> str:
    """The text of a token, with its spaces and line ends shown."""
    return word.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥") or "∅"


def digits(value: float) -> float:
    """A number as the page holds it."""
    return float(f"{value:.4g}")


def script_json(data: object) -> str:
    """JSON that is safe inside a script element: it cannot end the element or begin a comment."""
    packed = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return packed.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


GRAPH = """<section id="graph"><h2>The graph</h2>
<div class="controls" role="group" aria-label="What the graph shows">
<div class="control" id="size-control"><label for="size">Keep</label>
<input type="range" id="size" min="0" value="0" step="1"><output id="size-says" for="size"></output></div>
<div class="control"><label for="search">Search</label>
<input type="search" id="search" placeholder="node, token or description" autocomplete="off" spellcheck="false">
<output id="search-says" for="search"></output></div>
<div class="control"><label><input type="checkbox" id="errors" checked> errors</label>
<label id="groups-control"><input type="checkbox" id="groups" checked> supernodes closed</label></div>
<div class="control"><span class="buttons"><button type="button" id="smaller" aria-label="Smaller">&minus;</button>
<button type="button" id="larger" aria-label="Larger">+</button>
<button type="button" id="everything" disabled>Show everything</button>
<button type="button" id="theme">Dark</button></span></div>
</div>
<div class="legend" id="legend"></div>
<div class="stage"><div class="canvas" id="figure-attribution"></div>
<div class="side"><aside class="panel" id="panel" aria-live="polite" aria-label="Details"></aside></div></div>
<p class="note">{columns}
Blue edges raise what they enter, red ones lower it. Without a choice, only the strongest edges are drawn.</p>{notes}
<noscript><p>The graph needs JavaScript.</p></noscript>
</section>"""
