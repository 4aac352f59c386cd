"""The command line: one line and an exit code for every mistake, and torch only when there is work."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from mechinterp import pipeline, run_spec
from mechinterp.base import checkpoint
from mechinterp.circuit_file import named_files
from mechinterp.cli import app as cli
from mechinterp.engines.replacement import KINDS
from mechinterp.graphs.graph import LEVELS
from mechinterp.graphs.select import RULES
from mechinterp.models.placement import PLACEMENTS
from tests.support.commands import process, write
from tests.support.toy_circuits import toy_circuit
from tests.support.words_model import save_words_model

SMALL = ("--examples", "10", "--edges", "20", "--method", "eap", "--anyway", "--resamples", "4")
QUICK = (*SMALL, "--no-roles")  # where roles are not the point


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_words_model(tmp_path_factory.mktemp("models") / "words")


@pytest.fixture(scope="module")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The circuit file of one run."""
    out = tmp_path_factory.mktemp("out")
    assert cli.main(["run", "ioi", "--model", str(model), "--out", str(out), *SMALL]) == 0
    return out / "ioi-words-eap.circuit.json"


def complaint(capsys: pytest.CaptureFixture[str], arguments: Sequence[str]) -> str:
    """The one line on stderr of a command that ends with exit code 2 and prints nothing else."""
    capsys.readouterr()
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.endswith("\n") and err.count("\n") == 1, (out, err)
    return err


