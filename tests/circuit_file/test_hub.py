"""push and pull against a stand-in for the hub: `huggingface_hub` is the real one, uploads too."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

import mechinterp as mi
from mechinterp.base.errors import FormatError, InputError
from mechinterp.circuit_file import hub
from mechinterp.circuit_file.store import OpenedFile
from mechinterp.cli import app as cli
from mechinterp.graphs.circuit import Circuit
from tests.support.hub_stand_in import StandIn, running

STORED = Path(__file__).parents[2] / "circuits"
FILE = STORED / "ioi-bundled-eap-ig.circuit.json"
SIDECAR = STORED / "ioi-bundled-eap-ig.scores.safetensors"
REPO, SECRET = "me/circuits", "hf_aVerySecretToken"


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    with running() as found:
        found.create(f"models/{REPO}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", found.endpoint)
        template = found.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # xet is another server; the hub takes both
        monkeypatch.setenv("HF_TOKEN", SECRET)
        yield found


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """What the client keeps of a hub's answers does not come from elsewhere and goes nowhere."""
    folder = tmp_path_factory.mktemp("hub-cache")
    monkeypatch.setattr(constants, "HF_HOME", str(folder))
    monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", str(folder / "answer.json"), raising=False)


@pytest.mark.parametrize("answer", ["[]", "{}", "null", '"x"', '{"sha": 3, "siblings": 7}', '{"siblings": [{}]}'])
@pytest.mark.parametrize("command", [["pull", REPO, "--revision", "main"], ["push", str(FILE), REPO]])
def test_what_is_no_hub_is_told_in_one_line(
    answer: str, command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    class Strange(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = not self.path.startswith("/api/agent")  # which the client asks by itself, and keeps
            self.send_response(200 if known else 404)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer.encode())

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Strange)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    assert cli.main(command) in (2, 3)
    server.shutdown()
    server.server_close()
    told = capsys.readouterr()
    assert told.err.count("\n") == 1 and "Traceback" not in told.err and not list(tmp_path.iterdir())


