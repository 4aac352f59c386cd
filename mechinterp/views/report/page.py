"""`render_report`: a circuit file as one HTML page that needs only a browser and no network.

Every text from the file is escaped. The security policy of the page forbids it to load anything, and allows only the
scripts and styles in this folder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mechinterp.circuit_file.schema import CircuitFile, EvaluationRecord
from mechinterp.circuit_file.store import write_file
from mechinterp.circuit_file.summary import finding, steadiness
from mechinterp.graphs.circuit import Circuit
from mechinterp.views.report.asked import asked_section
from mechinterp.views.report.charts import curve_view, heat_view
from mechinterp.views.report.diagrams import MAIN_SHARE
from mechinterp.views.report.graph_view import graph_view
from mechinterp.views.report.html_page import html_page, resource
from mechinterp.views.report.node_details import NodeDetails, PromptDetails
from mechinterp.views.report.shown_paths import shown_document, shown_path, without_folders
from mechinterp.views.report.tables import (
    cards,
    edges_part,
    evaluation_section,
    nodes_part,
    predictions_section,
    provenance_section,
    roles_section,
    text,
    verify_section,
    warnings_section,
)

SCRIPTS = ("draw.js", "panel.js", "charts.js", "diagram.js", "page.js")
NO_MODEL = NodeDetails(notes=("Attention patterns and written tokens are left out: no model was available.",))


def write_report(
    path: Path, circuit: Circuit, document: CircuitFile, circuit_path: str, details: NodeDetails = NO_MODEL
) -> None:
    """Write the page of `render_report`, completely or not at all. Raises InputError if it cannot be written."""
    write_file(path, render_report(circuit, document, circuit_path, details).encode("utf-8"))


def render_report(circuit: Circuit, document: CircuitFile, circuit_path: str, details: NodeDetails = NO_MODEL) -> str:
    """The page about a circuit and its file, 0.1 to 1 MB depending on the number of edges and patterns.

    Args:
        circuit: the circuit.
        document: the circuit file that describes it.
        circuit_path: the path of the file in the `verify` command that the page shows.
        details: measurements with the model, from `node_details`.
    """
    document = shown_document(document)
    evaluation = document.evaluation[0] if document.evaluation else None
    title = finding(document)
    graph, curve, heat = graph_view(circuit, document, details.example), curve_view(document), heat_view(circuit)
    parts = [
        f"<h1>{text(title)}</h1>",
        _lead(document),
        cards(evaluation) if evaluation else "",
        warnings_section(document),
        asked_section(document, details.example),
        *(_diagram_section(diagram) for diagram in graph["diagrams"]),
        _graph_section(graph, details),
        _measures_section(evaluation, heat is not None, document.graph.granularity == "node"),
        f'<div class="pair"><section>{edges_part(document)}</section><section>{nodes_part(document)}</section></div>',
        evaluation_section(document, evaluation) if evaluation else "",
        roles_section(document),
        predictions_section(document),
        provenance_section(document),
        verify_section(document, shown_path(circuit_path)),
    ]
    data = {"graph": graph, "curve": curve, "heat": heat, "details": _details(details)}
    script = "\n".join(resource(name) for name in SCRIPTS)
    return html_page(title, "\n".join(part for part in parts if part), script=script, data=_json(data))


def _lead(document: CircuitFile) -> str:
    task = _task_words(document)
    words = [f"Circuit of the model {text(document.model.name)}" + (f" on the task {task}" if task else "")]
    if document.discovery is not None:
        words.append(f"found by {text(document.discovery.method)}")
    words.append(f"status: {text(document.status)}")
    described = f"<p>{text(document.description)}</p>" if document.description else ""
    steady = "".join(f"<p>{text(line[0].upper() + line[1:])}.</p>" for line in steadiness(document))
    return f'<p class="lead">{", ".join(words)}.</p>{described}{steady}'


def _task_words(document: CircuitFile) -> str:
    task = document.task
    if task is None:
        return ""
    return f"{text(task.name)} ({text(task.title)})" if task.kind == "task" else text(task.name)


def _diagram_section(diagram: dict[str, Any]) -> str:
    by_role = diagram["by"] == "roles"
    words: list[str] = []
    if by_role and any(column["name"] for column in diagram["columns"]):
        words.append("A box stands at the token position at which its nodes write, where the file states one.")
    if diagram["claimed"]:
        words.append("An arrow is what the source states that one role sends to another: into q, k or v of its heads.")
    elif diagram["weights"] == "scores":
        words.append(
            "The weight of an arrow is the sum of the scores of its edges; dashed: negative, against the task."
        )
    else:
        words.append("The wider an arrow, the more edges it stands for.")
    words.append("Information flows upward.")
    if not diagram["claimed"]:
        words.append(f"Arrows below {MAIN_SHARE:.0%} of the largest are left out.")
    plain = by_role and any(box["kind"] == "plain" for box in diagram["boxes"])
    check = '<div class="controls"><label><input type="checkbox" id="plain"> nodes without a role</label></div>'
    heading = "The circuit by role" if by_role else "The circuit by layer"
    return _DIAGRAM.format(heading=heading, check=check if plain else "", caption=" ".join(words))


def _graph_section(graph: dict[str, Any], details: NodeDetails) -> str:
    scored = (
        "The wider an edge, the larger its score; a dashed edge has a negative score (it works against the task)."
        if graph["scored"]
        else "The edges have no scores, so all are equally wide."
    )
    lines = " One line stands for all edges between two nodes." if graph["level"] == "node" else ""
    if graph["lines"]["frequency"]:
        whose = "the node that it leaves" if graph["level"] == "node" else "it"
        lines += f" The fainter an edge, the fewer circuits of resampled examples have {whose}."
    caption = (
        f"Information flows upward. {scored}{lines} q, k and v enter a head on the left, in the middle and on the "
        f"right. {graph['about']}"
    )
    said = [without_folders(note) for note in (_measured(details), *details.notes) if note]
    notes = "".join(f'<p class="note">{text(note)}</p>' for note in said)
    return _GRAPH.format(caption=text(caption), notes=notes)


def _measured(details: NodeDetails) -> str:
    """On which examples the details of the nodes were measured."""
    parts: list[str] = []
    if details.prompts:
        numbers = ", ".join(str(prompt.row + 1) for prompt in details.prompts)
        written = any(prompt.written for prompt in details.prompts)
        parts.append(
            f"Patterns{' and written tokens' if written else ''}: clean prompts {numbers} of the {details.n_examples} "
            f"{details.pairs} pairs, one at a time."
        )
        if written:
            parts.append(
                "Written tokens: what the node alone adds to the logits at the answer position, with the scale of the "
                "final norm in that run."
            )
    if details.n_direct:
        parts.append(
            f"Direct effect: on the {details.direction}, the mean over the first {details.n_direct} of these pairs."
        )
    return " ".join(parts)


def _measures_section(entry: EvaluationRecord | None, scored: bool, nodes: bool) -> str:
    parts: list[str] = []
    if entry is not None:
        caption = (
            "How much of the performance the best edges recover: 0 with every edge replaced, 1 for the full model. "
            "Above 1 the circuit does better than the full model. Edges on no path from input to logits "
            "are dropped before counting."
        )
        parts.append(_figure("sizes", "Faithfulness against size", caption))
    if scored:
        caption = (
            f"Score of a node: {'its own' if nodes else 'the sum of the scores of all edges that leave it'}, in the "
            "circuit or not (blue helps the task, red works against it). A dot marks the nodes of the circuit."
        )
        parts.append(_figure("heads", "Scores by layer and head", caption))
    return f'<div class="pair">{"".join(parts)}</div>' if parts else ""


def _figure(name: str, heading: str, caption: str) -> str:
    return (
        f'<section><h2>{heading}</h2><figure><div class="scroll" id="figure-{name}"></div>'
        f'<p class="readout" id="readout-{name}">&nbsp;</p><figcaption>{caption}</figcaption></figure></section>'
    )


def _details(details: NodeDetails) -> dict[str, Any]:
    return {
        "pairs": details.pairs,
        "n_examples": details.n_examples,
        "n_direct": details.n_direct,
        "direction": details.direction,
        "unit": details.unit,
        "direct": {name: _digits(value) for name, value in details.direct.items()},
        "tokens": details.tokens,
        "fires": details.fires,
        "prompts": [_prompt(prompt) for prompt in details.prompts],
    }


def _prompt(prompt: PromptDetails) -> dict[str, Any]:
    return {
        "row": prompt.row,
        "tokens": prompt.tokens,
        "answer_pos": prompt.answer_pos,
        "right": prompt.right,
        "wrong": prompt.wrong,
        # In thousandths, without the zeros at the end of each row: a causal head does not attend forward.
        "patterns": {
            name: [_without_zeros([round(1000 * value) for value in row]) for row in pattern.tolist()]
            for name, pattern in prompt.patterns.items()
        },
        "written": {
            name: [[[token, _digits(by)] for token, by in tokens] for tokens in (written.raised, written.lowered)]
            for name, written in prompt.written.items()
        },
    }


def _without_zeros(row: list[int]) -> list[int]:
    while row and row[-1] == 0:
        row.pop()
    return row


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


def _json(data: object) -> str:
    """JSON that is safe inside a script element: it cannot end the element or begin a comment."""
    packed = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return packed.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


_DIAGRAM = """<section id="by-group"><h2>{heading}</h2>{check}
<div class="stage"><div class="canvas" id="figure-diagram"></div>
<div class="side"><aside class="panel" id="diagram-panel" aria-live="polite" aria-label="Details"></aside></div></div>
<p class="note">{caption}</p></section>"""

_GRAPH = """<section id="graph"><h2>Heads and edges</h2>
<div class="controls" role="group" aria-label="What the graph shows">
<div class="control" id="size-control" hidden><label for="size">Size</label>
<input type="range" id="size" min="0" value="0" step="1"><output id="size-says" for="size"></output></div>
<div class="control"><label for="search">Search</label>
<input type="search" id="search" placeholder="node, edge or role" autocomplete="off" spellcheck="false">
<output id="search-says" for="search"></output></div>
<div class="control" id="lines-control" hidden><label for="lines">Lines</label>
<input type="range" id="lines" min="0" max="100" step="1"><output id="lines-says" for="lines"></output></div>
<fieldset class="control" id="colour-control"><legend>Edge colour</legend>
<label><input type="radio" name="colour" value="input" checked> where it enters</label>
<label><input type="radio" name="colour" value="sign"> sign of the score</label></fieldset>
<div class="control"><span class="buttons"><button type="button" id="smaller" aria-label="Smaller">&minus;</button>
<button type="button" id="larger" aria-label="Larger">+</button>
<button type="button" id="everything" disabled>Show everything</button>
<button type="button" id="theme">Dark</button></span></div>
</div>
<div class="legend" id="legend"></div>
<div class="stage"><div class="canvas" id="figure-circuit"></div>
<div class="side"><aside class="panel" id="panel" aria-live="polite" aria-label="Details"></aside></div></div>
<p class="note">{caption}</p>{notes}
<noscript><p>The pictures need JavaScript; the tables below have every number.</p></noscript>
</section>"""
