"""The tables of the page. Every text from the file is escaped here."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from mechinterp.base.errors import clip
from mechinterp.circuit_file.schema import CircuitFile, EvaluationRecord, TaskPairs
from mechinterp.circuit_file.summary import ranked_edges, ranked_nodes, stated_predictions, verify_command
from mechinterp.circuit_file.verify.coverage import extent_of
from mechinterp.circuit_file.verify.role_support import support_of_roles
from mechinterp.circuit_file.verify.warnings import stated_warnings
from mechinterp.evaluation.role_names import plain_role
from mechinterp.models.source import ModelFile

ROWS_SHOWN = 20
MAX_ROWS = 2000
LONG = 40
"""Cells with more letters are wrapped, in a column that keeps some width."""


def cards(entry: EvaluationRecord) -> str:
    low, high = entry.faithfulness_ci
    cards = [
        ("Faithfulness", _number(entry.faithfulness), f"{entry.ci_level:.0%} interval {low:.3f} to {high:.3f}"),
        ("Edges", f"{entry.n_edges:,}", f"of {entry.n_edges_graph:,} ({entry.n_edges / entry.n_edges_graph:.1%})"),
        ("KL to the full model", f"{_number(entry.kl)}", "nats, mean over examples"),
    ]
    if entry.accuracy is not None and entry.accuracy_full is not None:
        cards.append(("Accuracy", f"{entry.accuracy:.1%}", f"full model {entry.accuracy_full:.1%}"))
    if entry.random_faithfulness:
        best, n = max(entry.random_faithfulness), len(entry.random_faithfulness)
        mean = sum(entry.random_faithfulness) / n
        cards.append(("Random circuits", _rounded(mean), f"mean of {n} of this size; best {_rounded(best)}"))
    items = (f"<div><dt>{name}</dt><dd>{value}<small>{note}</small></dd></div>" for name, value, note in cards)
    return f'<dl class="cards">{"".join(items)}</dl>'


def edges_part(document: CircuitFile) -> str:
    edges = ranked_edges(document)
    largest = abs(edges[0].score or 0.0) or 1.0
    scored = edges[0].score is not None
    head = ("", "edge", "score", "of the largest") if scored else ("", "edge")
    rows: list[tuple[str, ...]] = []
    for rank, edge in enumerate(edges, 1):
        score = () if edge.score is None else (f"{edge.score:.3g}", f"{edge.score / largest:.0%}")
        rows.append((str(rank), edge.name, *score))
    heading = "Strongest edges" if scored else "Edges"
    return f"<h2>{heading}</h2>{_folded(head, rows, (0, 2, 3), 'edges')}"


def nodes_part(document: CircuitFile) -> str:
    nodes = ranked_nodes(document)
    role = ("role",) if document.roles else ()
    scored = any(node.score is not None for node in nodes)
    score_name = "score" if document.graph.granularity == "node" else "score of the edges out"
    head = ("node", *role, "edges in", "edges out", *((score_name,) if scored else ()))
    rows: list[tuple[str, ...]] = []
    for node in nodes:
        score = ("" if node.score is None else f"{node.score:.3g}",) if scored else ()
        rows.append((node.name, *((node.role,) if role else ()), str(node.n_in), str(node.n_out), *score))
    first = 1 + len(role)
    note = "Only edges of the circuit are counted."
    if document.graph.positions:
        note += (
            " An edge into a key or value counts for the head at the position of the key; in the graph it is drawn to "
            "the position where the head writes."
        )
    table = _folded(head, rows, range(first, len(head)), "nodes")
    return f'<h2>Nodes</h2>{table}<p class="note">{note}</p>'


def _folded(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int], things: str) -> str:
    """The first rows as a table, the others in a part that can be unfolded."""
    top = _table(head, rows[:ROWS_SHOWN], numbers)
    rest = rows[ROWS_SHOWN:MAX_ROWS]
    if not rest:
        return top
    more = len(rows) - MAX_ROWS
    note = f'<p class="note">{more:,} more are in the circuit file.</p>' if more > 0 else ""
    table = _table(head, rest, numbers)
    return f"{top}<details><summary>{len(rest):,} more {things}</summary>{table}{note}</details>"


def evaluation_section(document: CircuitFile, entry: EvaluationRecord) -> str:
    pairs = document.pairs.get(entry.pairs)
    made = pairs.made_from if pairs is not None else None
    drawn = f"split {made.split}, seed {made.seed}" if isinstance(made, TaskPairs) else "given as token ids"
    first, middle, third = entry.example_quartiles
    unit = entry.metric.unit
    numbers = [
        ("examples", f"{entry.n_examples:,} ({entry.pairs}; {drawn})"),
        ("metric", f"{entry.metric.name}, in {unit}, {entry.metric.direction}"),
        ("m(C): the circuit alone", f"{entry.circuit_value:.3f} {unit}"),
        ("m(full): the whole model", f"{entry.full_value:.3f} {unit}"),
        ("m(empty): every edge replaced", f"{entry.empty_value:.3f} {unit}"),
        ("faithfulness per example: quartiles", f"{first:.3f}, {middle:.3f}, {third:.3f}"),
        ("examples that have a ratio of their own", f"{entry.n_ratio:,} of {entry.n_examples:,}"),
        ("random circuits of this size", ", ".join(map(_rounded, entry.random_faithfulness)) or "not run"),
        ("seed of random circuits and bootstrap", str(entry.seed)),
    ]
    axes = [(name, str(value)) for name, value in entry.ablation.model_dump().items()]
    return (
        f'<div class="pair"><section><h2>Evaluation</h2>{_table(None, numbers)}'
        '<p class="note">Faithfulness is (m(C) - m(empty)) / (m(full) - m(empty)), m the mean over examples; its '
        f"interval is a bootstrap over examples.</p></section><section><h2>Ablation</h2>{_table(None, axes)}"
        '<p class="note">The six axes of Miller et al. 2024, arXiv 2407.08734; faithfulness means nothing without '
        "them.</p></section></div>"
    )


def predictions_section(document: CircuitFile) -> str:
    """The predictions of the file with the measured values, including those of the negative controls."""
    rows = stated_predictions(document)
    if not rows:
        return ""
    return (
        f"<h2>Predictions</h2>{_folded(('prediction', 'measured', 'negative controls'), rows, (1,), 'predictions')}"
        '<p class="note"><code>verify</code> measures each prediction and its negative controls again.</p>'
    )


def provenance_section(document: CircuitFile) -> str:
    model, rows = document.model, list[tuple[str, str]]()
    rows.append(("model", model.name + (f" at {model.revision}" if model.revision else f" ({model.origin})")))
    if model.file is not None:
        stored = ModelFile(model.file.sha256, model.file.types).stored
        rows.append(("model file", f"{stored}; sha256 {model.file.sha256}"))
    rows.append(("weights sha256", model.weights_sha256 or "not stated"))
    rows.append(("architecture", f"{model.architecture}, weights {model.processing}, {model.dtype}, {model.loader}"))
    if document.tokenizer is not None:
        rows.append(("vocabulary sha256", document.tokenizer.vocabulary_sha256))
    if document.task is not None:
        version = f", version {document.task.version}" if document.task.kind == "task" else ""
        rows.append(("task", document.task.name + version))
        if document.task.kind != "tokens":
            rows.append(("task sha256", document.task.sha256))
    rows += [(f"pairs {name!r} sha256", f"{pairs.sha256} ({pairs.n} pairs)") for name, pairs in document.pairs.items()]
    if document.discovery is not None:
        found = document.discovery
        rows.append(("method", f"{found.method} ({_parameters(found.parameters)}), metric {found.metric.name}"))
        rows.append(("scored on", f"{found.n_examples} examples ({found.pairs}); replacement: {found.replacement}"))
        rows.append(("cost", ", ".join(f"{count:,} {name}" for name, count in found.cost.items()) + " of one example"))
        rows.append(("sign of scores", found.score_sign))
    chosen = document.selection
    rows.append(
        ("selection", f"{_parameters(chosen.parameters)}; {chosen.n_selected} selected, {chosen.n_edges} on a path")
    )
    if chosen.size is not None:
        level = "" if chosen.size.target is None else f": {chosen.size.target:g}"
        rows.append(("size", f"{chosen.size.rule}{level}, on the {chosen.size.pairs} pairs"))
    rows += [("command", document.provenance.command)] if document.provenance.command else []
    rows.append(("made", f"{document.created_utc or 'at an unknown time'}, on {document.provenance.device}"))
    rows.append(("versions", ", ".join(f"{name} {version}" for name, version in document.provenance.versions.items())))
    cited = document.citation
    if cited is not None:
        parts = (", ".join(cited.authors), cited.title, cited.arxiv and f"arXiv {cited.arxiv}", cited.doi, cited.url)
        rows.append(("source", ". ".join(part for part in parts if part)))
    rows.append(("circuit sha256 (for citing)", document.integrity.circuit_sha256))
    return f"<h2>Provenance</h2>{_table(None, rows)}"


def _parameters(parameters: object) -> str:
    items = parameters.items() if isinstance(parameters, dict) else ()
    return ", ".join(f"{name}={value}" for name, value in items) or "no parameters"


def warnings_section(document: CircuitFile) -> str:
    """The warnings that follow from the file itself; empty if there are none."""
    found = stated_warnings(document, rescored=True)  # that nothing was scored again is said under "How to verify"
    if not found:
        return ""
    items = (f"<li><b>{text(warning.name)}</b>: {text(warning.text)}</li>" for warning in found)
    names = text(", ".join(dict.fromkeys(warning.name for warning in found)))
    return (
        f'<details class="warnings"><summary><b>What could mislead</b>: {names}</summary>'
        f"<ul>{''.join(items)}</ul></details>"
    )


def roles_section(document: CircuitFile) -> str:
    """Every role with the predictions that support it; the name of a role is free text, its predictions are not."""
    rows: list[tuple[str, ...]] = []
    for entry in support_of_roles(document):
        predicted = [repr(prediction) for prediction in entry.predictions]
        rows.append((plain_role(entry.role.label), _few(entry.role.nodes), _few(predicted, "; "), _few(entry.without)))
    if not rows:
        return ""
    head = ("role", "nodes", "predictions that support it", "nodes without one")
    note = (
        "The name of a role is the author's. A prediction supports it if it measures only nodes of this role, has a "
        "negative control and could fail."
    )
    return f'<h2>Roles</h2>{_folded(head, rows, (), "roles")}<p class="note">{note}</p>'


def _few(names: Sequence[str], between: str = ", ", most: int = 12) -> str:
    more = f"{between}{len(names) - most} more" if len(names) > most else ""
    return between.join(clip(name, 200) for name in names[:most]) + more or "none"


def verify_section(document: CircuitFile, circuit_path: str) -> str:
    """The `verify` command and what it does for this file; nothing is run for the page itself."""
    reach = extent_of(document).lines()
    rows = [(f"{heading} by verify" if heading == "recomputed" else heading, words) for heading, words in reach]
    steps = ["checks every hash and the graph"]
    if any(pairs.made_from.kind == "task" for pairs in document.pairs.values()):
        steps.append("makes the examples again")
    if document.evaluation:
        steps.append("repeats the evaluation")
    if document.predictions:
        steps.append("measures the predictions and their controls again")
    does = ", ".join(steps[:-1]) + (" and " if len(steps) > 1 else "") + steps[-1]
    sidecar, scored = document.integrity.sidecar, ""
    if document.discovery is not None:
        scored = " With <code>--rescore</code> the scores are made again, too."
    beside = f" The scores are in <code>{text(sidecar.file)}</code>, beside the file." if sidecar else ""
    return (
        "<h2>How to verify this</h2><p>This page shows what the file states; nothing was run again for it. The command "
        f"{does}. A claim that does not hold is exit code 1; so is what could mislead, with <code>--strict</code>."
        f"{scored}{beside} {_needs(document)}</p>"
        f"<pre><code>{text(verify_command(circuit_path))}</code></pre>"
        f"{_table(None, rows)}"
    )


def _needs(document: CircuitFile) -> str:
    """What the command needs: the package, and the model if anything is to be run."""
    package = "The command comes with the Python package <code>mechinterp-circuits</code>."
    name, origin = f"<code>{text(document.model.name)}</code>", document.model.origin
    if not (document.evaluation or document.predictions):
        return f"{package} The file states nothing that needs the model {name} to be run."
    model = {
        "bundled": "The model is in the package.",
        "hub": f"The model {name} is downloaded from the Hugging Face hub if it is not there yet.",
        "memory": (
            f"The model {name} was in memory: without it the command ends with exit code 3; in Python, "
            "<code>mi.verify(file, model=...)</code> takes it."
        ),
    }
    local = f"The model {name} is a local file or folder; where it is another one, <code>--model</code> names it."
    return f"{package} {model.get(origin, local)}"


def _table(head: Sequence[str] | None, rows: Iterable[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """Rows as a table; without a head, the first column names the rows."""

    def cell(column: int, value: str) -> str:
        if head is None and column == 0:
            return f'<th scope="row">{text(value)}</th>'
        kind = "number" if column in numbers else "name" if " " not in value else "wide" if len(value) > LONG else ""
        shown = f' class="{kind}"' if kind and head is not None else ""
        return f"<td{shown}>{text(value)}</td>"

    top, kind = "", ' class="facts-of"'
    if head is not None:
        kind = ' class="data"'
        names = (
            f'<th class="number">{text(n)}</th>' if i in numbers else f"<th>{text(n)}</th>" for i, n in enumerate(head)
        )
        top = f"<thead><tr>{''.join(names)}</tr></thead>"
    body = "".join(f"<tr>{''.join(cell(i, value) for i, value in enumerate(row))}</tr>" for row in rows)
    return f'<div class="scroll"><table{kind}>{top}<tbody>{body}</tbody></table></div>'


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) >= 0.0005 or value == 0 else f"{value:.1e}"


def _rounded(value: float) -> str:
    """Three decimals; zero has no sign."""
    return f"{round(value, 3) + 0.0:.3f}"


def text(value: str) -> str:
    return html.escape(value, quote=True)
