"""`discover-circuit graph`: the attribution graph of a prompt, checked against the model."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from mechinterp.base.errors import InputError
from mechinterp.cli import options
from mechinterp.cli.help import GRAPH_HELP
from mechinterp.cli.overwriting import check_new, make_folder
from mechinterp.cli.terminal import Detail, Terminal, quiet_libraries, say

commands = typer.Typer()
Action = Callable[[], int]


@commands.command("graph", help=GRAPH_HELP, short_help="The attribution graph of a prompt, through transcoders.")
@options.takes(
    *("prompt", "transcoders", "model", "revision", "targets", "out", "nodes_kept", "edges_kept"),
    *("max_features", "validated", "dtype", "device", "force", "detail"),
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
    validated: Annotated[int, typer.Option("--validate", min=0, help="Features ablated in the model; 0: none.")] = 32,
    force: options.Force = False,
    detail: Detail = Detail.NORMAL,
    **values: Any,
) -> Action:
    if not prompt.strip():
        raise InputError("The prompt is empty.")
    own = dict(targets=targets, out=out, nodes=nodes_kept, edges=edges_kept, n=validated, max_features=max_features)
    return partial(_do_graph, prompt, transcoders, own | values, force, detail)


def _do_graph(prompt: str, transcoders: str, values: dict[str, Any], force: bool, detail: Detail) -> int:
    from mechinterp.cli.progress_bars import stages

    console, path = Terminal(detail), values["out"] or Path("out") / f"{_name(prompt)}.graph.json"
    check_new(path, force)
    make_folder(path.parent)
    with stages(detail) as progress:
        progress("model", 0, 1)
        from mechinterp.analysis.attribution_graph.build import attribution_graph
        from mechinterp.analysis.attribution_graph.validate import validate_edges, validate_graph
        from mechinterp.circuit_file.formats.attribution_graphs import save_attribution_graph
        from mechinterp.features.load import load_bases
        from mechinterp.models.hook_manager import load_model
        from mechinterp.views.terminal_tables import frame_table

        quiet_libraries()
        model = load_model(values["model"], revision=values["revision"], dtype=values["dtype"], device=values["device"])
        bases = load_bases("bundled:transcoders" if transcoders == "bundled" else transcoders, model=model)
        graph = attribution_graph(
            model,
            prompt,
            bases,
            targets=values["targets"] or None,
            max_features=values["max_features"],
            progress=partial(progress, "edges"),
        )
        small = graph.pruned(values["nodes"], values["edges"])
        checks: list[object] = []
        if values["n"] and len(graph.features) > 1:
            progress("evaluation", 0, 1)
            checks.append(validate_edges(model, graph, bases, n=min(8, values["n"])))
            checks += [
                validate_graph(model, graph, bases, n=values["n"], held=held)
                for held in ("norms", "patterns", "nothing")
            ]
    say(console, f"{len(graph.features):,} active features, {graph.n_edges:,} edges; {graph.scores!r}")
    say(console, f"edges into a node add up to what it reads, to {graph.about['gap']:.1e} of their sizes")
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
    save_attribution_graph(path, small)
    say(console, f"wrote {path}")
    return 0


def _name(prompt: str) -> str:
    return "-".join(re.findall("[a-z0-9]+", prompt.lower())[-6:]) or "prompt"
