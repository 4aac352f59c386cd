"""`python -m tests.support.fuzz [CASES] [FIRST]`: commands on files that were changed on purpose, structure and all.

Circuit files (their hashes left, or made right again), sidecars, files of pairs, task files and other tools' files are
mutated; show, validate, cite, diff, export, list, view, import, run (up to the model) and the part of verify that needs
no model read them through `mechinterp.cli.app.main`, in this one process. Whatever comes out: the exit code is one that
the command may have, an error is one line, nothing steers the terminal, no command takes a second or half a gigabyte.
Case number N is always the same case, so a failure is run again with `python -m tests.support.fuzz 1 N`.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import typer

import mechinterp as mi
from mechinterp import exchange, pipeline
from mechinterp.base.errors import InputError, ModelNotAvailable
from mechinterp.circuit_file.formats.eap_ig_json import to_eap_ig_json
from mechinterp.circuit_file.formats.eap_ig_pt import to_eap_ig_pt
from mechinterp.circuit_file.formats.names import EXPORTS
from mechinterp.circuit_file.verify import verification
from mechinterp.cli import app as cli
from mechinterp.tasks import task as task_module
from tests.support import models_tiny as tiny
from tests.support.hostile_json import NUMBERS, OTHERS, Done, harmed, mutated, run, sealed, sha256
from tests.support.toy_circuits import toy_circuit, toy_document
from tests.support.words_model import save_words_model

SECONDS = 1.0
"""Of processor time, for one command."""
BYTES = 2**29
STORED = Path(__file__).parents[2] / "circuits"
PUBLISHED = ("docstring-heimersheim2023-heads", "tracr-reverse-zero")
COMMANDS = (*("verify",) * 3, *("show",) * 2, "validate", "cite", "view", "diff", "export")
EXPECTED = {
    "show": ((0,), (0, 2)),  # it needs no graph, and so shows edges that there cannot be
    "cite": ((0,), (2,)),
    "view": ((0,), (2,)),
    "diff": ((0, 1), (2,)),
    "export": ((0, 2), (2,)),
    "verify": ((0, 1, 3), (1, 2)),
}
"""Exit codes that a command may have for a file that `validate` takes, and for one that it refuses."""


@dataclass
class Place:
    """The files that cases start from, and the folder that they are changed in."""

    folder: Path
    seeds: dict[str, dict[str, Any]]
    """Circuit files by name, as JSON."""
    sidecar: bytes
    foreign: dict[str, bytes]
    """Other tools' files by format."""
    models: dict[str, Any] = field(default_factory=dict[str, Any])


def circuit_with_everything(folder: Path) -> tuple[dict[str, Any], bytes]:
    """A saved circuit of a tiny model with every part that a file can have, and its sidecar."""
    model = tiny.build("gpt2", dtype=torch.float32)
    graph, pairs = mi.build_graph(model), tiny.pairs()
    circuit = mi.select(graph, mi.score_edges(model, graph, pairs, method="eap"), edges=30)
    result = mi.evaluate(model, circuit, pairs, n_random=2)
    mi.save_circuit(folder / "all.circuit.json", circuit, model=model, result=result)
    content = json.loads((folder / "all.circuit.json").read_text("utf-8"))
    head = next(name for name in content["nodes"] if "h" in name)
    metric = {"kind": "attention", "head": head, "query": -1, "key": 0}
    content |= {
        "description": "words",
        "license": "MIT",
        "created_utc": "2026-01-02T03:04:05Z",
        "citation": {
            "title": "A title",
            "authors": ["A B"],
            "bibtex": "@misc{key,\n title = {A {GPT}},\n year = 2023\n}",
        },
        "derived_from": [{"source": "somewhere", "path": "a/b", "note": "words"}],
        "roles": {"mover": {"label": "name mover", "nodes": [head], "color": "#aabbcc"}},
        "role_edges": [{"source": "mover", "target": "logits", "inputs": [], "note": "words"}],
        "task": {"kind": "file", "name": "mine", "path": "mine.jsonl", "sha256": "0" * 64},
        "predictions": [
            {
                "name": "it looks back",
                "statement": "words",
                "measure": metric,
                "relation": ">=",
                "value": 0.5,
                "pairs": next(iter(content["pairs"])),
                "controls": [{"measure": {**metric, "key": 1}, "measured": 0.1}],
            }
        ],
        "curve": {
            "pairs": next(iter(content["pairs"])),
            "metric": "logit_diff",
            "replacement": "corrupt",
            "points": [{"n_selected": n, "n_edges": n, "faithfulness": 0.5} for n in (4, 30)],
        },
        "extensions": {"other tool": [1, {"x": "y"}]},
    }
    assert sealed(content, folder / "all.circuit.json")
    return content, (folder / "all.scores.safetensors").read_bytes()


