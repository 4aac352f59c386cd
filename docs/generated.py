"""Text of the pages that is made from the code: commands, methods, tasks, formats, the schema, the API reference."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import method_rows
import typer
from docstrings import as_markdown
from tutorials import gallery

import mechinterp
from mechinterp.circuit_file import schema
from mechinterp.circuit_file.formats.names import EXPORTS, IMPORTS
from mechinterp.cli.app import app
from mechinterp.discovery.methods import METHODS
from mechinterp.evaluation import predictions
from mechinterp.tasks.metric_names import METRICS
from mechinterp.tasks.task import load_task, task_names

GRAPHS = {
    "plain": "edges only, at all positions",
    "summed": "edges, nodes (the sum of a node's edges), named positions, neurons, experts, features",
    "own": "edges, nodes, named positions, neurons, experts, features",
}
PAGE_OF = {"random": "baselines", "weight-magnitude": "baselines"}
"""The pages of the methods that have none of their own."""
GROUPS: dict[str, tuple[str, ...]] = {
    "models": ("models.", "base."),
    "tasks": ("tasks.",),
    "graphs": ("graphs.", "engines.edge_patching", "engines.edge_attribution"),
    "features": ("features.",),
    "discovery": ("discovery.", "run_spec", "pipeline", "compare", "direct", "run_costs"),
    "evaluation": ("evaluation.",),
    "files": ("circuit_file.",),
    "analyses": ("analysis.", "engines.grid", "engines.decomposition."),
    "pictures": ("views.",),
}
"""Page of the API reference -> the modules on it; `discovery.` means all modules of that package."""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(text: str) -> str:
    """The text with a bar that is no code escaped."""
    return "`".join(part if i % 2 else part.replace("|", "\\|") for i, part in enumerate(text.split("`")))


def homes() -> dict[str, list[str]]:
    """Home module -> the public names that live there."""
    found: dict[str, list[str]] = {}
    for name in mechinterp.__all__:
        value = getattr(mechinterp, name)
        module = getattr(value, "__module__", "")
        defined = inspect.isclass(value) or inspect.isfunction(value)
        home = module if defined and module.startswith("mechinterp.") else f"mechinterp.{mechinterp._HOME_OF[name]}"
        found.setdefault(home.removeprefix("mechinterp."), []).append(name)
    return found


def _page_of(home: str) -> str:
    for page, modules in GROUPS.items():
        if home in modules or any(module.endswith(".") and home.startswith(module) for module in modules):
            return page
    raise KeyError(f"module {home!r} is on no page of the API reference: name it in GROUPS of docs/generated.py")


def api(page: str) -> str:
    """The public names of one page, each module with its docstring, for mkdocstrings."""
    out: list[str] = []
    for home, names in sorted(homes().items()):
        if _page_of(home) != page:
            continue
        about = as_markdown(inspect.getdoc(import_module(f"mechinterp.{home}")) or "")
        out += [
            f"## {home.replace('_', ' ').rpartition('.')[2].capitalize()}",
            "",
            f"`mechinterp.{home}`",
            "",
            about,
            "",
        ]
        for name in names:
            out += [f"::: mechinterp.{home}.{name}", ""]
    return "\n".join(out)


def api_index() -> str:
    """Every public name with its page."""
    rows = [
        (f"[`mi.{name}`][mechinterp.{home}.{name}]", f"[{_page_of(home)}]({_page_of(home)}.md)")
        for home, names in homes().items()
        for name in names
    ]
    return _table(("name", "page"), sorted(rows))


def method(name: str) -> str:
    """The card of one discovery method: source, what it takes, its parameters."""
    chosen = METHODS.get(name)
    parameters = ", ".join(f"`{key}={value}`" for key, value in chosen.defaults.items())
    circuit = "by [select](selection.md), from the scores"
    if chosen.threshold is not None:
        above = f"{chosen.threshold:g} (in magnitude, as `by` is)"
        circuit = f"chosen by the method itself: the edges whose score is above {above}"
    rows = (
        ("Source", chosen.source),
        ("Takes", GRAPHS[chosen.graphs]),
        ("Parameters, with defaults", parameters),
        ("Circuit", circuit),
    )
    return _table((f"`{name}`", chosen.title), rows)


def methods() -> str:
    """All discovery methods in one table."""
    rows = [
        (
            f"[`{name}`]({PAGE_OF.get(name, name)}.md)",
            METHODS.get(name).title,
            {"plain": "edges", "summed": "all", "own": "all"}[METHODS.get(name).graphs],
            "itself" if METHODS.get(name).threshold is not None else "`select`",
        )
        for name in METHODS
    ]
    return _table(("method", "what it is", "levels", "the circuit is chosen by"), rows)


def method_results(names: str) -> str:
    """The measured rows of some methods, separated by commas, beside those that every page has."""
    shown = dict.fromkeys((*names.split(","), *method_rows.BESIDE))
    first = method_rows.rows()[next(iter(shown))]
    return f"{_table(method_rows.HEAD, method_rows.table(*shown))}\n\n{_about_rows(first)}"


def method_comparison() -> str:
    """The measured rows of all methods, the best CMD first."""
    ordered = sorted(method_rows.rows().values(), key=lambda row: float(row["CMD"]))
    names = [str(row["method"]) for row in ordered]
    linked = [
        (f"[{name}]({PAGE_OF.get(name[1:-1], name[1:-1])}.md)", *rest) for name, *rest in method_rows.table(*names)
    ]
    return f"{_table(method_rows.HEAD, linked)}\n\n{_about_rows(ordered[0])}"


def _about_rows(row: method_rows.Row) -> str:
    return (
        f"IOI in the bundled model, {row['pairs']} train and {row['pairs']} held-out pairs, default settings; "
        f"`python -m benchmarks.method_rows`, {row['date']}. [CPR and CMD](../evaluation/curves.md) as in MIB. "
        "*80 %*, *90 %*: edges from which on every measured size is at least that faithful. KL in nats. *Runs*: "
        "forwards + backwards an example. CPU seconds of one thread, for all pairs."
    )


def tasks() -> str:
    """The tasks of the package."""
    rows = [
        (
            f"`{task.name}`",
            task.title,
            task.source,
            f"`{task.metric}`",
            ", ".join(f"`{p}`" for p in task.positions),
            task.needs,
        )
        for task in map(load_task, task_names())
    ]
    return _table(("task", "what it is", "source", "metric", "positions", "what it needs of a tokenizer"), rows)


def metrics() -> str:
    """All metrics, with unit and direction."""
    rows = [
        (
            f"`{name}`",
            about,
            METRICS.get(name).unit,
            "higher" if METRICS.get(name).direction > 0 else "lower",
            "yes" if METRICS.get(name).differentiable else "no",
        )
        for name, about in METRICS.about().items()
    ]
    return _table(("metric", "what it is", "unit", "better", "gradient"), rows)


def exports() -> str:
    """What a circuit can be written as, and what each format loses."""
    rows = [
        (f"`{name}`", about, EXPORTS.get(name).suffix or "a folder", EXPORTS.get(name).lost.removeprefix("Lost: "))
        for name, about in EXPORTS.about().items()
    ]
    return _table(("format", "what it is", "file", "lost"), rows)


def imports() -> str:
    """What can be read as a circuit."""
    rows = [
        (
            f"`{name}`",
            about,
            "yes" if IMPORTS.get(name).has_scores else "no",
            "yes" if IMPORTS.get(name).has_sizes else "no",
        )
        for name, about in IMPORTS.about().items()
    ]
    return _table(("format", "what it is", "can hold scores", "says the model's sizes"), rows)


def fields() -> str:
    """Every field of a circuit file: one table for each of the schema's classes, in the order of use."""
    texts = _field_texts(schema) | _field_texts(predictions)
    definitions: dict[str, Any] = schema.json_schema()
    known: dict[str, Any] = definitions["$defs"]
    out: list[str] = []
    waiting, done = ["CircuitFile"], set[str]()
    while waiting:
        name = waiting.pop(0)
        if name in done:
            continue
        done.add(name)
        body = definitions if name == "CircuitFile" else known[name]
        rows: list[tuple[str, ...]] = []
        for field, entry in body.get("properties", {}).items():
            needed = "yes" if field in body.get("required", ()) else ""
            about = next(
                (_about(known[target]).partition(". ")[0] for target in _targets(entry) if target in known), ""
            )
            rows.append((f"`{field}`", _type(entry), needed, texts.get((name, field), about)))
            waiting += [target for target in _targets(entry) if target in known]
        title = "The file" if name == "CircuitFile" else name
        out += [f"## {title} {{ #{name.lower()} }}", "", _about(body), ""]
        out += [_table(("field", "value", "needed", "meaning"), rows), ""]
    return "\n".join(out)


