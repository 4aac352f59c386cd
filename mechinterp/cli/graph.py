"""`discover-circuit graph`: the attribution graph of a prompt, or of several as one, checked against the model."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mechinterp.base.errors import InputError, clip
from mechinterp.base.registry import unknown
from mechinterp.circuit_file.limits import MAX_EXAMPLES
from mechinterp.cli import options
from mechinterp.cli.help import GRAPH_HELP
from mechinterp.cli.overwriting import check_new, make_folder
from mechinterp.cli.terminal import Detail, Terminal, quiet_libraries, say

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mechinterp.analysis.attribution_graph.build import GraphSize
    from mechinterp.analysis.attribution_graph.graph import AttributionGraph
    from mechinterp.analysis.attribution_graph.validate import EdgeValidation, GraphValidation
    from mechinterp.features.basis import Basis
    from mechinterp.models.hook_manager import HookManager

commands = typer.Typer()
Action = Callable[[], int]
Stages = Callable[[str, int, int], None]
HELD, POSITIONS = ("norms", "patterns", "nothing"), ("summed", "kept")
OF_A_TASK = 8
"""Examples of a task by default."""
WEAK = 0.1
"""The share of an activation that is taken away in the check of weak interventions."""


@commands.command("graph", help=GRAPH_HELP, short_help="The attribution graph of prompts, through transcoders.")
@options.takes(
    *("prompts", "file", "of_task", "n_prompts", "drawn", "aggregate", "transcoders", "model", "revision", "targets"),
    *("out", "nodes_kept", "edges_kept", "max_features", "held", "validated", "page", "texts", "grouped", "dtype"),
    *("device", "dry_run", "force", "detail"),
)
def _graph(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PROMPT]...",
            help="The text; the model's next token after it is explained. The graphs of several are aggregated.",
            show_default=False,
        ),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option("--prompts", metavar="FILE", help="Prompts, one a line (or .jsonl, each with a 'text')."),
    ] = None,
    of_task: Annotated[
        str | None,
        typer.Option("--task", metavar="TASK|PAIRS_FILE", help="Clean prompts of a task; explains right less wrong."),
    ] = None,
    n_prompts: Annotated[
        int | None, typer.Option("--examples", min=2, max=MAX_EXAMPLES, help="Prompts of the task.  [default: 8]")
    ] = None,
    drawn: Annotated[int | None, typer.Option("--seed", min=0, help="Of the task's prompts.  [default: 0]")] = None,
    aggregate: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="How the nodes of several prompts are joined: summed (a feature is one node at whatever positions) or "
            "kept (one per position, for prompts of one template).  [default: summed]",
        ),
    ] = None,
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
            help="Texts, one a line (or .jsonl, each with a 'text'): where features fire, behind the first token.  "
            "[default: for the bundled model prompts of a task]"
        ),
    ] = None,
    grouped: Annotated[
        bool | None,
        typer.Option(
            "--supernodes/--no-supernodes",
            help="Join features that write the same and fire together.  [default: of one prompt]",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what it will take: active features, memory, runs of the model.")
    ] = False,
    force: options.Force = False,
    detail: Detail = Detail.NORMAL,
    **values: Any,
) -> Action:
    ways = [bool(prompts), file is not None, of_task is not None]
    if sum(ways) != 1:
        raise InputError("Give a PROMPT, several of them, --prompts FILE or --task TASK; one of these.")
    if any(not prompt.strip() for prompt in prompts or ()):
        raise InputError("The prompt is empty.")
    for prompt in prompts or ():
        _refuse_task(prompt)
    if held not in HELD:
        raise unknown("part to hold", held, HELD)
    if of_task is None and (n_prompts is not None or drawn is not None):
        raise InputError("--examples and --seed go with --task.")
    several = not prompts or len(prompts) > 1
    if aggregate is not None and not several:
        raise InputError("--aggregate joins the graphs of several prompts; this is one.")
    if aggregate is not None and aggregate not in POSITIONS:
        raise unknown("treatment of positions", aggregate, POSITIONS)
    if several and grouped:
        raise InputError("--supernodes are of the graph of one prompt; leave the option out for several.")
    grouped = not several if grouped is None else grouped
    if texts is not None and page is None and not grouped:
        raise InputError(
            "--texts is for the examples of --page PAGE.html and for --supernodes; none of these is asked."
        )
    if of_task is not None:
        options.check_task(of_task, train=n_prompts or OF_A_TASK)
    own = dict(prompts=tuple(prompts or ()), file=file, task=of_task, examples=n_prompts or OF_A_TASK, seed=drawn or 0)
    own |= dict(aggregate=aggregate or "summed", transcoders=transcoders, several=several)
    own |= dict(targets=targets, out=out, nodes=nodes_kept, edges=edges_kept, n=validated, max_features=max_features)
    own |= dict(held=held, page=page, texts=texts, grouped=grouped)
    if dry_run:
        return partial(_do_dry_run, own | values, detail)
    return partial(_do_graphs if several else _do_graph, own | values, force, detail)


def _do_dry_run(values: dict[str, Any], detail: Detail) -> int:
    from mechinterp.cli.progress_bars import stages

    console = Terminal(detail)
    _check_texts(values)
    with stages(detail) as progress:
        model, bases = _loaded(values, progress)
        asked = _asked(model, values)
        sizes = _sizes(model, bases, asked, values, progress)
    for line in _costs(sizes, values):
        say(console, line)
    return 0


def _do_graph(values: dict[str, Any], force: bool, detail: Detail) -> int:
    from mechinterp.cli.progress_bars import stages

    (prompt,) = values["prompts"]
    console, path = Terminal(detail), values["out"] or Path("out") / f"{_name(prompt)}.graph.json"
    _check_files(path, values, force)
    with stages(detail) as progress:
        model, bases = _loaded(values, progress)
        from mechinterp.analysis.attribution_graph.supernodes import find_supernodes
        from mechinterp.analysis.attribution_graph.validate import validate_edges, validate_graph
        from mechinterp.analysis.feature_notes import feature_notes
        from mechinterp.circuit_file.formats.attribution_graphs import save_attribution_graph
        from mechinterp.views.report.attribution_page import WORDS, page_sizes, write_graph_page
        from mechinterp.views.terminal_tables import frame_table

        corpus = _corpus(model, values)
        graph = _made(model, bases, prompt, values["targets"] or None, values, progress)
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
            notes = feature_notes(model, bases, shown, texts=corpus, skip=1)
            write_graph_page(
                values["page"],
                graph,
                notes=notes,
                checks=checks,
                edges=values["edges"],
                shown=values["nodes"],
                command=_command(values),
            )
    say(console, f"{len(graph.features):,} active features, {graph.n_edges:,} edges; {graph.scores}")
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
        say(console, f"checked: {check}")
    say(console, f"wrote {path}")
    if values["page"] is not None:
        say(console, f"wrote {values['page']}")
    return 0


def _do_graphs(values: dict[str, Any], force: bool, detail: Detail) -> int:
    from mechinterp.cli.progress_bars import stages

    console, path = Terminal(detail), values["out"] or Path("out") / f"{_name_of_several(values)}.graphs.json"
    _check_files(path, values, force)
    with stages(detail) as progress:
        model, bases = _loaded(values, progress)
        from mechinterp.analysis.attribution_graph.aggregate import aggregate_graphs
        from mechinterp.analysis.attribution_graph.build import MAX_BYTES
        from mechinterp.analysis.attribution_graph.validate import validate_graph
        from mechinterp.analysis.feature_notes import feature_notes
        from mechinterp.circuit_file.formats.aggregated_graphs import save_aggregated_graph
        from mechinterp.views.report.aggregate_page import aggregate_sizes, write_aggregate_page
        from mechinterp.views.terminal_tables import frame_table

        asked = _asked(model, values)
        # What is too large is refused before anything is spent.
        for size in _sizes(model, bases, asked, values, progress):
            size.check(MAX_BYTES)
        checks: list[GraphValidation | None] = []

        def graphs() -> Iterator[AttributionGraph]:
            for i, (prompt, targets) in enumerate(asked):
                progress("edges", i, len(asked))
                graph = _made(model, bases, prompt, targets, values)
                tested = values["n"] and len(graph.features) > 1
                checks.append(validate_graph(model, graph, bases, n=values["n"]) if tested else None)
                yield graph.pruned(values["nodes"], values["edges"])
            progress("edges", len(asked), len(asked))

        found = aggregate_graphs(graphs(), positions=values["aggregate"])
        save_aggregated_graph(path, found)
        if values["page"] is not None:
            progress("page", 0, 1)
            parts = [part.nodes for _, part in aggregate_sizes(found)[0]]
            shown = dict.fromkeys(
                (str(row.basis), int(row.feature))
                for part in parts
                for row in part[part["kind"] == "feature"].itertuples()
            )
            write_aggregate_page(
                values["page"],
                found,
                notes=feature_notes(model, bases, shown, texts=_corpus(model, values), skip=1),
                checks=checks if any(checks) else (),
                command=_command(values),
            )
    say(console, str(found))
    often = found.frequent(0.5)
    nodes = often.nodes[often.nodes["kind"] == "feature"].head(8)
    say(console, "")
    say(console, f"features in at least half of the {found.graphs} prompts, by mean influence")
    console.table(frame_table(nodes[["node", "influence", "frequency", "value"]]))
    edges = often.edges[often.edges["source"] != "bias"].head(8)
    say(console, "")
    say(console, "the largest edges in at least half of them (constants left out)")
    console.table(frame_table(edges))
    say(console, _predicted([check for check in checks if check is not None], len(asked)))
    say(console, f"wrote {path}")
    if values["page"] is not None:
        say(console, f"wrote {values['page']}")
    return 0


def _predicted(checks: list[GraphValidation], n: int) -> str:
    """How well the graphs of the prompts predict ablations, with the controls."""
    if not checks:
        return "predictions of real ablations were not tested"
    known = [check for check in checks if check.pearson == check.pearson]
    if not known:
        return "predictions of real ablations: no correlation is a number, since nothing changed"
    values = sorted(check.pearson for check in known)
    chance = sum(not check.pearson > check.shuffled for check in known)
    return (
        f"ablations in the model against the graphs' predictions, prompt by prompt ({len(known)} of {n}): median "
        f"Pearson {median(values):.3f} ({values[0]:.3f} to {values[-1]:.3f}); the model's own gradient "
        f"{median(check.gradient for check in known):.3f}; controls: direct edges alone "
        f"{median(check.direct for check in known):.3f}, shuffled predictions below "
        f"{median(check.shuffled for check in known):.3f}; no better than chance in {chance} of them"
    )


def _check_files(path: Path, values: dict[str, Any], force: bool) -> None:
    for made in (path, values["page"]):
        if made is not None:
            check_new(made, force)
            make_folder(made.parent)
    _check_texts(values)


def _check_texts(values: dict[str, Any]) -> None:
    """Return None if the files of texts can be read. Raises FormatError, before a model is loaded."""
    from mechinterp.base.text_files import read_texts

    for file in (values["file"], values["texts"]):
        if file is not None:
            read_texts(file)


def _loaded(values: dict[str, Any], progress: Stages) -> tuple[HookManager, tuple[Basis, ...]]:
    progress("model", 0, 1)
    from mechinterp.features.load import load_bases
    from mechinterp.models.hook_manager import load_model

    quiet_libraries()
    model = load_model(values["model"], revision=values["revision"], dtype=values["dtype"], device=values["device"])
    where = values["transcoders"]
    return model, tuple(load_bases("bundled:transcoders" if where == "bundled" else where, model=model))


def _corpus(model: HookManager, values: dict[str, Any]) -> Any:
    """The texts in which features are looked for; None: none."""
    from mechinterp.base.text_files import read_texts
    from mechinterp.features.measure import default_prompts

    if values["texts"] is not None:
        return read_texts(values["texts"])
    return default_prompts(model) if model.info.origin == "bundled" else None


def _asked(model: HookManager, values: dict[str, Any]) -> list[tuple[Any, Any]]:
    """(prompt, its targets) of every prompt."""
    targets = values["targets"] or None
    if values["task"] is None:
        prompts = values["prompts"]
        if values["file"] is not None:
            from mechinterp.base.text_files import read_texts

            prompts = list(islice(read_texts(values["file"]), MAX_EXAMPLES + 1))
            if len(prompts) > MAX_EXAMPLES:
                raise InputError(f"{clip(str(values['file']), 200)} has more than {MAX_EXAMPLES:,} prompts.")
        return [(prompt, targets) for prompt in prompts]
    from mechinterp.analysis.attribution_graph.aggregate import graph_prompts
    from mechinterp.tasks.pair_files import load_pairs
    from mechinterp.tasks.task import load_task

    if Path(values["task"]).suffix.lower() in (".jsonl", ".csv"):
        pairs = load_pairs(values["task"], model)[: values["examples"]]
    else:
        pairs = load_task(values["task"]).pairs(model, n=values["examples"], seed=values["seed"])
    return [(prompt, targets or own) for prompt, own in graph_prompts(pairs)]


def _sizes(
    model: HookManager, bases: tuple[Basis, ...], asked: list[tuple[Any, Any]], values: dict[str, Any], progress: Stages
) -> list[GraphSize]:
    from mechinterp.analysis.attribution_graph.build import graph_size

    found: list[GraphSize] = []
    for i, (prompt, targets) in enumerate(asked):
        progress("sizes", i, len(asked))
        found.append(graph_size(model, prompt, bases, targets=targets, max_features=values["max_features"]))
    return found


def _costs(sizes: list[GraphSize], values: dict[str, Any]) -> list[str]:
    """What the graphs will take, a fact a line."""
    from mechinterp.analysis.attribution_graph.build import MAX_BYTES
    from mechinterp.run_costs import in_words

    def span(numbers: list[int]) -> str:
        least, most = min(numbers), max(numbers)
        return f"{least:,}" if least == most else f"{least:,} to {most:,}"

    n, most = len(sizes), max(size.bytes for size in sizes)
    expanded = [size.expanded for size in sizes]
    checks = 1 if values["several"] else 4
    runs = 2 + (0 if values["held"] == "norms" else 2 * sum(expanded) // n) + checks * values["n"]
    fits = (
        f"below the limit of {in_words(MAX_BYTES)}"
        if most <= MAX_BYTES
        else f"ABOVE the limit of {in_words(MAX_BYTES)}"
    )
    lines = [
        f"prompts: {n} of {span([size.positions for size in sizes])} tokens",
        f"active features of a prompt: {span([size.active for size in sizes])}; {span(expanded)} become nodes",
        f"memory of a graph: at most {in_words(most)}, {fits}, beside the model and its transcoders",
        f"runs of the model: about {runs:,} of one prompt for each graph, forwards and backwards",
    ]
    if most > MAX_BYTES:
        lines.append("next: give a smaller --max-features, or shorter prompts")
    return lines


def _made(
    model: HookManager,
    bases: tuple[Basis, ...],
    prompt: Any,
    targets: Any,
    values: dict[str, Any],
    progress: Stages | None = None,
) -> AttributionGraph:
    from mechinterp.analysis.attribution_graph.build import attribution_graph
    from mechinterp.base.progress import no_progress

    return attribution_graph(
        model,
        prompt,
        bases,
        targets=targets,
        max_features=values["max_features"],
        held=values["held"],
        progress=no_progress if progress is None else partial(progress, "edges"),
    )


def _command(values: dict[str, Any]) -> str:
    """The command that makes the page again: every option that is not the default."""
    words = ["discover-circuit", "graph", *values["prompts"]]
    words += ["--transcoders", values["transcoders"], "--model", str(values["model"])]
    words += [word for target in values["targets"] or () for word in ("--target", target)]
    given = {"prompts": None, "task": None, "examples": OF_A_TASK, "seed": 0, "aggregate": "summed", "revision": None}
    given |= {"keep-nodes": 0.8, "keep-edges": 0.98, "max-features": 4096, "held": "norms"}
    given |= {"validate": 32, "texts": None, "out": None, "page": None}
    names = {
        "keep-nodes": "nodes",
        "keep-edges": "edges",
        "max-features": "max_features",
        "validate": "n",
        "prompts": "file",
    }
    for name, default in given.items():
        value = values[names.get(name, name)]
        words += [] if value == default else [f"--{name}", str(value)]
    return shlex.join([*words, *([] if values["grouped"] or values["several"] else ["--no-supernodes"])])


def _name_of_several(values: dict[str, Any]) -> str:
    """Of a task or a file its name, of prompts that of the first one and how many more there are."""
    if values["prompts"]:
        first, *more = values["prompts"]
        return f"{_name(first)}-and-{len(more)}-more"
    return Path(values["task"] or values["file"]).stem


def _refuse_task(prompt: str) -> None:
    """Return None unless the prompt is the name of a task."""
    from mechinterp.tasks.task import task_names

    if prompt in task_names():
        raise InputError(
            f"{prompt!r} is a task, and `graph` takes a prompt, whose next token it explains: discover-circuit graph "
            f'"Then Julie and Ryan ...". For prompts of the task: discover-circuit graph --task {prompt}; for its '
            f"circuit: discover-circuit run {prompt}."
        )


def _name(prompt: str) -> str:
    return "-".join(re.findall("[a-z0-9]+", prompt.lower())[-6:]) or "prompt"
