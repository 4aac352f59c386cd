"""`write_aggregate_page`: the attribution graphs of several prompts as one HTML page, drawn as that of one prompt.

Its slider chooses in how many of the prompts a node or edge must be. Where positions are summed, columns only spread
the nodes of a layer, those that most prompts have first.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from mechinterp.analysis.attribution_graph.aggregate import AggregatedGraph
from mechinterp.analysis.attribution_graph.validate import GraphValidation
from mechinterp.analysis.feature_notes import FeatureNote
from mechinterp.base.atomic_write import write_whole
from mechinterp.base.errors import InputError, clip
from mechinterp.views.report.attribution_page import (
    GRAPH,
    MAX_EDGES,
    MAX_FEATURES,
    SCRIPTS,
    WORDS,
    digits,
    made_of,
    note_content,
    script_json,
    visible,
)
from mechinterp.views.report.html_page import html_page, resource
from mechinterp.views.report.shown_paths import shown_path
from mechinterp.views.report.tables import text

SHARES = (1.0, 0.75, 0.5, 0.25, 0.0)
"""Sizes of the page: the share of the prompts that must have a node or edge; 0: any prompt."""
FIRST = 0.5
COLUMNS = 14
"""Columns over which the nodes of a layer are spread where positions are summed."""
PROMPTS_SHOWN = 200
Checks = Sequence[GraphValidation | None]


def write_aggregate_page(
    path: str | os.PathLike[str],
    graph: AggregatedGraph,
    *,
    notes: Mapping[str, FeatureNote] | None = None,
    checks: Checks = (),
    command: str = "",
) -> None:
    """Return None after writing the page of an aggregated graph, completely or not at all.

    Args:
        path: Where, NAME.html.
        graph: The graph, of pruned graphs.
        notes: By the names of features (`m1.f17`), what they write and where they fire: `feature_notes`.
        checks: What `validate_graph` found for each prompt, in order (None: not tested); printed beside the graph.
        command: The command that makes the page again.

    The page is at most some 5 MB: sizes of more than 60,000 edges or 1,500 features are left out, which it says.

    Raises InputError if even the smallest size is larger, for another number of checks than prompts, and if the file
    cannot be written.
    """
    write_whole(path, render_aggregate_page(graph, notes, checks, command).encode("utf-8"))


def render_aggregate_page(
    graph: AggregatedGraph,
    notes: Mapping[str, FeatureNote] | None = None,
    checks: Checks = (),
    command: str = "",
) -> str:
    """The page as text; `write_aggregate_page` describes the arguments."""
    if checks and len(checks) != graph.graphs:
        raise InputError(f"Give a check for every prompt: {graph.graphs}; got {len(checks)}.")
    sizes, left_out = aggregate_sizes(graph)
    title = f"Attribution graphs of {graph.graphs} prompts"
    said = [f"What is in {_share(share, graph.graphs)} is too much for a page." for share in left_out]
    if notes is None:
        said.append("Tokens and examples of features were not measured: give notes=feature_notes(...).")
    columns = (
        "Columns are the positions of the prompts, rows the layers; information flows upward and to the right."
        if graph.positions == "kept"
        else "Rows are the layers; information flows upward. Positions are summed: columns only spread the nodes of a "
        "layer, with those that most prompts have on the left."
    )
    parts = [
        f"<h1>{text(title)}</h1>",
        _lead(graph),
        _cards(graph, checks),
        GRAPH.format(columns=columns, notes="".join(f'<p class="note">{text(one)}</p>' for one in said)),
        _prompts(graph, checks),
        made_of(graph.model, graph.bases, (), command),
    ]
    script = "\n".join(resource(name) for name in SCRIPTS)
    data = script_json(_data(graph, sizes, notes or {}))
    return html_page(title, "\n".join(parts), script=script, data=data, styles=(resource("attribution.css"),))


def aggregate_sizes(graph: AggregatedGraph) -> tuple[list[tuple[float, AggregatedGraph]], list[float]]:
    """(the sizes on the page by the share of prompts, the shares of those that are too large)."""
    found, left_out, counts = list[tuple[float, AggregatedGraph]](), list[float](), set[int]()
    for share in SHARES:
        least = max(1, math.ceil(share * graph.graphs - 1e-9))
        if least in counts:
            continue
        counts.add(least)
        part = graph.frequent(least / graph.graphs)
        if len(part.edges) > MAX_EDGES or int((part.nodes["kind"] == "feature").sum()) > MAX_FEATURES:
            left_out.append(share)
        else:
            found.append((share, part))
    if not found:
        raise InputError("What every prompt has is too much for a page; prune the graphs before they are aggregated.")
    return found, left_out


def _share(share: float, n: int) -> str:
    least = max(1, math.ceil(share * n - 1e-9))
    return "all prompts" if least == n else "any prompt" if least == 1 else f"at least {least} of {n} prompts"


def _data(
    graph: AggregatedGraph, sizes: Sequence[tuple[float, AggregatedGraph]], notes: Mapping[str, FeatureNote]
) -> Any:
    """What the script draws, as for one prompt; a node or edge is in every size that asks for no more prompts."""
    widest = max((part for _, part in sizes), key=lambda part: (len(part.nodes), len(part.edges)))
    nodes, edges = widest.nodes, widest.edges
    order = {name: i for i, name in enumerate(nodes["node"])}
    bits = [set(part.nodes["node"]) for _, part in sizes]
    edge_bits = [set(zip(part.edges["source"], part.edges["target"], strict=True)) for _, part in sizes]
    pairs = list(zip(edges["source"], edges["target"], strict=True))
    rows: list[dict[str, Any]] = nodes.to_dict("records")
    columns = [None] * len(rows) if graph.positions == "kept" else _columns(rows)
    layers = [row["layer"] for row in rows if row["layer"] >= 0]
    return {
        "words": _words(graph, columns),
        "mean": True,
        "layers": 1 + max(layers, default=-1),
        "nodes": [
            {
                "name": row["node"],
                "kind": row["kind"],
                "layer": row["layer"],
                "position": row["position"],
                **({} if column is None else {"column": column}),
                "text": visible(row["text"]) if row["kind"] == "token" and row["text"] else row["text"],
                "value": digits(row["value"]),
                "pre": None,
                "influence": digits(row["influence"]),
                "sizes": sum(1 << bit for bit, names in enumerate(bits) if row["node"] in names),
                "group": -1,
                "note": f"{row['basis']}.f{row['feature']}" if row["kind"] == "feature" else "",
                "facts": [["in", f"{row['frequency']:.0%} of the prompts"]],
            }
            for row, column in zip(rows, columns, strict=True)
        ],
        "edges": {
            "from": [order[source] for source, _ in pairs],
            "to": [order[target] for _, target in pairs],
            "weight": [digits(value) for value in edges["weight"]],
            "sizes": [sum(1 << bit for bit, names in enumerate(edge_bits) if pair in names) for pair in pairs],
            "says": [
                f"± {digits(sd):g}, {share:.0%}" for sd, share in zip(edges["sd"], edges["frequency"], strict=True)
            ],
        },
        "sizes": [
            {
                "share": share,
                "says": f"in {_share(share, graph.graphs)}",
                "features": int((part.nodes["kind"] == "feature").sum()),
                "edges": len(part.edges),
                "facts": [["nodes", f"{len(part.nodes):,}"]],
            }
            for share, part in sizes
        ],
        "first": min(range(len(sizes)), key=lambda i: abs(sizes[i][0] - FIRST)),
        "groups": [],
        "notes": {
            name: note_content(notes[name])
            for name in dict.fromkeys(f"{r['basis']}.f{r['feature']}" for r in rows if r["kind"] == "feature")
            if name in notes
        },
    }


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[int | None]:
    """For every node a column that spreads its row, those that most prompts have first; None: with the constants."""
    columns: list[int | None] = [None] * len(rows)
    seen: dict[tuple[str, int], int] = {}
    for i in sorted(range(len(rows)), key=lambda i: (-rows[i]["frequency"], -rows[i]["influence"])):
        kind = rows[i]["kind"]
        if kind in ("bias", "rest"):
            continue
        row = (kind if kind in ("token", "target") else "", rows[i]["layer"])
        columns[i] = seen.get(row, 0) % COLUMNS
        seen[row] = seen.get(row, 0) + 1
    return columns


def _words(graph: AggregatedGraph, columns: Sequence[int | None]) -> list[str]:
    """The heads of the columns: at every position the word, or the first one with a sign that there are others."""
    if graph.positions == "summed":
        return [""] * (1 + max((column for column in columns if column is not None), default=0))
    found: list[str] = []
    for position in range(max(map(len, graph.words), default=0)):
        here = dict.fromkeys(words[position] for words in graph.words if position < len(words))
        first = visible(next(iter(here)))
        found.append(first if len(here) == 1 else f"{first} …")
    return found


def _lead(graph: AggregatedGraph) -> str:
    model = f" in the model {text(shown_path(graph.model))}" if graph.model else ""
    held = WORDS.get(graph.held, graph.held)
    words = (
        "Edges are exact sums with attention patterns and norm scales held."
        if graph.held == "norms"
        else f"Edges are derivatives times activations, with {text(held)} held."
    )
    return (
        f'<p class="lead">What tokens, features of transcoders and what these miss (errors) add to each other and to '
        f"the targets{model}: means over {graph.graphs} prompts, each with its own graph. The fewer of them have a "
        f"node or an edge, the less it says about the others. {words}</p>"
    )


def _cards(graph: AggregatedGraph, checks: Checks) -> str:
    features = graph.nodes[graph.nodes["kind"] == "feature"]
    always = int((features["frequency"] > 1 - 1e-9).sum())
    errors, around = _spread(graph.of_errors, "{:.1%}")
    cards = [
        ("Influence from errors", errors, f"{around}, before pruning"),
        ("Features in every prompt", f"{always:,}", f"of {len(features):,} in any"),
    ]
    if tested := [check for check in checks if check is not None]:
        value, more = _spread([check.pearson for check in tested], "{:.2f}")
        gradient, _ = _spread([check.gradient for check in tested], "{:.2f}")
        chance = sum(not check.pearson > check.shuffled for check in tested)
        worse = f"; no better than chance in {chance} of {len(tested)} prompts" if chance else ""
        what = "ablations" if tested[0].strength == 1 else f"weakening by {tested[0].strength:g}"
        held = "" if tested[0].held == "nothing" else f", {WORDS[tested[0].held]} held"
        some = "" if len(tested) == len(checks) else f"; {len(tested)} of {len(checks)} prompts were tested"
        control = f"{more}; model's own gradient {gradient}{worse}{some}"
        cards.append((f"Predicts real {what}{held}", f"r = {value}", control))
    else:
        cards.append(("Predicts real ablations", "not tested", "give checks=[validate_graph(...), ...]"))
    rows = "".join(
        f"<div><dt>{text(name)}</dt><dd>{text(value)}<small>{text(more)}</small></dd></div>"
        for name, value, more in cards
    )
    return f'<dl class="cards">{rows}</dl>'


def _spread(values: Sequence[float], shown: str) -> tuple[str, str]:
    """The median, and from where to where the values go; one that is not a number makes the median none."""
    middle = median(values) if not any(map(math.isnan, values)) else math.nan
    known = [value for value in values if not math.isnan(value)]
    around = f"{shown.format(min(known))} to {shown.format(max(known))}" if known else "none is a number"
    return shown.format(middle), f"median; {around}"


def _prompts(graph: AggregatedGraph, checks: Checks) -> str:
    """A row per prompt: its text, the share of errors, and how well its graph predicts runs of the model."""
    head = ["prompt", "errors", *(["Pearson", "gradient", "direct edges", "shuffled"] if checks else [])]
    rows = list[str]()
    for i, (words, errors) in enumerate(zip(graph.words, graph.of_errors, strict=True)):
        joined = ("" if any(word[:1].isspace() for word in words) else " ").join(words)
        numbers = [f"{errors:.1%}"]
        if checks:
            one = checks[i]
            found = None if one is None else (one.pearson, one.gradient, one.direct, one.shuffled)
            numbers += ["not tested"] * 4 if found is None else [f"{value:.2f}" for value in found]
        cells = "".join(f'<td class="number">{number}</td>' for number in numbers)
        rows.append(f"<tr><td>{text(clip(joined.strip(), 300))}</td>{cells}</tr>")
    names = "".join(f'<th class="{"name" if i == 0 else "number"}">{name}</th>' for i, name in enumerate(head))
    more = len(rows) - PROMPTS_SHOWN
    note = f'<p class="note">{more:,} more prompts are not listed.</p>' if more > 0 else ""
    said = (
        "Features were ablated or weakened in the model, and the logits of the targets compared with what the graph of "
        "the prompt predicts: the correlation, and its controls."
        if checks
        else "Not tested: <code>validate_graph</code> compares the graph of a prompt with runs of the model."
    )
    return (
        f"<h2>The prompts</h2><p>{said}</p>"
        f'<div class="scroll"><table class="data" id="prompts"><thead><tr>{names}</tr></thead>'
        f"<tbody>{''.join(rows[:PROMPTS_SHOWN])}</tbody></table></div>{note}"
    )
