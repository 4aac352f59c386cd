"""`discover-circuit graph`: the attribution graph of a prompt, checked against the model."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mechinterp.base.errors import InputError
from mechinterp.base.registry import unknown
from mechinterp.cli import options
from mechinterp.cli.help import GRAPH_HELP
from mechinterp.cli.overwriting import check_new, make_folder
from mechinterp.cli.terminal import Detail, Terminal, quiet_libraries, say

if TYPE_CHECKING:
    from mechinterp.analysis.attribution_graph.validate import EdgeValidation, GraphValidation

commands = typer.Typer()
Action = Callable[[], int]
HELD = ("norms", "patterns", "nothing")
WEAK = 0.1
"""The share of an activation that is taken away in the check of weak interventions."""


@commands.command("graph", help=GRAPH_HELP, short_help="The attribution graph of a prompt, through transcoders.")
@options.takes(
    *("prompt", "transcoders", "model", "revision", "targets", "out", "nodes_kept", "edges_kept"),
    *("max_features", "held", "validated", "page", "texts", "grouped", "dtype", "device", "force", "detail"),
)
def _graph(
    prompt: Annotated[str, typer.Argument(help="The text; the model's next token after it is explained.")],
    transcoders: Annotated[
        str, typer.Option(help="A folder or hub repository of transcoders; `bundled`: those of the bundled model.")
    ] = "bundled",
    targets: Annotated[
        list[str] | None,
        typer.Option("--target", help="A token to explain; repeatable.  [default: the likeliest, up to 95%]"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The file to write.  [default: out/WORDS-OF-THE-PROMPT.graph.json]")
    ] = None,
    nodes_kept: Annotated[
        float, typer.Option("--keep-nodes", min=0.0, max=1.0, help="Share of the influence that the kept nodes hold.")
    ] = 0.8,
    edges_kept: Annotated[float, typer.Option("--keep-edges", min=0.0, max=1.0, help="The same for edges.")] = 0.98,
    max_features: Annotated[int, typer.Option(min=1, help="Features that become nodes at most.")] = 4096,
    held: Annotated[
        str,
        typer.Option(
            help="What edges hold: norms (patterns and norm scales; edges add up), patterns, or nothing (derivatives, "
            "which predict interventions)."
        ),
    ] = "norms",
    validated: Annotated[int, typer.Option("--validate", min=0, help="Features ablated in the model; 0: none.")] = 32,
    page: Annotated[Path | None, typer.Option(help="A page to write, which needs only a browser.")] = None,
    texts: Annotated[
        Path | None,
        typer.Option(
            help="Texts, one a line (or .jsonl, each with a 'text'): where features fire.  "
            "[default: for the bundled model prompts of a task]"
        ),
    ] = None,
    grouped: Annotated[
        bool, typer.Option("--supernodes/--no-supernodes", help="Join features that write the same and fire together.")
    ] = True,
    force: options.Force = False,
    detail: Detail = Detail.NORMAL,
    **values: Any,
) -> Action:
    if not prompt.strip():
        raise InputError("The prompt is empty.")
    _refuse_task(prompt)
    if held not in HELD:
        raise unknown("part to hold", held, HELD)
    if texts is not None and page is None and not grouped:
        raise InputError(
            "--texts is for the examples of --page PAGE.html and for --supernodes; none of these is asked."
        )
    own = dict(targets=targets, out=out, nodes=nodes_kept, edges=edges_kept, n=validated, max_features=max_features)
    own |= dict(held=held, page=page, texts=texts, grouped=grouped)
    return partial(_do_graph, prompt, transcoders, own | values, force, detail)


def _do_graph(prompt: str, transcoders: str, values: dict[str, Any], force: bool, detail: Detail) -> int:
    from mechinterp.cli.progress_bars import stages

    console, path = Terminal(detail), values["out"] or Path("out") / f"{_name(prompt)}.graph.json"
    for made in (path, values["page"]):
        if made is not None:
            check_new(made, force)
            make_folder(made.parent)
    with stages(detail) as progress:
        progress("model", 0, 1)
        from mechinterp.analysis.attribution_graph.build import attribution_graph
        from mechinterp.analysis.attribution_graph.supernodes import find_supernodes
        from mechinterp.analysis.attribution_graph.validate import validate_edges, validate_graph
        from mechinterp.analysis.feature_notes import feature_notes
        from mechinterp.base.text_files import read_texts
        from mechinterp.circuit_file.formats.attribution_graphs import save_attribution_graph
        from mechinterp.features.load import load_bases
        from mechinterp.features.measure import default_prompts
        from mechinterp.models.hook_manager import load_model
        from mechinterp.views.report.attribution_page import WORDS, page_sizes, write_graph_page
        from mechinterp.views.terminal_tables import frame_table

        quiet_libraries()
        corpus = None if values["texts"] is None else read_texts(values["texts"])
        model = load_model(values["model"], revision=values["revision"], dtype=values["dtype"], device=values["device"])
        bases = load_bases("bundled:transcoders" if transcoders == "bundled" else transcoders, model=model)
        graph = attribution_graph(
            model,
            prompt,
            bases,
            targets=values["targets"] or None,
            max_features=values["max_features"],
            held=values["held"],
            progress=partial(progress, "edges"),
        )
        if corpus is None and model.info.origin == "bundled":
            corpus = default_prompts(model)
        small = graph.pruned(values["nodes"], values["edges"])
        if values["grouped"]:
            groups = find_supernodes(model, small, bases, texts=corpus)
            small, graph = small.with_supernodes(groups), graph.with_supernodes(groups)
        checks: list[EdgeValidation | GraphValidation] = []
        if values["n"] and len(graph.features) > 1:
            progress("evaluation", 0, 1)
            checks.append(validate_edges(model, graph, bases, n=min(8, values["n"])))
            checks += [
                validate_graph(model, graph, bases, n=values["n"], held=held)
                for held in ("norms", "patterns", "nothing")
            ]
            checks.append(validate_graph(model, graph, bases, n=values["n"], strength=WEAK))
        save_attribution_graph(path, small)
        if values["page"] is not None:
            progress("page", 0, 1)
            sizes = [size.graph for size in page_sizes(graph, values["edges"], values["nodes"])[0]]
            shown = dict.fromkeys((node.basis, node.feature) for size in sizes for node in size.features)
            notes = feature_notes(model, bases, shown, texts=corpus)
            write_graph_page(
                values["page"],
                graph,
                notes=notes,
                checks=checks,
                edges=values["edges"],
                shown=values["nodes"],
                command=_command(prompt, transcoders, values),
            )
    say(console, f"{len(graph.features):,} active features, {graph.n_edges:,} edges; {graph.scores!r}")
    if "gap" in graph.about:
        say(console, f"edges into a node add up to what it reads, to {graph.about['gap']:.1e} of their sizes")
    else:
        say(
            console, f"edges are derivatives with {WORDS[values['held']]} held; they do not add up to what a node reads"
        )
    shares = f"{values['nodes']:.0%} of the influence of nodes, {values['edges']:.0%} of edges"
    say(console, f"kept: {len(small.features):,} features, {small.n_edges:,} edges ({shares})")
    token = small.to_frame().set_index("node")["token"]
    for target in () if detail is Detail.QUIET else small.targets[:3]:
        say(console, "")
        say(console, f"the largest edges into {target.name} (probability {target.value:.3f}, logit {target.pre:+.3f})")
        edges = small.edges(into=target.name).head(8)
        edges = edges.assign(token=[token[name] for name in edges["source"]])
        console.table(frame_table(edges[["source", "token", "weight"]]))
    for check in checks:
        say(console, repr(check))
    say(console, f"wrote {path}")
    if values["page"] is not None:
        say(console, f"wrote {values['page']}")
    return 0


def _command(prompt: str, transcoders: str, values: dict[str, Any]) -> str:
    """The command that makes the page again: every option that is not the default."""
    words = ["discover-circuit", "graph", prompt, "--transcoders", transcoders, "--model", str(values["model"])]
    words += [word for target in values["targets"] or () for word in ("--target", target)]
    given = {"revision": None, "keep-nodes": 0.8, "keep-edges": 0.98, "max-features": 4096, "held": "norms"}
    given |= {"validate": 32, "texts": None, "out": None, "page": None}
    names = {"keep-nodes": "nodes", "keep-edges": "edges", "max-features": "max_features", "validate": "n"}
    for name, default in given.items():
        value = values[names.get(name, name)]
        words += [] if value == default else [f"--{name}", str(value)]
    return shlex.join([*words, *([] if values["grouped"] else ["--no-supernodes"])])


def _refuse_task(prompt: str) -> None:
    """Return None unless the prompt is the name of a task."""
    from mechinterp.tasks.task import task_names

    if prompt in task_names():
        raise InputError(
            f"{prompt!r} is a task, and `graph` takes a prompt, whose next token it explains: discover-circuit graph "
            f'"Then Julie and Ryan ...". The circuit of a task: discover-circuit run {prompt}.'
        )


def _name(prompt: str) -> str:
    return "-".join(re.findall("[a-z0-9]+", prompt.lower())[-6:]) or "prompt"
