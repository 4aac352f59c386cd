"""`--config`: every run writes the file that repeats it, the command line overrides it, all mistakes are told."""

from __future__ import annotations

import shlex
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from mechinterp import pipeline
from mechinterp.cli import app as cli
from mechinterp.cli.app import app
from mechinterp.cli.config import config_text
from mechinterp.run_spec import RunSpec, command_of, declared, resolved
from tests.cli.test_options import SPECS
from tests.support.words_model import save_words_model

COMMANDS: Any = typer.main.get_command(app)
UNWRITTEN = {"restart": False, "shard": None}


def parsed(*words: str) -> Any:
    """What a command would do; nothing is run."""
    return COMMANDS.main(list(words), prog_name="discover-circuit", standalone_mode=False)


@pytest.mark.parametrize("spec", SPECS, ids=command_of)
def test_the_file_of_a_run_makes_the_same_spec(spec: RunSpec, tmp_path: Path) -> None:
    values = {name: getattr(spec, name) for name in declared()}
    file = tmp_path / "a.run.yaml"
    if not Path(spec.task).suffix:
        file.write_text(config_text("run", file, values, command_of(spec)), "utf-8")
    else:  # the file of pairs must be there
        pairs = tmp_path / spec.task
        pairs.write_text("", "utf-8")
        values["task"] = str(pairs)
        spec = replace(spec, task=str(pairs))
        file.write_text(config_text("run", file, values, command_of(spec)), "utf-8")
    asked = parsed("run", "--config", str(file)).args[0]
    assert RunSpec(**asked) == replace(spec, **UNWRITTEN)


def test_every_option_of_a_run_can_be_in_a_file() -> None:
    changed = {f.name for spec in SPECS for f in fields(spec) if getattr(spec, f.name) != f.default}
    assert changed == set(declared())


def write(path: Path, text: str) -> Path:
    path.write_text(text, "utf-8")
    return path


def test_the_command_line_overrides_the_file(tmp_path: Path) -> None:
    file = write(
        tmp_path / "run.yaml",
        "task: ioi\nmethod: acdc\nset: {tau: 0.05, order: by score}\nedges: 60\nbatch-size: 8\nroles: false\n"
        "positions: [S1, end]\n",
    )
    asked = parsed("run", "--config", str(file)).args[0]
    assert (asked["settings"], asked["edges"], asked["batch_size"]) == (("tau=0.05", "order=by score"), "60", 8)
    assert asked["roles"] is False and asked["positions"] == "S1,end" and asked["examples"] == 200
    more = ("greater_than", "--threshold", "0.1", "--roles", "--batch-size", "4", "--examples", "50")
    asked = parsed("run", "--config", str(file), *more).args[0]
    assert (asked["task"], asked["threshold"], asked["edges"]) == ("greater_than", 0.1, None)
    assert asked["roles"] is True and asked["batch_size"] == 4 and asked["test_examples"] == 50
    asked = parsed("run", "--config", str(file), "--effort", "quick").args[0]
    assert asked["method"] is None and asked["settings"] == ()
    assert parsed("compare", "--config", str(write(tmp_path / "c.yaml", "task: ioi\nmethods: [eap, cd]"))).args[1] == [
        "eap",
        "cd",
    ]


@pytest.mark.parametrize(
    ("text", "typed", "kept"),
    [
        ("method: mattr\neffort: thorough\nset: {runs: 8}", ("--method", "eap"), ()),
        ("effort: thorough\nset: {runs: 3}", ("--method", "eap"), ()),
        ("effort: thorough\nset: {runs: 3}", ("--method", "mattr"), ("runs=3",)),
        ("method: acdc\nset: {tau: 0.1}", ("--method", "acdc"), ("tau=0.1",)),
        ("method: acdc\nset: {tau: 0.1}", ("--method", "mattr", "--set", "runs=2"), ("runs=2",)),
        ("method: eap-ig\nsteps: 9", ("--method", "eap"), ()),
    ],
)
def test_another_method_leaves_the_settings_of_the_old_one_behind(
    text: str, typed: tuple[str, ...], kept: tuple[str, ...], tmp_path: Path
) -> None:
    """What is left is what the method has, so that the run can begin."""
    file = write(tmp_path / "run.yaml", f"task: ioi\n{text}\n")
    spec = RunSpec(**parsed("run", "--config", str(file), *typed).args[0])
    assert spec.settings == kept and spec.method == typed[1]
    pipeline._settings(resolved(spec))


@pytest.mark.parametrize(
    ("text", "typed"),
    [
        ("level: feature", ("--features", "bundled:m1")),
        ("neurons: 5", ("--level", "neuron")),
        ("nodes: 5", ("--level", "node")),
        ("refine_add: 5", ("--refine", "0.01")),
        ("top: 5", ("--features", "bundled:m1")),
        ("method: eap_ig", ("--method", "eap")),
    ],
)
def test_what_a_file_leaves_open_may_be_on_the_command_line(text: str, typed: tuple[str, ...], tmp_path: Path) -> None:
    file = write(tmp_path / "run.yaml", f"task: ioi\n{text}\n")
    assert RunSpec(**parsed("run", "--config", str(file), *typed).args[0]).task == "ioi"


