"""The command line on files that somebody made to harm: bounded, one line, the right exit code, nothing that steers."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mechinterp import run_spec
from mechinterp.base.canonical_json import MAX_VALUES, parse_json
from mechinterp.base.errors import FormatError, InputError
from mechinterp.circuit_file import limits
from mechinterp.circuit_file.formats.names import EXPORTS
from mechinterp.circuit_file.schema import CircuitFile, json_schema
from mechinterp.circuit_file.store import open_circuit_file, sidecar_name
from mechinterp.circuit_file.verify import verification
from mechinterp.circuit_file.verify.cost_estimate import planned_runs
from mechinterp.cli import app as cli
from mechinterp.graphs.graph import graph_of
from mechinterp.models.layout import Dims
from mechinterp.tasks import task as task_module
from mechinterp.tasks.pair_files import load_pairs
from mechinterp.tasks.task import load_task
from tests.support.fuzz import BYTES, SECONDS, Place, at_most, place_in, without_models
from tests.support.hostile_json import EVIL, Done, get, places, put, run, sealed


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Circuit files with every part; no command loads a model."""
    made = place_in(tmp_path_factory.mktemp("place"))
    with without_models(made):
        yield made


@pytest.fixture
def whole(place: Place) -> dict[str, Any]:
    return json.loads(json.dumps(place.seeds["all"]))


def write(place: Place, content: dict[str, Any], folder: Path) -> Path:
    """The file, its hashes made right, with its sidecar; it must be one that the schema takes."""
    (folder / "all.scores.safetensors").write_bytes(place.sidecar)
    assert sealed(content, folder / "all.circuit.json"), "the schema refuses it"
    return folder / "all.circuit.json"


def complaint(*arguments: str | Path, code: int = 2) -> str:
    """The one line of a command that ends with this exit code, soon and without much memory."""
    with at_most(BYTES):
        done = run(*arguments)
    assert not done.problems((code,)), done
    assert done.seconds < SECONDS, f"{done.seconds:.1f} s"
    return done.err


# --- the unexpected --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_unexpected_error_is_one_line_and_exit_code_70(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not 1, which means that a claim failed."""

    def broken(*arguments: Any) -> None:
        raise KeyError(EVIL * 100)

    monkeypatch.setattr(cli, "find_file", broken)
    done = run("show", "x")
    assert not done.problems((70,)) and "KeyError" in done.err and "--traceback" in done.err
    for arguments in (("show", "x", "--traceback"), ("--traceback", "show", "x")):
        with pytest.raises(KeyError):
            cli.main(arguments)
    assert "--traceback" in run("--help").out and "70 an unexpected error" in " ".join(run("--help").out.split())


# --- markup and controls ---------------------------------------------------------------------------------------------


def texts(content: Any) -> Iterator[tuple[Any, ...]]:
    """The place of every text."""
    return (at for at in places(content) if isinstance(get(content, at), str))


@pytest.mark.slow
def test_no_text_of_a_file_steers_the_terminal(place: Place, whole: dict[str, Any], tmp_path: Path) -> None:
    """Markup, escape sequences and bidi controls in every text that the schema lets be free, in all commands."""
    free = [at for at in texts(whole) if at[0] not in ("nodes", "edges", "integrity") and _can_be(whole, at, EVIL)]
    assert len(free) > 40  # titles, units, names of pairs, roles, authors, versions, ...
    for at in free:
        put(whole, at, EVIL)
    whole["roles"] = {EVIL: {**whole["roles"]["mover"], "label": EVIL}}
    whole["role_edges"] = [{"source": EVIL, "target": "logits", "positions": {EVIL: EVIL}, "note": EVIL}]
    whole["positions"] = {EVIL: {"description": EVIL}}
    whole["provenance"]["versions"] = {EVIL: EVIL, "mechinterp": EVIL}
    whole["citation"] = {"title": EVIL, "authors": [EVIL], "doi": EVIL, "arxiv": EVIL, "url": EVIL, "bibtex": EVIL}
    whole["selection"]["parameters"] = {EVIL: EVIL}
    whole["discovery"]["parameters"] = {EVIL: EVIL}
    (tmp_path / "out").mkdir()
    path = write(place, whole, tmp_path / "out")
    for arguments, codes in _commands(path, place.folder / "all.circuit.json", tmp_path):
        done = run(*arguments)
        assert not done.problems(codes), done
    out = run("show", path).out
    assert "[link=http://a.b]" in out  # a text, not a link