def test_an_endpoint_that_is_no_address(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://[bad")
    assert cli.main(["pull", REPO, "--revision", "main"]) == 2
    assert "HF_ENDPOINT" in capsys.readouterr().err


def test_no_revision_is_refused_however_it_is_written(
    stand_in: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in.commit(f"models/{REPO}", "main", {FILE.name: FILE.read_bytes(), SIDECAR.name: SIDECAR.read_bytes()})
    assert cli.main(["pull", REPO, "--revision", "", "--out", str(tmp_path / "new")]) == 2
    assert "Give a --revision" in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_what_was_checked_is_what_is_uploaded(
    stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = copied(tmp_path)
    checks = hub.circuit_of

    def then_replaced(opened: OpenedFile) -> Circuit:
        found = checks(opened)
        path.write_text("{}")
        return found

    monkeypatch.setattr(hub, "circuit_of", then_replaced)
    done = mi.push_circuit(path, REPO, endpoint=stand_in.endpoint)
    assert stand_in.commits[f"models/{REPO}"][done.commit][FILE.name] == FILE.read_bytes()


def copied(folder: Path, name: str = FILE.name) -> Path:
    """The stored circuit with its sidecar in another folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SIDECAR.name).write_bytes(SIDECAR.read_bytes())
    (folder / name).write_bytes(FILE.read_bytes())
    return folder / name


def test_what_was_pushed_is_pulled_byte_for_byte(
    stand_in: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    n_before = len(stand_in.commits[f"models/{REPO}"])
    assert cli.main(["push", str(FILE), REPO]) == 0
    told = capsys.readouterr().out
    commit = stand_in.branches[f"models/{REPO}"]["main"]
    assert len(stand_in.commits[f"models/{REPO}"]) == n_before + 1 and f"commit {commit}\n" in told
    command = told.strip().splitlines()[-1].partition("discover-circuit ")[2].split()
    assert cli.main([*command, "--out", str(tmp_path / "new")]) == 0
    told = capsys.readouterr()
    assert f"pulled {REPO}/{FILE.name} at commit {commit}\n" in told.out and "next: discover-circuit verify" in told.out
    assert SECRET not in told.out + told.err
    assert {path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()} == {
        FILE.name: FILE.read_bytes(),
        SIDECAR.name: SIDECAR.read_bytes(),
    }


@pytest.mark.slow
def test_a_commit_gives_the_old_version_after_a_second_push(stand_in: StandIn, tmp_path: Path) -> None:
    first = mi.push_circuit(FILE, REPO)
    circuit = mi.load_circuit(FILE)
    assert circuit.scores is not None
    smaller = mi.select(circuit.graph, circuit.scores, edges=30, by="magnitude")
    changed = tmp_path / FILE.name
    mi.save_circuit(changed, smaller, model=mi.load_model("bundled"))
    second = mi.push_circuit(changed, REPO, message="Fewer edges")
    assert second.commit != first.commit and second.new
    old = mi.pull_circuit(str(first.place), revision=first.commit, out=tmp_path / "old")
    new = mi.pull_circuit(REPO, revision="main", out=tmp_path / "new")
    assert (old.commit, new.commit) == (first.commit, second.commit)
    assert old.files[0].read_bytes() == FILE.read_bytes() and new.files[0].read_bytes() == changed.read_bytes()


def test_the_same_push_again_is_said_to_be_the_same(stand_in: StandIn) -> None:
    first = mi.push_circuit(FILE, REPO)
    again = mi.push_circuit(FILE, REPO)
    assert (again.commit, again.new) == (first.commit, False)


def test_a_circuit_without_scores_and_a_data_set(stand_in: StandIn, tmp_path: Path) -> None:
    stand_in.create("datasets/me/data")
    file = STORED / "tracr-reverse-zero.circuit.json"
    done = mi.push_circuit(file, "datasets/me/data")
    assert str(done.place) == f"datasets/me/data/{file.name}"
    beside = tmp_path / "tracr-reverse-zero.scores.safetensors"
    beside.write_bytes(b"somebody else's")
    pulled = mi.pull_circuit("datasets/me/data/tracr-reverse-zero", revision=done.commit, out=tmp_path)
    assert [path.name for path in pulled.files] == [file.name] and beside.read_bytes() == b"somebody else's"


def test_pull_without_a_revision_names_the_commit(stand_in: StandIn, tmp_path: Path) -> None:
    commit = mi.push_circuit(FILE, REPO).commit
    with pytest.raises(InputError, match=f"pull {REPO}/{FILE.name} --revision {commit}"):
        mi.pull_circuit(REPO, revision=None, out=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_was_changed_is_neither_pushed_nor_kept(stand_in: StandIn, tmp_path: Path) -> None:
    repo = f"models/{REPO}"
    commit = mi.push_circuit(FILE, REPO).commit
    broken = bytearray(SIDECAR.read_bytes())
    broken[-1] ^= 1
    for name, data in ((SIDECAR.name, bytes(broken)), (FILE.name, FILE.read_bytes().replace(b"eap-ig", b"eap-xx"))):
        stand_in.lies["bytes"] = {name: data}
        with pytest.raises(FormatError, match="Nothing was kept") as caught:
            mi.pull_circuit(REPO, revision=commit, out=tmp_path / "out")
        assert tempfile.gettempdir() not in str(caught.value)
    stand_in.lies.clear()
    file = copied(tmp_path / "mine")
    (file.parent / SIDECAR.name).write_bytes(broken)
    with pytest.raises(FormatError, match="not the file of scores"):
        mi.push_circuit(file, REPO)
    assert stand_in.branches[repo]["main"] == commit and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [FILE.name, SIDECAR.name])
def test_a_file_that_is_too_large_is_not_downloaded(
    name: str, stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = mi.push_circuit(FILE, REPO).commit
    stand_in.lies["sizes"] = {name: 2**40}
    stand_in.asked.clear()
    with pytest.raises(FormatError, match=r"1,099,511,627,776 bytes; at most"):
        mi.pull_circuit(REPO, revision=commit, out=tmp_path)
    assert not any(f"resolve/{commit}/{name}" in line for line in stand_in.asked)
    stand_in.lies["sizes"], stand_in.lies["bytes"] = {}, {name: b" " * 10**6}  # the hub states less than it sends
    with pytest.raises(FormatError, match="bytes that the hub states"):
        mi.pull_circuit(REPO, revision=commit, out=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["../../evil.circuit.json", "/etc/evil.circuit.json", "a\\..\\evil.circuit.json", "x/.hidden.circuit.json"]
)
def test_names_that_lead_elsewhere_are_refused(name: str, stand_in: StandIn, tmp_path: Path) -> None:
    stand_in.lies["names"] = [name]
    with pytest.raises(InputError):
        mi.pull_circuit(REPO, revision="main", out=tmp_path / "out")
    with pytest.raises(InputError):
        mi.pull_circuit(f"{REPO}/{name}", revision="main", out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    assert not any("resolve" in line for line in stand_in.asked)


def test_other_files_are_overwritten_only_by_force(
    stand_in: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commit = mi.push_circuit(FILE, REPO).commit
    arguments = ["pull", REPO, "--revision", commit, "--out", str(tmp_path)]
    (tmp_path / SIDECAR.name).write_bytes(b"mine")
    assert cli.main(arguments) == 2
    assert "would be overwritten" in capsys.readouterr().err
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"mine"]
    assert cli.main([*arguments, "--force"]) == 0
    assert (tmp_path / SIDECAR.name).read_bytes() == SIDECAR.read_bytes()
    times = [path.stat().st_mtime_ns for path in tmp_path.iterdir()]
    assert cli.main(arguments) == 0 and "already there, the same" in capsys.readouterr().out
    assert [path.stat().st_mtime_ns for path in tmp_path.iterdir()] == times


@pytest.mark.parametrize("call", [1, 2])
def test_a_killed_pull_leaves_nothing(
    call: int, stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By an interrupt while the second file is read, and while the first is renamed."""
    commit = mi.push_circuit(FILE, REPO).commit
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    if call == 1:
        download, calls = hub._download, list[int]()
        monkeypatch.setattr(
            hub, "_download", lambda *a: download(*a) if not calls and not calls.append(1) else interrupted()
        )
    else:
        monkeypatch.setattr(os, "replace", interrupted)
    assert cli.main(["pull", REPO, "--revision", commit, "--out", str(tmp_path / "out")]) == 130
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pull", "me/nothing", "--revision", "main"], "model repository 'me/nothing' does not exist"),
        (["pull", REPO, "--revision", "nowhere"], "has no revision 'nowhere'"),
        (["pull", REPO, "--revision", "0" * 40], "has no revision"),
        (["pull", REPO, "--revision", "main"], "has 0 circuit files"),
        (["pull", f"{REPO}/absent", "--revision", "main"], "Unknown circuit file of me/circuits 'absent'"),
        (["pull", "circuits", "--revision", "main"], "'circuits' is not a repository of the hub"),
        (["push", "FILE", "me/nothing"], "model repository 'me/nothing' does not exist"),
        (["push", "FILE", REPO, "--revision", "nowhere"], "has no revision 'nowhere'"),
        (["push", "FILE", f"{REPO}/folder"], "without 'folder'"),
        (["push", "nothing", REPO], "nothing"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str], words: str, stand_in: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--out", str(tmp_path)] if arguments[0] == "pull" else []
    assert cli.main([str(FILE) if word == "FILE" else word for word in arguments] + more) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and words in err and SECRET not in err
    assert list(tmp_path.iterdir()) == [] and len(stand_in.commits[f"models/{REPO}"]) == 1


def test_a_push_that_the_hub_refuses_or_drops_is_told(stand_in: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    stand_in.lies["status"] = 403
    assert cli.main(["push", str(FILE), REPO]) == 2
    assert "You have no permission" in capsys.readouterr().err
    stand_in.lies = {"ignored": [SIDECAR.name]}
    assert cli.main(["push", str(FILE), REPO]) == 2
    assert f"does not hold {SIDECAR.name}" in capsys.readouterr().err


def test_a_hub_out_of_reach_is_one_line_and_exit_code_3(
    stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    for arguments in (["pull", REPO, "--revision", "main", "--out", str(tmp_path)], ["push", str(FILE), REPO]):
        assert cli.main(arguments) == 3
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and "The hub cannot be reached" in err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert cli.main(["pull", REPO, "--revision", "main"]) == 3
    assert capsys.readouterr().err.count("offline mode is on") == 1


def test_what_is_no_hub_is_said_to_be_none(
    stand_in: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in.lies["page"] = b"<html>Log in to the network of this hotel</html>"
    assert cli.main(["pull", REPO, "--revision", "main", "--out", str(tmp_path)]) == 3
    assert "not that of a Hugging Face hub" in capsys.readouterr().err


@pytest.mark.slow
def test_the_endpoint_is_that_of_the_environment(stand_in: StandIn, tmp_path: Path) -> None:
    commit = mi.push_circuit(FILE, REPO).commit
    command = [sys.executable, "-m", "mechinterp", "pull", REPO, "--revision", commit, "--out", str(tmp_path)]
    environ = {**os.environ, "HF_ENDPOINT": stand_in.endpoint, "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and len(list(tmp_path.iterdir())) == 2


def test_an_index_without_end_is_not_read_on(
    stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither one that is too large nor one that comes too slowly."""
    pull = ["pull", REPO, "--revision", "main", "--out", str(tmp_path)]
    stand_in.lies["endless"] = 0
    assert cli.main(pull) == 2 and "more than the 16,777,216 bytes" in capsys.readouterr().err
    assert cli.main(["push", str(FILE), REPO]) == 2 and "the index of me/circuits" in capsys.readouterr().err
    stand_in.lies["endless"] = 0.05
    monkeypatch.setattr(hub, "SECONDS_IN_ALL", 0.3)
    assert cli.main(pull) == 3 and "took more than" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_file_that_looks_like_an_option_is_not_pulled(
    stand_in: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in.commit(f"models/{REPO}", "main", {"--force.circuit.json": FILE.read_bytes()})
    assert cli.main(["pull", REPO, "--revision", "main", "--out", str(tmp_path)]) == 2
    assert "does not begin with" in capsys.readouterr().err and not list(tmp_path.iterdir())