def test_all_mistakes_of_a_file_are_told_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(
        tmp_path / "run.yaml",
        "task: ioy\nmodle: bundled\nmethod: eap_ig\nexamples: 1\nbatch-size: many\nbatch_size: 3\nedges: 10\n"
        "threshold: 0.1\nlevel: [edge, {a: b}]\nseed:\n",
    )
    assert cli.main(["run", "--config", str(file)]) == 2
    out, err = capsys.readouterr()
    first, *lines = err.splitlines()
    assert out == "" and first == f"discover-circuit: {file} has {len(lines)} problems:" and len(lines) == 8
    for words in (
        "Unknown key 'modle'. Did you mean 'model'?",
        "Unknown method 'eap_ig'. Did you mean 'eap-ig'?",
        "Unknown task 'ioy'. Did you mean 'ioi'?",
        "  examples: ",
        "  batch-size: ",
        "level: a list of single values",
        "seed: the value is missing; leave the key out.",
        "Give --edges or --threshold, not both.",
    ):
        assert sum(words in line for line in lines) == 1, words
    assert all(line.startswith("  ") for line in lines)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "must hold a mapping"),
        ("- a", "must hold a mapping"),
        ("a: [", "not valid YAML"),
        ("a: &x b\nc: *x", "aliases"),
        ("x" * 2**19, "larger than"),
        ("task: ioi\nforce: true", "Unknown key 'force'"),
        ("task: ioi\nset: {tau: {a: b}}", "set: a list of single values"),
    ],
)
def test_a_file_that_is_no_config_is_one_line(
    text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", "--config", str(write(tmp_path / "run.yaml", text))]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1
    assert cli.main(["run", "--config", str(tmp_path / "none.yaml")]) == 2
    assert "cannot be read" in capsys.readouterr().err


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_words_model(tmp_path_factory.mktemp("models") / "words")


SMALL = ("--examples", "10", "--method", "eap", "--anyway", "--resamples", "0", "--no-roles", "--no-curve")


@pytest.mark.slow
def test_a_run_is_repeated_by_its_file_and_replaced_by_its_own_command_only(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["run", "ioi", "--model", str(model), "--out", str(tmp_path), *SMALL]
    assert cli.main([*run, "--edges", "20", "-q"]) == 0
    quiet = capsys.readouterr()
    name = tmp_path / "ioi-words-eap"
    circuit, config = Path(f"{name}.circuit.json"), Path(f"{name}.run.yaml")
    lines = quiet.out.splitlines()
    assert "edges recover" in lines[0] and lines[-1] == f"wrote {circuit}" and quiet.err == ""
    assert all(line.startswith(("doubt: ", "note: ")) for line in lines[1:-1])
    text = config.read_text("utf-8")
    head, made, *_ = text.splitlines()
    assert head == f"# discover-circuit run --config {config}"
    words = shlex.split(made.partition(": ")[2])
    assert words[:3] == ["discover-circuit", "run", "ioi"] and made.startswith("# mechinterp 0.1.0: ")
    assert yaml.safe_load(text)["method"] == "eap"
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    # The same again: the files are the same, to the last bit, and it is said that they were replaced.
    assert cli.main(["run", "--config", str(config), "--verbose"]) == 0
    loud = capsys.readouterr()
    assert "replaced the files that the same command had written" in loud.out
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert "method: eap\n" in loud.err and "all stages: " in loud.err and "score the edges: " in loud.err
    # Another command: refused before anything is loaded, with what made the file; --force replaces it.
    assert cli.main([*run, "--edges", "30"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "is there already, made by: discover-circuit run ioi" in err and "--force" in err
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert cli.main([*run, "--edges", "30", "--force"]) == 0
    assert "edges: '30'" in config.read_text("utf-8")
    # A file that was edited is kept, too.
    circuit.write_text(circuit.read_text("utf-8").replace('"title": "', '"title": "my '), "utf-8")
    assert cli.main([*run, "--edges", "30"]) == 2
    assert "is not as it was written" in capsys.readouterr().err
    circuit.unlink()
    config.write_text(config.read_text("utf-8").replace("seed: 0", "seed: 7"), "utf-8")
    assert cli.main([*run, "--edges", "30"]) == 2
    assert f"{config} is there already" in capsys.readouterr().err
    # So is one that can no longer be read: `--force` replaces it.
    config.write_text("edges: [", "utf-8")
    assert cli.main([*run, "--edges", "30"]) == 2
    assert f"{config} is there already. Add --force" in capsys.readouterr().err
    assert cli.main([*run, "--edges", "30", "--force"]) == 0
    assert "edges: '30'" in config.read_text("utf-8")


@pytest.mark.slow
def test_a_comparison_is_repeated_by_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--methods", "random", "--examples", "4", "--sizes", "0.5,1", "--out", str(tmp_path)]
    assert cli.main(["compare", "ioi", *few]) == 0
    capsys.readouterr()
    config = tmp_path / "ioi-comparison.compare.yaml"
    asked = parsed("compare", "--config", str(config))
    plain = parsed("compare", "ioi", *few)
    assert asked.args == plain.args
    assert cli.main(["compare", "ioi", *few[:-4], "--sizes", "0.1,1", "--out", str(tmp_path)]) == 2
    assert "ioi-comparison.html is there already" in capsys.readouterr().err
    assert cli.main(["compare", "--config", str(config), "-q"]) == 0
    assert "wrote" not in capsys.readouterr().out