def _commands(path: Path, other: Path, folder: Path) -> Iterator[tuple[tuple[str | Path, ...], tuple[int, ...]]]:
    for command in ("show", "validate", "cite"):
        yield (command, path), (0,)
    yield ("verify", path), (1,)
    yield ("verify", path, "--rescore"), (1,)
    yield ("view", path, "--no-open", "--out", folder / "page.html"), (0,)
    yield ("diff", path, other), (0, 1)
    yield ("diff", other, path, "--out", folder / "d.html"), (0, 1)
    yield ("eval", path), (2, 3)
    for format in EXPORTS:
        yield ("export", path, "--format", format, "--out", folder / f"e-{format}"), (0, 2)


def _can_be(content: dict[str, Any], at: tuple[Any, ...], text: str) -> bool:
    """Whether the schema takes a file with this text there."""
    changed = json.loads(json.dumps(content))
    put(changed, at, text)
    try:
        CircuitFile.model_validate(changed)
    except ValueError:
        return False
    return True


def test_list_shows_texts_as_they_are(
    place: Place, whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole["evaluation"] = []
    whole["title"] = EVIL
    (tmp_path / "out").mkdir()
    write(place, whole, tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    done = run("list")
    assert not done.problems((0,)) and "[link=http://a.b]" in " ".join(done.out.split())


# --- memory and time -------------------------------------------------------------------------------------------------


def resized(content: dict[str, Any], layers: int, heads: int) -> dict[str, Any]:
    """The file as one of a larger model, whose graph it describes rightly."""
    content["model"]["dims"] |= {"n_layers": layers, "n_heads": heads, "n_kv_heads": heads}
    graph = graph_of(Dims(**content["model"]["dims"]))
    content["graph"] |= {
        "n_writers": len(graph.writers),
        "n_readers": len(graph.readers),
        "n_edges": graph.n_edges,
        "sha256": graph.digest(),
    }
    content["edges"], content["nodes"] = [{"name": "input->logits"}], ["input", "logits"]
    content["roles"], content["role_edges"], content["predictions"] = {}, None, None
    content["selection"] |= {"n_edges": 1, "n_selected": 1}
    for part in ("discovery", "curve"):
        content.pop(part)
    content["integrity"].pop("sidecar")
    return content


def test_a_graph_beyond_a_70b_model_is_refused_at_once(whole: dict[str, Any], place: Place, tmp_path: Path) -> None:
    path = tmp_path / "all.circuit.json"
    whole["model"]["dims"] |= {"n_layers": 100, "n_heads": 64, "n_kv_heads": 64}
    path.write_text(json.dumps(whole), "utf-8")
    for command in ("show", "validate", "verify", "cite", "view"):
        assert "larger than this version reads" in complaint(command, path)
    whole["model"]["dims"] |= {"n_layers": 12, "n_heads": 12, "n_kv_heads": 12}
    whole["graph"]["positions"] = [f"p{i}" for i in range(999)] + ["rest"]
    path.write_text(json.dumps(whole), "utf-8")
    assert "larger than this version reads" in complaint("validate", path)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["validate", "verify", "diff", "export"])
def test_the_largest_graph_takes_little_time_and_memory(
    command: str, whole: dict[str, Any], place: Place, tmp_path: Path
) -> None:
    """A file of a few kB that describes a model of 35 layers with 46 heads: 3.9 million edges."""
    path = write(place, resized(whole, 35, 46), tmp_path)
    assert path.stat().st_size < 20_000
    more = {"diff": (path,), "export": ("--format", "csv", "--out", tmp_path / "x.csv")}.get(command, ())
    with at_most(BYTES):
        done = run(command, path, *more)
    expected = (3,) if command == "verify" else (0, 1)  # the model was in memory
    assert not done.problems(expected) and done.seconds < 5 * SECONDS, done


def test_a_graph_is_hashed_as_before() -> None:
    """Row by row, to the same bytes as its JSON in one piece."""
    for layers, heads in ((1, 1), (3, 4)):
        graph = graph_of(Dims(layers, heads, heads, 8, 4, 9, 9, 9, has_mlp=True, parallel=False, causal=True))
        whole = json.dumps([graph.writers, graph.readers, graph.possible.nonzero().tolist()])
        assert graph.digest() == hashlib.sha256(whole.encode()).hexdigest()


def test_values_are_counted_before_they_are_made(place: Place, tmp_path: Path) -> None:
    path = tmp_path / "a.circuit.json"
    path.write_bytes(b"[" + b"[]," * (60 * 2**20 // 3) + b"[]]")
    assert "values that it can have" in complaint("show", path)
    with pytest.raises(FormatError, match="values"):
        parse_json(b"[" + b"0," * MAX_VALUES + b"0]", "x")
    assert len(parse_json(b"[" + b"0," * 1000 + b"0]", "x")) == 1001


def test_rows_are_bounded_before_they_are_padded(whole: dict[str, Any], place: Place, tmp_path: Path) -> None:
    name = next(iter(whole["pairs"]))
    for field in ("clean", "answer_pos", "right"):
        changed = json.loads(json.dumps(whole))
        made = changed["pairs"][name]["made_from"]
        made[field] = [[1] * 50_000, *([1] for _ in range(2000))]
        path = tmp_path / "all.circuit.json"
        path.write_text(json.dumps(changed), "utf-8")
        assert "padded to 50000 ids" in complaint("validate", path)
    rows = [{"clean": [1] * 30_000, "corrupt": [2] * 30_000}, *({"clean": [1], "corrupt": [2]} for _ in range(2000))]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    assert "padded" in complaint("run", pairs, "--out", tmp_path / "out")
    rows = [{"clean": [1], "corrupt": [2], "right": [*range(3, 30_000)]}] + [
        {"clean": [1], "corrupt": [2], "right": [3]}
    ] * 2000
    pairs.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    assert "right has 2001 rows" in complaint("run", pairs, "--out", tmp_path / "out")


def test_every_list_and_mapping_of_the_schema_is_bounded() -> None:
    free = {"extensions", "spec"}  # bounded by the number of values in a file

    def unbounded(part: Any, at: str) -> Iterator[str]:
        if isinstance(part, dict):
            if part.get("type") == "array" and "maxItems" not in part:
                yield at
            if part.get("type") == "object" and part.get("additionalProperties") and "maxProperties" not in part:
                yield at
            for key, entry in part.items():
                yield from unbounded(entry, f"{at}.{key}")
        elif isinstance(part, list):
            for entry in part:
                yield from unbounded(entry, at)

    found = [at for at in unbounded(json_schema(), "") if at.rpartition(".")[2] not in free]
    assert not found, found


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (("evaluation", 0, "random_faithfulness"), [0.5] * 101),
        (("curve", "points"), [{"n_selected": 1, "n_edges": 1, "faithfulness": 0.5}] * 1001),
        (("curve", "points"), []),
        (("model", "dtype"), "float8_e4m3fn"),
        (("model", "dtype"), "x" * 900),
        (("integrity", "sidecar", "file"), "--force.scores.safetensors"),
    ],
)
def test_the_schema_refuses(
    at: tuple[Any, ...], value: Any, whole: dict[str, Any], place: Place, tmp_path: Path
) -> None:
    put(whole, at, value)
    path = tmp_path / "all.circuit.json"
    path.write_text(json.dumps(whole), "utf-8")
    for command in ("show", "verify"):
        assert ".".join(map(str, at))[:20] in complaint(command, path)


def test_many_evaluations_and_examples_are_refused(whole: dict[str, Any], place: Place, tmp_path: Path) -> None:
    path = tmp_path / "all.circuit.json"
    path.write_text(json.dumps({**whole, "evaluation": whole["evaluation"] * 1001}), "utf-8")
    assert "evaluation" in complaint("verify", path)
    toy = json.loads(json.dumps(place.seeds["toy"]))
    toy["pairs"]["evaluation"]["n"] = 100_000
    path.write_text(json.dumps(toy), "utf-8")
    assert "at most 20000 examples" in complaint("verify", path)
    assert run_spec.MAX_EXAMPLES == limits.MAX_EXAMPLES  # so that a run that cannot be saved does not begin


@pytest.mark.slow
def test_thousands_of_roles_take_linear_time(whole: dict[str, Any], place: Place, tmp_path: Path) -> None:
    node = whole["roles"]["mover"]["nodes"][0]
    whole["roles"] = {f"r{i}": {"label": "x", "nodes": [node]} for i in range(10_000)}
    whole["role_edges"] = None
    path = write(place, whole, tmp_path)
    done = run("show", path)
    assert not done.problems((0,)) and done.seconds < SECONDS, done.seconds
    whole["roles"] |= {f"s{i}": {"label": "x", "nodes": [node]} for i in range(20_000)}
    path.write_text(json.dumps(whole), "utf-8")
    assert "roles" in complaint("show", path)


def test_a_header_of_many_columns_is_refused_at_once(place: Place, tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text(",".join(f"c{i}" for i in range(200_000)) + "\n1\n", "utf-8")
    assert "Unknown column 'c0'" in complaint("run", path, "--out", tmp_path / "out")
    path.write_text("\n" * 10**6 + "clean,corrupt\n", "utf-8")
    assert "pairs.csv" in complaint("run", path, "--out", tmp_path / "out")


def test_verify_says_how_much_it_will_run(whole: dict[str, Any], place: Place, tmp_path: Path) -> None:
    path = write(place, whole, tmp_path)
    document = open_circuit_file(path).document
    n = document.evaluation[0].n_examples
    # The model, the circuit, the empty circuit and 2 random ones; 2 and 2 sizes; one prediction with one control.
    runs = n * (3 + 2) + n * (2 + 2) + n * (2 + 1)
    said = f"to run: 1 evaluation, a curve of 2 sizes, 1 prediction; about {runs} forward passes of one example"
    assert planned_runs(document) == said
    assert planned_runs(document, rescore=True).startswith(f"{said}; and all scores again: eap on {n} examples")
    assert run("verify", path).out.startswith(said)


# --- what a file makes us open ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "named", ["/etc/passwd", "/proc/self/mem", "/dev/zero", "../up.jsonl", "x" * 900, "..", "/", "\u0000"]
)
def test_verify_opens_only_what_lies_beside_the_file(
    named: str, whole: dict[str, Any], place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "up.jsonl").write_text("secret", "utf-8")
    folder = tmp_path / "a"
    folder.mkdir()
    monkeypatch.chdir(folder)
    opened: list[Path] = []
    true = verification.read_bounded

    def watched(path: Path, most: int) -> bytes:
        opened.append(path)
        return true(path, most)

    monkeypatch.setattr(verification, "read_bounded", watched)
    whole["task"]["path"] = named
    whole["model"]["origin"] = "directory"
    with at_most(BYTES):
        done = run("verify", write(place, whole, folder))
    assert not done.problems((1,)) and done.seconds < SECONDS
    assert opened == []
    for secret in (b"secret", Path("/etc/passwd").read_bytes() if Path("/etc/passwd").exists() else b"x"):
        assert hashlib.sha256(secret).hexdigest()[:12] not in done.out


def test_what_lies_beside_is_a_plain_file_and_its_hash_is_not_told(
    whole: dict[str, Any], place: Place, tmp_path: Path
) -> None:
    whole["task"]["path"] = "somewhere/mine.jsonl"
    whole["model"]["origin"] = "directory"  # a claim that fails, so that the others are checked, too
    path, beside = write(place, whole, tmp_path), tmp_path / "mine.jsonl"
    beside.write_bytes(b"other")
    done = run("verify", path)
    assert "was changed" in " ".join(done.out.split()) and hashlib.sha256(b"other").hexdigest()[:12] not in done.out
    beside.unlink()
    beside.symlink_to("/etc/passwd")
    assert "is a link out of the folder" in " ".join(run("verify", path).out.split())
    beside.unlink()
    os.mkfifo(beside)
    assert "not beside the circuit file" in " ".join(run("verify", path).out.split())


# --- odd values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (("model", "name"), "x" * 900),
        (("task", "path"), "x" * 900),
        (("task", "path"), "a/" * 400),
        (("selection", "parameters", "edges"), "x" * 9000),
        (("selection", "parameters", "edges"), True),
        (("selection", "parameters", "by"), 3),
        (("selection", "parameters", "rule"), 0.5),
        (("selection", "parameters", "ratio"), "x"),
    ],
)
def test_odd_values_are_failed_claims(
    at: tuple[Any, ...], value: Any, whole: dict[str, Any], place: Place, tmp_path: Path
) -> None:
    put(whole, at, value)
    whole["model"]["origin"] = "directory"
    done = run("verify", write(place, whole, tmp_path))
    assert not done.problems((1,)), done


