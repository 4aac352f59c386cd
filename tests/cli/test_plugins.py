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


@pytest.mark.slow
def test_another_package_adds_a_method_a_metric_and_a_format(tmp_path: Path) -> None:
    points = {"methods": "mine = mine_plugin:METHOD", "metrics": "mine-diff = mine_plugin:METRIC"}
    points |= {"exports": "mine-names = mine_plugin:EXPORT", "imports": "mine-json = mine_plugin:IMPORT"}
    install(tmp_path, "mine_plugin", GOOD, points, "Scores of mine")
    model = save_words_model(tmp_path / "words")
    small = ["--model", str(model), "--examples", "8", "--edges", "50%", "--no-roles", "--anyway", "--out", "out"]
    made = "out/ioi-words-mine.circuit.json"
    listed, found, exported, _, imported, refused = run(
        tmp_path,
        ["list"],
        ["run", "ioi", "--method", "mine", "--metric", "mine-diff", "--set", "times=3", *small],
        ["export", made, "--format", "mine-names", "--out", "names.txt"],
        ["export", made, "--format", "eap-ig-json", "--out", "graph.json"],
        ["import", "graph.json", "--format", "mine-json", "--model", str(model), "--out", "again.circuit.json"],
        ["run", "ioi", "--method", "mine", "--set", "times=0", *small, "--force"],
    )
    assert listed[0] == 0 and not listed[3] and listed[1].count("Scores of mine (package mine_plugin)") == 2
    assert found[0] == 0, found
    document = json.loads((tmp_path / made).read_text("utf-8"))
    assert document["discovery"]["method"] == "mine" and document["discovery"]["metric"]["name"] == "mine-diff"
    assert document["discovery"]["parameters"]["times"] == 3.0
    assert exported[0] == 0 and "Lost: all but the names." in exported[1]
    assert len((tmp_path / "names.txt").read_text().split()) == len(document["edges"])
    assert imported[0] == 0 and (tmp_path / "again.circuit.json").exists(), imported
    assert refused[0] == 2 and "times must be a number, above 0" in refused[2]


BROKEN = {
    "gone": "The method 'gone' (from the package bad_plugin) cannot be imported: AttributeError",
    "raises": "The method 'raises' (from the package bad_plugin) cannot be imported: ModuleNotFoundError",
    "exits": "The method 'exits' (from the package bad_plugin) cannot be imported: SystemExit",
    "wrong": "(from the package bad_plugin) is not usable: bad_plugin:NUMBER is of type int, not Method",
    "other": "calls itself 'eap-ig'; both must be the same",
    "eap": "The packages mechinterp and bad_plugin both have a method named 'eap'",
}


@pytest.mark.slow
def test_a_broken_plug_in_gets_one_line_and_spoils_nothing_else(tmp_path: Path) -> None:
    where = {"gone": "bad_plugin:GONE", "raises": "no_such_module:X", "exits": "exits:X", "wrong": "bad_plugin:NUMBER"}
    where |= {"other": "mechinterp.discovery.eap:EAP_IG", "eap": "bad_plugin:NUMBER"}
    (tmp_path / "exits.py").write_text("raise SystemExit(0)", "utf-8")
    points = "\n".join(f"{name} = {value}" for name, value in where.items())
    install(tmp_path, "bad_plugin", "NUMBER = 3", {"methods": points})
    model = str(save_words_model(tmp_path / "words"))
    commands = [["run", "ioi", "--method", name, "--model", model] for name in BROKEN]
    listed, *refused = run(tmp_path, ["list"], *commands)
    assert listed[0] == 0 and not listed[3] and all(name in listed[1] for name in BROKEN)
    for (code, _, errors, _), message in zip(refused, BROKEN.values(), strict=True):
        assert code == 2 and message in errors and errors.count("\n") == 1