def place_in(folder: Path) -> Place:
    """Make what the cases start from, in a folder."""
    whole, sidecar = circuit_with_everything(folder)
    seeds = {"all": whole, "toy": json.loads(toy_document(toy_circuit()).model_dump_json(exclude_none=True))}
    seeds |= {name: json.loads((STORED / f"{name}.circuit.json").read_text("utf-8")) for name in PUBLISHED}
    for name, content in seeds.items():
        (folder / f"{name}.circuit.json").write_text(json.dumps(content), "utf-8")
    circuit, document = exchange.opened(folder / "all.circuit.json")
    foreign = {"eap-ig-json": to_eap_ig_json(circuit, document), "eap-ig-pt": to_eap_ig_pt(circuit, document)}
    rows = [["tok_embeds", "m0"], ["m0", "resid_post"], ["tok_embeds", "a1.h0.q"], ["a1.h0", "resid_post"]]
    foreign["edge-pruning"] = json.dumps(rows).encode()
    point = ("blocks.0.hook_mlp_out", (None,))
    edges = {("blocks.1.hook_resid_post", (None,), *point): True}
    edges |= {("blocks.0.hook_mlp_in", (None,), "blocks.0.hook_resid_pre", (None,)): True}
    edges |= {(*point, "blocks.0.hook_mlp_in", (None,)): True}
    out = io.BytesIO()
    torch.save(edges, out)
    foreign["acdc"] = out.getvalue()
    save_words_model(folder / "words")
    models = {"tiny": tiny.build("gpt2", dtype=torch.float32), "words": mi.load_model(folder / "words")}
    return Place(folder, seeds, sidecar, foreign, models)


# --- one case ------------------------------------------------------------------------------------------------------


def of_circuit_file(place: Place, draw: random.Random) -> Iterator[str]:
    """A circuit file with changes in its structure; in most cases its hashes are made right again."""
    name = draw.choice(sorted(place.seeds))
    path = _copied(place, name)
    content = mutated(place.seeds[name], draw)
    changed = content != place.seeds[name]
    if draw.random() < 0.3 or not sealed(content, path):
        path.write_text(json.dumps(content), "utf-8")
        yield from _read_by_commands(place, path, draw, refused=changed)
    else:
        yield from _read_by_commands(place, path, draw)


def of_bytes(place: Place, draw: random.Random) -> Iterator[str]:
    """A circuit file with harmed bytes."""
    path = _copied(place, draw.choice(("all", "toy")))
    path.write_bytes(harmed(path.read_bytes(), draw))
    yield from _read_by_commands(place, path, draw)


def of_sidecar(place: Place, draw: random.Random) -> Iterator[str]:
    """A sidecar with harmed bytes or a mutated header; in most cases the circuit file states its new hash."""
    path = _copied(place, "all")
    size = int.from_bytes(place.sidecar[:8], "little")
    made = harmed(place.sidecar, draw)
    if draw.random() < 0.6:
        stated = json.loads(place.sidecar[8 : 8 + size])
        if draw.random() < 0.5:
            key = draw.choice(("dtype", "shape", "data_offsets"))
            stated["scores"][key] = draw.choice((*NUMBERS, *OTHERS, "F16", [[]], [1.0, True], [-1, 4]))
        else:
            stated = mutated(stated, draw)
        header = json.dumps(stated).encode()
        made = len(header).to_bytes(8, "little") + header + place.sidecar[8 + size :]
    (path.parent / "all.scores.safetensors").write_bytes(made)
    right = draw.random() < 0.8
    if right:
        content = json.loads(json.dumps(place.seeds["all"]))
        content["integrity"]["sidecar"]["sha256"] = sha256(made)
        assert sealed(content, path)
    yield from _read_by_commands(place, path, draw, refused=not right and made != place.sidecar, but=("show",))