# --- what needs no work --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", [[], ["--help"], ["run", "--help"], ["verify", "--help"], ["show", "--help"], ["list", "--help"]]
)
def test_help_names_examples_and_exit_codes(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert text.startswith("Usage: discover-circuit")
    if arguments != ["list", "--help"]:
        assert "1 a claim of the file failed" in text and "2 bad input" in text
    if arguments[:1] != ["show"] and arguments[:1] != ["list"]:
        assert "discover-circuit verify " in text or "discover-circuit run ioi" in text


WITHOUT_TORCH = (
    *("--help", "run --help", "list", "show TOY", "run ioy", "view none.circuit.json", "verify none"),
    *("compare ioi --sizes 1,0.5", "eval TOY --examples x", "run --config none.yaml", "export none --format dot"),
    *("diff TOY none", "cite none", "push none me/x", "run ioi --out TOY", "direct ioi --set a=1"),
)


def test_torch_is_imported_only_for_work(toy: Path) -> None:
    """All in one process, each of them as a user would type it."""
    given = [line.replace("TOY", str(toy)).split() for line in WITHOUT_TORCH]
    code = f"""
import sys
from mechinterp.cli.app import main

for words in {given!r}:
    main(words)
    if "torch" in sys.modules:
        sys.exit(" ".join(words))
"""
    done = process(code=code)
    assert done.returncode == 0, done.stderr[-500:]


def test_help_imports_little() -> None:
    """What its time depends on, 0.4 s of a processor at 344 modules; the time itself depends on the machine, too."""
    code = """
import sys
before = set(sys.modules)
from mechinterp.cli.app import main
main(["--help"])
new = set(sys.modules) - before
heavy = {"numpy", "torch", "transformers", "transformer_lens", "networkx", "plotly", "pandas", "scipy", "safetensors"}
sys.exit(f"{len(new)} modules, {sorted(new & heavy)}" if len(new) > 450 or new & heavy else 0)
"""
    done = process(code=code)
    assert done.returncode == 0, done.stderr[-500:]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert re.fullmatch(r"discover-circuit \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


def test_the_names_that_are_listed_are_those_that_are_registered() -> None:
    assert run_spec.REPLACEMENTS == KINDS and run_spec.RULES == RULES
    assert run_spec.LEVELS[:2] == LEVELS and run_spec.DEVICE_MAPS == PLACEMENTS


def test_list_names_what_there_is(
    toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (toy.parent / "out").mkdir()
    toy.rename(toy.parent / "out" / toy.name)
    (toy.parent / "out" / "broken.circuit.json").write_text("{", "utf-8")
    monkeypatch.chdir(toy.parent)
    assert cli.main(["list"]) == 0
    text = capsys.readouterr().out
    for name in ("ioi", "greater_than", "eap-ig", "exact", "logit_diff", "bundled", "toy", "broken", "cannot be read"):
        assert name in text


# --- mistakes ------------------------------------------------------------------------------------------------------

MISTAKES: dict[str, tuple[list[str], str]] = {
    "unknown task": (["run", "ioy"], "Unknown task 'ioy'. Did you mean 'ioi'?"),
    "unknown method": (["run", "ioi", "--method", "eap_ig"], "Unknown method 'eap_ig'. Did you mean 'eap-ig'?"),
    "unknown metric": (["run", "ioi", "--metric", "logit"], "Unknown metric 'logit'."),
    "unknown model directory": (["run", "ioi", "--model", "./nowhere"], "no model directory './nowhere'"),
    "unknown flag": (["run", "ioi", "--edgse", "3"], "--edgse"),
    "unknown command": (["runn", "ioi"], "runn"),
    "no task": (["run"], "TASK"),
    "two tasks": (["run", "ioi", "induction"], "induction"),
    "edges and threshold": (["run", "ioi", "--edges", "3", "--threshold", "0.1"], "--edges or --threshold"),
    "no edges": (["run", "ioi", "--edges", "0"], "--edges"),
    "edges in words": (["run", "ioi", "--edges", "many"], "--edges"),
    "edges above 100 %": (["run", "ioi", "--model", "MODEL", "--edges", "101%"], "100%"),
    "nodes without their level": (["run", "ioi", "--nodes", "5"], "--nodes does not go with --level edge"),
    "edges of nodes": (["run", "ioi", "--level", "node", "--edges", "5"], "give --nodes"),
    "neurons without their level": (["run", "ioi", "--neurons", "5"], "--level neuron"),
    "unknown level": (["run", "ioi", "--level", "layer"], "level 'layer'"),
    "unknown position": (["run", "ioi", "--model", "MODEL", "--positions", "S3"], "position 'S3'"),
    "positions for cd": (
        ["run", "ioi", "--model", "MODEL", "--positions", "S2", "--method", "cd"],
        "'cd' scores edges",
    ),
    "a ratio of 2": (["run", "ioi", "--ratio", "2"], "--ratio"),
    "a ratio of the integer program": (["run", "ioi", "--model", "MODEL", "--rule", "ilp", "--ratio", "0.5"], "ratio"),
    "a setting of no method": (["compare", "ioi", "--methods", "eap", "--set", "steps=3"], "METHOD.NAME=VALUE"),
    "more examples than a task has": (
        ["run", "greater_than_digits", "--examples", "15000"],
        "at most 10,708 different test examples; got 15,000",
    ),
    "more examples to compare on": (
        ["compare", "greater_than_digits", "--examples", "15000"],
        "at most 10,708 different test examples; got 15,000",
    ),
    "more examples to evaluate on": (["eval", "TOY", "--task", "greater_than_digits", "--examples", "15000"], "10,708"),
    "a seed beyond every generator": (["run", "ioi", "--seed", "99999999999999999999"], "--seed"),
    "an infinite threshold": (["run", "ioi", "--threshold", "inf"], "--threshold is not a finite number"),
    "sizes that fall": (["compare", "ioi", "--sizes", "1,0.5"], "Shares must increase"),
    "sizes in words": (["compare", "ioi", "--sizes", "x"], "Sizes are 'mib' or numbers"),
    "a method twice": (["compare", "ioi", "--methods", "eap,eap"], "each only once"),
    "no method": (["compare", "ioi", "--methods", ""], "--methods are names"),
    "an empty name": (["show", ""], "name of the file is empty"),
    "an empty circuit file": (["eval", "EMPTY"], "EMPTY is empty; JSON is expected"),
    "an empty task file": (["run", "EMPTY.yaml"], "EMPTY.yaml is empty"),
    "view a missing file": (["view", "nothing.circuit.json"], "nothing.circuit.json cannot be read"),
    "push a missing file": (["push", "nothing.circuit.json", "me/x"], "nothing.circuit.json cannot be read"),
    "quiet and verbose": (["run", "ioi", "-q", "-v"], "not both"),
    "a config that is a folder": (["run", "--config", "."], "not a plain file"),
    "a million examples": (["eval", "TOY", "--examples", "1000000"], "20000"),
    "a million examples of a direction": (["direct", "ioi", "--examples", "1000000"], "20000"),
    "evaluate a missing file": (["eval", "nothing.circuit.json"], "nothing.circuit.json"),
    "evaluate on nothing": (["eval", "TOY", "--task", "ioy"], "Did you mean 'ioi'?"),
    "threshold is no number": (["run", "ioi", "--threshold", "nan"], "--threshold"),
    "negative examples": (["run", "ioi", "--examples", "-5"], "--examples"),
    "no steps": (["run", "ioi", "--steps", "0"], "--steps"),
    "no batch": (["run", "ioi", "--batch-size", "0"], "--batch-size"),
    "steps for eap": (["run", "ioi", "--model", "MODEL", "--method", "eap", "--steps", "3"], "steps"),
    "bad dtype": (["run", "ioi", "--model", "MODEL", "--dtype", "float12"], "dtype 'float12'"),
    "bad device": (["run", "ioi", "--model", "MODEL", "--device", "tpu9"], "device 'tpu9'"),
    "absent device": (["run", "ioi", "--model", "MODEL", "--device", "cuda:99"], "cuda:99"),
    "bad device map": (["run", "ioi", "--device-map", "ballanced"], "Did you mean 'balanced'?"),
    "device and map": (["run", "ioi", "--model", "MODEL", "--device", "cpu", "--device-map", "auto"], "not both"),
    "revision of a directory": (["run", "ioi", "--model", "MODEL", "--revision", "main"], "revision"),
    "out is a file": (["run", "ioi", "--out", "FILE"], "--out"),
    "more edges than there are": (["run", "ioi", "--model", "MODEL", "--edges", "100000"], "100000"),
    "missing pairs file": (["run", "nothing.jsonl"], "nothing.jsonl"),
    "pairs file is a directory": (["run", "FOLDER.jsonl"], "FOLDER.jsonl"),
    "pairs file is not pairs": (["run", "FILE.jsonl", "--model", "MODEL"], "FILE.jsonl"),
    "missing task file": (["run", "nothing.yaml"], "nothing.yaml"),
    "missing circuit file": (["show", "nothing.circuit.json"], "nothing.circuit.json"),
    "verify a missing file": (["verify", "nothing.circuit.json"], "nothing.circuit.json"),
    "a directory as file": (["show", "."], "not a plain file"),
    "verify a directory": (["verify", "."], "not a plain file"),
    "show nonsense": (["show", "FILE"], "not valid JSON"),
    "verify nonsense": (["verify", "FILE"], "not valid JSON"),
    "show no rows": (["show", "FILE", "--top", "0"], "--top"),
    "tolerance of 2": (["verify", "TOY", "--tolerance", "2"], "tolerance"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(
    mistake: str,
    model: Path,
    toy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("FILE").write_text("no pairs", "utf-8")
    Path("FILE.jsonl").write_text("no pairs", "utf-8")
    Path("EMPTY").touch()
    Path("EMPTY.yaml").touch()
    Path("FOLDER.jsonl").mkdir()
    before = sorted(tmp_path.rglob("*"))
    arguments, words = MISTAKES[mistake]
    names = {"MODEL": str(model), "TOY": str(toy)}
    line = complaint(capsys, [names.get(word, word) for word in arguments])
    assert words in line and line.startswith("discover-circuit: ")
    assert sorted(path for path in tmp_path.rglob("*") if path.name != "out") == before  # nothing written


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "."], "Cannot load the model '.'"),
        (["--device", "tpu9"], "Unknown device 'tpu9'"),
        (["--features", "x"], "no feature nodes"),
    ],
)
def test_what_is_given_to_verify_is_no_claim_of_the_file(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bad input, not a failed claim."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(["verify", "ioi-bundled-eap-ig", *words]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


def test_a_changed_circuit_file_is_not_shown(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toy.write_text(toy.read_text("utf-8").replace('"faithfulness": 0.9261', '"faithfulness": 0.9961'), "utf-8")
    assert "was changed after it was written" in complaint(capsys, ["show", str(toy)])


@pytest.mark.slow
def test_a_mistake_from_outside_has_no_traceback() -> None:
    done = process("run", "ioy")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


def test_a_bug_is_exit_code_70_and_a_traceback_when_asked(
    monkeypatch: pytest.MonkeyPatch, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(pipeline, "discover", broken)
    command = ["run", "ioi", "--model", str(model), "--out", str(tmp_path)]
    assert cli.main(command) == cli.UNEXPECTED == 70
    assert capsys.readouterr().err.startswith("discover-circuit: unexpected error, ZeroDivisionError. ")
    with pytest.raises(ZeroDivisionError):
        cli.main([*command, "--traceback"])


# --- the work ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_writes_four_files_and_says_what_is_next(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "my results"
    assert cli.main(["run", "ioi", "--model", str(model), "--out", str(out), *SMALL]) == 0
    text, err = capsys.readouterr()
    stem = out / "ioi-words-eap"
    names = [f"{stem}.circuit.json", f"{stem}.scores.safetensors", f"{stem}.report.html", f"{stem}.run.yaml"]
    assert sorted(map(str, out.iterdir())) == sorted(names)
    for name in names:
        assert f"wrote {name}\n" in text
    assert f"next: discover-circuit verify '{names[0]}'\n" in text
    for word in ("edges", "faithfulness", "interval", "random circuits", "KL", "accuracy"):
        assert word in text
    assert err == ""
    document = json.loads(Path(names[0]).read_text("utf-8"))
    assert f"{document['selection']['n_edges']} of {document['graph']['n_edges']} edges recover" in text
    page = Path(names[2]).read_text("utf-8")
    assert all(
        name.replace(">", "&gt;").replace("<", "&lt;") in page for name in (e["name"] for e in document["edges"])
    )


@pytest.mark.slow
def test_a_model_that_does_not_do_the_task_is_exit_code_2(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`run` and `compare` say what they saw; --anyway goes on, and the doubt stands under the finding."""
    few = ["--model", str(model), "--out", str(tmp_path), "--examples", "10"]
    run = ["run", "ioi", *few, "--method", "eap", "--edges", "20", "--no-roles", "--resamples", "0"]
    for arguments in (run, ["compare", "ioi", *few, "--methods", "eap", "--sizes", "0.5,1"]):
        line = complaint(capsys, arguments)
        assert f"{model} does not do ioi on 10 pairs: " in line and "go on with --anyway" in line
        assert re.search(r"logit_diff of clean prompts is not above .*difference \S+ \[-\S+, \S+\]", line)
        assert not list(tmp_path.iterdir())
    assert cli.main([*run, "--anyway"]) == 0
    first = capsys.readouterr().out.splitlines()
    assert "edges recover" in first[0] and "doubt: the model does not do the task" in "\n".join(first[:8])
    assert "doubt: the circuit was found with 10 pairs" in first
    assert not any(line.startswith("stability") for line in first)  # --resamples 0
    document = json.loads((tmp_path / "ioi-words-eap.circuit.json").read_text("utf-8"))
    assert "stability" not in document and document["performance"]["n_examples"] == 10
    page = (tmp_path / "ioi-words-eap.report.html").read_text("utf-8")
    assert "the model does not do the task" in page


@pytest.mark.slow
def test_no_small_circuit_is_exit_code_4(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--model", str(model), "--out", str(tmp_path), "--examples", "10", "--anyway"]
    capsys.readouterr()
    assert cli.main(["run", "ioi", *few, "--method", "random"]) == cli.NO_CIRCUIT == 4
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("discover-circuit: No small circuit at this level")
    nearest = re.search(r"or --edges (\d+) for that one as it is", err)
    assert nearest is not None and not list(tmp_path.iterdir())
    again = ["run", "ioi", *few, "--method", "random", "--edges", nearest.group(1), "--no-roles"]
    assert cli.main(again) == 0  # what it says can be done


@pytest.mark.slow
def test_a_quick_run_is_an_ensemble_with_its_stability(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--model", str(model), "--out", str(tmp_path), "--examples", "20", "--anyway", "--edges", "20"]
    assert cli.main(["run", "ioi", *few, "--effort", "quick", "--no-roles", "--no-curve"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^stability: \d+ of \d+ edges \(\d+%\) are in at least 90% of 100 circuits", text, re.MULTILINE)
    document = json.loads((tmp_path / "ioi-words-ensemble.circuit.json").read_text("utf-8"))
    assert document["discovery"]["method"] == "ensemble" and document["stability"]["resamples"] == 100
    assert "--effort quick" in document["provenance"]["command"]
    assert [point["n_selected"] for point in document["curve"]["points"]] == [20]


@pytest.mark.slow
def test_a_pairs_file_can_be_run(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"clean": [1, 5 + i, 9, 7], "corrupt": [1, 6 + i, 9, 7], "right": [20 + i], "wrong": [40 + i]}
        for i in range(12)
    ]
    pairs = tmp_path / "mine.jsonl"
    pairs.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    assert cli.main(["run", str(pairs), "--model", str(model), "--out", str(tmp_path), *SMALL]) == 0
    assert (tmp_path / "mine-words-eap.report.html").is_file()
    said = "has 12 usable pairs: 6 train, 0 validation and 6 test pairs were taken, 10 train, 10 validation and 10 test"
    assert said in capsys.readouterr().out


@pytest.mark.slow
def test_verify_says_that_all_claims_hold(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", str(made)]) == 0
    assert re.search(r"verified: all \d+ claims of .* hold", capsys.readouterr().out)


@pytest.mark.slow
def test_verify_names_the_claim_that_failed(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sidecar = made.name.replace(".circuit.json", ".scores.safetensors")
    (tmp_path / sidecar).write_bytes((made.parent / sidecar).read_bytes())
    content = json.loads(made.read_text("utf-8"))
    content["evaluation"][0]["kl"] += 1
    changed = tmp_path / made.name
    changed.write_text(json.dumps(content), "utf-8")
    assert cli.main(["verify", str(changed)]) == 1
    text = capsys.readouterr().out
    assert "evaluation.kl" in text and "file hash" in text
    assert re.search(r"NOT verified: \d+ of \d+ claims", text)


def test_show_lists_nodes_and_edges(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = json.loads(made.read_text("utf-8"))
    assert cli.main(["show", str(made), "--top", "1000"]) == 0
    lines = capsys.readouterr().out.splitlines()
    firsts = {line.split()[0] for line in lines if line.split()}
    assert {edge["name"] for edge in content["edges"]} | set(content["nodes"]) <= firsts
    assert cli.main(["show", str(made), "--top", "3"]) == 0
    assert f"--top {len(content['edges'])} shows all" in capsys.readouterr().out


def test_show_knows_roles(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head = next(name for name in toy_circuit().nodes if name.startswith("a"))
    path = write(tmp_path / "toy.circuit.json", roles={"m": {"label": "name mover", "nodes": [head]}})
    assert cli.main(["show", str(path), "--top", "99"]) == 0
    assert re.search(rf"^{re.escape(head)} +name mover", capsys.readouterr().out, re.MULTILINE)


def test_a_stored_circuit_has_a_name(
    toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(named_files, "stored_files", lambda *_: {"toy": toy})
    monkeypatch.chdir(toy.parent)
    assert cli.main(["show", "toy"]) == 0
    assert "edges recover" in capsys.readouterr().out


# --- interrupts and terminals --------------------------------------------------------------------------------------


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.slow
def test_eval_says_how_a_circuit_does_on_another_task(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    of_package = str(Path(__file__).parents[2] / "circuits" / "ioi-bundled-eap-ig.circuit.json")
    assert cli.main(["eval", of_package, "--task", "ioi_distractor", "--examples", "20"]) == 0
    other = capsys.readouterr().out
    assert "144 edges on ioi_distractor\n" in other and "faithfulness" in other and "completeness" not in other
    assert cli.main(["eval", str(made), "--examples", "12", "--tests"]) == 0
    own = capsys.readouterr().out
    for words in ("edges on ioi\n", "equivalence", "independence", "sufficiency", "necessity", "incompleteness"):
        assert words in own


@pytest.mark.slow
@pytest.mark.parametrize(
    "more", [["--level", "node", "--positions", "all"], ["--level", "neuron", "--neurons", "6"], ["--edges", "60%"]]
)
def test_levels_and_positions_go_into_a_file_that_verifies(
    more: list[str], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["run", "ioi", "--model", str(model), "--out", str(tmp_path), "--examples", "12", "--method", "eap"]
    run += ["--no-roles", "--anyway", "--resamples", "3"]
    size = [] if "--edges" in more else ["--nodes", "60%"]
    assert cli.main([*run, *more, *size]) == 0
    (file,) = tmp_path.glob("*.circuit.json")
    assert cli.main(["verify", str(file), "--rescore"]) == 0
    assert cli.main(["show", str(file)]) == 0
    words = json.loads(file.read_text("utf-8"))["provenance"]["command"]
    assert all(word in words for word in [*more, *size])


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checkpoint, "EVERY_SECONDS", 0.0)
    arguments = ["run", "ioi", "--model", str(model), "--examples", "6", "--edges", "20", "--method", "exact"]
    arguments += ["--batch-size", "2", "--no-roles", "--anyway", "--resamples", "0"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert cli.main([*arguments, "--out", str(whole)]) == 0
    save, calls = checkpoint.Checkpoint.save, list[int]()

    def once(self: checkpoint.Checkpoint, state: Any, **keywords: Any) -> None:
        save(self, state, **keywords)
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.Checkpoint, "save", once)
    assert cli.main([*arguments, "--out", str(killed)]) == cli.INTERRUPTED
    assert [path.suffixes[-2:] for path in killed.iterdir()] == [[".unfinished", ".scores"]]
    n = len(calls)
    assert cli.main([*arguments, "--out", str(killed)]) == 0
    assert len(calls) > n and not list(killed.glob("*.unfinished*"))
    name = "ioi-words-exact.circuit.json"
    assert (killed / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize("place", ["resampled_scores", "evaluate_in", "save_circuit"])
def test_ctrl_c_is_one_line_and_leaves_nothing(
    place: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pipeline, place, interrupt)
    assert cli.main(["run", "ioi", "--model", str(model), "--out", str(tmp_path / "out"), *QUICK]) == 130
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "interrupted" in err and "The same command goes on" in err
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.slow
@pytest.mark.parametrize("call", [1, 2, 3])
def test_ctrl_c_while_files_are_written_leaves_no_part_of_one(
    call: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, calls = os.replace, list[object]()

    def counted(*paths: Any) -> None:
        calls.append(paths)
        if len(calls) == call:
            raise KeyboardInterrupt
        replace(*paths)

    monkeypatch.setattr(os, "replace", counted)
    assert cli.main(["run", "ioi", "--model", str(model), "--out", str(tmp_path), *QUICK]) == 130
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ([] if call < 3 else ["ioi-words-eap.circuit.json", "ioi-words-eap.scores.safetensors"])


@pytest.mark.slow
def test_warnings_of_the_package_are_lines(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def warn(done: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **keywords: Any) -> Any:
            logging.getLogger("mechinterp.tasks").warning("two\nlines %s", "[red]")
            return done(*arguments, **keywords)

        return wrapped

    monkeypatch.setattr(pipeline, "evaluate_in", warn(pipeline.evaluate_in))
    assert cli.main(["run", "ioi", "--model", str(model), "--out", str(tmp_path), *QUICK]) == 0
    assert capsys.readouterr().err == "warning: two lines [red]\n"
    assert not logging.getLogger("mechinterp").handlers
