"""Real processes: two that are connected as by torchrun, and shards that are merged, find the circuit of one process to
the last bit."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import shlex
import signal
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import mechinterp as mi
from mechinterp.base.errors import InputError
from mechinterp.cli import app as cli
from mechinterp.cli.processes import spec_here
from mechinterp.discovery import score_pieces
from mechinterp.pipeline import discover
from mechinterp.run_spec import RunSpec, command_of, parsed_shard
from mechinterp.shard_files import merge, read_shards, score_shard

RUN = RunSpec(
    "ioi", method="eap", edges=60, examples=8, validation_examples=4, test_examples=4, batch_size=2, resamples=8,
    curve=False, roles=False,
)  # fmt: skip
WORDS = shlex.split(command_of(RUN))[1:]
NAME = "ioi-bundled-eap.circuit.json"


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of the run in one process."""
    return discover(replace(RUN, out=tmp_path_factory.mktemp("alone"))).path


def same(path: Path, other: Path) -> bool:
    sidecar = NAME.replace("circuit.json", "scores.safetensors")
    return path.read_bytes() == other.read_bytes() and (
        path.with_name(sidecar).read_bytes() == other.with_name(sidecar).read_bytes()
    )


def process(rank: int, port: int, words: list[str], log: Path, dies_at: int | None) -> None:
    """The command line, as one of two processes that torchrun starts; it may die while it scores its examples."""
    torch.set_num_threads(1)
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in here.items()}
    own, count = score_pieces.raw_scores, 0

    def scored(*given: object, **asked: object) -> mi.Scores:
        nonlocal count
        count += 1
        if count == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return own(*given, **asked)  # pyright: ignore[reportArgumentType]

    score_pieces.raw_scores = scored
    out, err = ((log / f"{kind}{rank}").open("w", buffering=1) for kind in ("out", "err"))
    with out, err, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(words)
    os._exit(code)


def two_processes(out: Path, log: Path, dies_at: int | None = None) -> tuple[list[int | None], str, str]:
    """The exit codes, and what both print; the second one may die."""
    log.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")  # torch is imported once for all of them
    context.set_forkserver_preload([__name__])
    words = [*WORDS, "--out", str(out)]
    both = [context.Process(target=process, args=(rank, port, words, log, rank and dies_at)) for rank in range(2)]
    for one in both:
        one.start()
    for one in both:
        one.join(120)
    said = [(log / f"{kind}{rank}").read_text() for kind in ("out", "err") for rank in range(2)]
    assert said[1] == ""  # only the first prints its result
    return [one.exitcode for one in both], said[0], said[2] + said[3]


@pytest.mark.slow  # starts two processes
def test_two_processes_find_the_circuit_of_one(alone: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    codes, out, err = two_processes(tmp_path / "out", tmp_path / "log")
    assert codes == [0, 0] and "wrote" in out, err
    assert same(tmp_path / "out" / NAME, alone)


@pytest.mark.slow
@pytest.mark.exhaustive  # starts four more
def test_one_that_is_killed_ends_the_other_in_one_line_and_both_go_on(alone: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    broken = tmp_path / "broken"
    codes, out, err = two_processes(broken, tmp_path / "first", dies_at=3)
    assert codes == [cli.INTERRUPTED, -signal.SIGKILL] and out == ""
    said = [line for line in err.splitlines() if line.startswith("discover-circuit:")]
    assert len(said) == 1 and "another process of this run has ended" in said[0] and "goes on from there" in said[0]
    kept = [path.name for path in broken.iterdir()]
    assert kept and all(".unfinished.scores." in name for name in kept)
    codes, out, err = two_processes(broken, tmp_path / "second")
    assert codes == [0, 0] and same(broken / NAME, alone), err
    assert not [path for path in broken.iterdir() if path.name.startswith(".")]


@pytest.mark.slow
def test_four_shards_are_one_run(alone: Path, tmp_path: Path) -> None:
    spec = replace(RUN, out=tmp_path)
    paths = [score_shard(replace(spec, shard=f"{number}/4")) for number in (2, 1, 4, 3)]
    shards = read_shards(paths)
    assert [shard.number for shard in shards] == [1, 2, 3, 4] and shards[0].command == command_of(RUN)
    found = merge(spec, shards)
    assert same(found.path, alone) and mi.load_circuit(found.path).digest() == mi.load_circuit(alone).digest()
    with pytest.raises(InputError, match=r"Of 4 shards 3 are missing"):
        read_shards(paths[:3])
    with pytest.raises(InputError, match=r"given twice"):
        read_shards([*paths, paths[0]])
    with pytest.raises(InputError, match=r"is of another run"):
        merge(replace(spec, seed=1), shards)
    torn = tmp_path / "torn.shard"
    torn.write_bytes(paths[0].read_bytes()[:-9])
    with pytest.raises(InputError, match=r"is damaged"):
        read_shards([torn])


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "1/", "a/b", "1/4/2", "-1/4", "\u0661/4", "1/99999999999"])
def test_a_shard_is_one_of_several(text: str) -> None:
    with pytest.raises(InputError, match=r"A shard is I/N .*such as 3/8"):
        parsed_shard(text)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--method", "mattr", "--shard", "1/2"], r"Scores of method 'mattr' do not add up over examples.* torchrun"),
        (["--method", "eap", "--shard", "3/2"], r"A shard is I/N"),
        (["--method", "eap", "--replacement", "mean", "--shard", "1/2"], r"is the mean over all examples"),
    ],
)
def test_what_has_no_shards_is_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "ioi", *words]) == cli.BAD_INPUT
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and re.search(said, err)


@pytest.mark.parametrize(
    "words", [["eval", "a.circuit.json"], ["compare", "ioi"], ["verify", "a"], ["run", "ioi", "--dry-run"]]
)
def test_commands_that_do_not_share_their_work_are_refused_in_several_processes(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, from the first process; the others have nothing to do."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert cli.main(words) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"each of these 2 would do all of `{words[0]}`" in said
    monkeypatch.setenv("RANK", "1")
    assert cli.main(words) == 0
    assert capsys.readouterr().err == ""


def test_processes_of_one_machine_do_not_each_place_the_model_over_all_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"task": "ioi", "device": None, "device_map": "auto"}
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert spec_here(given).device_map == "auto"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"--nproc-per-node 1.*--shard"):
        spec_here(given)
