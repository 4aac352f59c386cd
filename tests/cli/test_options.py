"""Options are declared once, with `RunSpec`: what a command records repeats the run, field by field."""

from __future__ import annotations

import re
import shlex
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import typer

from mechinterp.base.errors import InputError
from mechinterp.cli.app import app
from mechinterp.run_spec import COMPARE, RunSpec, command_of, compare_command, declared, shown_order

COMMANDS: Any = typer.main.get_command(app)
# Another value for every field; those that exclude each other are in different specs.
OTHER = RunSpec(
    task="my pairs.jsonl",
    model="org/name",
    revision="main",
    method="acdc",
    metric="kl_to_clean",
    steps=3,
    level="neuron",
    positions="S1,end",
    neurons=7,
    nodes="5%",
    rule="ilp",
    refine=0.25,
    refine_add=3,
    by="value",
    ratio=0.25,
    examples=50,
    effort="quick",
    validation_examples=70,
    test_examples=60,
    resamples=7,
    curve=False,
    anyway=True,
    seed=4,
    bos=False,
    dtype="float64",
    device="cuda:1",
    device_map="sequential",
    batch_size=5,
    replacement="mean-positional",
    settings=("tau=0.05", "order=by score"),
    roles=False,
    restart=True,
    out=Path("my files"),
    shard="2/3",
    direction="my.direction.json",
)
UNRECORDED = ("device", "device_map", "restart", "out", "shard")
EXCLUSIVE = (RunSpec("ioi", edges="12"), RunSpec("ioi", threshold=0.5))
# On the command line as many test pairs as train pairs are the default; in Python 200 are.
PAIRS = (RunSpec("ioi", examples=50), RunSpec("ioi", examples=50, test_examples=50), RunSpec("ioi", test_examples=50))
FEATURES = RunSpec("ioi", level="feature", features=("bundled:m1", "my folder"), top=7)
SPECS = [RunSpec("ioi"), RunSpec("ioi", bos=True), FEATURES, OTHER, *EXCLUSIVE, *PAIRS]


def parsed(command: str) -> tuple[Any, ...]:
    """What a command line would do: the arguments of its action. Nothing is run."""
    words = shlex.split(command)
    assert words[0] == "discover-circuit"
    return COMMANDS.main(words[1:], prog_name="discover-circuit", standalone_mode=False).args


@pytest.mark.parametrize("spec", SPECS, ids=command_of)
def test_a_recorded_command_makes_the_same_spec(spec: RunSpec) -> None:
    asked, *_ = parsed(command_of(spec))
    unrecorded = {name: getattr(spec, name) for name in UNRECORDED}
    assert replace(RunSpec(**asked), **unrecorded) == spec


def test_every_field_is_recorded_or_cannot_change_the_circuit() -> None:
    """Each field has another value in one of the specs above, so the test before this one reaches every field."""
    changed = {f.name for spec in SPECS for f in fields(spec) if getattr(spec, f.name) != f.default}
    assert changed == set(declared()) == set(shown_order())
    assert {name for name, field in declared().items() if not field.option.recorded} == {
        *("task", *UNRECORDED)  # the task is an argument: it always comes first
    }


def test_what_is_given_reaches_the_spec_with_its_type() -> None:
    line = "run ioi --device cuda --restart --out there --no-roles --set a=1 --set b=2 --ratio 1"
    asked, *_ = parsed(f"discover-circuit {line}")
    spec = RunSpec(
        "ioi", device="cuda", restart=True, out=Path("there"), roles=False, settings=("a=1", "b=2"), ratio=1.0
    )
    assert RunSpec(**asked) == spec


def test_help_shows_the_options_in_their_order(capsys: pytest.CaptureFixture[str]) -> None:
    (command,) = (found for name, found in COMMANDS.commands.items() if name == "run")
    shown = [parameter.name for parameter in command.params]
    assert shown == [*shown_order(), "config", "dry_run", "force", "open_report", "as_json", "quiet", "verbose"]
    assert shown[shown.index("method") :][:5] == ["method", "effort", "metric", "steps", "settings"]


def test_a_comparison_records_what_repeats_it() -> None:
    spec = replace(OTHER, method=None, effort="standard", resamples=None, curve=True, validation_examples=200)
    spec = replace(spec, steps=None, nodes=None, rule="top", by="magnitude", ratio=None, refine=None, refine_add=0)
    spec = replace(spec, settings=("acdc.tau=0.05",), roles=True, restart=False, out=Path("out"), shard=None)
    spec = replace(spec, test_examples=spec.examples, device=None, device_map=None)
    command = compare_command(spec, ["acdc", "eap"], "0.1,1")
    asked, methods, sizes, _ = parsed(command)
    assert (RunSpec(**asked), methods, sizes) == (spec, ["acdc", "eap"], "0.1,1")
    assert set(COMPARE) - {"methods", "sizes"} <= set(declared())


def test_the_docstring_of_a_spec_names_every_field() -> None:
    assert RunSpec.__doc__ is not None
    block = RunSpec.__doc__.split("Args:")[1]
    assert re.findall(r"^ {8}(\w+): ", block, re.MULTILINE) == list(declared())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--level feature", "--level feature needs dictionaries"),
        ("--refine-add 5", "--refine-add goes with --refine"),
        ("--refine 0", "--refine is a KL divergence above 0"),
        ("--top 5", "--top goes with --features"),
        ("--features bundled:m1 --level node --edges 9", "--edges does not go with --level node"),
    ],
)
def test_options_that_go_together(line: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parsed(f"discover-circuit run ioi {line}")
