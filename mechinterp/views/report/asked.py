"""What was asked: the task in words, and one clean prompt beside its corrupt one, with positions and answers."""

from __future__ import annotations

from html import escape

from mechinterp.base.errors import MechInterpError
from mechinterp.circuit_file.records import task_of
from mechinterp.circuit_file.schema import CircuitFile, TaskRecord
from mechinterp.circuit_file.summary import METRIC_WORDS
from mechinterp.views.report.prompt_example import PromptExample

MOST_ANSWERS = 5
REPLACED = {
    "corrupt": "An edge outside the circuit carries what it carries on the corrupt prompt.",
    "mean": "An edge outside the circuit carries its mean over examples.",
    "zero": "An edge outside the circuit carries nothing: zero.",
}


def asked_section(document: CircuitFile, example: PromptExample | None) -> str:
    """The section as HTML; texts are escaped."""
    shown = _prompts(example) if example is not None else _template(document)
    parts = (_task(document), shown, _positions(document))
    return f'<section class="asked"><h2>What was asked</h2>{"".join(parts)}</section>'


def _task(document: CircuitFile) -> str:
    task, words = document.task, list[str]()
    if task is None:
        words.append("The file states no task and no prompts; its description says what the circuit is for.")
    if isinstance(task, TaskRecord):
        source = f"; {task.source}" if task.source else ""
        words.append(f"{escape(task.title.rstrip('.'))} (task <code>{escape(task.name)}</code>{escape(source)}).")
    elif task is not None:
        words.append(f"Pairs of prompts of the user's own ({escape(task.name)}).")
    if document.evaluation:
        entry = document.evaluation[0]
        metric = METRIC_WORDS.get(entry.metric.name, entry.metric.name)
        words.append(f"Measured: {escape(metric)}, {escape(entry.metric.direction)}.")
        words.append(REPLACED.get(entry.ablation.value, ""))
    return f"<p>{' '.join(word for word in words if word)}</p>"


def _prompts(example: PromptExample) -> str:
    names: dict[int, list[str]] = {}
    for name, at in example.positions.items():
        names.setdefault(at, []).append(name)
    n = len(example.clean)
    changed = {i for i, (a, b) in enumerate(zip(example.clean, example.corrupt, strict=True)) if a != b}
    top = "".join(f"<th>{escape(', '.join(names.get(i, [])))}</th>" for i in range(n))
    clean, corrupt = (_tokens(tokens, example.answer_pos, changed) for tokens in (example.clean, example.corrupt))
    right, wrong = map(_few, (example.right, example.wrong))
    answers = f"right answer {right}" + (f", wrong answer {wrong}" if wrong else "") if right else ""
    return (
        f'<div class="scroll"><table class="prompts"><thead><tr><th></th>{top}<th></th></tr></thead><tbody>'
        f'<tr><th scope="row">clean</th>{clean}<td class="answers">{answers}</td></tr>'
        f'<tr><th scope="row">corrupt</th>{corrupt}<td></td></tr></tbody></table></div>'
        f'<p class="note">Example {example.row + 1} of the {escape(example.pairs)} pairs. Above the tokens are the '
        "names of positions; the answer is read at the underlined token; tokens that differ are marked.</p>"
    )


def _tokens(tokens: tuple[str, ...], answer_pos: int, changed: set[int]) -> str:
    cells: list[str] = []
    for i, token in enumerate(tokens):
        kinds = [kind for kind, is_so in (("answer", i == answer_pos), ("changed", i in changed)) if is_so]
        kind = f' class="{" ".join(kinds)}"' if kinds else ""
        cells.append(f"<td{kind}>{escape(token.removeprefix('␣')) or '␣'}</td>")
    return "".join(cells)


def _few(tokens: tuple[str, ...]) -> str:
    shown = [f"<b>{escape(token.replace('␣', ' ').strip() or token)}</b>" for token in tokens[:MOST_ANSWERS]]
    more = f" and {len(tokens) - MOST_ANSWERS} more" if len(tokens) > MOST_ANSWERS else ""
    return ", ".join(shown) + more


def _template(document: CircuitFile) -> str:
    """A prompt of the task as its template, if no model is there to make an example for."""
    if not isinstance(document.task, TaskRecord):
        return ""
    try:
        spec = task_of(document.task).spec
    except MechInterpError:
        return ""
    templates = spec.splits.test.templates
    if not templates:
        return ""
    template = templates[0]
    answers = [
        f"{words} answer <code>{escape(answer.strip())}</code>"
        for words, answer in (("right", template.answer or spec.answer), ("wrong", template.wrong or spec.wrong))
        if isinstance(answer, str)
    ]
    return f"<p>A template of its prompts: <q>{escape(template.text)}</q>{''.join('; ' + a for a in answers)}.</p>"


def _positions(document: CircuitFile) -> str:
    """The positions that the file describes."""
    rows = "".join(
        f'<tr><th scope="row"><code>{escape(name)}</code></th><td>{escape(entry.description)}</td></tr>'
        for name, entry in document.positions.items()
    )
    return f'<div class="scroll"><table><tbody>{rows}</tbody></table></div>' if rows else ""