def of_pairs(place: Place, draw: random.Random) -> Iterator[str]:
    """A file of pairs, as JSONL or CSV, with texts or ids."""
    text = draw.random() < 0.5
    row: dict[str, Any] = {
        "clean": "When Mary and John",
        "corrupt": "When Bob and John",
        "right": " Mary",
        "wrong": " John",
    }
    if not text:
        row = {"clean": [1, 2, 3], "corrupt": [1, 4, 3], "right": [5, 6], "wrong": 7, "positions": {"name": 1}}
    rows = [mutated(row, draw) if draw.random() < 0.3 else dict(row) for _ in range(draw.choice((2, 4, 6)))]
    suffix = draw.choice((".jsonl", ".csv", ".JSONL"))
    if suffix == ".csv":
        lines = [",".join(row), *(",".join(_cell(entry.get(name, "")) for name in row) for entry in rows)]
        content = "\n".join(lines).encode()
    else:
        content = "\n".join(json.dumps(entry) for entry in rows).encode()
    if draw.random() < 0.4:
        content = harmed(content, draw)
    path = _empty(place) / f"pairs{suffix}"
    path.write_bytes(content)
    yield from _complaints(run("run", path, "--out", path.parent / "out"), (2,))


WORDS = ("- x", "  x: y", "[/x]", "{", "'", "*a", "&a x", '"\\ud800"', "!!python/name:os.system", "x" * 5000, "- '{A}'")


def of_task(place: Place, draw: random.Random) -> Iterator[str]:
    """A task file."""
    source = Path(task_module.__file__).with_name(
        draw.choice(("ioi", "greater_than", "induction", "docstring")) + ".yaml"
    )
    content = source.read_bytes()
    if draw.random() < 0.5:
        content = harmed(content, draw)
    else:
        lines = content.decode().splitlines()
        at = draw.randrange(len(lines))
        key = draw.choice(("", "  ", lines[at].partition(":")[0] + ": "))
        lines[at : at + draw.choice((0, 1, 1, 3))] = [key + draw.choice(WORDS)]
        content = "\n".join(lines).encode("utf-8", "replace")
    path = _empty(place) / "task.yaml"
    path.write_bytes(content)
    yield from _complaints(run("run", path, "--examples", "4", "--out", path.parent / "out"), (2,))


def of_foreign_file(place: Place, draw: random.Random) -> Iterator[str]:
    """Another tool's file."""
    format = draw.choice(sorted(place.foreign))
    content = place.foreign[format]
    if format in ("eap-ig-json", "edge-pruning") and draw.random() < 0.7:
        value = json.loads(content)
        value = mutated(value if isinstance(value, dict) else {"rows": value}, draw)
        content = json.dumps(value.get("rows", value) if format == "edge-pruning" else value).encode()
    else:
        content = harmed(content, draw)
    path = _empty(place) / "foreign"
    path.write_bytes(content)
    yield from _complaints(run("import", path, "--format", format, "--out", path.parent / "b.circuit.json"), (0, 2))


CASES: tuple[tuple[float, Callable[[Place, random.Random], Iterator[str]]], ...] = (
    (0.5, of_circuit_file),
    (0.1, of_bytes),
    (0.1, of_sidecar),
    (0.12, of_pairs),
    (0.08, of_task),
    (0.1, of_foreign_file),
)


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return '"' + text.replace('"', '""') + '"' if set(text) & set(',"\n') else text


def _empty(place: Place) -> Path:
    work = place.folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    return work