def test_a_threshold_is_a_number(whole: dict[str, Any], place: Place, tmp_path: Path) -> None:
    whole["selection"]["parameters"] = {"threshold": "x"}
    done = run("verify", write(place, whole, tmp_path))
    assert not done.problems((1,)) and "threshold must be a number" in " ".join(done.out.split())


@pytest.mark.parametrize("command", ["show", "validate", "verify", "cite", "view", "eval", "run", "push"])
def test_names_that_no_file_system_takes(command: str, place: Place, tmp_path: Path) -> None:
    for name in ("x" * 900, "a/" * 3000, "x" * 400 + ".jsonl", "a\x00b"):
        complaint(command, name, *(("me/repo",) if command == "push" else ()))


@pytest.mark.parametrize("repo", ["x" * 400, f"{'x' * 400}/y", "me/" + "y" * 900])
def test_long_names_of_repositories(repo: str, place: Place, tmp_path: Path) -> None:
    complaint("pull", repo, "--revision", "main", "--out", tmp_path)
    complaint("push", place.folder / "toy.circuit.json", repo)


def test_what_looks_like_an_option_is_no_name(tmp_path: Path) -> None:
    for name in ("--force.circuit.json", "-x.circuit.json", ".hidden.circuit.json", "x" * 300 + ".circuit.json"):
        with pytest.raises(InputError):
            sidecar_name(tmp_path / name)