def _about(definition: dict[str, Any]) -> str:
    return inspect.cleandoc(str(definition.get("description", ""))).replace("\n", " ")


def _field_texts(module: Any) -> dict[tuple[str, str], str]:
    """(class, field) -> the text that stands under the field in the source."""
    found: dict[tuple[str, str], str] = {}
    for node in ast.parse(inspect.getsource(module)).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for field, text in zip(node.body, node.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                name = field.target.id if isinstance(field.target, ast.Name) else ""
                found[node.name, name] = " ".join(str(text.value.value).split())
    return found


def _targets(entry: Any) -> list[str]:
    if isinstance(entry, dict):
        own = [str(entry["$ref"]).rpartition("/")[2]] if "$ref" in entry else []
        return own + [name for key, value in entry.items() if key != "$ref" for name in _targets(value)]
    if isinstance(entry, list):
        return [name for value in entry for name in _targets(value)]
    return []


def _type(entry: dict[str, Any]) -> str:
    """The JSON type of a field in words, with links to what it refers to."""
    if "$ref" in entry:
        name = str(entry["$ref"]).rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    for several in ("anyOf", "oneOf"):
        if several in entry:
            return " or ".join(dict.fromkeys(_type(one) for one in entry[several]))
    if "const" in entry:
        return f"`{entry['const']}`" if isinstance(entry["const"], int) else f'`"{entry["const"]}"`'
    if "enum" in entry:
        return ", ".join(f'`"{value}"`' for value in entry["enum"])
    kind = str(entry.get("type", "anything"))
    if kind == "array":
        if "prefixItems" in entry:
            return f"list of {len(entry['prefixItems'])}: " + _type(entry["prefixItems"][0])
        return "list of " + _type(entry.get("items", {}))
    if kind == "object" and isinstance(entry.get("additionalProperties"), dict):
        return "name to " + _type(entry["additionalProperties"])
    if "64}" in str(entry.get("pattern", "")):
        return "sha256 (64 hex digits)"
    return {"string": "text", "integer": "whole number", "boolean": "true, false", "null": "null"}.get(kind, kind)


def command_line() -> str:
    """Every command with its help, arguments and options."""
    group: Any = typer.main.get_command(app)
    out: list[str] = []
    for name, command in group.commands.items():
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        options = [p for p in command.params if p.param_type_name == "option"]
        usage = " ".join([f"discover-circuit {name}", *(_metavar(p, command) for p in arguments), "[OPTIONS]"])
        out += [f"## {name}", "", "```text", usage, "```", "", _help(command.help or ""), ""]
        if arguments:
            out += [_table(("argument", ""), [(f"`{_metavar(p, command)}`", p.help or "") for p in arguments]), ""]
        rows = [(", ".join(f"`{o}`" for o in (*p.opts, *p.secondary_opts)), _value(p), p.help or "") for p in options]
        out += [_table(("option", "default", ""), rows), ""] if rows else []
    return "\n".join(out)


def _metavar(parameter: Any, command: Any) -> str:
    return str(parameter.metavar or parameter.name).upper()


def _value(parameter: Any) -> str:
    given = parameter.default
    if given is None or isinstance(given, bool) or given == () or "default:" in (parameter.help or ""):
        return ""
    return f"`{given}`"


def _help(text: str) -> str:
    """Help as typer prints it: a paragraph that begins with \\b keeps its lines."""
    out: list[str] = []
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        code = paragraph.startswith("\b")
        body = paragraph.removeprefix("\b").strip("\n")
        out += ["```console", *(f"$ {line.strip()}" for line in body.splitlines()), "```"] if code else [body]
        out.append("")
    return "\n".join(out)


def changelog() -> str:
    """The changelog without its title."""
    text = (Path(__file__).parents[1] / "CHANGELOG.md").read_text(encoding="utf-8")
    return text.partition("\n")[2]


def citation() -> str:
    """CITATION.cff as it stands."""
    text = (Path(__file__).parents[1] / "CITATION.cff").read_text(encoding="utf-8")
    return f"```yaml\n{text}```"


GENERATED: dict[str, Callable[..., str]] = {
    "api": api,
    "api-index": api_index,
    "changelog": changelog,
    "citation": citation,
    "command-line": command_line,
    "exports": exports,
    "fields": fields,
    "gallery": gallery,
    "imports": imports,
    "method": method,
    "method-comparison": method_comparison,
    "method-results": method_results,
    "methods": methods,
    "metrics": metrics,
    "tasks": tasks,
}