def _copied(place: Place, name: str) -> Path:
    work = _empty(place)
    for source in (place.folder / f"{name}.circuit.json", place.folder / f"{name}.scores.safetensors"):
        if source.exists():
            shutil.copy(source, work / source.name)
    return work / f"{name}.circuit.json"


def _read_by_commands(
    place: Place, path: Path, draw: random.Random, refused: bool = False, but: tuple[str, ...] = ()
) -> Iterator[str]:
    """What is wrong with what `validate` and one other command do; `refused`: none may take the file."""
    checked = run("validate", path)
    yield from _complaints(checked, (2,) if refused else (0, 2))
    command = draw.choice(COMMANDS)
    more: tuple[str | Path, ...] = ()
    if command == "view":
        more = ("--no-open", "--out", path.parent / "page.html")
    elif command == "diff":
        more = (place.folder / path.name, *draw.choice(((), (), ("--out", path.parent / "d.html"))))
    elif command == "export":
        format = draw.choice(EXPORTS.names())
        more = ("--format", format, "--out", path.parent / "exported")
    if command != "validate":
        valid, invalid = EXPECTED[command]
        expected = valid if checked.code == 0 else invalid
        if refused and command not in ("verify", *but):
            expected = (2,)
        yield from _complaints(run(command, path, *more), expected)
    if draw.random() < 0.03:
        (path.parent / "out").mkdir()
        shutil.copy(path, path.parent / "out")
        with contextlib.chdir(path.parent) if hasattr(contextlib, "chdir") else contextlib.nullcontext():
            yield from _complaints(run("list"), (0,), seconds=5)


def _complaints(done: Done, allowed: tuple[int, ...], seconds: float = SECONDS) -> Iterator[str]:
    found = done.problems(allowed)
    if done.seconds > seconds:
        found.append(f"took {done.seconds:.1f} s")
    for problem in found:
        yield f"{problem}: {' '.join(done.arguments)[:300]}\n    {done.err.strip()[:400]}"


# --- all cases -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def without_models(place: Place) -> Iterator[None]:
    """No model is loaded or run: `verify` and `view` do without, `run` stops before the graph."""

    def unavailable(*arguments: Any, **keywords: Any) -> Any:
        raise ModelNotAvailable("no model is loaded here.")

    def stop(*arguments: Any, **keywords: Any) -> Any:
        raise InputError("the pairs can be read; no model is run here.")

    commands = typer.main.get_command(cli.app)  # built once: that takes longer than most commands
    with (
        mock.patch.object(cli, "app", commands),
        mock.patch.object(verification, "load_model", unavailable),
        mock.patch.object(exchange, "load_model", lambda *arguments, **keywords: place.models["tiny"]),
        mock.patch.object(pipeline, "load_model", lambda *arguments, **keywords: place.models["words"]),
        mock.patch.object(pipeline, "graph_of_run", stop),
    ):
        yield


@contextlib.contextmanager
def at_most(extra: int) -> Iterator[None]:
    """So many bytes more of address space than now, where the system can bound it; more is a MemoryError."""
    try:
        import resource

        now = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except (ImportError, OSError):
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + extra, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def fuzz(place: Place, cases: int, first: int = 0) -> list[str]:
    """The problems of so many cases, each with its number."""
    found: list[str] = []
    with without_models(place):
        run("validate", place.folder / "all.circuit.json")  # imports are not counted
        for number in range(first, first + cases):
            draw = random.Random(number)
            kind = draw.choices([case for _, case in CASES], [share for share, _ in CASES])[0]
            with at_most(BYTES):
                found += [f"case {number} ({kind.__name__}): {problem}" for problem in kind(place, draw)]
    return found


def main() -> int:
    """Run the cases, print what is wrong, and return 1 when anything is."""
    cases, first = (int(word) for word in (*sys.argv[1:], *("2000", "0")[len(sys.argv) - 1 :]))
    with tempfile.TemporaryDirectory() as folder:
        found = fuzz(place_in(Path(folder)), cases, first)
    for problem in found[:100]:
        print(problem)
    print(f"{cases} cases, {len(found)} problems")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