@pytest.mark.parametrize("dtype", [[], {}, None, 3, [["F32"]]])
def test_a_sidecar_with_an_odd_dtype(dtype: Any, whole: dict[str, Any], place: Place, tmp_path: Path) -> None:
    size = int.from_bytes(place.sidecar[:8], "little")
    header = json.loads(place.sidecar[8 : 8 + size])
    header["scores"]["dtype"] = dtype
    text = json.dumps(header).encode()
    made = len(text).to_bytes(8, "little") + text + place.sidecar[8 + size :]
    whole["integrity"]["sidecar"]["sha256"] = hashlib.sha256(made).hexdigest()
    path = write(place, whole, tmp_path)
    (tmp_path / "all.scores.safetensors").write_bytes(made)
    assert "must be F32 or F64" in complaint("validate", path)


def test_half_of_a_surrogate_pair_is_refused(place: Place, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"clean": "a \\ud800", "corrupt": "b c"}\n' * 2, "utf-8")
    assert "surrogate" in complaint("run", path, "--out", tmp_path / "out")
    task = Path(task_module.__file__).with_name("ioi.yaml").read_text("utf-8")
    path = tmp_path / "task.yaml"
    path.write_text(task.replace("title: ", 'title: "\\ud800" #', 1), "utf-8")
    assert "task.yaml" in complaint("run", path, "--out", tmp_path / "out")


