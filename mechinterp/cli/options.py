"""The options that commands share, with their help and their checks; no torch is imported for them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from mechinterp.base.errors import InputError
from mechinterp.base.registry import unknown
from mechinterp.cli.help import LEVELS, REPLACEMENTS, RULES
from mechinterp.discovery.methods import METHODS
from mechinterp.tasks.metric_names import METRICS

SIZE = re.compile(r"[1-9][0-9]{0,8}|[0-9]{1,3}(\.[0-9]{1,9})? ?%")
COMPARED = {"edge": "eap,eap-ig,cd,cd-edges,random", "node": "eap,eap-ig,relp,cd-edges,random"}
Task = Annotated[str, typer.Argument(metavar="TASK|PAIRS_FILE", help="A task's name, or a file.")]
File = Annotated[str, typer.Argument(help="A circuit file, or the name of a stored circuit.")]
Model = Annotated[str, typer.Option(help="'bundled', a directory, or a hub id (also id@revision).")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")]
Method = Annotated[str, typer.Option(help=f"How edges are scored: {', '.join(METHODS)}.")]
Metric = Annotated[str | None, typer.Option(help="What counts as doing the task.  [default: the task's]")]
Steps = Annotated[int | None, typer.Option(min=1, max=1000, help="Integration steps of eap-ig.  [default: 5]")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A parameter of the method; repeatable.")
]
MethodSettings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="METHOD.NAME=VALUE", help="A parameter of one of the methods; repeatable."),
]
Level = Annotated[str, typer.Option(help=f"What is chosen: {', '.join(LEVELS)} (heads, MLPs and single neurons).")]
Positions = Annotated[
    str | None, typer.Option(help="Tell edges at these named positions apart: names with commas between, or 'all'.")
]
Neurons = Annotated[
    int | None, typer.Option(min=1, help="The strongest neurons that become nodes, for --level neuron.  [default: 50]")
]
Edges = Annotated[str | None, typer.Option(help="Select so many edges, or a share such as 5%.")]
Nodes = Annotated[str | None, typer.Option(help="The same for nodes, with --level node or neuron.")]
Threshold = Annotated[float | None, typer.Option(help="Select every edge whose score (as --by has it) is above this.")]
By = Annotated[str, typer.Option(help="Order edges by score: value (helping ones first) or magnitude.")]
Rule = Annotated[str, typer.Option(help="top, greedy (grown from the logits back), or ilp (the best of its size).")]
Ratio = Annotated[
    float | None, typer.Option(min=0, max=1, help="Take this share of the edges from the best helping ones first.")
]
Replacement = Annotated[str, typer.Option(help=f"What a cut edge carries: {', '.join(REPLACEMENTS)}.")]
MOST_EXAMPLES = 20_000
"""The same as `mechinterp.circuit_file.limits.MAX_EXAMPLES`."""
Examples = Annotated[int, typer.Option(min=2, max=MOST_EXAMPLES, help="Pairs to find it with.")]
TestExamples = Annotated[
    int | None, typer.Option(min=2, max=MOST_EXAMPLES, help="Held-out pairs.  [default: as many as --examples]")
]
Seed = Annotated[int, typer.Option(min=0, help="Of the pairs, random circuits and intervals.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16, ...  [default: float32]")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps.  [default: cpu]")]
BatchSize = Annotated[int, typer.Option(min=1, help="Pairs at a time; the result does not depend on it.")]
Roles = Annotated[bool, typer.Option("--roles/--no-roles", help="Measure roles of heads and MLPs, as predictions.")]
Restart = Annotated[
    bool, typer.Option("--restart", help="Begin again, and delete the states of unfinished runs that write this file.")
]
Out = Annotated[Path, typer.Option(file_okay=False, writable=True, help="Folder for the files.")]


def check(asked: Mapping[str, Any]) -> None:
    """Return None when the options make sense as far as can be told without torch. Raises InputError otherwise."""
    given = [name for name in ("edges", "nodes", "threshold") if asked.get(name) is not None]
    if len(given) > 1:
        raise InputError(f"Give --{given[0]} or --{given[1]}, not both.")
    threshold, level = asked.get("threshold"), asked.get("level", "edge")
    if threshold is not None and threshold != threshold:
        raise InputError("--threshold is not a number.")
    names = {
        "method": METHODS,
        "order": ("value", "magnitude"),
        "rule": RULES,
        "replacement": REPLACEMENTS,
        "metric": METRICS,
        "level": LEVELS,
    }
    for name, known in names.items():
        value = asked.get("by" if name == "order" else name)
        if value is not None:
            check_name(name, value, known)
    wrong = "nodes" if level == "edge" else "edges"
    if asked.get(wrong) is not None:
        raise InputError(
            f"--{wrong} does not go with --level {level}; give --{'edges' if wrong == 'nodes' else 'nodes'}."
        )
    for name in ("edges", "nodes"):
        size = asked.get(name)
        if size is not None and not SIZE.fullmatch(size):
            raise InputError(f"--{name} is a whole number above 0, or a share such as 5%; got {size!r}.")
    if asked.get("neurons") is not None and level != "neuron":
        raise InputError("--neurons goes with --level neuron.")


def compared(level: str, positions: str | None) -> str:
    """What `compare` compares when nobody says."""
    return COMPARED["edge" if level == "edge" and positions is None else "node"]


def check_name(kind: str, name: str, known: Iterable[str]) -> None:
    """Return None when the name is known. Raises InputError, with the nearest one, otherwise."""
    if name not in known:
        raise unknown(kind, name, known)
