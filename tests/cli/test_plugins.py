"""Methods, metrics and formats of another installed package, on the command line; and of one that is broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.words_model import save_words_model

ROOT = Path(__file__).parents[2]
RUN = """
import contextlib, io, json, sys
from mechinterp.cli.app import main
for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    print(json.dumps([code, out.getvalue(), err.getvalue(), "torch" in sys.modules]))
"""
GOOD = """
from dataclasses import replace

import mechinterp as mi
from mechinterp.base.settings import Setting
from mechinterp.circuit_file.formats.format import Export, Import
from mechinterp.circuit_file.formats.names import IMPORTS
from mechinterp.discovery.method import REPLACEMENT, Method

METRIC = replace(mi.get_metric("logit_diff"), name="mine-diff")


def scored(job):
    eap = mi.score_edges(job.model, job.graph, job.pairs, method="eap", metric=job.metric)
    return job.scores("mine", eap.total * job.settings["times"], {})


SETTINGS = {"replacement": REPLACEMENT, "times": Setting(2.0, above=0)}
METHOD = Method("mine", "EAP, scaled", "this test", scored, SETTINGS)
EXPORT = Export(".txt", lambda circuit, document: "\\n".join(circuit.edges).encode(), "Lost: all but the names.")
IMPORT = Import(has_scores=True, has_sizes=True, read=IMPORTS.get("eap-ig-json").read)
"""


def install(folder: Path, package: str, source: str, points: dict[str, str], about: str = "") -> None:
    """Write a package as an installer leaves it."""
    (folder / f"{package}.py").write_text(source, "utf-8")
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir()
    summary = f"Summary: {about}\n" if about else ""
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n{summary}", "utf-8")
    lines = (f"[mechinterp.{group}]\n{entries}\n" for group, entries in points.items())
    (info / "entry_points.txt").write_text("\n".join(lines), "utf-8")


def run(folder: Path, *commands: list[str]) -> list[Any]:
    """Exit code, output, error output and whether torch was imported by then, of commands in one new process."""
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "COLUMNS": "200"}
    command = [sys.executable, "-c", RUN, json.dumps(commands)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, timeout=300)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


BROKEN = {
    "gone": "The method 'gone' (from the package bad_plugin) cannot be imported: AttributeError",
    "raises": "The method 'raises' (from the package bad_plugin) cannot be imported: ModuleNotFoundError",
    "exits": "The method 'exits' (from the package bad_plugin) cannot be imported: SystemExit",
    "wrong": "(from the package bad_plugin) is not usable: bad_plugin:NUMBER is of type int, not Method",
    "other": "calls itself 'eap-ig'; both must be the same",
    "relp": "The packages mechinterp and bad_plugin both have a method named 'relp'",
}


NAMES = {"gone": "bad_plugin:GONE", "raises": "no_such_module:X", "exits": "exits:X", "wrong": "bad_plugin:NUMBER"}
NAMES |= {"other": "mechinterp.discovery.eap:EAP_IG", "relp": "bad_plugin:NUMBER"}
MADE = "out/ioi-words-mine.circuit.json"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two packages are installed, one of them broken."""
    folder = tmp_path_factory.mktemp("plugins")
    points = {"methods": "mine = mine_plugin:METHOD", "metrics": "mine-diff = mine_plugin:METRIC"}
    points |= {"exports": "mine-names = mine_plugin:EXPORT", "imports": "mine-json = mine_plugin:IMPORT"}
    install(folder, "mine_plugin", GOOD, points, "Scores of mine")
    (folder / "exits.py").write_text("raise SystemExit(0)", "utf-8")
    install(folder, "bad_plugin", "NUMBER = 3", {"methods": "\n".join(f"{n} = {where}" for n, where in NAMES.items())})
    return folder


@pytest.fixture(scope="module")
def done(folder: Path) -> dict[str, Any]:
    """What the commands gave, by name, all in one process."""
    model = str(save_words_model(folder / "words"))
    small = ["--model", model, "--examples", "8", "--edges", "50%", "--no-roles", "--anyway", "--out", "out"]
    commands = {
        "list": ["list"],
        "run": ["run", "ioi", "--method", "mine", "--metric", "mine-diff", "--set", "times=3", *small],
        "export": ["export", MADE, "--format", "mine-names", "--out", "names.txt"],
        "graph": ["export", MADE, "--format", "eap-ig-json", "--out", "graph.json"],
        "import": ["import", "graph.json", "--format", "mine-json", "--model", model, "--out", "again.circuit.json"],
        "refused": ["run", "ioi", "--method", "mine", "--set", "times=0", *small, "--force"],
        **{name: ["run", "ioi", "--method", name, "--model", model] for name in BROKEN},
    }
    return dict(zip(commands, run(folder, *commands.values()), strict=True))


@pytest.mark.slow
def test_another_package_adds_a_method_a_metric_and_a_format(folder: Path, done: dict[str, Any]) -> None:
    code, listed, _, with_torch = done["list"]
    assert code == 0 and not with_torch and listed.count("Scores of mine (package mine_plugin)") == 2
    assert done["run"][0] == 0, done["run"]
    document = json.loads((folder / MADE).read_text("utf-8"))
    assert document["discovery"]["method"] == "mine" and document["discovery"]["metric"]["name"] == "mine-diff"
    assert document["discovery"]["parameters"]["times"] == 3.0
    assert done["export"][0] == 0 and "Lost: all but the names." in done["export"][1]
    assert len((folder / "names.txt").read_text().split()) == len(document["edges"])
    assert done["import"][0] == 0 and (folder / "again.circuit.json").exists(), done["import"]
    assert done["refused"][0] == 2 and "times must be a number, above 0" in done["refused"][2]


@pytest.mark.slow
def test_a_broken_plug_in_gets_one_line_and_spoils_nothing_else(done: dict[str, Any]) -> None:
    """The other package is used beside it, and the list needs no torch for either."""
    code, listed, _, with_torch = done["list"]
    assert code == 0 and not with_torch and all(name in listed for name in BROKEN)
    for name, message in BROKEN.items():
        code, _, errors, _ = done[name]
        assert code == 2 and message in errors and errors.count("\n") == 1