def test_a_pipe_is_no_file_of_pairs_and_no_task(place: Place, tmp_path: Path) -> None:
    for name in ("pairs.jsonl", "task.yaml"):
        os.mkfifo(tmp_path / name)
        read: Callable[[Path], Any] = load_pairs if name == "pairs.jsonl" else load_task
        with pytest.raises(FormatError, match="not a plain file"):
            read(tmp_path / name)


# --- citations -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bibtex",
    [
        '@preamble{"\\write18{touch owned}"}',
        "@misc{k, title = {\\input{/etc/passwd} ^^5cinput ~ a^b}}",
        "@misc{k, title = {x}}\n@preamble{y}",
        "@misc{k, title = {x} } } @preamble{y}",
        "@misc{k, title = {x}, evil = {\\write18{y}}, year = 2023}",
        "@misc{k, title = {x" + "{" * 3000 + "}" * 3000 + "}}",
    ],
)
def test_nothing_of_a_citation_is_printed_as_it_is(
    bibtex: str, whole: dict[str, Any], place: Place, tmp_path: Path
) -> None:
    whole["citation"] = {"title": "A ^ b ~ \\write18{c}", "authors": ["D @preamble{e}"], "bibtex": bibtex}
    done: Done = run("cite", write(place, whole, tmp_path))
    assert not done.problems((0,))
    for line in done.out.splitlines():
        assert not line.lower().startswith("@preamble")
        for command in ("\\write", "\\input", "^^"):
            assert command not in line
    assert done.out.count("{") == done.out.count("}")
    assert sum(line.startswith("@") for line in done.out.splitlines()) == 3
